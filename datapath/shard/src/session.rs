//! The interface of a front's connection for the engine that runs it.

use sheave_core::{Backend, ByteRange, Error, Io, Nanos, Op, OpKind, Outcome, Payload, Result};
use sheave_ring::SendBatch;
use sheave_telemetry::Recorder;

use crate::failures::report;
use crate::tags::tag;
use crate::waiting::Waiting;

/// What a session wants to receive next.
#[derive(Debug)]
pub enum NextRead {
    /// Any bytes: [`Session::received`].
    Stream,
    /// Exactly this payload from byte `skip` on, into its own memory: [`Session::received_into`].
    Into {
        /// The memory.
        payload: Payload,
        /// Bytes of it that have been received.
        skip: usize,
    },
    /// Nothing before an op has completed or replies have been sent.
    Paused,
    /// Nothing any more; close once the last reply is sent.
    Finished,
}

/// The phase of a connection's life. It goes from [`Phase::Open`] downwards, and back only from
/// [`Phase::Quiescing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Requests are received and answered.
    Open,
    /// The connection quiesces between two requests, so that another process can take it over:
    /// requests in flight are answered, and no new request is received.
    Quiescing,
    /// No more requests are taken; those in flight are answered.
    Draining,
    /// Nothing is sent or received any more. Completions are awaited.
    Gone,
}

/// The protocol state of one connection.
///
/// Calls come in turns: any number of `received`, `received_into`, `taken`, `completed`, `sent`;
/// then `gather` and `next_read` once.
pub trait Session: Send {
    /// Takes all bytes that have arrived.
    fn received(&mut self, bytes: &mut [u8], cx: &mut Cx<'_>);

    /// `count` more bytes of the [`NextRead::Into`] payload, handed back here, have been received.
    fn received_into(&mut self, payload: Payload, count: usize, cx: &mut Cx<'_>);

    /// An op that was queued has completed. `request` is the argument of [`Cx::submit`].
    fn completed(&mut self, request: u32, outcome: Outcome, cx: &mut Cx<'_>);

    /// The backend has taken an op that waited for room.
    fn taken(&mut self, request: u32, now: Nanos);

    /// Moves all replies that are ready into the (empty) batch. `now` is the time of sending.
    fn gather(&mut self, batch: &mut SendBatch, now: Nanos, recorder: &Recorder);

    /// `bytes` of gathered replies have been sent.
    fn sent(&mut self, bytes: usize, cx: &mut Cx<'_>);

    /// What to receive next. Called again only after that was received, or after
    /// [`NextRead::Paused`].
    fn next_read(&mut self) -> NextRead;

    /// The connection is in this phase from now on; `error` is why the stream is broken.
    fn enter(&mut self, phase: Phase, error: Option<&std::io::Error>);

    /// Ops that were started and have not completed; at most [`crate::IN_FLIGHT_MAX`].
    fn in_flight(&self) -> usize;

    /// Whether nothing is half received, in flight or unanswered, so that another process can take
    /// the connection over ([`Phase::Quiescing`]).
    fn is_quiescent(&self) -> bool {
        false
    }

    /// The connection is closed. Subtracts from the recorder what this session still counts as in
    /// flight.
    fn closed(&mut self, recorder: &Recorder);
}

/// The engine, as a session sees it during a call.
pub struct Cx<'a> {
    pub(crate) backend: &'a mut dyn Backend,
    pub(crate) waiting: &'a mut Waiting,
    pub(crate) io: &'a mut dyn Io,
    pub(crate) recorder: &'a Recorder,
    pub(crate) connection: u32,
    /// Set when an op was started: the engine then visits its volume.
    pub(crate) has_started: bool,
}

impl Cx<'_> {
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
        report(self.recorder, op, error, self.io.now());
    }

    /// Memory for the data of a write, see [`Backend::write_buffer`].
    ///
    /// # Errors
    /// When there is no memory.
    pub fn write_buffer(&mut self, range: ByteRange) -> Result<Payload> {
        self.backend.write_buffer(range, self.io)
    }

    /// Starts an op that the session calls `request`, as soon as there is room for it. Returns the
    /// outcome if the op has completed; otherwise [`Session::completed`] is called with it.
    pub fn submit(&mut self, op: Op, request: u32) -> Option<Outcome> {
        self.has_started = true;
        let tag = tag(self.connection, request);
        self.waiting.submit(op, tag, self.backend, self.io)
    }
}
