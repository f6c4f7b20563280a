//! A backend whose ops are let through when a layer says so, or fail instead.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use sheave_core::{
    Backend, ByteRange, Completion, Error, Io, IoDone, Nanos, Op, Payload, Submitted, Tag,
    VolumeInfo,
};

use crate::RETRY_NS;

/// The most ops that wait in a gate.
const DELAYED_MAX: usize = 1024;

/// What a layer has to say about ops.
pub(super) trait Keeper: Send {
    /// When an op may go, and how. Asked once for each.
    fn decide(&mut self, op: Op, now: Nanos) -> (Nanos, End);

    /// Whether writes may fail, so that they must not be received in place.
    fn spoils_writes(&self) -> bool {
        false
    }
}

/// A backend behind a queue ordered by time.
pub(super) struct Gate<K> {
    inner: Box<dyn Backend>,
    keeper: K,
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

impl<K: Keeper> Gate<K> {
    pub(super) fn new(inner: Box<dyn Backend>, keeper: K) -> Self {
        Self { inner, keeper, delayed: BinaryHeap::new(), next: 0 }
    }

    /// Takes an op that is due at `release`.
    fn pass(&mut self, release: Nanos, end: End, tag: Tag, io: &mut dyn Io) -> Submitted {
        let now = io.now();
        if release > now {
            return self.delay(release, end, tag);
        }
        match end {
            End::Fail(error) => Submitted::Done(Err(error)),
            End::Submit(op) => match self.inner.submit(op, tag, io) {
                // Taken all the same, so that what the keeper has counted for it is counted once.
                Submitted::Full(op) => self.delay(now + RETRY_NS, End::Submit(op), tag),
                taken => taken,
            },
        }
    }

    fn delay(&mut self, release: Nanos, end: End, tag: Tag) -> Submitted {
        let number = self.next;
        self.next += 1;
        self.delayed.push(Reverse(Delayed { release, number, tag, end }));
        Submitted::Queued
    }
}

impl<K: Keeper> Backend for Gate<K> {
    fn info(&self) -> &VolumeInfo {
        self.inner.info()
    }

    fn write_buffer(&mut self, range: ByteRange, io: &mut dyn Io) -> Payload {
        if self.keeper.spoils_writes() {
            return io.buffer(range.len() as usize).into();
        }
        self.inner.write_buffer(range, io)
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if self.delayed.len() >= DELAYED_MAX {
            return Submitted::Full(op);
        }
        let (release, end) = self.keeper.decide(op, io.now());
        self.pass(release, end, tag, io)
    }

    fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        self.inner.io_done(done, io);
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        let now = io.now();
        while self.delayed.peek().is_some_and(|Reverse(first)| first.release <= now) {
            let Some(Reverse(Delayed { tag, end, .. })) = self.delayed.pop() else { break };
            if let Submitted::Done(outcome) = self.pass(now, end, tag, io) {
                return Some(Completion { tag, outcome });
            }
        }
        self.inner.reap(io)
    }

    fn deadline(&self) -> Option<Nanos> {
        let own = self.delayed.peek().map(|Reverse(first)| first.release);
        own.into_iter().chain(self.inner.deadline()).min()
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
