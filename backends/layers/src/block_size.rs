//! Lets ops of any alignment reach a volume that takes whole blocks only.
//!
//! Reads are widened and cut; writes of parts of blocks become read, patch, write. Since two
//! connections may write parts of one block, all writing ops of the volume are entered in one table
//! ([`RangeLocks`]), which wakes the thread of an op that waited for one of another thread.

use std::sync::Arc;

use sheave_core::extents::{data, empty_range_outcome};
use sheave_core::{
    Backend, ByteRange, Completion, Error, ErrorKind, Extent, Io, IoDone, Layer, Legs, Nanos, Op,
    OpKind, Outcome, Payload, Reply, Result, Segment, Submitted, Tag, Volume, VolumeInfo,
};

use crate::jobs::{Jobs, Plan};
use crate::patch::Patch;
use crate::range_locks::{Mode, RangeLocks, Ticket};

/// A volume that takes any alignment. It still states the minimum block of the one below, for
/// clients that ask, since whole blocks are faster.
pub struct BlockSize {
    inner: Arc<dyn Volume>,
    locks: Arc<RangeLocks>,
}

impl BlockSize {
    /// Wraps a volume. All connections must go through this one layer.
    #[must_use]
    pub fn new(inner: Arc<dyn Volume>) -> Self {
        Self { inner, locks: Arc::default() }
    }

    fn blocks(&self) -> Blocks {
        Blocks::of(&*self.inner)
    }
}

impl Layer for BlockSize {
    fn inner(&self) -> &Arc<dyn Volume> {
        &self.inner
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        let jobs = Jobs::new(
            WholeBlocks(Arc::clone(&self.locks)),
            Legs::of(std::slice::from_ref(&self.inner))?,
        );
        Ok(Box::new(BlockSizeBackend { jobs, volume: Arc::clone(&self.inner) }))
    }

    fn takes_registered(&self, kind: OpKind, range: ByteRange) -> bool {
        // Writes may have to wait here for other writes.
        kind == OpKind::Read
            && self.blocks().fill(range)
            && self.inner.takes_registered(kind, range)
    }
}

/// The only leg.
const LEG: usize = 0;

struct BlockSizeBackend {
    jobs: Jobs<WholeBlocks>,
    /// The one below, which may grow.
    volume: Arc<dyn Volume>,
}

/// The plan of ops on parts of blocks.
struct WholeBlocks(Arc<RangeLocks>);

/// The remaining work of an op from above.
struct Work {
    /// Its range in the table, if it writes.
    ticket: Option<Ticket>,
    granted: bool,
    steps: Steps,
    outcome: Outcome,
}

/// What the completion of the op below means for the op above.
enum Steps {
    /// Its outcome is the outcome.
    Forward,
    /// These bytes of the reply are the answer.
    Read { skip: usize, len: usize },
    /// This part of the extents is the answer.
    Status { skip: u64, len: u64 },
    /// The last of these has made progress.
    Write(Vec<Step>),
}

enum Step {
    Zero { range: ByteRange, fua: bool, no_hole: bool, fast: bool },
    Patch(Patch),
}

enum Next {
    Submit(Op),
    End(Reply),
}

impl Backend for BlockSizeBackend {
    fn info(&self) -> &VolumeInfo {
        self.volume.info()
    }

    fn write_buffer(&mut self, range: ByteRange, io: &mut dyn Io) -> Result<Payload> {
        if self.blocks().fill(range) {
            return self.jobs.legs.write_buffer(LEG, range, io);
        }
        io.buffer(range.len() as usize).map(Payload::from)
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if let Some(outcome) = empty_range_outcome(&op) {
            return Submitted::Done(outcome);
        }
        let blocks = self.blocks();
        let whole = op.range().is_none_or(|range| blocks.fill(range));
        if blocks.block > 1 && (!whole || op.kind().is_write()) {
            return self.begin(op, tag, blocks, io);
        }
        match self.jobs.pass_on(LEG, op, tag, io) {
            Ok(submitted) => submitted,
            Err(op) => self.begin(op, tag, blocks, io),
        }
    }

    fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        self.jobs.io_done(done, io);
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        self.jobs.reap(io)
    }

    fn deadline(&self) -> Option<Nanos> {
        self.jobs.deadline()
    }
}

impl Drop for BlockSizeBackend {
    fn drop(&mut self) {
        // Otherwise the ranges of ops that will not complete would block other ops for ever.
        for work in self.jobs.works() {
            work.ticket.inspect(|ticket| self.jobs.plan.0.leave(*ticket));
        }
    }
}

impl BlockSizeBackend {
    fn blocks(&self) -> Blocks {
        Blocks::of(&*self.volume)
    }

