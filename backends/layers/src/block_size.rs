//! Lets ops of any alignment reach a volume that takes whole blocks only.
//!
//! Reads are widened and cut, writes of parts of blocks become read, patch, write. Since two
//! connections may write parts of one block, all writing ops of the volume are entered in one table
//! ([`RangeLocks`]), which wakes the thread of an op that had to wait for one of another thread.

use std::collections::VecDeque;
use std::sync::Arc;

use sheave_core::{
    Backend, ByteRange, Completion, Error, ErrorKind, Extent, Io, IoDone, Nanos, Op, OpKind,
    Outcome, Payload, Reply, Result, Segment, Submitted, Tag, Volume, VolumeInfo, memory,
};
use slab::Slab;

use super::patch::Patch;
use super::range_locks::{Mode, RangeLocks, Ticket};
use crate::RETRY_NS;
use sheave_core::extents::{data, empty_range_outcome};

/// The most ops that a backend of this layer has in work.
const JOBS_MAX: usize = 1024;
/// Marks the tags of ops that this layer issues itself.
const OWN: u64 = 1 << 63;

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

impl Volume for BlockSize {
    fn info(&self) -> &VolumeInfo {
        self.inner.info()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn grow(&self) -> Result<u64> {
        self.inner.grow()
    }

    fn below(&self) -> Option<&dyn Volume> {
        Some(&*self.inner)
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        Ok(Box::new(BlockSizeBackend {
            inner: self.inner.backend()?,
            volume: Arc::clone(&self.inner),
            locks: Arc::clone(&self.locks),
            jobs: Slab::new(),
            pending: VecDeque::new(),
            ready: VecDeque::new(),
            retry_at: None,
        }))
    }

    fn takes_registered(&self, kind: OpKind, range: ByteRange) -> bool {
        // Writes may have to wait here for others.
        kind == OpKind::Read
            && self.blocks().fill(range)
            && self.inner.takes_registered(kind, range)
    }
}

struct BlockSizeBackend {
    inner: Box<dyn Backend>,
    /// That of `inner`, which may grow.
    volume: Arc<dyn Volume>,
    locks: Arc<RangeLocks>,
    jobs: Slab<Job>,
    /// Next ops of jobs, which wait for their range or for room below.
    pending: VecDeque<(usize, Op)>,
    ready: VecDeque<Completion>,
    /// Set while something waits for room below.
    retry_at: Option<Nanos>,
}

/// An op from above. At any time one op of it is pending or below.
struct Job {
    tag: Tag,
    ticket: Option<Ticket>,
    granted: bool,
    work: Work,
}

/// What the end of the op below means for the op above.
enum Work {
    /// It is the end.
    Forward,
    /// These bytes of the reply are the answer.
    Read { skip: usize, len: usize },
    /// This part of the extents is the answer.
    Status { skip: u64, len: u64 },
    /// The last of these has made progress.
    Steps(Vec<Step>),
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
        self.inner.info()
    }

    fn write_buffer(&mut self, range: ByteRange, io: &mut dyn Io) -> Result<Payload> {
        if self.blocks().fill(range) {
            return self.inner.write_buffer(range, io);
        }
        io.buffer(range.len() as usize).map(Payload::from)
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if let Some(outcome) = empty_range_outcome(&op) {
            return Submitted::Done(outcome);
        }
        let blocks = self.blocks();
        let whole = op.range().is_none_or(|range| blocks.fill(range));
        let plain = whole && !op.kind().is_write() && tag.0 & OWN == 0;
        if blocks.block == 1 || plain {
            return self.inner.submit(op, tag, io);
        }
        if self.jobs.len() >= JOBS_MAX {
            return Submitted::Full(op);
        }
        if let Err(error) = self.make_room() {
            return Submitted::Done(Err(error));
        }
        let (ticket, granted) = match self.enter(&op, blocks, io) {
            Ok(Some(entered)) => entered,
            Ok(None) => return Submitted::Full(op),
            Err(error) => return Submitted::Done(Err(error)),
        };
        match blocks.plan(op) {
            Ok((first, work)) => {
                let key = self.jobs.insert(Job { tag, ticket, granted, work });
                self.pending.push_back((key, first));
                self.pump(io);
                Submitted::Queued
            }
            Err(outcome) => {
                ticket.inspect(|ticket| self.locks.leave(*ticket));
                Submitted::Done(outcome)
            }
        }
    }

    fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        self.inner.io_done(done, io);
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        if let Some(completion) = self.ready.pop_front() {
            return Some(completion);
        }
        while let Some(Completion { tag, outcome }) = self.inner.reap(io) {
            if tag.0 & OWN == 0 {
                return Some(Completion { tag, outcome });
            }
            let key = (tag.0 & !OWN) as usize;
            if let Some(op) = self.advance(key, outcome, io) {
                self.run(key, op, io);
            }
            if let Some(completion) = self.ready.pop_front() {
                return Some(completion);
            }
        }
        // Nothing more has ended below; perhaps what did has made way.
        self.pump(io);
        self.ready.pop_front()
    }

    fn deadline(&self) -> Option<Nanos> {
        self.retry_at.into_iter().chain(self.inner.deadline()).min()
    }
}

impl Drop for BlockSizeBackend {
    fn drop(&mut self) {
        // Else the ranges of ops that do not end any more would stand in the way for ever.
        for (_, job) in &self.jobs {
            job.ticket.inspect(|ticket| self.locks.leave(*ticket));
        }
    }
}

impl BlockSizeBackend {
    fn blocks(&self) -> Blocks {
        Blocks::of(&*self.volume)
    }

