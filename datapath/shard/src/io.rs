//! The two ways to carry out what a backend asks for.

use std::collections::VecDeque;

use sheave_core::{Buf, Destination, Io, IoDone, IoRequest, IoToken, Nanos, Payload};
use sheave_ring::{Ring, plain};

use crate::Clock;
use crate::pool::Pool;
use crate::quick::Quick;

/// On a ring, next to the sockets.
pub(crate) struct RingIo<'a> {
    pub(crate) ring: &'a mut Ring,
    pub(crate) pool: &'a mut Pool,
    pub(crate) quick: &'a mut Quick,
    pub(crate) clock: Clock,
    pub(crate) now: Nanos,
    /// Which of the shard's volumes asks.
    pub(crate) volume: u32,
}

impl Io for RingIo<'_> {
    fn now(&self) -> Nanos {
        self.now
    }

    fn buffer(&mut self, len: usize) -> Buf {
        self.pool.take(len)
    }

    fn recycle(&mut self, payload: Payload) {
        self.pool.give_all(payload);
    }

    fn start(
        &mut self,
        request: IoRequest,
        token: IoToken,
        to: Destination,
    ) -> Result<(), IoRequest> {
        if to == Destination::Memory && self.quick.takes(&request, self.now) {
            self.quick.run(self.volume, request, token, self.clock);
            return Ok(());
        }
        self.ring.start(request, (self.volume, token.0))?;
        if to == Destination::Device {
            self.ring.submit();
        }
        Ok(())
    }
}

/// By system calls, at once.
#[derive(Default)]
pub(crate) struct PlainIo {
    pub(crate) pool: Pool,
    pub(crate) now: Nanos,
    pub(crate) done: VecDeque<IoDone>,
}

/// Ends that wait to be told to the backend.
const DONE_MAX: usize = 64;

impl Io for PlainIo {
    fn now(&self) -> Nanos {
        self.now
    }

    fn buffer(&mut self, len: usize) -> Buf {
        self.pool.take(len)
    }

    fn recycle(&mut self, payload: Payload) {
        self.pool.give_all(payload);
    }

    fn start(
        &mut self,
        request: IoRequest,
        token: IoToken,
        _: Destination,
    ) -> Result<(), IoRequest> {
        if self.done.len() >= DONE_MAX {
            return Err(request);
        }
        let result = plain::file(&request);
        self.done.push_back(IoDone { token, request, result });
        Ok(())
    }
}
