//! Counts, what snapshots keep, and what openings delete.

mod cleaning;
mod openings;

use super::*;
use crate::extents::Span;
use crate::format::{CheckpointPlace, Committed, Form, FramePlace, Reach, Run, Snapshot};
use crate::ids::{Epoch, Lsn, Place, Seq};

fn run(start: u64, blocks: u64, seq: u64, (frame, form, skip, run): (u32, Form, u32, u32)) -> Run {
    let place = Place::Object { seq: Seq(seq), frame, form, skip, run };
    Run { span: Span { start, blocks }, place }
}

/// A frame of several blocks is needed for each of them, and counts once.
#[test]
fn a_frame_counts_once_also_where_other_blocks_have_come_in_its_middle() {
    let packed = |frame, skip| (frame, Form::Packed(999), skip, 4);
    let runs = [
        run(0, 1, 1, packed(200, 0)),
        run(1, 1, 2, (152, Form::Plain, 0, 1)),
        run(2, 2, 1, packed(200, 2)),
        Run { span: Span { start: 4, blocks: 1 }, place: Place::Zero },
        run(5, 3, 1, packed(1199, 1)),
        run(8, 4, 2, packed(4264, 0)),
        run(12, 300, 3, (152, Form::Sealed, 7, 400)),
    ];
    let mut found = Vec::new();
    each_frame(runs, |seq, bytes| found.push((seq.0, bytes)));
    let packed = 999 + 24;
    assert_eq!(found, [(1, packed), (2, 4112), (1, packed), (2, packed), (3, 300 * 4144)]);
}

/// Short frames have long indexes, which cleaning cannot make shorter.
#[test]
fn what_is_needed_and_compresses_well_is_not_cleaned() {
    let cleaning = Cleaning { space_percent: 133, move_bytes: 1000 };
    let frames = 500;
    let of_object = |seq: u64, needed: u64| {
        let frame = move |at: u64| {
            let place = ((128 + 24 * frames + 60 * at) as u32, Form::Packed(60), 0, 4);
            run((seq * frames + at) * 4, 4, seq, place)
        };
        (0..needed).map(frame)
    };
    let victims = |needed: u64| {
        let mut counts = Counts::new(Seq(1));
        (1..9).for_each(|seq| counts.add(Seq(seq), 128 + (24 + 60) * frames));
        let runs: Vec<_> = (1..9).flat_map(|seq| of_object(seq, needed)).collect();
        counts.settle(Seq(9), &runs, None);
        counts.victims(Seq(0), &std::collections::BTreeSet::new(), cleaning)
    };
    assert_eq!(victims(frames), []);
    assert!(!victims(frames / 2).is_empty());
}

fn snapshot(committed: u64, directory: u64) -> Snapshot {
    Snapshot {
        id: directory,
        name: directory.to_string(),
        committed: Committed { seq: Seq(committed), lsn: Lsn(1) },
        checkpoint: Some(CheckpointPlace {
            directory: FramePlace { seq: Seq(directory), at: 152, bytes: 99 },
            reach: Reach { epoch: Epoch(1), first: Seq(1) },
        }),
        size: 1,
        at_ms: 0,
    }
}

/// By each snapshot in turn, as the rule is written.
#[test]
fn snapshots_keep_what_was_born_before_and_died_behind_them() {
    let lists = [
        vec![],
        vec![snapshot(4, 6)],
        vec![snapshot(4, 6), snapshot(9, 10), snapshot(9, 12)],
        // The last one has a state of long before, which was restored.
        vec![snapshot(4, 6), snapshot(9, 10), snapshot(4, 14)],
    ];
    for snapshots in lists {
        let mut counts = Counts::new(Seq(1));
        let dead = (1..20).flat_map(|birth| (birth..20).map(move |death| (birth, death)));
        for (birth, death) in dead {
            counts.add(Seq(birth), 1000);
            counts.settle(Seq(death), &[], None);
            let needs = |snapshot: &Snapshot| {
                snapshot.last_object().0 >= birth && snapshot.committed.seq.0 < death
            };
            let is_garbage = counts.garbage(&snapshots).iter().any(|(seq, _)| seq.0 == birth);
            assert_eq!(is_garbage, !snapshots.iter().any(needs), "{birth} {death} {snapshots:?}");
        }
    }
}
