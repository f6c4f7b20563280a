//! Closing and opening. A file of its own, since it closes all volumes of its process.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sheave_conformance::ops;
use sheave_core::{ErrorKind, Op, Reply, Volume};
use sheave_layers::BlockSize;
use sheave_object::{
    BLOCK_BYTES, Codec, DirStore, Durability, JournalSize, StoredVolume, Tuning, close_all,
};

const BLOCKS: u64 = 96;

#[test]
fn what_was_written_is_there_after_closing_and_opening() {
    let dir = ops::disk_dir();
    let volume = StoredVolume {
        name: "dir:///v".to_owned(),
        store: Arc::new(DirStore::new(&dir.path().join("volume"))),
        journals: dir.path().join("journals"),
        key: None,
        snapshot: None,
    };
    volume.create(BLOCKS * BLOCK_BYTES, Codec::Plain, Durability::Local).unwrap();
    let segment_bytes = JournalSize::SEGMENT_BYTES_MIN;
    let tuning = Tuning {
        journal: JournalSize { segment_bytes, segments_max: 2 },
        object_bytes: 64 << 10,
        ..Tuning::default()
    };
    let byte_of = |block: u64, round: u64| (block * 7 + round * 31 + 1) as u8;
    for round in 0..4 {
        let opened = volume.open_tuned(false, tuning).unwrap();
        let opened: Arc<dyn Volume> = Arc::new(BlockSize::new(Arc::new(opened)));
        let mut driver = ops::driver(&*opened);
        for block in 0..BLOCKS {
            let read = driver.run_one(ops::read(block * BLOCK_BYTES, BLOCK_BYTES));
            // Every second block was written in the last round.
            let want = if round > 0 && block % 2 == 0 { byte_of(block, round - 1) } else { 0 };
            assert_eq!(ops::bytes(read), vec![want; BLOCK_BYTES as usize], "{round}: {block}");
        }
        for block in (0..BLOCKS).step_by(2) {
            let bytes = vec![byte_of(block, round); BLOCK_BYTES as usize];
            assert!(driver.run_one(ops::write(block * BLOCK_BYTES, &bytes)).is_ok());
        }
        // Busy as long as it is in use.
        let busy = volume.open_tuned(false, tuning).map(drop).unwrap_err();
        assert_eq!(busy.kind(), ErrorKind::Busy, "{busy}");
        drop((driver, opened));
    }
    assert_eq!(close_all(Duration::from_secs(60)), []);
    // The journal is empty, so an opening on another node leaves nothing behind here.
    let elsewhere = StoredVolume { journals: dir.path().join("elsewhere"), ..volume.clone() };
    for node in [&elsewhere, &volume] {
        let opened = node.open_tuned(false, tuning).unwrap();
        let mut driver = ops::driver(&opened);
        assert!(driver.run_one(ops::write(0, &[1; BLOCK_BYTES as usize])).is_ok());
        assert!(matches!(driver.run_one(Op::Flush), Ok(Reply::Done)));
        // An op of a volume that is closing is refused, and not lost.
        assert_eq!(close_all(Duration::from_secs(60)), []);
        let late = driver.run_one(ops::write(0, &[2; BLOCK_BYTES as usize])).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::Shutdown);
        let all = ops::range(0, BLOCKS * BLOCK_BYTES);
        for late in [
            ops::read(0, BLOCK_BYTES),
            ops::read(2 * BLOCK_BYTES, BLOCK_BYTES),
            Op::BlockStatus { range: all, extents_max: 9 },
            Op::Flush,
        ] {
            assert_eq!(driver.run_one(late).unwrap_err().kind(), ErrorKind::Shutdown);
        }
        drop((driver, opened));
    }
    let id = volume.identity().unwrap();
    let names_in = |dir: &Path| {
        let names = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let journal = volume.journals.join(id);
    assert_eq!(names_in(&journal), ["journal", "lock"]);
    let left = [".sheave-spare", "superblock"];
    assert_eq!(names_in(&journal.join("journal")), left, "its room is given back");
}
