//! Copies between volumes that watch their ops.

use std::sync::Mutex;

use sheave_core::{
    Backend, Buf, ByteRange, Completion, Io, IoDone, Nanos, Op, Payload, Reply, Segment, Submitted,
    Tag, VolumeInfo,
};
use sheave_shard::Blocking;

use super::job::{ZERO_UNIT, copy, zero_runs};
use super::*;

const SIZE: u64 = 200 << 20;

/// Counts of a watched volume's backends, made when they are dropped.
#[derive(Default)]
struct Log {
    /// Backends that wrote.
    writers: u64,
    /// Backends that were dropped with an unflushed write.
    unflushed: u64,
}

/// A memory volume that is watched, and has only some of a memory volume's capabilities.
struct Watched {
    inner: Arc<dyn Volume>,
    info: VolumeInfo,
    log: Arc<Mutex<Log>>,
}

impl Watched {
    fn new(text: &str, change: impl FnOnce(&mut VolumeInfo)) -> Self {
        let inner = sheave_volumes::open(text, &OpenOptions::default()).unwrap();
        let mut info = inner.info().clone();
        change(&mut info);
        Self { inner, info, log: Arc::default() }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let range = ByteRange::within(at, bytes.len() as u64, self.inner.size()).unwrap();
        let data = Buf::from_bytes(bytes).into();
        Blocking::open(&*self.inner).unwrap().run(Op::Write { range, data, fua: false }).unwrap();
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let range = ByteRange::within(at, len as u64, self.inner.size()).unwrap();
        match Blocking::open(&*self.inner).unwrap().run(Op::Read { range, into: None }).unwrap() {
            Reply::Data(payload) => payload.to_vec(),
            other => panic!("{other:?}"),
        }
    }
}

impl Volume for Watched {
    fn info(&self) -> &VolumeInfo {
        &self.info
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn grow(&self) -> sheave_core::Result<u64> {
        self.inner.grow()
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        std::slice::from_ref(&self.inner)
    }

    fn backend(&self) -> sheave_core::Result<Box<dyn Backend>> {
        let (inner, log) = (self.inner.backend()?, Arc::clone(&self.log));
        Ok(Box::new(WatchedBackend { inner, log, wrote: false, dirty: false }))
    }
}

struct WatchedBackend {
    inner: Box<dyn Backend>,
    log: Arc<Mutex<Log>>,
    wrote: bool,
    dirty: bool,
}

impl Backend for WatchedBackend {
    fn info(&self) -> &VolumeInfo {
        self.inner.info()
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if op.kind().is_write() {
            (self.wrote, self.dirty) = (true, true);
        }
        self.dirty &= !matches!(op, Op::Flush);
        self.inner.submit(op, tag, io)
    }

    fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        self.inner.io_done(done, io);
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        self.inner.reap(io)
    }

    fn deadline(&self) -> Option<Nanos> {
        self.inner.deadline()
    }
}

impl Drop for WatchedBackend {
    fn drop(&mut self) {
        let mut log = self.log.lock().unwrap();
        log.writers += u64::from(self.wrote);
        log.unflushed += u64::from(self.dirty);
    }
}

fn copy_quietly(from: &Arc<Watched>, to: &Arc<Watched>) -> anyhow::Result<()> {
    let (from, to) = (Arc::clone(from), Arc::clone(to));
    copy(from, to, false, 4, &progress(true, MEASURED))
}

fn source(change: impl FnOnce(&mut VolumeInfo)) -> Arc<Watched> {
    let source = Watched::new(&format!("memory:?size={SIZE}"), change);
    for at in [0, 1 << 20, 100 << 20, SIZE - 5000] {
        source.write(at + 77, &[at as u8 | 1; 4900]);
    }
    Arc::new(source)
}

fn target(change: impl FnOnce(&mut VolumeInfo)) -> Arc<Watched> {
    let target = Watched::new(&format!("memory:?size={}", SIZE + 1000), change);
    for at in [50, 5 << 20, SIZE - 9000] {
        target.write(at, &[0xee; 8000]);
    }
    target.write(SIZE, &[0xdd; 1000]);
    Arc::new(target)
}

fn check(from: &Watched, to: &Watched) {
    for at in (0..SIZE).step_by(5 << 20) {
        assert!(from.read(at, 5 << 20) == to.read(at, 5 << 20), "at {at}");
    }
    assert_eq!(to.read(SIZE, 1000), [0xdd; 1000], "what is beyond the source stays");
}

#[test]
fn every_connection_flushes_what_it_wrote() {
    for multi_conn in [true, false] {
        let (from, to) = (source(|_| {}), target(|info| info.can.multi_conn = multi_conn));
        copy_quietly(&from, &to).unwrap();
        check(&from, &to);
        let log = to.log.lock().unwrap();
        assert!(log.writers >= 1 && (multi_conn || log.writers == 1), "{} wrote", log.writers);
        assert_eq!(log.unflushed, 0, "of {} that wrote", log.writers);
    }
}

#[test]
fn volumes_that_can_do_little_are_copied_all_the_same() {
    let poor = |info: &mut VolumeInfo| {
        info.can = Default::default();
        info.block.maximum_payload = 100_000;
    };
    for (from, to) in [
        (source(poor), target(|_| {})),
        (source(|_| {}), target(poor)),
        (source(poor), target(poor)),
    ] {
        copy_quietly(&from, &to).unwrap();
        check(&from, &to);
    }
}

#[test]
fn a_failure_of_one_worker_is_the_failure_of_the_copy() {
    for fault in ["write:error=ENOSPC:after=3", "flush:error=EIO:after=1", "write-zeroes:error=EIO"]
    {
        let from = source(|_| {});
        let to = Arc::new(Watched::new(&format!("memory:?size={SIZE}&fault={fault}"), |_| {}));
        let error = copy_quietly(&from, &to).unwrap_err();
        assert!(format!("{error:#}").contains("on purpose"), "{error:#}");
    }
    let from = Watched::new(&format!("memory:?size={SIZE}&fault=read:error=EIO:after=2"), |_| {});
    for at in [0, 64 << 20, 130 << 20] {
        from.write(at, &[1; 3 << 20]);
    }
    copy_quietly(&Arc::new(from), &target(|_| {})).unwrap_err();
}

#[test]
fn what_cannot_make_zeroes_gets_them_written() {
    let from = source(|_| {});
    let text = format!("memory:?size={}&fault=write-zeroes:error=ENOTSUP", SIZE + 1000);
    let to = Arc::new(Watched::new(&text, |_| {}));
    to.write(SIZE, &[0xdd; 1000]);
    to.write(30 << 20, &[0xee; 300_000]);
    copy_quietly(&from, &to).unwrap();
    check(&from, &to);
}

#[test]
fn runs_cover_the_payload_and_find_zero_units() {
    let mut payload = Payload::from(Buf::from_bytes(&[1; ZERO_UNIT]));
    payload.push(Segment::Zero(ZERO_UNIT));
    payload.push(Segment::Data(Buf::zeroed(100)));
    assert_eq!(zero_runs(&payload), [(ZERO_UNIT, false), (ZERO_UNIT + 100, true)]);
}
