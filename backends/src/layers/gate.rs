//! Ops on their way to a backend, each let through not before its time.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use sheave_core::{Backend, Completion, Error, Io, IoDone, Nanos, Op, Submitted, Tag};

use crate::RETRY_NS;

/// The most ops that wait in a gate.
const DELAYED_MAX: usize = 1024;

/// A backend behind a queue ordered by time.
pub(super) struct Gate {
    pub(super) inner: Box<dyn Backend>,
    delayed: BinaryHeap<Reverse<Delayed>>,
    /// Number of the next op, which keeps ops of one time in order.
    next: u64,
}

struct Delayed {
    release: Nanos,
    number: u64,
    tag: Tag,
    end: End,
}

/// What becomes of an op when its time has come.
pub(super) enum End {
    Submit(Op),
    Fail(Error),
}

impl Gate {
    pub(super) fn new(inner: Box<dyn Backend>) -> Self {
        Self { inner, delayed: BinaryHeap::new(), next: 0 }
    }

    /// Whether no op more may be submitted before one has been let through.
    pub(super) fn is_full(&self) -> bool {
        self.delayed.len() >= DELAYED_MAX
    }

    /// Takes an op that is due at `release`. A gate that is not full takes it for certain, so that
    /// what the caller has counted for it is counted once.
    pub(super) fn submit(
        &mut self,
        release: Nanos,
        end: End,
        tag: Tag,
        io: &mut dyn Io,
    ) -> Submitted {
        let now = io.now();
        if release > now {
            return self.delay(release, end, tag);
        }
        match end {
            End::Fail(error) => Submitted::Done(Err(error)),
            End::Submit(op) => match self.inner.submit(op, tag, io) {
                Submitted::Full(op) => self.delay(now + RETRY_NS, End::Submit(op), tag),
                taken => taken,
            },
        }
    }

    pub(super) fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        self.inner.io_done(done, io);
    }

    pub(super) fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        let now = io.now();
        while self.delayed.peek().is_some_and(|Reverse(first)| first.release <= now) {
            let Some(Reverse(Delayed { tag, end, .. })) = self.delayed.pop() else { break };
            if let Submitted::Done(outcome) = self.submit(now, end, tag, io) {
                return Some(Completion { tag, outcome });
            }
        }
        self.inner.reap(io)
    }

    pub(super) fn deadline(&self) -> Option<Nanos> {
        let own = self.delayed.peek().map(|Reverse(first)| first.release);
        own.into_iter().chain(self.inner.deadline()).min()
    }

    fn delay(&mut self, release: Nanos, end: End, tag: Tag) -> Submitted {
        let number = self.next;
        self.next += 1;
        self.delayed.push(Reverse(Delayed { release, number, tag, end }));
        Submitted::Queued
    }
}

impl Ord for Delayed {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.release, self.number).cmp(&(other.release, other.number))
    }
}

impl PartialOrd for Delayed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Delayed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Delayed {}
