//! Ops from above that become one or more ops below.
//!
//! A layer that does not pass its ops on one by one describes them by a [`Plan`]. [`Jobs`] runs it
//! over the backends below: it keeps waiting ops, assigns completions, and bounds everything.

use std::collections::VecDeque;

use sheave_core::{
    Completion, Io, IoDone, Issuer, Legs, Nanos, Op, Outcome, Result, Submitted, Tag, memory,
};
use slab::Slab;

use crate::RETRY_NS;

/// The most ops from above that a layer has in progress.
const JOBS_MAX: usize = 1024;

/// How a layer carries out its ops.
pub trait Plan: Send {
    /// The state of an op from above until its completion.
    type Work: Send;

    /// Whether the next op of a job may be submitted below. Called in each turn until it may.
    fn may_go(&mut self, work: &mut Self::Work) -> bool {
        let _ = work;
        true
    }

    /// An op of a job has completed below, at this leg. Returns the job's next op.
    fn advance(
        &mut self,
        work: &mut Self::Work,
        completed: (usize, Outcome),
        legs: &mut Legs,
        io: &mut dyn Io,
    ) -> Option<(usize, Op)>;

    /// All ops of the job have completed. Returns the outcome of the op from above.
    fn finish(&mut self, work: Self::Work) -> Outcome;
}

/// Ops in progress, and the backends below.
pub struct Jobs<P: Plan> {
    /// The layer's own part.
    pub plan: P,
    /// The backends below.
    pub legs: Legs,
    jobs: Slab<Job<P::Work>>,
    /// Ops of jobs, with their legs, that may not be submitted yet or find no room below.
    pending: VecDeque<(usize, usize, Op)>,
    ready: VecDeque<Completion>,
    /// Ops of all jobs, pending or below.
    ops: usize,
    /// Set while an op waits for room below.
    retry_at: Option<Nanos>,
}

/// An op from above.
struct Job<W> {
    tag: Tag,
    /// Ops of it that are pending or below.
    ops: usize,
    work: W,
}

impl<P: Plan> Jobs<P> {
    /// No ops in progress over these backends.
    #[must_use]
    pub fn new(plan: P, legs: Legs) -> Self {
        let (jobs, pending, ready) = (Slab::new(), VecDeque::new(), VecDeque::new());
        Self { plan, legs, jobs, pending, ready, ops: 0, retry_at: None }
    }

    /// Passes an op from above on as it is.
    ///
    /// # Errors
    /// Hands it back when it has to become a job, see [`Tag::passed_on`].
    pub fn pass_on(
        &mut self,
        leg: usize,
        op: Op,
        tag: Tag,
        io: &mut dyn Io,
    ) -> Result<Submitted, Op> {
        match tag.passed_on() {
            Some(below) => Ok(self.legs.submit(leg, op, below, io)),
            None => Err(op),
        }
    }

    /// Whether the number of jobs is at its maximum.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.jobs.len() >= JOBS_MAX
    }

    /// Makes sure that one more job, with at most `ops` ops at a time, needs no more memory in
    /// these lists.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn make_room(&mut self, ops: usize) -> Result<()> {
        memory::check_growth::<Job<P::Work>>(self.jobs.len(), self.jobs.capacity())?;
        memory::attempt(|| self.ready.try_reserve(self.jobs.len() + 1))?;
        memory::attempt(|| self.pending.try_reserve(self.ops + ops - self.pending.len()))
    }

    /// Begins a job with at least one op, after [`Self::make_room`].
    pub fn begin(
        &mut self,
        tag: Tag,
        work: P::Work,
        first: impl IntoIterator<Item = (usize, Op)>,
        io: &mut dyn Io,
    ) {
        let key = self.jobs.insert(Job { tag, ops: 0, work });
        for (leg, op) in first {
            self.pending.push_back((key, leg, op));
            self.jobs[key].ops += 1;
            self.ops += 1;
        }
        self.pump(io);
    }

    /// The states of the ops in progress.
    pub fn works(&self) -> impl Iterator<Item = &P::Work> {
        self.jobs.iter().map(|(_, job)| &job.work)
    }

    /// See [`sheave_core::Backend::io_done`].
    pub fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        self.legs.io_done(done, io);
    }

    /// See [`sheave_core::Backend::reap`].
    pub fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        if let Some(completion) = self.ready.pop_front() {
            return Some(completion);
        }
        while let Some((leg, Completion { tag, outcome })) = self.legs.reap(io) {
            match tag.issuer() {
                Issuer::Above(tag) => return Some(Completion { tag, outcome }),
                Issuer::Own(key) => {
                    if let Some((leg, op)) = self.advance(key, (leg, outcome), io) {
                        self.run(key, leg, op, io);
                    }
                }
            }
            if let Some(completion) = self.ready.pop_front() {
                return Some(completion);
            }
        }
        // The completed ops may have made room below.
        self.pump(io);
        self.ready.pop_front()
    }

    /// See [`sheave_core::Backend::deadline`].
    #[must_use]
    pub fn deadline(&self) -> Option<Nanos> {
        self.retry_at.into_iter().chain(self.legs.deadline()).min()
    }

    /// Submits each pending op once to its backend.
    fn pump(&mut self, io: &mut dyn Io) {
        self.retry_at = None;
        for _ in 0..self.pending.len() {
            let Some((key, leg, op)) = self.pending.pop_front() else { break };
            if self.plan.may_go(&mut self.jobs[key].work) {
                self.run(key, leg, op, io);
            } else {
                self.pending.push_back((key, leg, op));
            }
        }
    }

    /// Runs one op of a job, and those that follow it, until one is queued below or waits.
    fn run(&mut self, key: usize, mut leg: usize, mut op: Op, io: &mut dyn Io) {
        loop {
            match self.legs.submit(leg, op, Tag::own(key), io) {
                Submitted::Queued => return,
                Submitted::Full(back) => {
                    self.pending.push_back((key, leg, back));
                    self.retry_at = Some(io.now() + RETRY_NS);
                    return;
                }
                Submitted::Done(outcome) => match self.advance(key, (leg, outcome), io) {
                    Some(next) => (leg, op) = next,
                    None => return,
                },
            }
        }
    }

    /// Takes the completion of a job's op; returns the next op, or completes the job if none is
    /// left.
    fn advance(
        &mut self,
        key: usize,
        completed: (usize, Outcome),
        io: &mut dyn Io,
    ) -> Option<(usize, Op)> {
        let job = &mut self.jobs[key];
        if let Some(next) = self.plan.advance(&mut job.work, completed, &mut self.legs, io) {
            return Some(next);
        }
        self.ops -= 1;
        job.ops -= 1;
        if job.ops == 0 {
            let Job { tag, work, .. } = self.jobs.remove(key);
            let outcome = self.plan.finish(work);
            self.ready.push_back(Completion { tag, outcome });
        }
        None
    }
}
