//! The content of a directory: the map of a volume up to an object, as a checkpoint stores it.

use super::code::{Reader, Wrong, put_number};
use super::object::OBJECT_BYTES_MAX;
use super::root::{Committed, NUMBER_MAX, Reach, SIZE_MAX};
use crate::extents::Span;
use crate::ids::{BLOCK_BYTES, Epoch, Lsn, Place, Seq};

/// A directory. `docs/format.md` draws its bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// The part of the log that is in it.
    pub covered: Committed,
    /// The epochs that have objects in that part, in order.
    pub epochs: Vec<Reach>,
    /// Where blocks are that are not zeroes, in the order of their addresses.
    pub runs: Vec<Run>,
}

/// Blocks that follow one another in a run of blocks of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The blocks.
    pub span: Span,
    /// Where the first one is.
    pub place: Place,
}

const OUTSIDE: Wrong = Wrong::Damaged("a run of its directory leads outside");
/// Bytes before the epochs.
const BEGIN_BYTES: usize = 24;
const REACH_BYTES: usize = 16;
/// A run takes at least so many bytes.
const RUN_BYTES_MIN: usize = 6;

impl Directory {
    /// Its bytes.
    ///
    /// # Panics
    /// When it has runs of zeroes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let runs_bytes = self.runs.len() * 2 * RUN_BYTES_MIN;
        let bytes = BEGIN_BYTES + self.epochs.len() * REACH_BYTES + runs_bytes;
        let mut out = Vec::with_capacity(bytes);
        out.extend(self.covered.seq.0.to_le_bytes());
        out.extend(self.covered.lsn.0.to_le_bytes());
        out.extend((self.epochs.len() as u32).to_le_bytes());
        out.extend((self.runs.len() as u32).to_le_bytes());
        for Reach { epoch, first } in &self.epochs {
            out.extend(epoch.0.to_le_bytes());
            out.extend(first.0.to_le_bytes());
        }
        let mut end = 0;
        for Run { span, place } in &self.runs {
            let Place::Object { seq, frame, skip, run } = *place else {
                panic!("a run of zeroes in a directory");
            };
            let behind = u64::from(run - skip) - span.blocks;
            let [frame, skip] = [frame, skip].map(u64::from);
            for number in [span.start - end, span.blocks, seq.0, frame, skip, behind] {
                put_number(&mut out, number);
            }
            end = span.end();
        }
        out
    }

    /// Reads it from its bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Self, Wrong> {
        let mut reader = Reader::new(bytes);
        let covered = Committed { seq: Seq(reader.u64()?), lsn: Lsn(reader.u64()?) };
        let [epoch_count, run_count] = [reader.u32()? as usize, reader.u32()? as usize];
        if epoch_count > bytes.len() / REACH_BYTES || run_count > bytes.len() / RUN_BYTES_MIN {
            return Err(Wrong::Damaged("it ends too early"));
        }
        let mut epochs = Vec::with_capacity(epoch_count);
        for _ in 0..epoch_count {
            epochs.push(Reach { epoch: Epoch(reader.u64()?), first: Seq(reader.u64()?) });
        }
        check_log(covered, &epochs)?;
        let mut runs = Vec::with_capacity(run_count);
        let mut end = 0;
        for _ in 0..run_count {
            let run = take_run(&mut reader, end, covered.seq)?;
            end = run.span.end();
            runs.push(run);
        }
        match reader.is_empty() {
            true => Ok(Self { covered, epochs, runs }),
            false => Err(Wrong::Damaged("its directory has more than it states")),
        }
    }
}

/// Checks that the epochs are those of all objects up to one.
fn check_log(covered: Committed, epochs: &[Reach]) -> Result<(), Wrong> {
    let is_right = [covered.seq.0, covered.lsn.0].iter().all(|number| *number <= NUMBER_MAX)
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

/// The next run, which begins at or behind `end`.
fn take_run(reader: &mut Reader<'_>, end: u64, covered: Seq) -> Result<Run, Wrong> {
    let [gap, blocks] = [reader.number()?, reader.number()?];
    let seq = Seq(reader.number()?);
    let [frame, skip, behind] = [reader.number()?, reader.number()?, reader.number()?];
    let start = end.checked_add(gap).filter(|start| *start <= SIZE_MAX).ok_or(OUTSIDE)?;
    // Each is small, so their sum is a number.
    let is_small = [blocks, skip, behind].iter().all(|count| *count <= SIZE_MAX);
    let run = if is_small { skip + blocks + behind } else { u64::MAX };
    let is_right = blocks > 0
        && run <= OBJECT_BYTES_MAX / BLOCK_BYTES
        && frame <= OBJECT_BYTES_MAX
        && start + blocks <= SIZE_MAX
        && (1..=covered.0).contains(&seq.0);
    if !is_right {
        return Err(OUTSIDE);
    }
    let place = Place::Object { seq, frame: frame as u32, skip: skip as u32, run: run as u32 };
    Ok(Run { span: Span { start, blocks }, place })
}
