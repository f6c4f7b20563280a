//! What a queue of a block device looks like to the shard that serves it.

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

/// A queue whose requests the kernel hands over as the ends of commands, one slot each.
///
/// Calls come in turns: any number of `commanded`, `taken`, `completed`; then `turn_ended` once.
pub trait DeviceQueue: Send {
    /// How many entries of the ring's table of buffers it wants, see
    /// [`sheave_ring::Ring::reserve_buffers`].
    fn buffers(&self) -> u16;

    /// Offers all slots to the kernel. It has been given what it wanted of the ring's table, from
    /// this index on, or nothing.
    fn start(&mut self, first_buffer: Option<u16>, cx: &mut QueueCx<'_>);

    /// A command about this slot has ended; a negative result is an error number.
    fn commanded(&mut self, slot: u32, result: i32, cx: &mut QueueCx<'_>);

    /// An op that was queued has ended.
    fn completed(&mut self, slot: u32, outcome: Outcome, cx: &mut QueueCx<'_>);

    /// The backend has taken an op that had to wait for room.
    fn taken(&mut self, slot: u32, now: Nanos);

    /// Answers all requests with an error from now on, also those that the backend holds, whose
    /// completions are ignored. Not undone.
    fn abandon(&mut self, cx: &mut QueueCx<'_>);

    /// The answers of this turn go to the kernel now.
    fn turn_ended(&mut self, now: Nanos, recorder: &Recorder);

    /// Whether neither the kernel nor the backend holds anything of it.
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
    /// Set when an op was started: its volume is to be visited.
    pub(crate) has_started: bool,
}

impl QueueCx<'_> {
    /// The time at which this turn began.
    #[must_use]
    pub fn now(&self) -> Nanos {
        self.io.now()
    }

    /// Where counts go.
    #[must_use]
    pub fn recorder(&self) -> &Recorder {
        self.recorder
    }

    /// Counts a failed request, and logs it if the storage is at fault and this is news.
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
    /// When there is none.
    pub fn write_buffer(&mut self, range: ByteRange) -> Result<Payload> {
        self.backend.write_buffer(range, &mut self.io)
    }

    /// Gives memory back that is not needed any more.
    pub fn recycle(&mut self, payload: Payload) {
        self.io.recycle(payload);
    }

    /// Starts the op of this slot, as soon as there is room for it. Answers with the outcome if the
    /// op has ended; if not, [`DeviceQueue::completed`] is called with it.
    pub fn submit(&mut self, op: Op, slot: u32) -> Option<Outcome> {
        self.has_started = true;
        let tag = tag(owner_of(self.queue), slot);
        self.waiting.submit(op, tag, self.backend, &mut self.io)
    }

    /// Sends a command about this slot.
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
