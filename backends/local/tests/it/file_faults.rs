//! A file volume on an engine with mishaps.

use rustix::io::Errno;
use sheave_core::{Backend, ErrorKind, IoRequest, Op, Reply, Submitted, Tag, Volume};
use tempfile::TempDir;

use sheave_conformance::ops::{Log, bytes, driver, range, read, trim, with_fua, write, zeroes};
use sheave_conformance::{Driver, Engine, Mishap, PlainEngine};
use sheave_local::{FileOptions, FileVolume, HANDLES_READY};

const SIZE: u64 = 4 << 20;

fn volume(dir: &TempDir) -> FileVolume {
    let path = dir.path().join("a.img");
    std::fs::write(&path, vec![0x11; SIZE as usize]).unwrap();
    FileVolume::open(&FileOptions::new(path)).unwrap()
}

fn errno(errno: Errno) -> Mishap {
    Mishap::Errno(errno.raw_os_error())
}

/// Fails allocations with an errno.
fn no_allocate(why: Errno) -> impl FnMut(&IoRequest) -> Mishap {
    move |request| match request {
        IoRequest::Allocate { .. } => errno(why),
        _ => Mishap::None,
    }
}

fn is_sync(request: &IoRequest) -> bool {
    matches!(request, IoRequest::Sync { .. })
}

#[test]
fn short_transfers_are_carried_on() {
    let dir = TempDir::new().unwrap();
    let volume = volume(&dir);
    let log = Log::default();
    let mut driver = log.driver(&volume, |_| Mishap::Short(1000));
    let data: Vec<u8> = (0..3500_u32).map(|at| (at % 251) as u8).collect();
    driver.run_one(write(7, &data)).unwrap();
    assert_eq!(
        log.take(),
        ["write 7+3500", "write 1007+2500", "write 2007+1500", "write 3007+500"]
    );
    assert_eq!(bytes(driver.run_one(read(7, 3500))), data);
    assert_eq!(log.take().len(), 4);
    assert_eq!(bytes(driver.run_one(read(0, 7))), [0x11; 7]);
}

#[test]
fn short_transfers_that_find_the_engine_full_are_carried_on() {
    let dir = TempDir::new().unwrap();
    let volume = volume(&dir);
    let engine = PlainEngine::new(2).refusing_one_in(2, 5).with_mishaps(|_| Mishap::Short(100));
    let mut driver = Driver::new(volume.backend().unwrap(), engine);
    let ops = (0..20_u64).map(|at| with_fua(write(at * 1000, &[at as u8; 1000]))).collect();
    assert!(driver.run(ops).iter().all(Result::is_ok));
    assert!(driver.full_count > 0);
    for at in 0..20 {
        assert_eq!(bytes(driver.run_one(read(at * 1000, 1000))), [at as u8; 1000]);
    }
}

