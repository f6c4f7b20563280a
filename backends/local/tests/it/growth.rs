//! Volumes that grow while they are open.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use sheave_core::{Buf, ByteRange, ErrorKind, Op, Payload, Volume};

use sheave_conformance::ops::{
    bytes, disk_dir, driver, extents, image, range, read, with_fua, write, zeroes,
};
use sheave_local::{FileOptions, FileVolume};
use sheave_volumes::{OpenOptions, open};

fn set_len(path: &Path, len: u64) {
    File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

#[test]
fn a_file_grows_for_backends_that_exist_already() {
    let dir = disk_dir();
    let path = image(&dir, 1001);
    let volume = FileVolume::open(&FileOptions::new(&path)).unwrap();
    let (mut early, mut other) = (driver(&volume), driver(&volume));
    assert_eq!((volume.grow().unwrap(), volume.size()), (1001, 1001));
    set_len(&path, 1 << 20);
    assert_eq!(volume.size(), 1001, "only when it is asked to look");
    assert_eq!((volume.grow().unwrap(), volume.size()), (1 << 20, 1 << 20));
    early.run_one(with_fua(write(990, b"over the old end of the file"))).unwrap();
    assert_eq!(bytes(other.run_one(read(990, 28))), b"over the old end of the file");
    early.run_one(write((1 << 20) - 3, b"end")).unwrap();
    other.run_one(zeroes(1 << 19, 4096)).unwrap();
    let status = Op::BlockStatus { range: range(0, 1 << 20), extents_max: 9 };
    let described: u64 = extents(other.run_one(status)).iter().map(|(len, ..)| len).sum();
    assert_eq!(described, 1 << 20);
    // A range that was made for the old size is still valid.
    assert_eq!(bytes(other.run_one(read(0, 1001))).len(), 1001);
    early.run_one(Op::Flush).unwrap();
    drop((early, other, volume));
    assert_eq!(std::fs::read(&path).unwrap()[(1 << 20) - 3..], *b"end");
}

#[test]
fn a_file_that_shrank_keeps_its_size_and_says_so() {
    let dir = disk_dir();
    let path = image(&dir, 8192);
    let volume = FileVolume::open(&FileOptions::new(&path)).unwrap();
    set_len(&path, 4096);
    let error = volume.grow().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("8192"), "{error}");
    assert_eq!(volume.size(), 8192);
    set_len(&path, 16384);
    assert_eq!(volume.grow().unwrap(), 16384);
}

#[test]
fn every_layer_passes_growth_on() {
    let dir = disk_dir();
    let path = image(&dir, 8192);
    let layers = "limit-bps=1G&fault=flush:error=EIO:after=9&read-only=true";
    let url = format!("{}?direct=true&{layers}", path.display());
    let volume = open(&url, &OpenOptions::default()).unwrap();
    let mut early = driver(&*volume);
    set_len(&path, 16384);
    assert_eq!((volume.grow().unwrap(), volume.size()), (16384, 16384));
    assert_eq!(bytes(early.run_one(read(8000, 300))), [vec![0x11; 192], vec![0; 108]].concat());
    for url in ["memory:?size=1M", "null:?size=1M"] {
        let volume = open(url, &OpenOptions::default()).unwrap();
        assert_eq!((volume.grow().unwrap(), volume.size()), (1 << 20, 1 << 20), "{url}");
    }
}

#[test]
fn a_file_is_extended_while_it_is_open_and_never_cut_off() {
    let dir = disk_dir();
    let path = image(&dir, 8192);
    let layers = "limit-bps=1G&fault=flush:error=EIO:after=9";
    let url = format!("{}?{layers}", path.display());
    let volume = open(&url, &OpenOptions::default()).unwrap();
    let mut early = driver(&*volume);
    volume.extend(16384).unwrap();
    assert_eq!(volume.size(), 8192, "the caller says when the size is served");
    assert_eq!(volume.grow().unwrap(), 16384);
    early.run_one(write(16380, b"tail")).unwrap();
    let error = volume.extend(8192).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("would cut data off"), "{error}");
    // Under another name it is still the file that the volume has.
    std::fs::rename(&path, dir.path().join("moved")).unwrap();
    std::fs::write(&path, b"another").unwrap();
    volume.extend(32768).unwrap();
    assert_eq!(volume.grow().unwrap(), 32768);
    assert_eq!(bytes(early.run_one(read(16380, 8))), b"tail\0\0\0\0");
    assert_eq!(std::fs::metadata(dir.path().join("moved")).unwrap().len(), 32768);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 7);
}

#[test]
fn many_extend_a_file_at_once_and_none_cuts_off() {
    let dir = disk_dir();
    let path = image(&dir, 4096);
    let volume = FileVolume::open(&FileOptions::new(&path)).unwrap();
    std::thread::scope(|scope| {
        for blocks in 2..40 {
            let volume = &volume;
            scope.spawn(move || {
                // An error, since truncating the file would be worse.
                if volume.extend(blocks * 4096).is_ok() {
                    assert!(volume.grow().unwrap() >= blocks * 4096);
                }
            });
        }
    });
    assert_eq!(volume.grow().unwrap(), 39 * 4096);
}

