//! The suite on volumes in a directory, with a small journal: so it is full most of the time, and
//! reads come from journal and objects alike.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use sheave_conformance::stacks::for_any_two;
use sheave_conformance::{Options, PlainEngine, check, ops};
use sheave_core::{ErrorKind, Op, Reply, Volume};
use sheave_layers::BlockSize;
use sheave_object::{BLOCK_BYTES, DirVolume, JournalSize, ObjectVolume, Tuning, close_all};
use tempfile::TempDir;

const SIZE: u64 = 96 * BLOCK_BYTES;

/// Directories of volumes that are new for each test.
struct Place {
    dir: TempDir,
    made: AtomicUsize,
}

impl Place {
    fn new() -> Self {
        Self { dir: ops::disk_dir(), made: AtomicUsize::new(0) }
    }

    fn volume(&self, index: usize) -> DirVolume {
        let dir = self.dir.path().join(format!("volume-{index}"));
        let journals = self.dir.path().join("journals");
        DirVolume { name: format!("dir://{}", dir.display()), dir, journals }
    }

    fn make(&self) -> DirVolume {
        let volume = self.volume(self.made.fetch_add(1, Relaxed));
        volume.create(SIZE).expect("a new volume");
        volume
    }
}

fn tuning() -> Tuning {
    let journal = JournalSize { segment_bytes: JournalSize::SEGMENT_BYTES_MIN, segments_max: 2 };
    // Objects of few blocks, and ticks within a case.
    Tuning { journal, object_bytes: 64 << 10, tick: Duration::from_millis(20) }
}

fn open(volume: &DirVolume) -> ObjectVolume {
    volume.open_tuned(false, tuning()).expect("a volume")
}

#[test]
fn a_volume_answers_as_the_model_does() {
    let place = Place::new();
    let options = Options { cases: 12, unaligned: false };
    check(options, || Arc::new(open(&place.make())), || PlainEngine::new(3));
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

#[test]
fn what_was_written_is_there_after_closing_and_opening() {
    let place = Place::new();
    let volume = place.make();
    let byte_of = |block: u64, round: u64| (block * 7 + round * 31 + 1) as u8;
    for round in 0..4 {
        let open: Arc<dyn Volume> = Arc::new(BlockSize::new(Arc::new(open(&volume))));
        let mut driver = ops::driver(&*open);
        for block in 0..96 {
            let read = driver.run_one(ops::read(block * BLOCK_BYTES, BLOCK_BYTES));
            let want = match round {
                0 => 0,
                // Only every second block was written in the last round.
                _ if block % 2 == 0 => byte_of(block, round - 1),
                _ => 0,
            };
            assert_eq!(ops::bytes(read), vec![want; BLOCK_BYTES as usize], "{round}: {block}");
        }
        for block in (0..96).step_by(2) {
            let bytes = vec![byte_of(block, round); BLOCK_BYTES as usize];
            assert!(driver.run_one(ops::write(block * BLOCK_BYTES, &bytes)).is_ok());
        }
        // Busy as long as it is in use.
        let busy = volume.open_tuned(false, tuning()).map(drop).unwrap_err();
        assert_eq!(busy.kind(), ErrorKind::Busy, "{busy}");
        drop((driver, open));
    }
    assert_eq!(close_all(Duration::from_secs(60)), []);
    // The journal is empty, so an opening on another node leaves nothing behind.
    let elsewhere = DirVolume { journals: place.dir.path().join("elsewhere"), ..volume.clone() };
    let open = open(&elsewhere);
    let mut driver = ops::driver(&open);
    assert!(matches!(driver.run_one(Op::Flush), Ok(Reply::Done)));
    drop((driver, open));
}