    /// Makes a job of an op.
    fn begin(&mut self, op: Op, tag: Tag, blocks: Blocks, io: &mut dyn Io) -> Submitted {
        if self.jobs.is_full() {
            return Submitted::Full(op);
        }
        if let Err(error) = self.jobs.make_room(1) {
            return Submitted::Done(Err(error));
        }
        let (ticket, granted) = match self.jobs.plan.enter(&op, blocks, io) {
            Ok(Some(entered)) => entered,
            Ok(None) => return Submitted::Full(op),
            Err(error) => return Submitted::Done(Err(error)),
        };
        match blocks.plan(op) {
            Ok((first, steps)) => {
                let work = Work { ticket, granted, steps, outcome: Ok(Reply::Done) };
                self.jobs.begin(tag, work, [(LEG, first)], io);
                Submitted::Queued
            }
            Err(outcome) => {
                ticket.inspect(|ticket| self.jobs.plan.0.leave(*ticket));
                Submitted::Done(outcome)
            }
        }
    }
}

impl WholeBlocks {
    /// Enters the range of a writing op; `None` when the table has no room. It wakes this thread
    /// when it has.
    fn enter(
        &self,
        op: &Op,
        blocks: Blocks,
        io: &dyn Io,
    ) -> Result<Option<(Option<Ticket>, bool)>> {
        let Some(range) = op.range().filter(|_| op.kind().is_write()) else {
            return Ok(Some((None, true)));
        };
        // A trim never changes a part of a block.
        let shared = blocks.fill(range) || matches!(op, Op::Trim { .. });
        let mode = if shared { Mode::Shared } else { Mode::Exclusive };
        let wide = range.widened(blocks.block, blocks.size);
        let entered = self.0.enter(wide, mode, || io.waker())?;
        Ok(entered.map(|(ticket, granted)| (Some(ticket), granted)))
    }
}

impl Plan for WholeBlocks {
    type Work = Work;

    fn may_go(&mut self, work: &mut Work) -> bool {
        work.granted |= work.ticket.is_none_or(|ticket| self.0.is_granted(ticket));
        work.granted
    }

    fn advance(
        &mut self,
        work: &mut Work,
        (leg, outcome): (usize, Outcome),
        legs: &mut Legs,
        io: &mut dyn Io,
    ) -> Option<(usize, Op)> {
        match outcome.and_then(|reply| work.steps.advance(reply, legs, io)) {
            Ok(Next::Submit(op)) => return Some((leg, op)),
            Ok(Next::End(reply)) => work.outcome = Ok(reply),
            Err(error) => work.outcome = Err(error),
        }
        None
    }

    fn finish(&mut self, work: Work) -> Outcome {
        work.ticket.inspect(|ticket| self.0.leave(*ticket));
        work.outcome
    }
}

impl Steps {
    fn advance(&mut self, reply: Reply, legs: &mut Legs, io: &mut dyn Io) -> Result<Next> {
        Ok(match (self, reply) {
            (Self::Read { skip, len }, Reply::Data(bytes)) => {
                Next::End(Reply::Data(bytes.slice(*skip, *len)))
            }
            (Self::Status { skip, len }, Reply::Extents(extents)) => {
                Next::End(Reply::Extents(cut(extents, *skip, *len)))
            }
            (Self::Write(steps), reply) => {
                if let Some(Step::Patch(patch)) = steps.last_mut()
                    && let Some(op) = patch.completed(
                        &reply,
                        |range, io| legs.write_buffer(LEG, range, io),
                        io,
                    )?
                {
                    return Ok(Next::Submit(op));
                }
                steps.pop();
                steps.last().map_or(Next::End(Reply::Done), |step| Next::Submit(step.start()))
            }
            (_, reply) => Next::End(reply),
        })
    }
}

impl Step {
    /// The first op below.
    fn start(&self) -> Op {
        match self {
            Self::Zero { range, fua, no_hole, fast } => {
                Op::WriteZeroes { range: *range, fua: *fua, no_hole: *no_hole, fast: *fast }
            }
            Self::Patch(patch) => patch.start(),
        }
    }
}

/// The blocks of a volume at one moment. The last one may be short.
#[derive(Clone, Copy)]
struct Blocks {
    block: u64,
    size: u64,
}

impl Blocks {
    fn of(volume: &dyn Volume) -> Self {
        Self { block: volume.info().block.minimum.into(), size: volume.size() }
    }

    /// Whether a range consists of whole blocks.
    fn fill(self, range: ByteRange) -> bool {
        range.widened(self.block, self.size) == range
    }

    /// The whole blocks inside a range.
    fn inside(self, range: ByteRange) -> ByteRange {
        let skip = range.start().next_multiple_of(self.block) - range.start();
        let end =
            if range.end() == self.size { self.size } else { range.end() & !(self.block - 1) };
        let len = end.saturating_sub(range.start().saturating_add(skip));
        range.part(skip.min(range.len()), len)
    }

