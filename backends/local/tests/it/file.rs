//! Properties of file volumes only.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use sheave_core::{Buf, ErrorKind, Op, Payload, Result, Segment, Volume};
use tempfile::TempDir;

use sheave_conformance::Mishap;
use sheave_conformance::ops::{
    Log, bytes, disk_dir, driver, extents, image, range, read, trim, with_fua, write, zeroes,
};
use sheave_local::{FileOptions, FileVolume, start_process};
use sheave_volumes::{OpenOptions, VolumeSpec, open};

const SIZE: u64 = 1 << 20;

fn identity(volume: &str) -> Result<Option<String>> {
    volume.parse::<VolumeSpec>()?.identity()
}

fn resize(volume: &str, size: Option<u64>) -> Result<u64> {
    volume.parse::<VolumeSpec>()?.resize(size)
}

fn open_error(options: &FileOptions) -> (ErrorKind, String) {
    let error = FileVolume::open(options).err().expect("an error");
    (error.kind(), error.to_string())
}

#[test]
fn serves_exactly_its_bytes_and_leaves_the_rest_alone() {
    let dir = disk_dir();
    let path = image(&dir, 1001);
    let volume = FileVolume::open(&FileOptions::new(&path)).unwrap();
    assert_eq!(volume.size(), 1001);
    let mut driver = driver(&volume);
    driver.run_one(with_fua(write(990, b"hello world"))).unwrap();
    driver.run_one(zeroes(0, 10)).unwrap();
    drop(driver);
    drop(volume);
    let content = std::fs::read(&path).unwrap();
    assert_eq!(content.len(), 1001);
    assert_eq!(content[..10], [0; 10]);
    assert_eq!(content[10..990], [0x11; 980]);
    assert_eq!(&content[990..], b"hello world");
}

#[test]
fn a_direct_file_of_odd_size_keeps_its_size() {
    let dir = disk_dir();
    let path = image(&dir, 10_001);
    let url = format!("{}?direct=true", path.display());
    let volume = open(&url, &OpenOptions::default()).unwrap();
    assert!(volume.info().block.minimum >= 4096);
    assert_eq!(volume.size(), 10_001);
    let mut driver = driver(&*volume);
    driver.run_one(with_fua(write(9_990, b"hello world"))).unwrap();
    assert_eq!(bytes(driver.run_one(read(9_990, 11))), b"hello world");
    driver.run_one(Op::Flush).unwrap();
    drop(driver);
    drop(volume);
    let content = std::fs::read(&path).unwrap();
    assert_eq!(content.len(), 10_001);
    assert_eq!(content[..9_990], [0x11; 9_990]);
    assert_eq!(&content[9_990..], b"hello world");
}

#[test]
fn direct_writes_come_from_aligned_memory_without_zero_segments() {
    let dir = disk_dir();
    let options = FileOptions { direct: true, ..FileOptions::new(image(&dir, SIZE)) };
    let volume = FileVolume::open(&options).unwrap();
    let block = volume.info().block.minimum as usize;
    let odd = Buf::from_bytes(&vec![7; 4 * block + 1]).slice(1, block);
    let mut data = Payload::new();
    data.push(Segment::Zero(block));
    data.push(Segment::Data(odd));
    let op = Op::Write { range: range(0, 2 * block as u64), data, fua: false };
    // The kernel would refuse memory at an odd address; the test engine copies, so look here.
    let log = Log::default();
    let mut driver = log.driver(&volume, move |request| {
        if let sheave_core::IoRequest::Write { from, .. } = request {
            let fits = |segment: &Segment| {
                matches!(segment, Segment::Data(buf) if buf.start().is_multiple_of(block))
            };
            assert!(from.segments().iter().all(fits), "{from:?}");
        }
        Mishap::None
    });
    driver.run_one(op).unwrap();
    let want = [vec![0; block], vec![7; block]].concat();
    assert_eq!(bytes(driver.run_one(read(0, 2 * block as u64))), want);
}

#[test]
fn fua_and_flush_reach_the_disk_before_the_answer() {
    let dir = disk_dir();
    let path = image(&dir, SIZE);
    let log = Log::default();
    let volume = FileVolume::open(&FileOptions::new(&path)).unwrap();
    let mut driver = log.driver(&volume, |_| Mishap::None);
    for (op, want) in [
        (write(0, b"abcd"), vec!["write 0+4"]),
        (with_fua(write(0, b"abcd")), vec!["write 0+4", "sync"]),
        (with_fua(trim(0, 4096)), vec!["PunchHole 0+4096", "sync"]),
        (with_fua(zeroes(5, 6)), vec!["PunchHole 5+6", "sync"]),
        (Op::Flush, vec!["sync"]),
    ] {
        driver.run_one(op).unwrap();
        assert_eq!(log.take(), want);
    }
    drop((driver, volume));
    let options = FileOptions { direct: true, ..FileOptions::new(path) };
    let volume = FileVolume::open(&options).unwrap();
    let mut driver = log.driver(&volume, |_| Mishap::None);
    driver.run_one(with_fua(write(0, &[1; 4096]))).unwrap();
    assert_eq!(log.take(), ["write 0+4096 dsync"]);
}