#[test]
fn signals_are_survived_but_not_for_ever() {
    let dir = TempDir::new().unwrap();
    let volume = volume(&dir);
    let mut left = 3;
    let mut driver = Log::default().driver(&volume, move |_| {
        left -= 1;
        if left >= 0 { errno(Errno::INTR) } else { Mishap::None }
    });
    driver.run_one(with_fua(write(0, b"x"))).unwrap();
    let mut driver = Log::default().driver(&volume, |_| errno(Errno::INTR));
    assert_eq!(driver.run_one(read(0, 1)).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(driver.run_one(Op::Flush).unwrap_err().kind(), ErrorKind::Io);
}

#[test]
fn a_file_that_was_cut_off_is_an_error_that_says_so() {
    let dir = TempDir::new().unwrap();
    let volume = volume(&dir);
    let mut driver = driver(&volume);
    std::fs::File::options()
        .write(true)
        .open(dir.path().join("a.img"))
        .unwrap()
        .set_len(5000)
        .unwrap();
    let error = driver.run_one(read(4096, 4096)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("a.img: it ends at or before byte 5000"), "{error}");
    assert_eq!(bytes(driver.run_one(read(0, 5000))).len(), 5000);
    // Least of all a hole: a copy would have zeroes there.
    let status = Op::BlockStatus { range: range(0, SIZE), extents_max: 9 };
    let error = driver.run_one(status).unwrap_err();
    assert!(error.to_string().contains("a.img: it ends at or before byte 5000"), "{error}");
}

#[test]
fn a_full_disk_reaches_the_client_and_poisons_nothing() {
    let dir = TempDir::new().unwrap();
    let volume = volume(&dir);
    let mut full = true;
    let mut driver = Log::default().driver(&volume, move |request| match request {
        IoRequest::Write { .. } if std::mem::take(&mut full) => errno(Errno::NOSPC),
        _ => Mishap::None,
    });
    let error = driver.run_one(with_fua(write(0, b"x"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(error.to_string().contains("a.img: 1 bytes at 0"), "{error}");
    driver.run_one(with_fua(write(0, b"x"))).unwrap();
    driver.run_one(Op::Flush).unwrap();
}

/// A backend and its engine, driven step by step.
struct User {
    backend: Box<dyn Backend>,
    engine: PlainEngine,
}

impl User {
    /// Begins a flush; whether it has started a sync.
    fn begins_flush(&mut self) -> bool {
        let submitted = self.backend.submit(Op::Flush, Tag(1), self.engine.io());
        assert!(matches!(submitted, Submitted::Queued));
        self.engine.in_flight() == 1
    }

    /// The outcome of the flush, if it has one now.
    fn flushed(&mut self) -> Option<sheave_core::Result<Reply>> {
        self.backend.reap(self.engine.io()).map(|completion| completion.outcome)
    }

    fn end_sync(&mut self) {
        let mut done = Vec::new();
        self.engine.wait(None, &mut done);
        assert_eq!(done.len(), 1);
        done.into_iter().for_each(|done| self.backend.io_done(done, self.engine.io()));
    }
}

/// Three backends that share one description: every fourth of the volume's.
fn sharers(volume: &FileVolume, mut first: PlainEngine) -> [User; 3] {
    [(); 3].map(|()| {
        let engine = std::mem::replace(&mut first, PlainEngine::new(9));
        let mut group: Vec<_> = (0..HANDLES_READY).map(|_| volume.backend().unwrap()).collect();
        // The others are kept, so that they count as users of their descriptions.
        let backend = group.remove(0);
        group.into_iter().for_each(std::mem::forget);
        User { backend, engine }
    })
}

#[test]
fn backends_that_share_a_description_take_turns_to_sync_it() {
    let dir = TempDir::new().unwrap();
    let volume = volume(&dir);
    let [mut a, mut b, mut c] = sharers(&volume, PlainEngine::new(9));
    assert!(a.begins_flush());
    assert!(!b.begins_flush() && !c.begins_flush(), "the kernel reports an error once");
    assert!(b.flushed().is_none() && c.flushed().is_none());
    a.end_sync();
    a.flushed().expect("the end of its sync").unwrap();
    assert!(b.flushed().is_none() && c.flushed().is_none());
    assert_eq!((b.engine.in_flight(), c.engine.in_flight()), (1, 0), "one syncs for both");
    b.end_sync();
    b.flushed().expect("the end of its sync").unwrap();
    c.flushed().expect("served by the same").unwrap();
    assert_eq!(c.engine.in_flight(), 0);
}

#[test]
fn a_sync_that_fails_fails_for_all_backends_of_its_description() {
    let dir = TempDir::new().unwrap();
    let volume = volume(&dir);
    let engine = PlainEngine::new(9).with_mishaps(|_| errno(Errno::IO));
    let [mut a, mut b, _] = sharers(&volume, engine);
    assert!(a.begins_flush() && !b.begins_flush());
    a.end_sync();
    a.flushed().expect("the end of its sync").unwrap_err();
    assert!(b.flushed().is_none());
    // The kernel has reported the error, so this sync succeeds.
    b.end_sync();
    let error = b.flushed().expect("the end of its sync").unwrap_err();
    assert!(error.to_string().contains("may be lost"), "{error}");
}

#[test]
fn a_backend_that_goes_away_while_it_syncs_lets_the_next_one_sync() {
    let dir = TempDir::new().unwrap();
    let volume = volume(&dir);
    let [mut a, mut b, _] = sharers(&volume, PlainEngine::new(9));
    assert!(a.begins_flush() && !b.begins_flush());
    drop(a);
    assert!(b.flushed().is_none());
    b.end_sync();
    b.flushed().expect("the end of its sync").unwrap();
}

#[test]
fn a_failed_flush_poisons_the_volume_for_all_backends() {
    let dir = TempDir::new().unwrap();
    let volume = volume(&dir);
    let mut other = driver(&volume);
    other.run_one(write(0, b"lost")).unwrap();
    let mut fails = true;
    let mut driver = Log::default().driver(&volume, move |request| {
        if is_sync(request) && std::mem::take(&mut fails) { errno(Errno::IO) } else { Mishap::None }
    });
    // The two that wait behind the first must not succeed.
    for outcome in driver.run(vec![Op::Flush, Op::Flush, with_fua(write(8, b"x"))]) {
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("may be lost"), "{error}");
    }
    for op in [write(0, b"x"), Op::Flush, trim(0, 4096), zeroes(0, 4096)] {
        let error = other.run_one(op).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("open the volume again"), "{error}");
    }
    assert_eq!(bytes(other.run_one(read(0, 4))), b"lost", "reads go on");
    drop((driver, other, volume));
    let volume = FileVolume::open(&FileOptions::new(dir.path().join("a.img"))).unwrap();
    self::driver(&volume).run_one(with_fua(write(0, b"x"))).unwrap();
}

#[test]
fn a_write_that_fails_does_not_poison_but_a_failed_dsync_does() {
    let dir = TempDir::new_in("/var/tmp").unwrap();
    let path = dir.path().join("a.img");
    std::fs::write(&path, vec![0; SIZE as usize]).unwrap();
    let options = FileOptions { direct: true, ..FileOptions::new(path) };
    let volume = FileVolume::open(&options).unwrap();
    let mut driver = Log::default().driver(&volume, |request| match request {
        IoRequest::Write { at: 0, .. } => errno(Errno::IO),
        _ => Mishap::None,
    });
    assert!(driver.run_one(write(0, &[1; 4096])).is_err());
    driver.run_one(with_fua(write(4096, &[1; 4096]))).unwrap();
    assert!(driver.run_one(with_fua(write(0, &[1; 4096]))).is_err());
    let error = driver.run_one(write(4096, &[1; 4096])).unwrap_err();
    assert!(error.to_string().contains("an earlier flush failed"), "{error}");
}

#[test]
fn where_holes_are_unsupported_trims_do_nothing_and_zeroes_are_written() {
    let dir = TempDir::new().unwrap();
    let volume = volume(&dir);
    let log = Log::default();
    let mut driver = log.driver(&volume, no_allocate(Errno::OPNOTSUPP));
    driver.run_one(with_fua(trim(0, 4096))).unwrap();
    assert_eq!(log.take(), ["PunchHole 0+4096"]);
    driver.run_one(trim(0, 4096)).unwrap();
    assert!(log.take().is_empty(), "it is remembered");
    assert_eq!(bytes(driver.run_one(read(0, 4096))), [0x11; 4096]);
    log.take();

    let fast = |start, len, no_hole| Op::WriteZeroes {
        range: range(start, len),
        fua: false,
        no_hole,
        fast: true,
    };
    let error = driver.run_one(fast(0, 4096, false)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(log.take(), ["ZeroRange 0+4096"], "the other way is tried, and nothing written");
    assert_eq!(driver.run_one(fast(0, 4096, true)).unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(log.take().is_empty());
    assert_eq!(bytes(driver.run_one(read(0, 4096))), [0x11; 4096]);
    log.take();

    driver.run_one(with_fua(zeroes(1000, (2 << 20) + 500))).unwrap();
    let mib = 1 << 20;
    let want = [
        format!("write 1000+{}", mib - 1000),
        format!("write {mib}+{mib}"),
        format!("write {}+1500", 2 * mib),
        "sync".to_owned(),
    ];
    assert_eq!(log.take(), want, "one bounded piece after the other");
    let got = bytes(driver.run_one(read(999, (2 << 20) + 502)));
    assert!(got[0] == 0x11 && got[got.len() - 1] == 0x11);
    assert!(got[1..got.len() - 1].iter().all(|byte| *byte == 0));
}

#[test]
fn zeroes_that_fail_otherwise_are_not_written_instead() {
    let dir = TempDir::new().unwrap();
    let volume = volume(&dir);
    let log = Log::default();
    let mut driver = log.driver(&volume, no_allocate(Errno::NOSPC));
    let no_hole = Op::WriteZeroes { range: range(0, 10), fua: false, no_hole: true, fast: false };
    assert_eq!(driver.run_one(no_hole).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(log.take(), ["ZeroRange 0+10"]);
}

#[test]
fn more_ops_than_there_is_room_for_come_back_and_end_later() {
    let dir = TempDir::new().unwrap();
    let volume = volume(&dir);
    let engine = PlainEngine::new(usize::MAX);
    let mut driver = Driver::new(volume.backend().unwrap(), engine);
    let ops = (0..3000_u64).map(|at| write(at * 8, &at.to_le_bytes())).collect();
    assert!(driver.run(ops).iter().all(Result::is_ok));
    assert!(driver.full_count > 0);
    let want: Vec<u8> = (0..3000_u64).flat_map(u64::to_le_bytes).collect();
    assert_eq!(bytes(driver.run_one(read(0, 24_000))), want);
}

#[test]
fn a_direct_write_whose_sync_fails_poisons_and_one_that_fails_itself_does_not() {
    let dir = TempDir::new_in("/var/tmp").unwrap();
    let path = dir.path().join("a.img");
    std::fs::write(&path, vec![0x11; SIZE as usize]).unwrap();
    let volume = FileVolume::open(&FileOptions { direct: true, ..FileOptions::new(path) }).unwrap();
    let op = || with_fua(write(0, &[1; 4096]));
    let mut driver = Log::default().driver(&volume, |request| match request {
        IoRequest::Write { .. } => errno(Errno::NOSPC),
        _ => Mishap::None,
    });
    assert_eq!(driver.run_one(op()).unwrap_err().kind(), ErrorKind::NoSpace);
    let mut driver = Log::default().driver(&volume, |request| match request {
        IoRequest::Write { dsync: true, .. } => errno(Errno::NOSPC),
        _ => Mishap::None,
    });
    driver.run_one(Op::Flush).unwrap();
    // Written without a sync, so the sync failed, perhaps with data of another program.
    for op in [op(), Op::Flush] {
        let error = driver.run_one(op).unwrap_err();
        assert!(error.to_string().contains("may be lost"), "{error}");
    }
}

#[test]
fn a_device_that_another_program_holds_gets_zeroes_written_and_no_trims() {
    let dir = TempDir::new().unwrap();
    let volume = volume(&dir);
    let log = Log::default();
    let mut held = true;
    let mut driver = log.driver(&volume, move |request| match request {
        IoRequest::Allocate { .. } if held => errno(Errno::BUSY),
        IoRequest::Write { at: 0, from, .. } if from.len() == 1 => {
            held = false;
            Mishap::None
        }
        _ => Mishap::None,
    });
    driver.run_one(with_fua(trim(0, 4096))).unwrap();
    assert_eq!(log.take(), ["PunchHole 0+4096"]);
    for no_hole in [false, true] {
        let zero = |fast| Op::WriteZeroes { range: range(0, 4096), fua: true, no_hole, fast };
        let way = if no_hole { "ZeroRange 0+4096" } else { "PunchHole 0+4096" };
        // Only this request failed as a whole: the next one may succeed.
        assert_eq!(driver.run_one(zero(true)).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(log.take(), [way]);
        driver.run_one(zero(false)).unwrap();
        assert_eq!(log.take(), [way, "write 0+4096", "sync"]);
    }
    assert_eq!(bytes(driver.run_one(read(0, 4097))), [vec![0; 4096], vec![0x11]].concat());
    driver.run_one(write(0, b"x")).unwrap();
    log.take();
    driver.run_one(zeroes(0, 4096)).unwrap();
    assert_eq!(log.take(), ["PunchHole 0+4096"], "it is not remembered");
}

#[test]
fn a_file_system_that_becomes_read_only_is_a_matter_of_permission() {
    for why in [Errno::ROFS, Errno::PERM] {
        let dir = TempDir::new().unwrap();
        let volume = volume(&dir);
        let mut driver = Log::default().driver(&volume, move |request| match request {
            IoRequest::Write { .. } | IoRequest::Allocate { .. } => errno(why),
            _ => Mishap::None,
        });
        for op in [write(0, b"x"), with_fua(write(0, b"x")), trim(0, 4096), zeroes(0, 4096)] {
            let error = driver.run_one(op).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
            assert_eq!(error.kind().nbd_errno(), sheave_core::NbdErrno::Perm);
        }
        assert_eq!(bytes(driver.run_one(read(0, 2))), [0x11; 2], "reads go on");
        driver.run_one(Op::Flush).unwrap();
    }
}
