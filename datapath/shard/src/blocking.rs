//! Runs one op at a time, synchronously: for tools and tests.

use sheave_core::{Backend, Buf, Error, Op, Outcome, Payload, Tag, Volume};

use crate::Clock;
use crate::io::PlainIo;
use crate::pool::{Buffers, PoolRef};
use crate::waiting::Waiting;

/// A backend behind synchronous calls.
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

    /// As [`Blocking::open`], with buffers that others use as well.
    ///
    /// # Errors
    /// As there.
    pub fn sharing(volume: &dyn Volume, buffers: &Buffers) -> sheave_core::Result<Self> {
        let mut blocking = Self::open(volume)?;
        blocking.io.pool = PoolRef::Shared(buffers.clone());
        Ok(blocking)
    }

    /// A buffer of `len` bytes from the pool, with arbitrary content.
    ///
    /// # Errors
    /// [`ErrorKind::NoMemory`](sheave_core::ErrorKind::NoMemory) when there is no memory for it.
    pub fn buffer(&mut self, len: usize) -> sheave_core::Result<Buf> {
        self.io.pool.take(len)
    }

    /// Gives the buffers of a payload back to the pool that nothing else holds.
    pub fn recycle(&mut self, payload: Payload) {
        self.io.pool.give_all(payload);
    }

    /// Runs an op to its completion.
    ///
    /// # Errors
    /// Errors of the volume.
    pub fn run(&mut self, op: Op) -> Outcome {
        let outcome = self.run_to_end(op);
        // Until the next op this thread drives no I/O.
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
                // The op that was taken may have completed by now.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_gives_back_another_uses_again() {
        let volume = sheave_local::Memory::new(1 << 20).unwrap();
        let buffers = Buffers::new(1 << 20);
        let mut reader = Blocking::sharing(&volume, &buffers).unwrap();
        let mut writer = Blocking::sharing(&volume, &buffers).unwrap();
        let buf = reader.buffer(8192).unwrap();
        let address = buf.pages().as_ptr();
        let held = buf.clone();
        writer.recycle(buf.into());
        let fresh = reader.buffer(8192).unwrap();
        assert!(!fresh.is_same(&held) && fresh.pages().as_ptr() != address, "it is still held");
        writer.recycle(held.into());
        assert_eq!(reader.buffer(5000).unwrap().pages().as_ptr(), address);
    }
}
