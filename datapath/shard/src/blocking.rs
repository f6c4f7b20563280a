//! One op at a time, waited for: for tools and tests.

use sheave_core::{Backend, Buf, Error, Op, Outcome, Submitted, Tag, Volume};

use crate::Clock;
use crate::io::PlainIo;

/// A backend that is used by plain calls.
pub struct Blocking {
    backend: Box<dyn Backend>,
    io: PlainIo,
    clock: Clock,
}

const TAG: Tag = Tag(0);

impl Blocking {
    /// Uses the volume from this thread.
    ///
    /// # Errors
    /// When the volume can no longer be used.
    pub fn open(volume: &dyn Volume) -> sheave_core::Result<Self> {
        let backend = volume.backend()?;
        let io = PlainIo::new().map_err(|error| Error::from_io("open", "its waker", error))?;
        Ok(Self { backend, io, clock: Clock::start() })
    }

    /// Gives a buffer back to the pool.
    pub fn recycle(&mut self, buf: Buf) {
        self.io.pool.give(buf);
    }

    /// Runs an op to its end.
    ///
    /// # Errors
    /// As the volume says.
    pub fn run(&mut self, op: Op) -> Outcome {
        let outcome = self.run_to_end(op);
        // Until the next op this thread looks after nothing.
        self.io.cancel();
        while let Some(done) = self.io.done.pop_front() {
            self.backend.io_done(done, &mut self.io);
        }
        outcome
    }

    fn run_to_end(&mut self, op: Op) -> Outcome {
        let mut waiting = Some(op);
        loop {
            self.io.now = self.clock.now();
            if let Some(op) = waiting.take() {
                match self.backend.submit(op, TAG, &mut self.io) {
                    Submitted::Done(outcome) => return outcome,
                    Submitted::Queued => {}
                    Submitted::Full(op) => waiting = Some(op),
                }
            }
            while let Some(done) = self.io.done.pop_front() {
                self.backend.io_done(done, &mut self.io);
            }
            if let Some(completion) = self.backend.reap(&mut self.io) {
                return completion.outcome;
            }
            if self.io.done.is_empty() {
                let within = self.backend.deadline().map(|due| self.clock.until(due));
                self.io.wait(None, within);
            }
        }
    }
}