#[test]
fn flushes_that_come_together_share_syncs() {
    let dir = disk_dir();
    let log = Log::default();
    let volume = FileVolume::open(&FileOptions::new(image(&dir, SIZE))).unwrap();
    let mut driver = log.driver(&volume, |_| Mishap::None);
    let outcomes = driver.run((0..50).map(|_| Op::Flush).collect());
    assert!(outcomes.iter().all(Result::is_ok));
    // The first op has a sync to itself; all others came after it began.
    assert_eq!(log.take(), ["sync", "sync"]);
}

#[test]
fn status_tells_holes_from_data() {
    let dir = disk_dir();
    let path = dir.path().join("a.img");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    let volume = FileVolume::open(&FileOptions::new(&path)).unwrap();
    assert!(volume.info().can.block_status);
    let mut driver = driver(&volume);
    driver.run_one(with_fua(write(256 << 10, &[1; 64 << 10]))).unwrap();
    let status =
        |start, len, extents_max| Op::BlockStatus { range: range(start, len), extents_max };
    let all = extents(driver.run_one(status(0, SIZE, 10)));
    assert_eq!(
        all,
        [(256 << 10, true, true), (64 << 10, false, false), (SIZE - (320 << 10), true, true)]
    );
    assert_eq!(extents(driver.run_one(status(0, SIZE, 1))), all[..1]);
    assert_eq!(extents(driver.run_one(status(300 << 10, 1, 9))), [(20 << 10, false, false)]);
    driver.run_one(trim(0, SIZE)).unwrap();
    assert_eq!(extents(driver.run_one(status(0, SIZE, 10))), [(SIZE, true, true)]);
    let no_hole = Op::WriteZeroes { range: range(0, SIZE), fua: false, no_hole: true, fast: false };
    driver.run_one(no_hole).unwrap();
    let allocated = std::os::unix::fs::MetadataExt::blocks(&path.metadata().unwrap()) * 512;
    assert!(allocated >= SIZE, "{allocated} bytes are allocated");
}

#[test]
fn a_file_that_grows_keeps_its_size_in_status() {
    let dir = disk_dir();
    let path = image(&dir, 10_000);
    let volume = FileVolume::open(&FileOptions::new(&path)).unwrap();
    let mut driver = driver(&volume);
    let file = File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_at(&file, &[1; 10_000], 10_000).unwrap();
    let status = Op::BlockStatus { range: range(5000, 1000), extents_max: 9 };
    assert_eq!(extents(driver.run_one(status)), [(5000, false, false)]);
}

#[test]
fn a_file_that_takes_the_name_of_another_is_another() {
    let dir = disk_dir();
    let path = image(&dir, SIZE);
    let open = || FileVolume::open(&FileOptions::new(&path)).unwrap().info().identity.clone();
    let first = open();
    assert!(first.is_some());
    File::options().write(true).open(&path).unwrap().set_len(2 * SIZE).unwrap();
    assert_eq!(open(), first);
    assert_eq!(identity(path.to_str().unwrap()).unwrap(), first);
    // Its number is free for the next one.
    std::fs::remove_file(&path).unwrap();
    assert!(identity(path.to_str().unwrap()).is_err());
    image(&dir, SIZE);
    assert_ne!(open(), first);
    assert_eq!(identity("null:?size=1M").unwrap(), None);
}

#[test]
fn a_file_keeps_working_without_its_name() {
    let dir = disk_dir();
    let path = image(&dir, SIZE);
    let volume = FileVolume::open(&FileOptions::new(&path)).unwrap();
    let mut before = driver(&volume);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"another file").unwrap();
    before.run_one(with_fua(write(0, b"still here"))).unwrap();
    let mut after = driver(&volume);
    assert_eq!(bytes(after.run_one(read(0, 10))), b"still here");
    assert_eq!(std::fs::read(&path).unwrap(), b"another file");
}

#[test]
fn read_only_opens_for_reading_and_refuses_to_write() {
    let dir = disk_dir();
    let path = image(&dir, SIZE);
    let options = FileOptions { read_only: true, ..FileOptions::new(&path) };
    let volume = FileVolume::open(&options).unwrap();
    let mut driver = driver(&volume);
    for op in [write(0, b"x"), trim(0, 1), zeroes(0, 1)] {
        assert_eq!(driver.run_one(op).unwrap_err().kind(), ErrorKind::Permission);
    }
    driver.run_one(Op::Flush).unwrap();
    driver.run_one(Op::Cache { range: range(0, SIZE) }).unwrap();
    assert_eq!(bytes(driver.run_one(read(0, 3))), [0x11; 3]);
    let mut seen = 0;
    for fd in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        if std::fs::read_link(fd.path()).is_ok_and(|to| to == path) {
            let info = Path::new("/proc/self/fdinfo").join(fd.file_name());
            let info = std::fs::read_to_string(info).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            assert!(flags.ends_with('0'), "not O_RDONLY: {flags}");
            seen += 1;
        }
    }
    assert!(seen > 1);
}