#[test]
fn a_volume_that_cannot_be_extended_says_why() {
    let dir = disk_dir();
    let path = image(&dir, 8192);
    for (parameters, size, kind, why) in [
        ("read-only=true", 16384, ErrorKind::Unsupported, "reading only"),
        ("lock=false", 16384, ErrorKind::Unsupported, "lock=false"),
        ("block=4096", 10_240, ErrorKind::Invalid, "no multiple of its block, 4096"),
    ] {
        let url = format!("{}?{parameters}", path.display());
        let volume = open(&url, &OpenOptions::default()).unwrap();
        let error = volume.extend(size).unwrap_err();
        assert_eq!(error.kind(), kind, "{parameters}");
        assert!(error.to_string().contains(why), "{error}");
    }
    for url in ["memory:?size=1M", "null:?size=1M&limit-bps=1G"] {
        let volume = open(url, &OpenOptions::default()).unwrap();
        let error = volume.extend(2 << 20).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("part of its name"), "{error}");
    }
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 8192);
}

/// Opened with `from` bytes, which end within a block, and grown to `to`.
fn grow_direct(from: u64, to: u64) {
    let dir = disk_dir();
    let path = image(&dir, from);
    let url = format!("{}?direct=true", path.display());
    let volume = open(&url, &OpenOptions::default()).unwrap();
    let mut early = driver(&*volume);
    // The last block is in the page cache, and dirty.
    early.run_one(write(from - 11, b"hello world")).unwrap();
    set_len(&path, to);
    assert_eq!(volume.grow().unwrap(), to);
    for mut driver in [early, driver(&*volume)] {
        assert_eq!(bytes(driver.run_one(read(from - 11, 12))), b"hello world\0");
        driver.run_one(with_fua(write(from - 5, b"WORLD and more"))).unwrap();
        assert_eq!(bytes(driver.run_one(read(from - 11, 20))), b"hello WORLD and more");
        driver.run_one(with_fua(write(to - 3, b"end"))).unwrap();
        // A range of a client with the old size.
        assert_eq!(bytes(driver.run_one(read(0, from))).len() as u64, from);
        driver.run_one(write(0, &vec![7; (from - 11) as usize])).unwrap();
        driver.run_one(zeroes(from + 4096, 100)).unwrap();
        driver.run_one(write(from - 5, b"world\0\0\0\0\0\0\0\0\0")).unwrap();
        driver.run_one(Op::Flush).unwrap();
    }
    drop(volume);
    let content = std::fs::read(&path).unwrap();
    let old = from as usize;
    assert_eq!(content.len() as u64, to);
    assert_eq!(content[..old - 11], vec![7; old - 11]);
    assert_eq!(&content[old - 11..old], b"hello world");
    assert!(content[old..to as usize - 3].iter().all(|byte| *byte == 0));
    assert_eq!(&content[to as usize - 3..], b"end");
}

#[test]
fn a_direct_file_of_odd_size_grows() {
    grow_direct(10_001, 40_960);
    grow_direct(10_001, 50_003);
    // Within its last block.
    grow_direct(10_001, 10_001 + 5000);
}

#[test]
fn a_direct_file_of_whole_blocks_grows_by_whole_blocks() {
    let dir = disk_dir();
    let path = image(&dir, 8192);
    let url = format!("{}?direct=true", path.display());
    let volume = open(&url, &OpenOptions::default()).unwrap();
    let block = u64::from(volume.info().block.minimum);
    set_len(&path, 8192 + 3 * block + 1);
    assert_eq!(volume.grow().unwrap(), 8192 + 3 * block);
    let mut driver = driver(&*volume);
    driver.run_one(with_fua(write(8192 + 3 * block - 7, b"the end"))).unwrap();
    assert_eq!(bytes(driver.run_one(read(8192 + 3 * block - 7, 7))), b"the end");
}

/// One thread grows the file, two others write to it all the time, each into its own bytes.
fn grow_while_busy(direct: bool) {
    const FROM: u64 = 10_001;
    const STEP: u64 = 3_777;
    const STEPS: u64 = 60;
    const TO: u64 = FROM + STEP * STEPS;
    let dir = disk_dir();
    let path = image(&dir, FROM);
    let url = format!("{}?direct={direct}", path.display());
    let volume = open(&url, &OpenOptions::default()).unwrap();
    let grown = AtomicBool::new(false);
    let writer = |lane: u64| {
        let mut driver = driver(&*volume);
        let mut at = lane * 50;
        while at + 50 <= TO {
            let done = grown.load(Relaxed);
            let end = volume.size();
            if at + 50 > end {
                assert!(!done, "the growth is seen by all");
                std::thread::yield_now();
                continue;
            }
            let data = Payload::from(Buf::from_bytes(&[lane as u8 + 1; 50]));
            let range = ByteRange::within(at, 50, end).unwrap();
            driver.run_one(Op::Write { range, data, fua: false }).unwrap();
            assert_eq!(bytes(driver.run_one(read(at, 50))), [lane as u8 + 1; 50]);
            at += 100;
        }
    };
    std::thread::scope(|scope| {
        for lane in [0, 1] {
            scope.spawn(move || writer(lane));
        }
        for step in 1..=STEPS {
            set_len(&path, FROM + step * STEP);
            assert_eq!(volume.grow().unwrap(), FROM + step * STEP);
            std::thread::yield_now();
        }
        grown.store(true, Relaxed);
    });
    let content = std::fs::read(&path).unwrap();
    for (number, piece) in content[..TO as usize - 100].chunks_exact(50).enumerate() {
        assert_eq!(piece, [(number % 2) as u8 + 1; 50], "piece {number}");
    }
}

#[test]
fn a_file_grows_under_load() {
    grow_while_busy(false);
}

#[test]
fn a_direct_file_grows_under_load() {
    grow_while_busy(true);
}
