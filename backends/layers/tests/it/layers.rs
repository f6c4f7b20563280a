//! Properties of each layer that the conformance suite does not check.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Wake, Waker};

use sheave_core::{
    Backend, Buf, ByteRange, Completion, Destination, ErrorKind, Io, IoDone, IoRequest, IoToken,
    Nanos, Op, OpKind, Reply, Result, Submitted, Tag, Volume, VolumeInfo,
};

use sheave_conformance::ops::{bytes, disk_dir, driver, range, read, write};
use sheave_conformance::{Driver, Engine, PlainEngine};
use sheave_layers::{BlockSize, FaultRule, Faults, Limits, RateLimit, RateLimits, ReadOnly};
use sheave_local::{FileOptions, FileVolume, Memory};
use sheave_volumes::OpenOptions;

const SIZE: u64 = 1 << 20;

fn memory() -> Arc<dyn Volume> {
    Arc::new(Memory::new(SIZE).unwrap())
}

fn faults(rules: &[&str]) -> Faults {
    let rules: Vec<FaultRule> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
    Faults::new(memory(), rules, 1)
}

fn limits(bytes_per_second: u64, ops_per_second: u64) -> Arc<Limits> {
    Arc::new(Limits::new(RateLimits { bytes_per_second, ops_per_second }))
}

fn limited(limits: &Arc<Limits>) -> RateLimit {
    RateLimit::new(memory(), Arc::clone(limits))
}

fn now(driver: &mut Driver<PlainEngine>) -> Nanos {
    driver.engine.io().now()
}

#[test]
fn a_refused_write_leaves_no_trace_even_in_the_write_buffer() {
    for volume in [
        Arc::new(ReadOnly::new(memory())) as Arc<dyn Volume>,
        Arc::new(faults(&["write:error=ENOSPC"])),
    ] {
        let mut driver = driver(&*volume);
        let data = driver.write_buffer(range(0, 4096));
        data.copy_in(0, &[7; 4096]);
        let error = driver.run_one(Op::Write { range: range(0, 4096), data, fua: false });
        let kind = error.unwrap_err().kind();
        assert!(matches!(kind, ErrorKind::Permission | ErrorKind::NoSpace), "{kind:?}");
        assert_eq!(bytes(driver.run_one(read(0, 4096))), [0; 4096]);
    }
}

#[test]
fn faults_strike_as_their_rules_say() {
    let volume =
        faults(&["write+flush:error=ENOSPC:after=1:count=2:range=0-4K", "read:delay=200ms"]);
    let mut driver = driver(&volume);
    let mut kinds = Vec::new();
    for op in [write(0, b"a"), write(8192, b"b"), write(4095, b"c"), Op::Flush, write(0, b"d")] {
        kinds.push(driver.run_one(op).err().map(|error| error.kind()));
    }
    let nospace = Some(ErrorKind::NoSpace);
    assert_eq!(kinds, [None, None, nospace, nospace, None]);
    let before = now(&mut driver);
    assert_eq!(bytes(driver.run_one(read(0, 1))), b"d");
    let waited = now(&mut driver) - before;
    assert!((200_000_000..201_000_000).contains(&waited), "{waited} ns");
}

#[test]
fn a_delayed_failure_fails_late() {
    let mut driver = driver(&faults(&["flush:error=EIO:delay=1s"]));
    let before = now(&mut driver);
    let error = driver.run_one(Op::Flush).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("fault=flush:error=EIO:delay=1s"), "{error}");
    assert!(now(&mut driver) - before >= 1_000_000_000);
}

#[test]
fn limits_hold_over_all_backends_together() {
    let volume = limited(&limits(SIZE, 0));
    let mut drivers = [driver(&volume), driver(&volume)];
    // Three seconds' worth of bytes, taken in turns. Each driver has a clock of its own, so both
    // together take as long as the later one.
    for turn in 0..12 {
        let driver = &mut drivers[turn % 2];
        driver.run_one(write(0, &[1; SIZE as usize / 4])).unwrap();
    }
    let end = drivers.iter_mut().map(now).max().unwrap();
    // The first op and the burst are free.
    assert!((2_600_000_000..=3_000_000_000).contains(&end), "{end} ns");
}

#[test]
fn ops_per_second_hold_for_every_kind_of_op() {
    let mut driver = driver(&limited(&limits(0, 1000)));
    for outcome in driver.run((0..1000).map(|_| Op::Flush).collect()) {
        outcome.unwrap();
    }
    let end = now(&mut driver);
    assert!((940_000_000..1_010_000_000).contains(&end), "{end} ns");
}

