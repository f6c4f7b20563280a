//! The map of a volume up to an object, as a checkpoint stores it: a directory, and leaves.

use super::code::{Reader, Wrong, put_number};
use super::counted::{Counted, put_counted, take_counted};
use super::object::{LEAF_BLOCKS, OBJECT_BYTES_MAX};
use super::root::{Committed, FramePlace, NUMBER_MAX, Reach, SIZE_MAX};
use super::run::Form;
use super::snapshot::{Snapshot, put_snapshots, take_snapshots};
use crate::extents::Span;
use crate::ids::{BLOCK_BYTES, Epoch, Lsn, Place, Seq};

/// A directory. `docs/format.md` draws its bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// The part of the log that is in it.
    pub covered: Committed,
    /// The epochs that have objects in that part, in order.
    pub epochs: Vec<Reach>,
    /// The leaves, in the order of their numbers.
    pub leaves: Vec<LeafRef>,
    /// What is newer than the leaves, in the order of the addresses. Blocks that are in neither are
    /// zeroes.
    pub runs: Vec<Run>,
    /// The snapshots of the volume, in the order of their numbers.
    pub snapshots: Vec<Snapshot>,
    /// The volume's own log objects up to what is in it that are not deleted, in order.
    pub objects: Vec<Counted>,
    /// Leaves that the map does not need any more, and whose runs still count, in order.
    pub dropped: Vec<LeafRef>,
}

/// A leaf and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LeafRef {
    /// Its number: it has the blocks from [`LEAF_BLOCKS`] times that on.
    pub number: u64,
    /// Its frame.
    pub place: FramePlace,
}

/// Blocks that follow one another in a run of blocks of an object, or zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The blocks.
    pub span: Span,
    /// Where the first one is.
    pub place: Place,
}

impl LeafRef {
    /// The blocks of the leaf of a number.
    #[must_use]
    pub fn span_of(number: u64) -> Span {
        Span { start: number * LEAF_BLOCKS, blocks: LEAF_BLOCKS }
    }
}

const OUTSIDE: Wrong = Wrong::Damaged("a run of the map leads outside");
const TOO_SHORT: Wrong = Wrong::Damaged("it ends too early");
const TOO_LONG: Wrong = Wrong::Damaged("it has more than it states");
const REACH_BYTES: usize = 16;
/// A leaf takes at least so many bytes, and a run.
const LEAF_BYTES_MIN: usize = 4;
const RUN_BYTES_MIN: usize = 3;

impl Directory {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 + 16 * (self.leaves.len() + self.runs.len()));
        out.extend(self.covered.seq.0.to_le_bytes());
        out.extend(self.covered.lsn.0.to_le_bytes());
        for count in [self.epochs.len(), self.leaves.len(), self.runs.len()] {
            out.extend((count as u32).to_le_bytes());
        }
        out.extend([0; 4]);
        for Reach { epoch, first } in &self.epochs {
            out.extend(epoch.0.to_le_bytes());
            out.extend(first.0.to_le_bytes());
        }
        put_leaves(&mut out, &self.leaves, 1);
        put_runs(&mut out, 0, &self.runs);
        put_number(&mut out, self.snapshots.len() as u64);
        put_snapshots(&mut out, &self.snapshots);
        put_counted(&mut out, &self.objects, self.covered.seq);
        put_number(&mut out, self.dropped.len() as u64);
        put_leaves(&mut out, &self.dropped, 0);
        out
    }

    /// Reads it from its bytes, which are in an object of that number.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn decode(bytes: &[u8], object: Seq) -> Result<Self, Wrong> {
        let mut reader = Reader::new(bytes);
        let covered = Committed { seq: Seq(reader.u64()?), lsn: Lsn(reader.u64()?) };
        let [epoch_count, leaf_count, run_count] =
            [reader.u32()?, reader.u32()?, reader.u32()?].map(|count| count as usize);
        reader.zeroes(4)?;
        let bytes_min =
            [epoch_count * REACH_BYTES, leaf_count * LEAF_BYTES_MIN, run_count * RUN_BYTES_MIN];
        if bytes_min.iter().any(|least| *least > bytes.len()) {
            return Err(TOO_SHORT);
        }
        let mut epochs = Vec::with_capacity(epoch_count);
        for _ in 0..epoch_count {
            epochs.push(Reach { epoch: Epoch(reader.u64()?), first: Seq(reader.u64()?) });
        }
        check_log(covered, &epochs, object)?;
        let leaves = take_leaves(&mut reader, leaf_count, 1, object)?;
        let whole = Span { start: 0, blocks: SIZE_MAX };
        let runs = take_runs(&mut reader, whole, run_count, covered.seq)?;
        // They were there before the object was begun, and not before the last write that it has.
        let last = Committed { seq: Seq(object.0 - 1), lsn: covered.lsn };
        let count = reader.number()? as usize;
        let snapshots = take_snapshots(&mut reader, count, last)?;
        let objects = take_counted(&mut reader, bytes.len(), covered.seq)?;
        let count = reader.number()? as usize;
        if count > bytes.len() / LEAF_BYTES_MIN {
            return Err(TOO_SHORT);
        }
        let dropped = take_leaves(&mut reader, count, 0, object)?;
        match reader.is_empty() {
            true => Ok(Self { covered, epochs, leaves, runs, snapshots, objects, dropped }),
            false => Err(TOO_LONG),
        }
    }
}

/// The bytes of a leaf.
pub(super) fn encode_leaf(number: u64, runs: &[Run]) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + 16 * runs.len());
    put_number(&mut out, runs.len() as u64);
    put_runs(&mut out, LeafRef::span_of(number).start, runs);
    out
}

