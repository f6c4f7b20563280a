//! Runs ops on a backend to their completion.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use sheave_core::{Backend, ByteRange, Completion, Op, Outcome, Payload, Submitted, Tag};

use super::Engine;

/// An op that makes no progress for so long counts as lost. It may wait for syncs of a busy disk,
/// one after another.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// How long a turn without progress waits for another thread, whose waker may end the wait.
const IDLE_WAIT: Duration = Duration::from_micros(100);

/// A backend and the engine that it runs on.
pub struct Driver<E> {
    backend: Box<dyn Backend>,
    /// The engine.
    pub engine: E,
    /// How often the backend had no room.
    pub full_count: usize,
}

impl<E: Engine> Driver<E> {
    /// Drives `backend` on `engine`.
    pub fn new(backend: Box<dyn Backend>, engine: E) -> Self {
        Self { backend, engine, full_count: 0 }
    }

    /// See [`Backend::write_buffer`].
    ///
    /// # Panics
    /// When there is no memory for it.
    pub fn write_buffer(&mut self, range: ByteRange) -> Payload {
        self.backend.write_buffer(range, self.engine.io()).expect("memory for a write")
    }

    /// Submits all ops at once and answers with their outcomes in the same order.
    ///
    /// # Panics
    /// When the backend loses an op, or completes one twice.
    pub fn run(&mut self, ops: Vec<Op>) -> Vec<Outcome> {
        let mut outcomes: Vec<Option<Outcome>> = ops.iter().map(|_| None).collect();
        let mut queue: VecDeque<(usize, Op)> = ops.into_iter().enumerate().collect();
        let mut progressed = Instant::now();
        loop {
            let had = queue.len();
            self.submit(&mut queue, &mut outcomes);
            let mut progress = queue.len() < had;
            while let Some(Completion { tag, outcome }) = self.backend.reap(self.engine.io()) {
                let slot = outcomes.get_mut(tag.0 as usize).expect("a tag that was submitted");
                assert!(slot.replace(outcome).is_none(), "op {tag:?} has ended twice");
                progress = true;
            }
            if outcomes.iter().all(Option::is_some) {
                self.settle();
                return outcomes.into_iter().flatten().collect();
            }
            if !progress {
                progress = self.wait();
            }
            if progress {
                progressed = Instant::now();
            }
            assert!(progressed.elapsed() < IDLE_MAX, "an op neither ends nor makes progress");
        }
    }

    /// Goes on until nothing is in flight, as the thread of a backend does: its requests may be for
    /// ops of other backends.
    fn settle(&mut self) {
        let begun = Instant::now();
        while begun.elapsed() < IDLE_MAX {
            let none = self.backend.reap(self.engine.io());
            assert!(none.is_none(), "an op has ended twice, or none that was submitted");
            if self.engine.in_flight() == 0 {
                return;
            }
            self.wait();
        }
        panic!("I/O that does not end");
    }

    /// Runs one op.
    pub fn run_one(&mut self, op: Op) -> Outcome {
        self.run(vec![op]).remove(0)
    }

    fn submit(&mut self, queue: &mut VecDeque<(usize, Op)>, outcomes: &mut [Option<Outcome>]) {
        while let Some((index, op)) = queue.pop_front() {
            let kind = op.kind();
            match self.backend.submit(op, Tag(index as u64), self.engine.io()) {
                Submitted::Done(outcome) => outcomes[index] = Some(outcome),
                Submitted::Queued => {}
                Submitted::Full(op) => {
                    assert_eq!(op.kind(), kind, "the op comes back untouched");
                    self.full_count += 1;
                    queue.push_front((index, op));
                    return;
                }
            }
        }
    }

    /// Waits for the engine or the backend's deadline. True if any I/O has completed.
    fn wait(&mut self) -> bool {
        let until = self.backend.deadline();
        if until.is_none() && self.engine.in_flight() == 0 {
            // Another thread has to make progress, or a fresh submit. The caller bounds the time.
            std::thread::park_timeout(IDLE_WAIT);
            return false;
        }
        let mut done = Vec::new();
        self.engine.wait(until, &mut done);
        let progress = !done.is_empty();
        for end in done {
            self.backend.io_done(end, self.engine.io());
        }
        progress
    }
}
