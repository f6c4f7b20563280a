//! The interface of a block device's queue for the shard that serves it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use sheave_core::{
    Backend, ByteRange, Error, Io, Nanos, Op, OpKind, Outcome, Payload, Result, Volume,
};
use sheave_ring::{DeviceCommand, plain};
use sheave_telemetry::Recorder;

use crate::failures::report;
use crate::io::RingIo;
use crate::tags::{owner_of, tag};
use crate::waiting::Waiting;

/// A queue whose requests arrive from the kernel as completions of commands, one per slot.
///
/// Calls come in turns: any number of `commanded`, `taken`, `completed`; then `turn_ended` once.
pub trait DeviceQueue: Send {
    /// The number of entries that it wants in the ring's table of buffers, see
    /// [`sheave_ring::Ring::reserve_buffers`].
    fn buffers(&self) -> u16;

    /// Sends the first command of each slot. Its entries of the ring's table begin at
    /// `first_buffer`; `None` if it got none.
    fn start(&mut self, first_buffer: Option<u16>, cx: &mut QueueCx<'_>);

    /// A command of this slot has completed; a negative result is an error number.
    fn commanded(&mut self, slot: u32, result: i32, cx: &mut QueueCx<'_>);

    /// An op that was queued has completed.
    fn completed(&mut self, slot: u32, outcome: Outcome, cx: &mut QueueCx<'_>);

    /// The backend has taken an op that waited for room.
    fn taken(&mut self, slot: u32, now: Nanos);

    /// Answers all requests with an error from now on, also those in the backend, whose completions
    /// are ignored. Cannot be undone.
    fn abandon(&mut self, cx: &mut QueueCx<'_>);

    /// The turn ends; its answers go to the kernel now.
    fn turn_ended(&mut self, now: Nanos, recorder: &Recorder);

    /// Whether neither the kernel nor the backend has a command or an op of it.
    fn is_finished(&self) -> bool;
}

/// The shard, as a queue sees it during a call.
pub struct QueueCx<'a> {
    pub(crate) volume: &'a dyn Volume,
    pub(crate) backend: &'a mut dyn Backend,
    pub(crate) waiting: &'a mut Waiting,
    pub(crate) recorder: &'a Recorder,
    pub(crate) io: RingIo<'a>,
    pub(crate) device: &'a OwnedFd,
    pub(crate) queue: u32,
    /// Set when an op was started: the shard then visits its volume.
    pub(crate) has_started: bool,
}

impl QueueCx<'_> {
    /// The time at which this turn began.
    #[must_use]
    pub fn now(&self) -> Nanos {
        self.io.now()
    }

    /// The recorder of the volume's statistics.
    #[must_use]
    pub fn recorder(&self) -> &Recorder {
        self.recorder
    }

    /// Counts a failed request, and logs it if the storage is at fault, at a limited rate.
    pub fn failed(&self, op: OpKind, error: &Error) {
        report(self.recorder, op, error, self.now());
    }

    /// Bytes of the volume, see [`Volume::size`].
    #[must_use]
    pub fn size(&self) -> u64 {
        self.volume.size()
    }

    /// See [`Volume::takes_registered`].
    #[must_use]
    pub fn takes_registered(&self, kind: OpKind, range: ByteRange) -> bool {
        self.volume.takes_registered(kind, range)
    }

    /// Memory for the data of a write, see [`sheave_core::Backend::write_buffer`].
    ///
    /// # Errors
    /// When there is no memory.
    pub fn write_buffer(&mut self, range: ByteRange) -> Result<Payload> {
        self.backend.write_buffer(range, &mut self.io)
    }

    /// Gives memory back to the pool.
    pub fn recycle(&mut self, payload: Payload) {
        self.io.recycle(payload);
    }

    /// Starts the op of this slot, as soon as there is room for it. Returns the outcome if the op
    /// has completed; otherwise [`DeviceQueue::completed`] is called with it.
    pub fn submit(&mut self, op: Op, slot: u32) -> Option<Outcome> {
        self.has_started = true;
        let tag = tag(owner_of(self.queue), slot);
        self.waiting.submit(op, tag, self.backend, &mut self.io)
    }

    /// Sends a command of this slot.
    pub fn command(&mut self, command: &DeviceCommand, slot: u32) {
        self.io.core.ring.command(self.device, command, (self.queue, slot));
    }

    /// Copies the data of a request, which begins at `at`, to memory.
    ///
    /// # Errors
    /// See [`plain::copy_from_device`].
    pub fn copy_from_device(&self, at: u64, payload: &Payload) -> io::Result<()> {
        plain::copy_from_device(self.device.as_fd(), at, payload)
    }

    /// Copies memory to a request, whose data begins at `at`.
    ///
    /// # Errors
    /// See [`plain::copy_to_device`].
    pub fn copy_to_device(&self, at: u64, payload: &Payload) -> io::Result<()> {
        plain::copy_to_device(self.device.as_fd(), at, payload)
    }
}
