//! What an engine does for a backend: buffers, time, file and socket I/O.
//!
//! The backend decides what is to be done; the engine (a ring, or plain system calls) decides how.
//! This keeps backends free of io_uring and lets one backend run on every engine.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::Waker;

use crate::{Buf, OpKind, Payload, Result};

/// Nanoseconds on a monotonic clock.
pub type Nanos = u64;

/// The backend's identifier of a request in flight, echoed in [`IoDone`].
///
/// The low [`crate::OWN_BITS`] are the backend's; it leaves the others clear, which are for layers
/// with several backends below ([`crate::Legs`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IoToken(pub u64);

/// How [`IoRequest::Allocate`] changes a range of a file (`fallocate(2)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocate {
    /// Deallocate; it reads as zeroes afterwards (`PUNCH_HOLE|KEEP_SIZE`).
    PunchHole,
    /// Make it read as zeroes and keep it allocated (`ZERO_RANGE|KEEP_SIZE`).
    ZeroRange,
}

/// I/O that an engine carries out. It owns descriptor and buffers until its [`IoDone`], even if
/// the backend that started it is dropped before. File requests end by themselves; a socket request
/// may not, so a backend shuts its sockets down (`shutdown(2)`) when it is dropped.
#[derive(Clone, Debug)]
pub enum IoRequest {
    /// Fill `into` from the file at `at`.
    Read {
        /// The file.
        file: Arc<File>,
        /// Offset in bytes.
        at: u64,
        /// Where to put the bytes.
        into: Buf,
    },
    /// Write `from`, which has no zero segments, to the file at `at`.
    Write {
        /// The file.
        file: Arc<File>,
        /// Offset in bytes.
        at: u64,
        /// The bytes.
        from: Payload,
        /// Return only when they are stable (`RWF_DSYNC`).
        dsync: bool,
    },
    /// `fdatasync(2)`.
    Sync {
        /// The file.
        file: Arc<File>,
    },
    /// `fallocate(2)`.
    Allocate {
        /// The file.
        file: Arc<File>,
        /// How.
        mode: Allocate,
        /// Offset in bytes.
        at: u64,
        /// Length in bytes, at least 1.
        len: u64,
    },
    /// Receive from a connected stream socket in blocking mode. At most one at a time per socket.
    /// Ends with at least 1 byte, or with 0 bytes at the end of the stream.
    Recv {
        /// The socket.
        socket: Arc<OwnedFd>,
        /// Where to put the bytes; without zero segments.
        into: Payload,
        /// Bytes of `into` that are there already; less than its length.
        skip: usize,
        /// Wait for all of `into` (`MSG_WAITALL`) rather than for the first bytes. A hint: the
        /// result may be short all the same.
        all: bool,
    },
    /// Send to a connected stream socket in blocking mode. At most one at a time per socket.
    /// May be short.
    Send {
        /// The socket.
        socket: Arc<OwnedFd>,
        /// The bytes.
        from: Payload,
        /// Bytes of `from` that were sent before; less than its length.
        skip: usize,
    },
}

impl IoRequest {
    /// Whether it is for a socket.
    #[must_use]
    pub fn is_socket(&self) -> bool {
        matches!(self, Self::Recv { .. } | Self::Send { .. })
    }
}

/// The completion of an [`IoRequest`].
#[derive(Debug)]
pub struct IoDone {
    /// As given to [`Io::start`].
    pub token: IoToken,
    /// The request, with its buffers.
    pub request: IoRequest,
    /// Bytes moved (may be short; 0 at the end of file), or the kernel's error. `ECANCELED` on a
    /// socket: the engine has moved nothing and will not be asked for some time, and another
    /// backend may start the request instead.
    pub result: io::Result<usize>,
}

/// Where a request most likely goes, so that the engine can choose how to start it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Not known. It is started together with the other requests of this turn.
    Unknown,
    /// In memory, such as a write of whole pages to the page cache. The engine may carry it out on
    /// the spot.
    Memory,
    /// At a device, which should begin soon rather than with the last request of the turn.
    Device,
    /// In memory, and the thread that writes there may have to wait for a device: not that of an
    /// engine with many volumes.
    BusyMemory,
    /// At a device that has much to do. A thread that hands it one more request may have to wait
    /// for it.
    BusyDevice,
}

/// A part of the time that an op spends in a backend whose data a server has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoStage {
    /// Waiting to be sent: for the connection, for other requests, for room.
    Wait,
    /// From sending the request to its answer.
    Wire,
}

/// An engine, as a backend sees it.
pub trait Io {
    /// The time at which the engine last woke. Constant while it works through one batch.
    fn now(&self) -> Nanos;

    /// A page-aligned buffer of `len` bytes with arbitrary content.
    ///
    /// # Errors
    /// [`ErrorKind::NoMemory`](crate::ErrorKind::NoMemory) when there is no memory for it.
    fn buffer(&mut self, len: usize) -> Result<Buf>;

    /// Takes memory that is not needed any more, so that the next buffer is a warm one. Buffers
    /// that are still referenced are ignored.
    fn recycle(&mut self, payload: Payload) {
        drop(payload);
    }

    /// Counts the time that a stage of an op took. An engine without statistics does nothing.
    fn record(&mut self, kind: OpKind, stage: IoStage, ns: Nanos) {
        let _ = (kind, stage, ns);
    }

    /// A waker that makes the engine call [`crate::Backend::reap`] soon. A thread that works for
    /// the backend keeps it, and wakes it whenever it has a result for the backend. A waker may
    /// outlive its backend; waking it then does nothing.
    fn waker(&self) -> Waker;

    /// Starts a request; its completion goes to [`crate::Backend::io_done`].
    ///
    /// # Errors
    /// Hands the request back when the engine's queue is full; try again after a completion.
    fn start(
        &mut self,
        request: IoRequest,
        token: IoToken,
        to: Destination,
    ) -> std::result::Result<(), IoRequest>;
}