#[test]
fn one_writer_or_many_readers() {
    let dir = disk_dir();
    let path = image(&dir, SIZE);
    let writer = FileOptions::new(&path);
    let reader = FileOptions { read_only: true, ..writer.clone() };
    let first = FileVolume::open(&writer).unwrap();
    for options in [&writer, &reader] {
        let (kind, message) = open_error(options);
        assert_eq!(kind, ErrorKind::Busy);
        assert!(message.contains("this process has it open"), "{message}");
    }
    drop(first);
    let readers = [&reader, &reader].map(|options| FileVolume::open(options).unwrap());
    assert_eq!(open_error(&writer).0, ErrorKind::Busy);
    drop(readers);
    // The lock of another process of ours.
    let other = File::open(&path).unwrap();
    other.lock_shared().unwrap();
    drop(FileVolume::open(&reader).unwrap());
    let (kind, message) = open_error(&writer);
    assert_eq!(kind, ErrorKind::Busy);
    assert!(message.contains("has locked it; stop it, or add lock=false"), "{message}");
    other.lock().unwrap();
    assert_eq!(open_error(&reader).0, ErrorKind::Busy);
    let unlocked = FileOptions { lock: false, ..writer.clone() };
    drop(FileVolume::open(&unlocked).unwrap());
    drop(other);
    drop(FileVolume::open(&writer).unwrap());
}

#[test]
fn what_is_no_file_is_refused_without_waiting() {
    let dir = TempDir::new().unwrap();
    let fifo = dir.path().join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    for path in [dir.path(), &fifo] {
        let (kind, message) = open_error(&FileOptions::new(path));
        assert_eq!(kind, ErrorKind::Invalid);
        assert!(message.contains("regular file or a block device"), "{message}");
    }
    let (kind, _) = open_error(&FileOptions::new(dir.path().join("missing")));
    assert_eq!(kind, ErrorKind::NotFound);
    assert_eq!(
        FileVolume::open(&FileOptions::new(fifo.with_file_name("x/y"))).err().unwrap().kind(),
        ErrorKind::NotFound
    );
}

#[test]
fn backends_come_and_go_without_new_descriptors() {
    let dir = disk_dir();
    let volume: Arc<dyn Volume> =
        Arc::new(FileVolume::open(&FileOptions::new(image(&dir, SIZE))).unwrap());
    let target = dir.path().join("a.img");
    let open_count = || {
        let entries = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        entries.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == target)).count()
    };
    let before = open_count();
    assert_eq!(before, 5, "the one that was opened by name, and those that are ready");
    for _ in 0..100 {
        driver(&*volume).run_one(read(0, 1)).unwrap();
    }
    assert_eq!(open_count(), before);
    drop(volume);
    assert_eq!(open_count(), 0);
}

#[test]
fn a_file_that_nobody_has_open_grows_and_never_shrinks() {
    let dir = disk_dir();
    let path = image(&dir, SIZE);
    let name = path.to_str().unwrap();
    assert_eq!(resize(name, None).unwrap(), SIZE);
    assert_eq!(resize(name, Some(SIZE)).unwrap(), SIZE);
    assert_eq!(resize(name, Some(4 * SIZE)).unwrap(), 4 * SIZE);
    let content = std::fs::read(&path).unwrap();
    assert_eq!(content.len() as u64, 4 * SIZE);
    assert!(content[..SIZE as usize].iter().all(|byte| *byte == 0x11));
    assert!(content[SIZE as usize..].iter().all(|byte| *byte == 0));
    let error = resize(name, Some(SIZE)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 4 * SIZE);
    let _open = open(name, &OpenOptions::default()).unwrap();
    assert_eq!(resize(name, Some(8 * SIZE)).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(resize("memory:?size=1M", Some(SIZE)).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn a_process_that_is_being_started_does_not_keep_a_file_from_being_opened() {
    let dir = disk_dir();
    let path = image(&dir, SIZE);
    let ended = Arc::new(AtomicBool::new(false));
    let starters: Vec<_> = (0..4)
        .map(|_| {
            let ended = Arc::clone(&ended);
            std::thread::spawn(move || {
                while !ended.load(Relaxed) {
                    let child = start_process(|| Command::new("true").spawn());
                    child.unwrap().wait().unwrap();
                }
            })
        })
        .collect();
    let opened: Vec<_> =
        (0..200).map(|_| FileVolume::open(&FileOptions::new(&path)).map(drop)).collect();
    ended.store(true, Relaxed);
    for starter in starters {
        starter.join().unwrap();
    }
    for result in opened {
        result.unwrap();
    }
}