/// Reaps until the next op completes; returns the time, in milliseconds.
fn next_end_ms(backend: &mut dyn Backend, mut now: Nanos) -> Nanos {
    loop {
        if backend.reap(&mut NoIo(now)).is_some() {
            return now / 1_000_000;
        }
        let due = backend.deadline().expect("an op waits");
        assert!(due > now && due <= now + 10_000_000, "a changed limit is noticed soon");
        now = due;
    }
}

#[test]
fn a_limit_that_changes_holds_for_what_waits() {
    const MS: Nanos = 1_000_000;
    const HOUR_MS: Nanos = 3_600_000;
    let limits = limits(0, 1);
    let set = |bytes_per_second, ops_per_second| {
        limits.set(RateLimits { bytes_per_second, ops_per_second });
    };
    let mut backend = limited(&limits).backend().unwrap();
    let start = HOUR_MS * MS;
    let offer =
        |backend: &mut dyn Backend, tag, now| backend.submit(Op::Flush, Tag(tag), &mut NoIo(now));
    assert!(matches!(offer(&mut *backend, 0, start), Submitted::Done(Ok(_))));
    for tag in 1..8 {
        assert!(matches!(offer(&mut *backend, tag, start), Submitted::Queued), "op {tag}");
    }
    let first = next_end_ms(&mut *backend, start);
    assert_eq!(first, HOUR_MS + 950, "one a second, less the burst");
    // Nine tenths of the second are still to be waited for, ten times as fast.
    set(0, 10);
    let second = next_end_ms(&mut *backend, start + 1050 * MS);
    assert!((HOUR_MS + 1130..=HOUR_MS + 1160).contains(&second), "{second}");
    // A tenth of an op an hour is slower than before.
    set(1, 1);
    let third = next_end_ms(&mut *backend, second * MS);
    assert!((second + 900..=second + 1020).contains(&third), "{third} after {second}");
    set(0, 0);
    for tag in 4..8 {
        let completion = backend.reap(&mut NoIo(third * MS + 10 * MS)).expect("no limit, no wait");
        assert_eq!(completion.tag, Tag(tag));
    }
    assert_eq!(backend.deadline(), None);
    assert!(matches!(offer(&mut *backend, 8, third * MS + 10 * MS), Submitted::Done(Ok(_))));
    set(0, 1);
    let later = (third + 1000) * MS;
    assert!(matches!(offer(&mut *backend, 9, later), Submitted::Done(Ok(_))), "no debt");
    assert!(matches!(offer(&mut *backend, 10, later), Submitted::Queued), "no credit");
    set(1 << 20, 0);
    assert!(backend.reap(&mut NoIo(later + 10 * MS)).is_some(), "the other limit binds no flush");
}

#[test]
fn limits_of_the_text_and_of_the_opener_hold_together() {
    let limits = limits(0, 100);
    let options = OpenOptions { limits: Some(Arc::clone(&limits)), ..OpenOptions::default() };
    let volume = sheave_volumes::open("memory:?size=1M&limit-iops=1000", &options).unwrap();
    let mut driver = driver(&*volume);
    let mut run_ms = |count| {
        let before = now(&mut driver);
        assert!(driver.run((0..count).map(|_| Op::Flush).collect()).iter().all(Result::is_ok));
        (now(&mut driver) - before) / 1_000_000
    };
    let slow = run_ms(500);
    assert!((4900..5050).contains(&slow), "{slow} ms");
    limits.set(RateLimits::default());
    let fast = run_ms(2000);
    assert!((1900..2050).contains(&fast), "{fast} ms");
}

#[test]
fn a_full_gate_hands_ops_back_and_goes_on_later() {
    let mut driver = driver(&faults(&["any:delay=1ms"]));
    let ops = (0..3000).map(|at| write(at * 8, &at.to_le_bytes())).collect();
    assert!(driver.run(ops).iter().all(Result::is_ok));
    assert!(driver.full_count > 0);
    assert_eq!(bytes(driver.run_one(read(2999 * 8, 8))), 2999_u64.to_le_bytes());
}

/// A volume that has room only for every third op that is submitted.
struct Reluctant(Arc<dyn Volume>);

struct ReluctantBackend {
    inner: Box<dyn Backend>,
    offers: usize,
}

impl Volume for Reluctant {
    fn info(&self) -> &VolumeInfo {
        self.0.info()
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn grow(&self) -> Result<u64> {
        self.0.grow()
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        std::slice::from_ref(&self.0)
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        Ok(Box::new(ReluctantBackend { inner: self.0.backend()?, offers: 0 }))
    }
}

impl Backend for ReluctantBackend {
    fn info(&self) -> &VolumeInfo {
        self.inner.info()
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        self.offers += 1;
        if self.offers.is_multiple_of(3) {
            return self.inner.submit(op, tag, io);
        }
        Submitted::Full(op)
    }

    fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        self.inner.io_done(done, io);
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        self.inner.reap(io)
    }
}

