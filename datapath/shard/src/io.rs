//! The two ways to carry out what a backend asks for.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use sheave_core::{
    Buf, Destination, Io, IoDone, IoRequest, IoStage, IoToken, Nanos, OpKind, Payload, Result,
};
use sheave_ring::{By, plain};
use sheave_telemetry::{Recorder, Stage};
use smallvec::SmallVec;

use crate::core::Core;
use crate::doorbell::Doorbell;
use crate::pool::PoolRef;
use crate::waker::of_bell;

/// From how many pending entries of the ring on they are submitted when a request to storage is
/// started, within a turn. Storage begins sooner with fewer, but each time costs a call. Measured:
/// docs/performance.md, "O_DIRECT" for connections, "Direct files" for the queues of block devices.
pub(crate) const CONNECTION_SUBMIT_FROM: usize = 1;
pub(crate) const QUEUE_SUBMIT_FROM: usize = 4;

/// On a ring, next to the sockets.
pub(crate) struct RingIo<'a> {
    pub(crate) core: &'a mut Core,
    /// [`CONNECTION_SUBMIT_FROM`] or [`QUEUE_SUBMIT_FROM`].
    pub(crate) submit_from: usize,
    /// Which of the shard's volumes asks.
    pub(crate) volume: u32,
    /// What the shard keeps for that volume.
    pub(crate) mount: Mount<'a>,
}

/// What of a mounted volume its backend's I/O needs.
pub(crate) struct Mount<'a> {
    /// Has the shard visit the volume.
    pub(crate) waker: &'a Waker,
    /// Requests that were started and have not completed.
    pub(crate) io_in_flight: &'a mut usize,
    pub(crate) recorder: &'a Recorder,
}

impl Io for RingIo<'_> {
    fn now(&self) -> Nanos {
        self.core.now
    }

    fn buffer(&mut self, len: usize) -> Result<Buf> {
        self.core.pool.take(len)
    }

    fn recycle(&mut self, payload: Payload) {
        self.core.pool.give_all(payload);
    }

    fn record(&mut self, kind: OpKind, stage: IoStage, ns: Nanos) {
        self.mount.recorder.record(kind, stage_of(stage), ns);
    }

    fn waker(&self) -> Waker {
        self.mount.waker.clone()
    }

    fn start(
        &mut self,
        request: IoRequest,
        token: IoToken,
        to: Destination,
    ) -> std::result::Result<(), IoRequest> {
        let in_flight = &mut *self.mount.io_in_flight;
        let Core { inline, now, clock, .. } = &mut *self.core;
        let at_hand = match to {
            Destination::Memory => inline.run(self.volume, request, token, *now, *clock),
            Destination::BusyMemory => inline.leave(self.volume, request, token),
            _ => Err(request),
        };
        let Err(request) = at_hand else {
            *in_flight += 1;
            return Ok(());
        };
        inline.other_started(*now);
        let by = match to {
            Destination::BusyMemory | Destination::BusyDevice => By::Worker,
            _ => By::Caller,
        };
        self.core.ring.start(request, (self.volume, token.0), *in_flight, by)?;
        *in_flight += 1;
        if to == Destination::Device {
            self.core.ring.submit_from(self.submit_from);
        }
        Ok(())
    }
}

/// By system calls: files at once, sockets when they are ready.
pub(crate) struct PlainIo {
    pub(crate) pool: PoolRef,
    pub(crate) now: Nanos,
    pub(crate) done: VecDeque<IoDone>,
    /// Requests that wait for their sockets.
    waiting: Vec<(IoToken, IoRequest)>,
    /// For the stages of a volume that has some.
    pub(crate) recorder: Option<Recorder>,
    /// Rings when another thread has something for the backend.
    pub(crate) bell: Arc<Doorbell>,
    waker: Waker,
}

/// The most completions that wait for the backend.
const DONE_MAX: usize = 64;

impl PlainIo {
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn new() -> io::Result<Self> {
        let bell = Arc::new(Doorbell::new()?);
        // One for all that ask, so that they can see that it is the same.
        let waker = of_bell(&bell);
        let (done, waiting) = (VecDeque::new(), Vec::new());
        let (pool, recorder) = (PoolRef::Own(Box::default()), None);
        Ok(Self { pool, now: 0, done, waiting, recorder, bell, waker })
    }

    /// Ends what waits for its socket, without having moved a byte.
    pub(crate) fn cancel(&mut self) {
        for (token, request) in self.waiting.drain(..) {
            self.done.push_back(IoDone { token, request, result: Err(Errno::CANCELED.into()) });
        }
    }

    /// Sleeps until the connection is ready (true), the bell rings, a request of the backend has
    /// ended, or the time is over.
    pub(crate) fn wait(
        &mut self,
        connection: Option<PollFd<'_>>,
        within: Option<Duration>,
    ) -> bool {
        let of_request = |(_, request): &(IoToken, IoRequest)| match request {
            IoRequest::Recv { socket, .. } => Some((Arc::clone(socket), PollFlags::IN)),
            IoRequest::Send { socket, .. } => Some((Arc::clone(socket), PollFlags::OUT)),
            _ => None,
        };
        let sockets: SmallVec<[_; 4]> = self.waiting.iter().filter_map(of_request).collect();
        let others =
            sockets.iter().map(|(socket, flags)| PollFd::from_borrowed_fd(socket.as_fd(), *flags));
        let has_connection = usize::from(connection.is_some());
        let ready = self.bell.wait(connection.into_iter().chain(others), within);
        let of_requests = ready.iter().skip(has_connection).enumerate();
        // From the last one on, since what ends leaves the list.
        let ended: SmallVec<[usize; 4]> =
            of_requests.filter(|(_, ready)| **ready).map(|(index, _)| index).collect();
        for index in ended.into_iter().rev() {
            self.try_again(index);
        }
        has_connection == 1 && ready.first().is_some_and(|ready| *ready)
    }

    fn try_again(&mut self, index: usize) {
        let result = plain::carry_out(&self.waiting[index].1);
        if !would_block(&result) {
            let (token, request) = self.waiting.swap_remove(index);
            self.done.push_back(IoDone { token, request, result });
        }
    }
}

fn stage_of(stage: IoStage) -> Stage {
    match stage {
        IoStage::Wait => Stage::RemoteWait,
        IoStage::Wire => Stage::RemoteWire,
    }
}

fn would_block(result: &io::Result<usize>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
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

    fn record(&mut self, kind: OpKind, stage: IoStage, ns: Nanos) {
        if let Some(recorder) = &self.recorder {
            recorder.record(kind, stage_of(stage), ns);
        }
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
        if let IoRequest::Recv { .. } = request {
            // What it is to receive has rarely arrived.
            self.waiting.push((token, request));
            return Ok(());
        }
        if self.done.len() >= DONE_MAX {
            return Err(request);
        }
        let result = plain::carry_out(&request);
        if request.is_socket() && would_block(&result) {
            self.waiting.push((token, request));
        } else {
            self.done.push_back(IoDone { token, request, result });
        }
        Ok(())
    }
}
