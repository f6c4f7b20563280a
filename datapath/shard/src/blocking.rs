//! One op at a time, waited for: for tools and tests.

use sheave_core::{Backend, Buf, Error, Op, Outcome, Tag, Volume};

use crate::Clock;
use crate::io::PlainIo;
use crate::waiting::Waiting;

/// A backend that is used by plain calls.
pub struct Blocking {
    backend: Box<dyn Backend>,
    waiting: Waiting,
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
        Ok(Self { backend, waiting: Waiting::default(), io, clock: Clock::start() })
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
        let Self { backend, waiting, io, clock } = self;
        io.now = clock.now();
        if let Some(outcome) = waiting.submit(op, TAG, &mut **backend, io) {
            return outcome;
        }
        loop {
            while let Some(done) = io.done.pop_front() {
                backend.io_done(done, io);
            }
            if let Some(completion) = backend.reap(io) {
                return completion.outcome;
            }
            match waiting.offer(&mut **backend, io) {
                Some((_, Some(outcome))) => return outcome,
                // What was taken may have ended by now.
                Some((_, None)) => continue,
                None => {}
            }
            if io.done.is_empty() {
                let within = backend.deadline().map(|due| clock.until(due));
                io.wait(None, within);
            }
            io.now = clock.now();
        }
    }
}
