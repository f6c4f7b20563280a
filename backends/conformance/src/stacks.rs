//! Layers in any order, and a layer with two volumes below.

use std::sync::Arc;

use sheave_core::{
    Backend, Completion, Error, ErrorKind, Io, IoDone, Legs, Nanos, Op, Outcome, Reply, Result,
    Submitted, Tag, Volume, VolumeInfo,
};
use sheave_layers::{BlockSize, FaultRule, Faults, Jobs, Limits, Plan, RateLimit, RateLimits};

/// Makes a layer over volumes made by `below`, which may be called more than once.
pub type Wrap = fn(below: &dyn Fn() -> Arc<dyn Volume>) -> Arc<dyn Volume>;

/// Layers that let all ops through.
pub const LAYERS: [(&str, Wrap); 4] = [
    ("block size", |below| Arc::new(BlockSize::new(below()))),
    ("limits", |below| {
        let limits = RateLimits { bytes_per_second: 1 << 30, ops_per_second: 100_000 };
        Arc::new(RateLimit::new(below(), Arc::new(Limits::new(limits))))
    }),
    ("delays", |below| {
        let rule: FaultRule = "any:delay=1ms:probability=0.3".parse().expect("a rule");
        Arc::new(Faults::new(below(), vec![rule], 3))
    }),
    ("mirror", |below| Arc::new(Mirror::new([below(), below()]))),
];

/// Calls `check` with the name and the maker of each layer over each layer, itself included, over
/// volumes made by `base`.
pub fn for_any_two(
    base: &dyn Fn() -> Arc<dyn Volume>,
    check: impl Fn(&str, &dyn Fn() -> Arc<dyn Volume>),
) {
    for (outer_name, outer) in LAYERS {
        for (inner_name, inner) in LAYERS {
            check(&format!("{outer_name} over {inner_name}"), &|| outer(&|| inner(base)));
        }
    }
}

/// Two volumes of one size with the same content: writes go to both, reads to each in turn.
pub struct Mirror {
    below: [Arc<dyn Volume>; 2],
}

impl Mirror {
    /// Mirrors two volumes.
    #[must_use]
    pub fn new(below: [Arc<dyn Volume>; 2]) -> Self {
        Self { below }
    }
}

impl Volume for Mirror {
    fn info(&self) -> &VolumeInfo {
        self.below[0].info()
    }

    fn size(&self) -> u64 {
        self.below[0].size()
    }

    fn grow(&self) -> Result<u64> {
        let sizes = self.below.each_ref().map(|below| below.grow());
        sizes.into_iter().try_fold(u64::MAX, |least, size| Ok(least.min(size?)))
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        &self.below
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        let jobs = Jobs::new(Both, Legs::of(self.below())?);
        Ok(Box::new(MirrorBackend { info: self.info().clone(), jobs, next: 0 }))
    }
}

struct MirrorBackend {
    info: VolumeInfo,
    jobs: Jobs<Both>,
    /// The leg of the next read.
    next: usize,
}

impl Backend for MirrorBackend {
    fn info(&self) -> &VolumeInfo {
        &self.info
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if matches!(op, Op::WriteZeroes { fast: true, .. }) {
            // The legs could differ afterwards.
            let why = "a mirror does not zero fast";
            return Submitted::Done(Err(Error::new(ErrorKind::Unsupported, "write_zeroes", why)));
        }
        let mut op = op;
        if matches!(op, Op::Read { .. } | Op::Cache { .. } | Op::BlockStatus { .. }) {
            self.next = 1 - self.next;
            match self.jobs.pass_on(self.next, op, tag, io) {
                Ok(submitted) => return submitted,
                Err(back) => op = back,
            }
        }
        if self.jobs.is_full() {
            return Submitted::Full(op);
        }
        if let Err(error) = self.jobs.make_room(2) {
            return Submitted::Done(Err(error));
        }
        match op.kind().is_write() || matches!(op, Op::Flush) {
            true => {
                self.jobs.begin(tag, Ok(Reply::Done), [(0, op.clone()), (1, op)], io);
            }
            false => self.jobs.begin(tag, Ok(Reply::Done), [(self.next, op)], io),
        }
        Submitted::Queued
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

/// An op completes with the leg that completes last, or fails with the first that fails.
struct Both;

impl Plan for Both {
    type Work = Outcome;

    fn advance(
        &mut self,
        work: &mut Outcome,
        (_, outcome): (usize, Outcome),
        _: &mut Legs,
        _: &mut dyn Io,
    ) -> Option<(usize, Op)> {
        if work.is_ok() {
            *work = outcome;
        }
        None
    }

    fn finish(&mut self, work: Outcome) -> Outcome {
        work
    }
}