    /// The first op below for an op from above, and the next steps; or the outcome at once.
    fn plan(self, op: Op) -> Result<(Op, Steps), Outcome> {
        let Some(range) = op.range() else { return Ok((op, Steps::Forward)) };
        if self.fill(range) {
            return Ok((op, Steps::Forward));
        }
        let wide = range.widened(self.block, self.size);
        let skip = range.start() - wide.start();
        Ok(match op {
            Op::Read { .. } => {
                let steps = Steps::Read { skip: skip as usize, len: range.len() as usize };
                (Op::Read { range: wide, into: None }, steps)
            }
            Op::Write { data, fua, .. } => {
                let patch = self.patch(range, data, fua);
                (patch.start(), Steps::Write(vec![patch]))
            }
            Op::Trim { fua, .. } => {
                let range = self.inside(range);
                if range.is_empty() {
                    return Err(Ok(Reply::Done));
                }
                (Op::Trim { range, fua }, Steps::Forward)
            }
            Op::WriteZeroes { fua, no_hole, fast, .. } => {
                self.plan_zeroes(range, fua, no_hole, fast)?
            }
            Op::Cache { .. } => (Op::Cache { range: wide }, Steps::Forward),
            Op::BlockStatus { extents_max, .. } => {
                let steps = Steps::Status { skip, len: range.len() };
                (Op::BlockStatus { range: wide, extents_max }, steps)
            }
            Op::Flush => (Op::Flush, Steps::Forward),
        })
    }

    /// Whole blocks first: if they cannot be zeroed fast, nothing has been changed.
    fn plan_zeroes(
        self,
        range: ByteRange,
        fua: bool,
        no_hole: bool,
        fast: bool,
    ) -> Result<(Op, Steps), Outcome> {
        let zeroes = |range: ByteRange| {
            let mut zeroes = Payload::new();
            zeroes.push(Segment::Zero(range.len() as usize));
            self.patch(range, zeroes, fua)
        };
        let inside = self.inside(range);
        if inside.is_empty() {
            if fast {
                let why = "a part of a block is not zeroed faster than it is written";
                return Err(Err(Error::new(ErrorKind::Unsupported, "write_zeroes", why)));
            }
            let patch = zeroes(range);
            return Ok((patch.start(), Steps::Write(vec![patch])));
        }
        let head = range.part(0, inside.start() - range.start());
        let tail = range.part(inside.end() - range.start(), range.end() - inside.end());
        let edges = [head, tail].into_iter().filter(|edge| !edge.is_empty());
        let mut steps: Vec<Step> = edges.map(zeroes).collect();
        let whole = Step::Zero { range: inside, fua, no_hole, fast };
        let first = whole.start();
        steps.push(whole);
        Ok((first, Steps::Write(steps)))
    }

    fn patch(self, range: ByteRange, data: Payload, fua: bool) -> Step {
        Step::Patch(Patch::new(range, data, fua, self.block, self.size))
    }
}

/// The extents of a part of the range that they describe.
fn cut(mut extents: Vec<Extent>, skip: u64, len: u64) -> Vec<Extent> {
    let mut at = 0;
    extents.retain_mut(|extent| {
        let (start, end) = (at, at + extent.len);
        at = end;
        extent.len = end - start.max(skip.min(end));
        start < skip + len && end > skip
    });
    if extents.is_empty() {
        // The answer ended before the requested part.
        extents.push(data(len));
    }
    extents
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_cut_to_the_part_asked_about() {
        let run = |len, hole| Extent { len, hole, zero: hole };
        let extents = [run(100, true), run(12, false), run(400, true), run(512, false)];
        assert_eq!(cut(extents.to_vec(), 0, 1), [run(100, true)]);
        assert_eq!(cut(extents.to_vec(), 100, 12), [run(12, false)]);
        assert_eq!(cut(extents.to_vec(), 101, 12), [run(11, false), run(400, true)]);
        assert_eq!(cut(extents.to_vec(), 600, 1), [run(424, false)]);
        assert_eq!(cut(extents[..1].to_vec(), 200, 50), [data(50)], "it ended before");
    }

    #[test]
    fn whole_blocks_inside_a_range() {
        let blocks = Blocks { block: 512, size: 2000 };
        let range = |start, len| ByteRange::within(start, len, 2000).unwrap();
        assert_eq!(blocks.inside(range(1, 1023)), range(512, 512));
        assert_eq!(blocks.inside(range(512, 1488)), range(512, 1488), "the last block is short");
        assert!(blocks.inside(range(1, 1022)).is_empty());
        assert!(blocks.inside(range(10, 20)).is_empty());
        assert!(blocks.fill(range(1536, 464)) && !blocks.fill(range(1536, 463)));
    }
}