#[test]
fn an_op_that_finds_no_room_below_is_counted_once() {
    let rules = vec!["write:error=EIO:after=10:count=1".parse().unwrap()];
    let faults = Faults::new(Arc::new(Reluctant(memory())), rules, 1);
    let mut driver = driver(&faults);
    let outcomes = driver.run((0..20).map(|at| write(at, b"x")).collect());
    let failed: Vec<usize> =
        outcomes.iter().enumerate().filter(|(_, o)| o.is_err()).map(|(at, _)| at).collect();
    assert_eq!(failed, [10]);
    assert_eq!(driver.full_count, 0, "the layer keeps the ops");
    let mut want = [b'x'; 20];
    want[10] = 0;
    assert_eq!(bytes(driver.run_one(read(0, 20))), want);
}

/// An engine with this time that takes no request.
struct NoIo(Nanos);

/// How often its wakers were called.
static WOKEN: AtomicUsize = AtomicUsize::new(0);

impl Io for NoIo {
    fn now(&self) -> Nanos {
        self.0
    }

    fn buffer(&mut self, len: usize) -> Result<Buf> {
        Buf::try_zeroed(len)
    }

    fn waker(&self) -> Waker {
        struct Count;

        impl Wake for Count {
            fn wake(self: Arc<Self>) {
                WOKEN.fetch_add(1, Relaxed);
            }
        }

        Arc::new(Count).into()
    }

    fn start(
        &mut self,
        request: IoRequest,
        _: IoToken,
        _: Destination,
    ) -> std::result::Result<(), IoRequest> {
        Err(request)
    }
}

#[test]
fn a_delayed_op_is_due_at_the_deadline_and_not_before() {
    let mut backend = faults(&["any:delay=5ns"]).backend().unwrap();
    assert_eq!(backend.deadline(), None);
    assert!(matches!(backend.submit(read(0, 1), Tag(1), &mut NoIo(7)), Submitted::Queued));
    assert_eq!(backend.deadline(), Some(12));
    assert!(backend.reap(&mut NoIo(7)).is_none());
    let Some(Completion { tag: Tag(1), outcome: Ok(Reply::Data(data)) }) =
        backend.reap(&mut NoIo(12))
    else {
        panic!("the read has ended")
    };
    assert_eq!(data.to_vec(), [0]);
    assert_eq!(backend.deadline(), None);
}

#[test]
fn a_backend_without_room_for_a_range_is_woken_when_there_is_some() {
    let dir = tempfile::TempDir::new_in("/var/tmp").unwrap();
    let path = dir.path().join("a.img");
    std::fs::write(&path, vec![0; 8 << 20]).unwrap();
    let url = format!("{}?direct=true", path.display());
    let volume = sheave_volumes::open(&url, &OpenOptions::default()).unwrap();
    // No file request is ever taken, so the ranges of all writes stay locked.
    let mut backends = Vec::new();
    let mut full = loop {
        let mut backend = volume.backend().unwrap();
        let taken = (0..1024)
            .take_while(|&at| {
                let op = write(at * 8192 + 1, b"x");
                matches!(backend.submit(op, Tag(at), &mut NoIo(7)), Submitted::Queued)
            })
            .count();
        if taken == 0 {
            break backend;
        }
        backends.push(backend);
    };
    // Only one backend's ranges leave.
    drop(backends.remove(0));
    assert!(WOKEN.load(Relaxed) > 0, "else its shard would sleep though there is room");
    let again = full.submit(write(1, b"x"), Tag(1), &mut NoIo(7));
    assert!(matches!(again, Submitted::Queued));
}

#[test]
fn layers_answer_for_the_volume_below() {
    let text = "memory:?size=1M&limit-iops=5&fault=read:error=EIO&read-only=true";
    let layers = sheave_volumes::open(text, &OpenOptions::default()).unwrap();
    let blocks: Arc<dyn Volume> = Arc::new(BlockSize::new(memory()));
    for volume in [layers, blocks] {
        assert!(!volume.below().is_empty() && !volume.has_lost_data());
        assert!(volume.held_bytes().is_some(), "that of the memory volume");
    }
}

#[test]
fn limits_leave_data_where_the_volume_takes_it() {
    let dir = disk_dir();
    let path = dir.path().join("a.img");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    let file: Arc<dyn Volume> = Arc::new(FileVolume::open(&FileOptions::new(&path)).unwrap());
    let limited = RateLimit::new(Arc::clone(&file), limits(0, 0));
    for kind in [OpKind::Read, OpKind::Write, OpKind::Flush] {
        let range = ByteRange::within(0, 64 << 10, 1 << 20).unwrap();
        let takes = file.takes_registered(kind, range);
        assert_eq!(limited.takes_registered(kind, range), takes, "{kind:?}");
    }
}
