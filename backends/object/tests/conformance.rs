//! The suite on volumes in a directory, with a small journal: so it is full most of the time, and
//! reads come from journal and objects alike.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use sheave_conformance::stacks::for_any_two;
use sheave_conformance::{Options, PlainEngine, check, ops};
use sheave_core::Volume;
use sheave_object::{
    BLOCK_BYTES, Codec, DirStore, Durability, JournalSize, KeySource, ObjectVolume, StoredVolume,
    Tuning,
};
use tempfile::TempDir;

const SIZE: u64 = 96 * BLOCK_BYTES;

/// Directories of volumes that are new for each test.
struct Place {
    dir: TempDir,
    made: AtomicUsize,
    codec: Codec,
    key: Option<KeySource>,
}

impl Place {
    fn new() -> Self {
        let (dir, made) = (ops::disk_dir(), AtomicUsize::new(0));
        Self { dir, made, codec: Codec::Plain, key: None }
    }

    fn volume(&self, index: usize) -> StoredVolume {
        let dir = self.dir.path().join(format!("volume-{index}"));
        let journals = self.dir.path().join("journals");
        let store = Arc::new(DirStore::new(&dir));
        let name = format!("dir://{}", dir.display());
        StoredVolume { name, store, journals, key: self.key.clone(), snapshot: None }
    }

    fn make(&self) -> StoredVolume {
        let volume = self.volume(self.made.fetch_add(1, Relaxed));
        volume.create(SIZE, self.codec, Durability::Local).expect("a new volume");
        volume
    }
}

fn tuning() -> Tuning {
    let journal = JournalSize { segment_bytes: JournalSize::SEGMENT_BYTES_MIN, segments_max: 2 };
    // Objects of few blocks, ticks within a case, and a map that is in leaves.
    let (object_bytes, tick) = (64 << 10, Duration::from_millis(20));
    Tuning { journal, object_bytes, tick, map_bytes: 1 << 10, ..Tuning::default() }
}

/// A cache of so few chunks that one makes room for another all the time.
fn small_cache() -> Tuning {
    Tuning { cache_bytes: 1 << 20, ..tuning() }
}

fn open(volume: &StoredVolume) -> ObjectVolume {
    volume.open_tuned(false, tuning()).expect("a volume")
}

#[test]
fn a_volume_answers_as_the_model_does() {
    let place = Place::new();
    let options = Options { cases: 12, unaligned: false };
    check(options, || Arc::new(open(&place.make())), || PlainEngine::new(3));
}

#[test]
fn a_volume_with_a_small_cache_or_none_answers_as_the_model_does() {
    for tuning in [small_cache(), Tuning { cache_bytes: 0, ..tuning() }] {
        let place = Place::new();
        let open = || Arc::new(place.make().open_tuned(false, tuning).expect("a volume"));
        check(Options { cases: 8, unaligned: false }, || open(), || PlainEngine::new(3));
    }
}

#[test]
fn a_compressed_or_encrypted_volume_answers_as_the_model_does() {
    for (codec, is_encrypted) in [(Codec::Lz4, false), (Codec::Plain, true), (Codec::Lz4, true)] {
        let mut place = Place::new();
        let file = place.dir.path().join("key");
        std::fs::write(&file, "5a".repeat(32)).expect("a key");
        place.codec = codec;
        place.key = is_encrypted.then_some(KeySource::File(file));
        for tuning in [tuning(), small_cache()] {
            let open = || Arc::new(place.make().open_tuned(false, tuning).expect("a volume"));
            check(Options { cases: 5, unaligned: false }, || open(), || PlainEngine::new(3));
        }
    }
}

#[test]
fn an_engine_that_often_has_no_room_loses_no_op() {
    let place = Place::new();
    let options = Options { cases: 6, unaligned: false };
    let engine = || PlainEngine::new(2).refusing_one_in(3, 7);
    check(options, || Arc::new(open(&place.make())), engine);
}

#[test]
fn a_volume_under_layers_answers_as_the_model_does() {
    let place = Place::new();
    let base = || -> Arc<dyn Volume> { Arc::new(open(&place.make())) };
    for_any_two(&base, |name, make| {
        // Without the block-size layer ops are aligned. Limits and delays are slow.
        if name.contains("limits") || name.contains("delays") {
            return;
        }
        let options = Options { cases: 1, unaligned: name.starts_with("block size") };
        check(options, make, || PlainEngine::new(8));
    });
}
