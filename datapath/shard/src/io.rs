//! The two ways to carry out what a backend asks for.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::task::Waker;

use sheave_core::{Buf, Destination, Io, IoDone, IoRequest, IoToken, Nanos, Payload, Result};
use sheave_ring::{Ring, plain};

use crate::Clock;
use crate::doorbell::Doorbell;
use crate::pool::Pool;
use crate::quick::Quick;
use crate::waker::of_bell;

/// From how many pending entries of the ring on they are submitted when a request to storage is
/// started, within a turn. Storage begins sooner with fewer, but each time costs a call. Measured:
/// docs/performance.md, "O_DIRECT" for connections, "Direct files" for the queues of block devices.
pub(crate) const CONNECTION_SUBMIT_FROM: usize = 1;
pub(crate) const QUEUE_SUBMIT_FROM: usize = 4;

/// On a ring, next to the sockets.
pub(crate) struct RingIo<'a> {
    pub(crate) ring: &'a mut Ring,
    pub(crate) pool: &'a mut Pool,
    pub(crate) quick: &'a mut Quick,
    pub(crate) clock: Clock,
    pub(crate) now: Nanos,
    /// [`CONNECTION_SUBMIT_FROM`] or [`QUEUE_SUBMIT_FROM`].
    pub(crate) submit_from: usize,
    /// Which of the shard's volumes asks.
    pub(crate) volume: u32,
    /// Has the shard visit that volume; `None` for a queue at rest, which has none.
    pub(crate) waker: Option<&'a Waker>,
}

impl Io for RingIo<'_> {
    fn now(&self) -> Nanos {
        self.now
    }

    fn buffer(&mut self, len: usize) -> Result<Buf> {
        self.pool.take(len)
    }

    fn recycle(&mut self, payload: Payload) {
        self.pool.give_all(payload);
    }

    fn waker(&self) -> Waker {
        self.waker.expect("only a volume's backend asks").clone()
    }

    fn start(
        &mut self,
        request: IoRequest,
        token: IoToken,
        to: Destination,
    ) -> std::result::Result<(), IoRequest> {
        if to == Destination::Memory && self.quick.takes(&request, self.now) {
            self.quick.run(self.volume, request, token, self.clock);
            return Ok(());
        }
        self.ring.start(request, (self.volume, token.0))?;
        if to == Destination::Device {
            self.ring.submit_from(self.submit_from);
        }
        Ok(())
    }
}

/// By system calls, at once.
pub(crate) struct PlainIo {
    pub(crate) pool: Pool,
    pub(crate) now: Nanos,
    pub(crate) done: VecDeque<IoDone>,
    /// Rings when another thread has something for the backend.
    pub(crate) bell: Arc<Doorbell>,
    waker: Waker,
}

/// Ends that wait to be told to the backend.
const DONE_MAX: usize = 64;

impl PlainIo {
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn new() -> io::Result<Self> {
        let bell = Arc::new(Doorbell::new()?);
        // One for all that ask, so that they can see that it is the same.
        let waker = of_bell(&bell);
        Ok(Self { pool: Pool::default(), now: 0, done: VecDeque::new(), bell, waker })
    }
}

impl Io for PlainIo {
    fn now(&self) -> Nanos {
        self.now
    }

    fn buffer(&mut self, len: usize) -> Result<Buf> {
        self.pool.take(len)
    }

    fn recycle(&mut self, payload: Payload) {
        self.pool.give_all(payload);
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn start(
        &mut self,
        request: IoRequest,
        token: IoToken,
        _: Destination,
    ) -> std::result::Result<(), IoRequest> {
        if self.done.len() >= DONE_MAX {
            return Err(request);
        }
        let result = plain::file(&request);
        self.done.push_back(IoDone { token, request, result });
        Ok(())
    }
}
