//! Layers over layers, and layers with several volumes below.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use sheave_conformance::ops::{disk_dir, driver, write};
use sheave_conformance::stacks::{LAYERS, Mirror, for_any_two};
use sheave_conformance::{Options, PlainEngine, check};
use sheave_core::{Backend, ErrorKind, Result, Volume, VolumeInfo};
use sheave_layers::{BlockSize, ReadOnly};
use sheave_local::{FileOptions, FileVolume, Memory};
use tempfile::TempDir;

/// Neither a multiple of a page, nor of anything.
const SIZE: u64 = (64 << 10) + 777;

fn memory() -> Arc<dyn Volume> {
    Arc::new(Memory::new(SIZE).unwrap())
}

/// Makes volumes of whole blocks, each over an image of its own.
fn direct_files(dir: &TempDir) -> impl Fn() -> Arc<dyn Volume> {
    let (dir, made) = (dir.path().to_owned(), AtomicUsize::new(0));
    move || {
        let path = dir.join(format!("{}.img", made.fetch_add(1, Relaxed) % 64));
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, vec![0; SIZE as usize]).unwrap();
        let options = FileOptions { direct: true, ..FileOptions::new(path) };
        Arc::new(FileVolume::open(&options).unwrap())
    }
}

#[test]
fn any_two_layers_keep_the_contract_over_whole_blocks() {
    let dir = disk_dir();
    for_any_two(&direct_files(&dir), |name, make| {
        // Only the block-size layer lets any op reach a direct file.
        let unaligned = name.contains("block size");
        check(Options { cases: 4, unaligned }, make, || PlainEngine::new(3));
    });
}

#[test]
fn any_two_layers_keep_the_contract_over_memory() {
    for_any_two(&memory, |_, make| {
        check(Options { cases: 20, unaligned: true }, make, || PlainEngine::new(1));
    });
}

#[test]
fn any_two_layers_keep_the_contract_on_an_engine_that_refuses() {
    let dir = disk_dir();
    for_any_two(&direct_files(&dir), |name, make| {
        let unaligned = name.contains("block size");
        check(Options { cases: 2, unaligned }, make, || PlainEngine::new(2).refusing_one_in(3, 99));
    });
}

/// More layers that issue ops of their own than a tag has bits for.
#[test]
fn a_deep_stack_keeps_the_contract() {
    let dir = disk_dir();
    let base = direct_files(&dir);
    let make = || {
        let mirror: Arc<dyn Volume> = Arc::new(Mirror::new([base(), base()]));
        (0..12).fold(mirror, |below, _| Arc::new(BlockSize::new(below)))
    };
    check(Options { cases: 10, unaligned: true }, make, || PlainEngine::new(3));
}

#[test]
fn more_volumes_below_than_tokens_can_tell_apart_are_an_error() {
    let wrap = |below: Arc<dyn Volume>| -> Arc<dyn Volume> {
        Arc::new(Mirror::new([Arc::clone(&below), below]))
    };
    let widest = (0..8).fold(memory(), |below, _| wrap(below));
    assert!(driver(&*widest).run_one(write(0, b"x")).is_ok());
    let error = wrap(widest).backend().err().expect("too many");
    assert_eq!(error.kind(), ErrorKind::TooLarge);
}

/// A volume that knows that it has lost data.
struct Lossy(Memory);

impl Volume for Lossy {
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
        &[]
    }

    fn has_lost_data_itself(&self) -> bool {
        true
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        self.0.backend()
    }
}

#[test]
fn no_layer_hides_that_a_volume_below_has_lost_data() {
    let lossy = || -> Arc<dyn Volume> { Arc::new(Lossy(Memory::new(SIZE).unwrap())) };
    for (name, wrap) in LAYERS {
        assert!(wrap(&lossy).has_lost_data() && !wrap(&memory).has_lost_data(), "{name}");
    }
    let read_only: Arc<dyn Volume> = Arc::new(ReadOnly::new(lossy()));
    assert!(read_only.has_lost_data());
    let second: Arc<dyn Volume> = Arc::new(Mirror::new([memory(), lossy()]));
    assert!(second.has_lost_data(), "each volume below counts");
}
