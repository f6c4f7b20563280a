//! A backend that delays ops, or fails them, as the policy of a layer decides.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use sheave_core::{
    Backend, ByteRange, Completion, Error, Io, IoDone, Nanos, Op, Payload, Result, Submitted, Tag,
    VolumeInfo, memory,
};

use crate::RETRY_NS;

/// The most ops that wait in a gate.
const DELAYED_MAX: usize = 1024;

/// Decides when each op may pass, and whether it fails.
pub(super) trait Policy: Send {
    /// What an op waits for. The smallest turn in a gate passes first.
    type Turn: Ord + Send;

    /// How long a gate with waiting ops may sleep until it asks again when they are due.
    const RECHECK_NS: Nanos = Nanos::MAX;

    /// What an op waits for, and what is done with it then. Called once for each op.
    fn decide(&mut self, op: Op, now: Nanos) -> (Self::Turn, Decision);

    /// When the turn comes. This may change while an op waits.
    fn due(&self, turn: &Self::Turn) -> Nanos;

    /// Notes the time, before `due` is called in a new turn of the engine.
    fn note_time(&mut self, now: Nanos) {
        let _ = now;
    }

    /// Whether any op may pass at once, uncounted. Called only when no op waits.
    fn is_open(&self) -> bool {
        false
    }

    /// Whether writes may fail, so that their data must not be received into the volume's own
    /// memory.
    fn may_fail_writes(&self) -> bool {
        false
    }
}

/// A backend behind a queue ordered by turn.
pub(super) struct Gate<K: Policy> {
    inner: Box<dyn Backend>,
    policy: K,
    delayed: BinaryHeap<Reverse<Delayed<K::Turn>>>,
    /// The number of the next op; it keeps ops of one turn in order.
    next: u64,
    /// When the delayed ops were last checked.
    looked_at: Nanos,
}

struct Delayed<T> {
    turn: T,
    /// The backend below had no room before this time.
    not_before: Nanos,
    number: u64,
    tag: Tag,
    decision: Decision,
}

/// What is done with an op when its turn has come.
pub(super) enum Decision {
    Submit(Op),
    Fail(Error),
}

impl<K: Policy> Gate<K> {
    pub(super) fn new(inner: Box<dyn Backend>, policy: K) -> Self {
        Self { inner, policy, delayed: BinaryHeap::new(), next: 0, looked_at: 0 }
    }

    /// Carries out the decision about an op; hands it back if the backend below has no room.
    fn pass(
        &mut self,
        decision: Decision,
        tag: Tag,
        io: &mut dyn Io,
    ) -> Result<Submitted, Decision> {
        match decision {
            Decision::Fail(error) => Ok(Submitted::Done(Err(error))),
            Decision::Submit(op) => match self.inner.submit(op, tag, io) {
                Submitted::Full(op) => Err(Decision::Submit(op)),
                taken => Ok(taken),
            },
        }
    }

    /// Submits an op that the policy counts. A function of its own, to keep [`Backend::submit`]
    /// short.
    fn submit_counted(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if self.delayed.len() >= DELAYED_MAX {
            return Submitted::Full(op);
        }
        if let Err(error) = memory::attempt(|| self.delayed.try_reserve(1)) {
            return Submitted::Done(Err(error));
        }
        let now = io.now();
        if self.delayed.is_empty() {
            self.looked_at = now;
        }
        let (turn, decision) = self.policy.decide(op, now);
        if self.policy.due(&turn) > now {
            self.delay(turn, 0, tag, decision);
            return Submitted::Queued;
        }
        self.pass(decision, tag, io).unwrap_or_else(|decision| {
            // The op is taken all the same, since the policy has counted it.
            self.delay(turn, now + RETRY_NS, tag, decision);
            Submitted::Queued
        })
    }

    /// Passes the delayed ops whose turn has come, up to the first that completes at once.
    fn reap_delayed(&mut self, io: &mut dyn Io) -> Option<Completion> {
        let now = io.now();
        self.looked_at = now;
        self.policy.note_time(now);
        while self.delayed.peek().is_some_and(|Reverse(first)| self.due(first) <= now) {
            let Some(Reverse(Delayed { turn, tag, decision, .. })) = self.delayed.pop() else {
                break;
            };
            match self.pass(decision, tag, io) {
                Ok(Submitted::Done(outcome)) => return Some(Completion { tag, outcome }),
                Ok(_) => {}
                Err(decision) => self.delay(turn, now + RETRY_NS, tag, decision),
            }
        }
        None
    }

    fn delay(&mut self, turn: K::Turn, not_before: Nanos, tag: Tag, decision: Decision) {
        let number = self.next;
        self.next += 1;
        self.delayed.push(Reverse(Delayed { turn, not_before, number, tag, decision }));
    }

    fn due(&self, delayed: &Delayed<K::Turn>) -> Nanos {
        self.policy.due(&delayed.turn).max(delayed.not_before)
    }
}

impl<K: Policy> Backend for Gate<K> {
    fn info(&self) -> &VolumeInfo {
        self.inner.info()
    }

    fn write_buffer(&mut self, range: ByteRange, io: &mut dyn Io) -> Result<Payload> {
        if self.policy.may_fail_writes() {
            return io.buffer(range.len() as usize).map(Payload::from);
        }
        self.inner.write_buffer(range, io)
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if self.delayed.is_empty() && self.policy.is_open() {
            return self.inner.submit(op, tag, io);
        }
        self.submit_counted(op, tag, io)
    }

    fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        self.inner.io_done(done, io);
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        if self.delayed.is_empty() {
            return self.inner.reap(io);
        }
        self.reap_delayed(io).or_else(|| self.inner.reap(io))
    }

    fn deadline(&self) -> Option<Nanos> {
        let below = self.inner.deadline();
        let Some(Reverse(first)) = self.delayed.peek() else { return below };
        let own = self.due(first).min(self.looked_at.saturating_add(K::RECHECK_NS));
        Some(below.map_or(own, |below| own.min(below)))
    }
}

impl<T: Ord> Ord for Delayed<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.turn.cmp(&other.turn).then(self.number.cmp(&other.number))
    }
}

impl<T: Ord> PartialOrd for Delayed<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T: Ord> PartialEq for Delayed<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<T: Ord> Eq for Delayed<T> {}
