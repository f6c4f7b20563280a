//! The conformance suite over every volume and layer.

use std::sync::Arc;

use sheave_core::Volume;
use tempfile::TempDir;

use sheave_conformance::ops::disk_dir;
use sheave_conformance::{Options, PlainEngine, check};
use sheave_layers::BlockSize;
use sheave_layers::{FaultRule, Faults, Limits, RateLimit, RateLimits};
use sheave_local::{FileOptions, FileVolume, Memory};
use sheave_volumes::{OpenOptions, open};

/// Neither a multiple of a chunk, nor of a page, nor of anything.
const SIZE: u64 = 3 * (64 << 10) + 777;
const ANY: Options = Options { cases: 60, unaligned: true };

fn memory() -> Arc<dyn Volume> {
    Arc::new(Memory::new(SIZE).unwrap())
}

/// An image of zeroes without a hole, so that punching one shows.
fn image(dir: &TempDir, size: u64) -> FileOptions {
    let path = dir.path().join("a.img");
    std::fs::write(&path, vec![0; size as usize]).unwrap();
    FileOptions::new(path)
}

fn check_file(size: u64, direct: bool) {
    let dir = disk_dir();
    let make = || -> Arc<dyn Volume> {
        let volume = FileVolume::open(&FileOptions { direct, ..image(&dir, size) }).unwrap();
        if direct { Arc::new(BlockSize::new(Arc::new(volume))) } else { Arc::new(volume) }
    };
    check(Options { cases: 30, unaligned: true }, make, || PlainEngine::new(3));
}

#[test]
fn memory_volume() {
    check(ANY, memory, || PlainEngine::new(1));
}

#[test]
fn file_volume() {
    check_file(SIZE, false);
}

#[test]
fn direct_file_volume_under_block_size() {
    check_file(3 * (64 << 10), true);
}

#[test]
fn direct_file_volume_of_odd_size_under_block_size() {
    check_file(SIZE, true);
}

#[test]
fn direct_file_volume_alone_takes_whole_blocks() {
    let dir = disk_dir();
    let make = || -> Arc<dyn Volume> {
        let options = FileOptions { direct: true, ..image(&dir, SIZE) };
        Arc::new(FileVolume::open(&options).unwrap())
    };
    check(Options { cases: 30, unaligned: false }, make, || PlainEngine::new(3));
}

#[test]
fn file_volume_on_an_engine_that_refuses() {
    let dir = disk_dir();
    let make = || -> Arc<dyn Volume> { Arc::new(FileVolume::open(&image(&dir, SIZE)).unwrap()) };
    check(Options { cases: 30, unaligned: true }, make, || {
        PlainEngine::new(2).refusing_one_in(3, 99)
    });
}

#[test]
fn rate_limit_layer() {
    let limits = RateLimits { bytes_per_second: 1 << 20, ops_per_second: 100 };
    let make =
        || -> Arc<dyn Volume> { Arc::new(RateLimit::new(memory(), Arc::new(Limits::new(limits)))) };
    check(ANY, make, || PlainEngine::new(1));
}

#[test]
fn faults_layer_that_delays() {
    let make = || -> Arc<dyn Volume> {
        let rules: Vec<FaultRule> = vec![
            "any:delay=5ms:probability=0.5".parse().unwrap(),
            "read:delay=1us".parse().unwrap(),
        ];
        Arc::new(Faults::new(memory(), rules, 3))
    };
    check(ANY, make, || PlainEngine::new(1));
}

#[test]
fn all_layers_over_a_direct_file() {
    let dir = disk_dir();
    let make = || {
        let path = image(&dir, SIZE).path;
        let url = format!(
            "file://{}?direct=true&limit-bps=1G&limit-iops=100000\
             &fault=any:delay=1ms:probability=0.1",
            path.display()
        );
        open(&url, &OpenOptions::default()).unwrap()
    };
    check(Options { cases: 30, unaligned: true }, make, || PlainEngine::new(2));
}
