//! What becomes of a batch.

use super::*;
use crate::format::{Codec, Entry, Form, Reach};
use crate::ids::{Epoch, Incarnation, VolumeId};

fn built(codec: Codec, entries: Vec<SealedEntry>) -> Vec<Entry> {
    let author = Author {
        volume: VolumeId([1; 16]),
        reach: Reach { epoch: Epoch(1), first: Seq(1) },
        previous: None,
        incarnation: Incarnation([1; 16]),
        coding: Coding { codec, key: None },
    };
    let sealed = Sealed { lsn_first: Lsn(1), lsn_last: Lsn(9), entries };
    let plan = Plan { author, seq: Seq(1), sealed };
    let built = plan.build(|from, blocks, into| {
        into.resize(into.len() + (blocks * BLOCK_BYTES) as usize, from.segment as u8);
        Ok(())
    });
    let built = built.unwrap();
    built.header.decode_index(&built.body[128..built.header.index_end()]).unwrap()
}

fn write(lba: u64, blocks: u64, segment: u64) -> SealedEntry {
    let from = JournalPlace { segment, page: 2 };
    SealedEntry::Write { lba: Lba(lba), blocks, from }
}

/// Blocks of each run, by address; none for zeroes.
fn runs(entries: &[Entry]) -> Vec<(u64, Option<u32>)> {
    let run = |entry: &Entry| match *entry {
        Entry::Write { lba, blocks, .. } => (lba.0, Some(blocks)),
        Entry::Zero { lba, .. } => (lba.0, None),
        other => panic!("{other:?}"),
    };
    entries.iter().map(run).collect()
}

#[test]
fn writes_that_follow_one_another_are_one_run() {
    let zero = SealedEntry::Zero { lba: Lba(9), blocks: 1 };
    let batch = vec![write(4, 1, 1), write(5, 3, 2), zero, write(10, 1, 3), write(12, 1, 4)];
    let entries = built(Codec::Plain, batch);
    assert_eq!(runs(&entries), [(4, Some(4)), (9, None), (10, Some(1)), (12, Some(1))]);
    // They are no longer than what is copied at once.
    let entries = built(Codec::Plain, (0..300).map(|lba| write(lba, 1, lba)).collect());
    assert_eq!(runs(&entries), [(0, Some(256)), (256, Some(44))]);
    // So blocks are compressed together that were written one by one.
    let entries = built(Codec::Lz4, (0..16).map(|lba| write(lba, 1, lba)).collect());
    assert_eq!(runs(&entries), [0, 4, 8, 12].map(|lba| (lba, Some(4))));
    assert!(entries.iter().all(|entry| {
        matches!(entry, Entry::Write { form: Form::Packed(bytes), .. } if *bytes < 1000)
    }));
}

/// Also in a batch in which they cover one another.
#[test]
fn entries_take_effect_in_their_order() {
    let zero = SealedEntry::Zero { lba: Lba(4), blocks: 1 };
    let entries = built(Codec::Plain, vec![write(4, 1, 1), zero, write(5, 1, 2), write(4, 1, 3)]);
    assert_eq!(runs(&entries), [(4, Some(1)), (4, None), (5, Some(1)), (4, Some(1))]);
}
