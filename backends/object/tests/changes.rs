//! Volumes that are changed while they are open.

use std::sync::Arc;
use std::time::Duration;

use sheave_conformance::ops;
use sheave_core::{ErrorKind, Op, Volume};
use sheave_object::{
    BLOCK_BYTES, Codec, DirStore, Durability, ObjectVolume, StoredVolume, Tuning, finish_closing,
};
use tempfile::TempDir;

const SIZE: u64 = 64 * BLOCK_BYTES;

fn place(dir: &TempDir) -> StoredVolume {
    StoredVolume {
        name: format!("dir://{}/v", dir.path().display()),
        store: Arc::new(DirStore::new(&dir.path().join("v"))),
        journals: dir.path().join("journals"),
        key: None,
        snapshot: None,
    }
}

/// Nothing goes to the store by time.
fn opened(volume: &StoredVolume) -> ObjectVolume {
    let tuning = Tuning { tick: Duration::from_secs(600), ..Tuning::default() };
    volume.open_tuned(false, tuning).expect("it opens")
}

fn close(volume: ObjectVolume) {
    drop(volume);
    assert!(finish_closing(Duration::from_secs(60)).is_empty());
}

fn write(volume: &dyn Volume, at: u64, byte: u8) {
    let data = vec![byte; BLOCK_BYTES as usize];
    ops::driver(volume).run_one(ops::write(at, &data)).expect("a write");
}

fn byte(volume: &dyn Volume, at: u64) -> u8 {
    ops::bytes(ops::driver(volume).run_one(ops::read(at, BLOCK_BYTES)))[0]
}

#[test]
fn an_open_volume_grows() {
    let dir = ops::disk_dir();
    let volume = place(&dir);
    volume.create(SIZE, Codec::Lz4, Durability::Local).unwrap();
    let open = opened(&volume);
    write(&open, SIZE - BLOCK_BYTES, 1);
    let snapshot = StoredVolume { snapshot: Some("small".to_owned()), ..volume.clone() };
    snapshot.make_snapshot().unwrap();
    // As another process asks, and as the one that serves it does.
    assert_eq!(volume.resize(2 * SIZE).unwrap(), 2 * SIZE);
    assert_eq!((open.size(), open.grow().unwrap(), open.size()), (SIZE, 2 * SIZE, 2 * SIZE));
    write(&open, 2 * SIZE - BLOCK_BYTES, 2);
    open.extend(3 * SIZE).unwrap();
    assert_eq!(open.grow().unwrap(), 3 * SIZE);
    for (size, why) in [(2 * SIZE, "would cut data off"), (4 * SIZE + 1, "multiple of 4096")] {
        for error in [volume.resize(size).unwrap_err(), open.extend(size).unwrap_err()] {
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
            assert!(error.to_string().contains(why), "{error}");
        }
    }
    assert_eq!(open.grow().unwrap(), 3 * SIZE);
    assert_eq!(volume.root().unwrap().unwrap().size_bytes(), 3 * SIZE);
    close(open);
    let open = opened(&volume);
    assert_eq!(open.size(), 3 * SIZE);
    let found = [SIZE - BLOCK_BYTES, 2 * SIZE - BLOCK_BYTES, 3 * SIZE - BLOCK_BYTES];
    assert_eq!(found.map(|at| byte(&open, at)), [1, 2, 0]);
    close(open);
    let small = snapshot.open_snapshot(Tuning::default()).unwrap();
    assert_eq!((small.size(), byte(&small, SIZE - BLOCK_BYTES)), (SIZE, 1));
    let error = small.extend(2 * SIZE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

#[test]
fn flushes_wait_for_what_an_open_volume_is_set_to() {
    let dir = ops::disk_dir();
    let volume = place(&dir);
    volume.create(SIZE, Codec::Plain, Durability::Local).unwrap();
    let open = opened(&volume);
    let objects = || volume.describe().unwrap().objects;
    let flushed = |at, byte| {
        write(&open, at, byte);
        ops::driver(&open).run_one(Op::Flush).expect("a flush");
        objects()
    };
    assert_eq!(flushed(0, 1), 0, "the journal is enough");
    volume.set_durability(Durability::Remote).unwrap();
    assert_eq!(objects(), 0);
    assert_eq!(flushed(BLOCK_BYTES, 2), 1, "the store has it");
    volume.set_durability(Durability::Local).unwrap();
    assert_eq!(flushed(0, 3), 1);
    volume.set_durability(Durability::Remote).unwrap();
    close(open);
    let open = opened(&volume);
    let before = objects();
    write(&open, 0, 4);
    ops::driver(&open).run_one(Op::Flush).unwrap();
    assert_eq!(objects(), before + 1, "it is still so");
    close(open);
}