/// Reads a leaf from its bytes, which are in an object of that number.
pub(super) fn decode_leaf(number: u64, object: Seq, bytes: &[u8]) -> Result<Vec<Run>, Wrong> {
    let mut reader = Reader::new(bytes);
    let count = reader.number()?;
    if count > LEAF_BLOCKS {
        return Err(Wrong::Damaged("a leaf has more runs than blocks"));
    }
    let runs = take_runs(&mut reader, LeafRef::span_of(number), count as usize, object)?;
    match reader.is_empty() && runs.iter().all(|run| run.place != Place::Zero) {
        true => Ok(runs),
        false => Err(TOO_LONG),
    }
}

/// Appends runs that begin at or behind `end`.
fn put_runs(out: &mut Vec<u8>, mut end: u64, runs: &[Run]) {
    for Run { span, place } in runs {
        put_number(out, span.start - end);
        put_number(out, span.blocks);
        match *place {
            Place::Zero => put_number(out, 0),
            Place::Object { seq, frame, form, skip, run } => {
                let behind = u64::from(run - skip) - span.blocks;
                let [frame, form, skip] = [frame, form.number().into(), skip].map(u64::from);
                for number in [seq.0, frame, form, skip, behind] {
                    put_number(out, number);
                }
            }
        }
        end = span.end();
    }
}

/// Takes runs that are in a part of the volume, and in objects up to one.
fn take_runs(
    reader: &mut Reader<'_>,
    part: Span,
    count: usize,
    last: Seq,
) -> Result<Vec<Run>, Wrong> {
    let mut runs = Vec::with_capacity(count);
    let mut end = part.start;
    for _ in 0..count {
        let [gap, blocks] = [reader.number()?, reader.number()?];
        let start = end.checked_add(gap).ok_or(OUTSIDE)?;
        end = start.checked_add(blocks).filter(|end| *end <= part.end()).ok_or(OUTSIDE)?;
        let place = take_place(reader, blocks, last)?;
        if blocks == 0 {
            return Err(OUTSIDE);
        }
        runs.push(Run { span: Span { start, blocks }, place });
    }
    Ok(runs)
}

fn take_place(reader: &mut Reader<'_>, blocks: u64, last: Seq) -> Result<Place, Wrong> {
    let seq = Seq(reader.number()?);
    if seq == Seq(0) {
        return Ok(Place::Zero);
    }
    let (frame, form) = (reader.number()?, reader.number()?);
    let [skip, behind] = [reader.number()?, reader.number()?];
    let run = skip.saturating_add(blocks).saturating_add(behind);
    if seq > last || frame > OBJECT_BYTES_MAX || run > OBJECT_BYTES_MAX / BLOCK_BYTES {
        return Err(OUTSIDE);
    }
    let form = Form::of(u16::try_from(form).map_err(|_| OUTSIDE)?, run)?;
    Ok(Place::Object { seq, frame: frame as u32, form, skip: skip as u32, run: run as u32 })
}

/// Appends leaves, each with a number that is at least `step` above that of the one before.
fn put_leaves(out: &mut Vec<u8>, leaves: &[LeafRef], step: u64) {
    let mut next = 0;
    for LeafRef { number, place } in leaves {
        let [at, bytes] = [place.at, place.bytes].map(u64::from);
        for number in [number - next, place.seq.0, at, bytes] {
            put_number(out, number);
        }
        next = number + step;
    }
}

/// Takes leaves that [`put_leaves`] has written.
fn take_leaves(
    reader: &mut Reader<'_>,
    count: usize,
    step: u64,
    object: Seq,
) -> Result<Vec<LeafRef>, Wrong> {
    let mut leaves = Vec::with_capacity(count);
    let mut next = 0;
    for _ in 0..count {
        let leaf = take_leaf(reader, next, object)?;
        next = leaf.number + step;
        leaves.push(leaf);
    }
    Ok(leaves)
}

/// Takes a leaf of that number or a higher one.
fn take_leaf(reader: &mut Reader<'_>, next: u64, object: Seq) -> Result<LeafRef, Wrong> {
    let [gap, seq] = [reader.number()?, reader.number()?];
    let [at, bytes] = [reader.number()?, reader.number()?];
    let number = next.checked_add(gap).filter(|number| *number <= SIZE_MAX / LEAF_BLOCKS);
    let is_inside = at.checked_add(bytes).is_some_and(|end| end <= OBJECT_BYTES_MAX);
    match number.filter(|_| is_inside && (1..=object.0).contains(&seq)) {
        Some(number) => {
            let place = FramePlace { seq: Seq(seq), at: at as u32, bytes: bytes as u32 };
            Ok(LeafRef { number, place })
        }
        None => Err(Wrong::Damaged("a leaf of its directory leads outside")),
    }
}

/// Checks that the epochs are those of all objects up to one, which is before this one.
fn check_log(covered: Committed, epochs: &[Reach], object: Seq) -> Result<(), Wrong> {
    let is_right = covered.seq < object
        && covered.lsn.0 <= NUMBER_MAX
        && epochs.first().map(|first| first.first) == (covered.seq.0 > 0).then_some(Seq(1))
        && epochs.last().is_none_or(|last| last.first <= covered.seq && last.epoch.0 <= NUMBER_MAX)
        && epochs
            .windows(2)
            .all(|pair| pair[0].epoch < pair[1].epoch && pair[0].first < pair[1].first);
    match is_right {
        true => Ok(()),
        false => Err(Wrong::Damaged("the epochs of its directory contradict one another")),
    }
}