    /// Makes sure that one more job needs no memory in these lists, whatever comes of it.
    fn make_room(&mut self) -> Result<()> {
        let count = self.jobs.len() + 1;
        memory::check_growth::<Job>(self.jobs.len(), self.jobs.capacity())?;
        memory::attempt(|| self.ready.try_reserve(count))?;
        memory::attempt(|| self.pending.try_reserve(count - self.pending.len()))
    }

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
        // A trim never writes a part of a block.
        let shared = blocks.fill(range) || matches!(op, Op::Trim { .. });
        let mode = if shared { Mode::Shared } else { Mode::Exclusive };
        let wide = range.widened(blocks.block, blocks.size);
        let entered = self.locks.enter(wide, mode, || io.waker())?;
        Ok(entered.map(|(ticket, granted)| (Some(ticket), granted)))
    }

    /// Offers each pending op once to the backend below.
    fn pump(&mut self, io: &mut dyn Io) {
        self.retry_at = None;
        for _ in 0..self.pending.len() {
            let Some((key, op)) = self.pending.pop_front() else { break };
            let job = &mut self.jobs[key];
            job.granted |= job.ticket.is_none_or(|ticket| self.locks.is_granted(ticket));
            if job.granted {
                self.run(key, op, io);
            } else {
                self.pending.push_back((key, op));
            }
        }
    }

    /// Runs a job's ops until one is queued below or the job has ended.
    fn run(&mut self, key: usize, first: Op, io: &mut dyn Io) {
        let mut op = first;
        loop {
            match self.inner.submit(op, Tag(OWN | key as u64), io) {
                Submitted::Queued => return,
                Submitted::Full(back) => {
                    self.pending.push_back((key, back));
                    self.retry_at = Some(io.now() + RETRY_NS);
                    return;
                }
                Submitted::Done(outcome) => match self.advance(key, outcome, io) {
                    Some(next) => op = next,
                    None => return,
                },
            }
        }
    }

    /// Takes the end of a job's op below; answers with its next, or ends the job.
    fn advance(&mut self, key: usize, outcome: Outcome, io: &mut dyn Io) -> Option<Op> {
        let work = &mut self.jobs[key].work;
        let outcome = match outcome.and_then(|reply| work.advance(reply, &mut *self.inner, io)) {
            Ok(Next::Submit(op)) => return Some(op),
            Ok(Next::End(reply)) => Ok(reply),
            Err(error) => Err(error),
        };
        let job = self.jobs.remove(key);
        job.ticket.inspect(|ticket| self.locks.leave(*ticket));
        self.ready.push_back(Completion { tag: job.tag, outcome });
        None
    }
}

impl Work {
    fn advance(&mut self, reply: Reply, inner: &mut dyn Backend, io: &mut dyn Io) -> Result<Next> {
        Ok(match (self, reply) {
            (Self::Read { skip, len }, Reply::Data(bytes)) => {
                Next::End(Reply::Data(bytes.slice(*skip, *len)))
            }
            (Self::Status { skip, len }, Reply::Extents(extents)) => {
                Next::End(Reply::Extents(cut(extents, *skip, *len)))
            }
            (Self::Steps(steps), reply) => {
                if let Some(Step::Patch(patch)) = steps.last_mut()
                    && let Some(op) = patch.ended(&reply, inner, io)?
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

    /// The first op below for an op from above, and how it goes on; or the outcome at once.
    fn plan(self, op: Op) -> Result<(Op, Work), Outcome> {
        let Some(range) = op.range() else { return Ok((op, Work::Forward)) };
        if self.fill(range) {
            return Ok((op, Work::Forward));
        }
        let wide = range.widened(self.block, self.size);
        let skip = range.start() - wide.start();
        Ok(match op {
            Op::Read { .. } => {
                let work = Work::Read { skip: skip as usize, len: range.len() as usize };
                (Op::Read { range: wide, into: None }, work)
            }
            Op::Write { data, fua, .. } => {
                let patch = self.patch(range, data, fua);
                (patch.start(), Work::Steps(vec![patch]))
            }
            Op::Trim { fua, .. } => {
                let range = self.inside(range);
                if range.is_empty() {
                    return Err(Ok(Reply::Done));
                }
                (Op::Trim { range, fua }, Work::Forward)
            }
            Op::WriteZeroes { fua, no_hole, fast, .. } => {
                self.plan_zeroes(range, fua, no_hole, fast)?
            }
            Op::Cache { .. } => (Op::Cache { range: wide }, Work::Forward),
            Op::BlockStatus { extents_max, .. } => {
                let work = Work::Status { skip, len: range.len() };
                (Op::BlockStatus { range: wide, extents_max }, work)
            }
            Op::Flush => (Op::Flush, Work::Forward),
        })
    }

    /// Whole blocks first: if those can't be zeroed fast, nothing has been altered.
    fn plan_zeroes(
        self,
        range: ByteRange,
        fua: bool,
        no_hole: bool,
        fast: bool,
    ) -> Result<(Op, Work), Outcome> {
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
            return Ok((patch.start(), Work::Steps(vec![patch])));
        }
        let head = range.part(0, inside.start() - range.start());
        let tail = range.part(inside.end() - range.start(), range.end() - inside.end());
        let edges = [head, tail].into_iter().filter(|edge| !edge.is_empty());
        let mut steps: Vec<Step> = edges.map(zeroes).collect();
        let whole = Step::Zero { range: inside, fua, no_hole, fast };
        let first = whole.start();
        steps.push(whole);
        Ok((first, Work::Steps(steps)))
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
        // The answer ended before the part that was asked about.
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
