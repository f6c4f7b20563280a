//! A backend whose ops are let through when a layer says so, or fail instead.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use sheave_core::{
    Backend, ByteRange, Completion, Error, Io, IoDone, Nanos, Op, Payload, Result, Submitted, Tag,
    VolumeInfo, memory,
};

use crate::RETRY_NS;

/// The most ops that wait in a gate.
const DELAYED_MAX: usize = 1024;

/// What a layer has to say about ops.
pub(super) trait Keeper: Send {
    /// What an op waits for. The smallest of a gate passes first.
    type Turn: Ord + Send;

    /// How long a gate with waiting ops may sleep before it asks again when they are due.
    const RECHECK_NS: Nanos = Nanos::MAX;

    /// What an op waits for, and how it ends then. Asked once for each.
    fn decide(&mut self, op: Op, now: Nanos) -> (Self::Turn, End);

    /// When the turn comes. May change while an op waits for it.
    fn due(&self, turn: &Self::Turn) -> Nanos;

    /// Notes the time, before `due` is asked in a new turn of the engine.
    fn wake(&mut self, now: Nanos) {
        let _ = now;
    }

    /// Whether any op may pass at once, uncounted. Asked only when none waits.
    fn is_open(&self) -> bool {
        false
    }

    /// Whether writes may fail, so that they must not be received in place.
    fn spoils_writes(&self) -> bool {
        false
    }
}

/// A backend behind a queue ordered by turn.
pub(super) struct Gate<K: Keeper> {
    inner: Box<dyn Backend>,
    keeper: K,
    delayed: BinaryHeap<Reverse<Delayed<K::Turn>>>,
    /// Number of the next op, which keeps ops of one turn in order.
    next: u64,
    /// When the delayed ops were last looked at.
    looked_at: Nanos,
}

struct Delayed<T> {
    turn: T,
    /// The backend below had no room before this time.
    not_before: Nanos,
    number: u64,
    tag: Tag,
    end: End,
}

/// What becomes of an op when its time has come.
pub(super) enum End {
    Submit(Op),
    Fail(Error),
}

impl<K: Keeper> Gate<K> {
    pub(super) fn new(inner: Box<dyn Backend>, keeper: K) -> Self {
        Self { inner, keeper, delayed: BinaryHeap::new(), next: 0, looked_at: 0 }
    }

    /// Ends an op whose turn has come; hands it back if the backend below has no room.
    fn pass(&mut self, end: End, tag: Tag, io: &mut dyn Io) -> Result<Submitted, End> {
        match end {
            End::Fail(error) => Ok(Submitted::Done(Err(error))),
            End::Submit(op) => match self.inner.submit(op, tag, io) {
                Submitted::Full(op) => Err(End::Submit(op)),
                taken => Ok(taken),
            },
        }
    }

    /// Submits an op that the keeper counts. Apart from [`Backend::submit`], to keep that short.
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
        let (turn, end) = self.keeper.decide(op, now);
        if self.keeper.due(&turn) > now {
            self.delay(turn, 0, tag, end);
            return Submitted::Queued;
        }
        self.pass(end, tag, io).unwrap_or_else(|end| {
            // Taken all the same, so that what the keeper has counted for it is counted once.
            self.delay(turn, now + RETRY_NS, tag, end);
            Submitted::Queued
        })
    }

    /// Ends the delayed ops whose turn has come, up to the first that has a completion here.
    fn reap_delayed(&mut self, io: &mut dyn Io) -> Option<Completion> {
        let now = io.now();
        self.looked_at = now;
        self.keeper.wake(now);
        while self.delayed.peek().is_some_and(|Reverse(first)| self.due(first) <= now) {
            let Some(Reverse(Delayed { turn, tag, end, .. })) = self.delayed.pop() else { break };
            match self.pass(end, tag, io) {
                Ok(Submitted::Done(outcome)) => return Some(Completion { tag, outcome }),
                Ok(_) => {}
                Err(end) => self.delay(turn, now + RETRY_NS, tag, end),
            }
        }
        None
    }

    fn delay(&mut self, turn: K::Turn, not_before: Nanos, tag: Tag, end: End) {
        let number = self.next;
        self.next += 1;
        self.delayed.push(Reverse(Delayed { turn, not_before, number, tag, end }));
    }

    fn due(&self, delayed: &Delayed<K::Turn>) -> Nanos {
        self.keeper.due(&delayed.turn).max(delayed.not_before)
    }
}

impl<K: Keeper> Backend for Gate<K> {
    fn info(&self) -> &VolumeInfo {
        self.inner.info()
    }

    fn write_buffer(&mut self, range: ByteRange, io: &mut dyn Io) -> Result<Payload> {
        if self.keeper.spoils_writes() {
            return io.buffer(range.len() as usize).map(Payload::from);
        }
        self.inner.write_buffer(range, io)
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if self.delayed.is_empty() && self.keeper.is_open() {
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
