//! One NBD connection in its transmission phase.

use std::io;
use std::sync::Arc;

use sheave_core::{
    Error, Nanos, NbdErrno, Op, OpKind, Outcome, Payload, Reply, Result, Volume, memory,
};
use sheave_proto::reply::{ReplyTo, StatusQuery};
use sheave_proto::{Negotiated, Request, Verdict};
use sheave_ring::SendBatch;
use sheave_shard::{Cx, IN_FLIGHT_MAX, NextRead, Phase, Session};
use sheave_telemetry::Recorder;
use slab::Slab;

use crate::connections::Attached;
use crate::incoming::{Arrived, Broken, Incoming};
use crate::replies::{self, Asked};
use crate::tls::{Stream, TlsStream};

/// The most requests of one connection in flight.
const REQUESTS_MAX: usize = IN_FLIGHT_MAX;
/// The most payload bytes of one connection, in flight or in replies that wait for a slow reader.
/// One request is always admitted, however long.
const HELD_BYTES_MAX: usize = 64 << 20;
/// The most replies that wait for a slow reader: each takes some memory beside its bytes.
const REPLIES_MAX: usize = 8192;
/// Extents in one block status reply; proto.md allows 2^20.
const EXTENTS_MAX: usize = 2048;

/// The protocol state of one connection.
pub(crate) struct NbdSession {
    negotiated: Negotiated,
    tls: Option<TlsStream>,
    incoming: Incoming,
    /// Bytes that have arrived and cannot be decoded until an op completes.
    backlog: Vec<u8>,
    requests: Slab<InFlight>,
    ready: SendBatch,
    /// Replies in `ready`, and in the batch that is being sent.
    replies_ready: usize,
    replies_sending: usize,
    /// Payload bytes, see [`HELD_BYTES_MAX`].
    held: usize,
    /// The part of them that the recorder counts.
    held_recorded: usize,
    phase: Phase,
    /// The client sends nothing more; the backlog came before.
    closing: bool,
    times: Vec<Timed>,
    /// Payload bytes of the requests that succeeded.
    bytes_read: u64,
    bytes_written: u64,
    /// The entry among the connections of its export; the kernel's connection has none.
    attached: Option<Attached>,
    /// The volume whose size the client can use, even if it grows; `None` keeps the size that was
    /// negotiated.
    growing: Option<Arc<dyn Volume>>,
}

/// The state of a request until its reply.
struct InFlight {
    to: ReplyTo,
    asked: Asked,
    kind: OpKind,
    /// When its header arrived.
    start: Nanos,
    /// When the backend took it.
    submitted: Nanos,
    /// Payload bytes it holds.
    held: usize,
}

/// Ops that ended in this turn and began together; recorded when their replies are sent.
struct Timed {
    kind: OpKind,
    start: Nanos,
    submitted: Nanos,
    count: u64,
}

impl NbdSession {
    /// A session that begins with the bytes the client sent right behind its last option.
    pub(crate) fn new(
        negotiated: Negotiated,
        tls: Option<TlsStream>,
        early: Vec<u8>,
        attached: Option<Attached>,
    ) -> Self {
        Self {
            incoming: Incoming::new(&negotiated),
            negotiated,
            tls,
            backlog: early,
            requests: Slab::new(),
            ready: SendBatch::new(),
            replies_ready: 0,
            replies_sending: 0,
            held: 0,
            held_recorded: 0,
            phase: Phase::Open,
            closing: false,
            times: Vec::new(),
            bytes_read: 0,
            bytes_written: 0,
            attached,
            growing: None,
        }
    }

    /// A session with the kernel's client, which gets a new size by other means.
    pub(crate) fn of_kernel(negotiated: Negotiated, volume: Arc<dyn Volume>) -> Self {
        Self { growing: Some(volume), ..Self::new(negotiated, None, Vec::new(), None) }
    }

    fn parse(&mut self, bytes: &[u8], cx: &mut Cx<'_>) {
        if let Some(volume) = &self.growing {
            // The kernel gets a new size after the volume has it, and uses it only then.
            self.negotiated.size = volume.size();
        }
        let mut input = bytes;
        while !input.is_empty() && !self.is_finished() {
            if self.is_blocked() {
                return self.keep(input);
            }
            let arrived = self.incoming.take(&mut input, &self.negotiated, cx);
            self.arrived(arrived, cx);
        }
    }

    /// Keeps bytes that cannot be decoded yet. Without memory for them they are lost, and the
    /// connection cannot go on.
    fn keep(&mut self, bytes: &[u8]) {
        match memory::insist(|| self.backlog.try_reserve(bytes.len())) {
            Ok(()) => self.backlog.extend_from_slice(bytes),
            Err(error) => self.starve(&error),
        }
    }

    fn parse_backlog(&mut self, cx: &mut Cx<'_>) {
        if !self.backlog.is_empty() && !self.is_blocked() {
            let backlog = std::mem::take(&mut self.backlog);
            self.parse(&backlog, cx);
        }
        if self.closing && self.backlog.is_empty() {
            self.finish();
        }
    }

    fn is_blocked(&self) -> bool {
        self.requests.len() >= REQUESTS_MAX
            || self.replies_ready + self.replies_sending >= REPLIES_MAX
            || self.held >= HELD_BYTES_MAX
    }

    fn arrived(&mut self, arrived: Result<Option<Arrived>, Broken>, cx: &mut Cx<'_>) {
        match arrived {
            Ok(None) => {}
            Ok(Some(arrived)) => self.execute(arrived, cx),
            Err(Broken(reason)) => {
                self.in_span(|| tracing::info!(reason, "connection dropped"));
                self.finish();
            }
        }
    }

    fn execute(&mut self, arrived: Arrived, cx: &mut Cx<'_>) {
        let Arrived { request, verdict, start, data } = arrived;
        let (op, asked) = match verdict {
            Verdict::Read { range, df } => {
                (Op::Read { range, into: None }, Asked::Read { range, df })
            }
            Verdict::Write { range, fua } => {
                match data.expect("a write arrives with its data, or the reason why not") {
                    Ok(data) => {
                        (Op::Write { range, data, fua }, Asked::Done { bytes: range.len() })
                    }
                    Err(error) => return self.fail(&request, OpKind::Write, start, &error, cx),
                }
            }
            Verdict::Flush => (Op::Flush, Asked::Done { bytes: 0 }),
            Verdict::Trim { range, fua } => {
                (Op::Trim { range, fua }, Asked::Done { bytes: range.len() })
            }
            Verdict::WriteZeroes { range, fua, no_hole, fast } => {
                let op = Op::WriteZeroes { range, fua, no_hole, fast };
                (op, Asked::Done { bytes: range.len() })
            }
            Verdict::Cache { range } => (Op::Cache { range }, Asked::Done { bytes: 0 }),
            Verdict::BlockStatus { range, req_one, contexts } => {
                let extents_max = self.negotiated.extents_max(req_one).min(EXTENTS_MAX);
                let query = StatusQuery { range, req_one };
                (Op::BlockStatus { range, extents_max }, Asked::Status { query, contexts })
            }
            Verdict::Done => return self.answer(&request),
            Verdict::Refuse { error, message, .. } => return self.refuse(&request, error, message),
            Verdict::Disconnect => return self.finish(),
            Verdict::Drop(_) | Verdict::BlockStatusFilter { .. } => {
                unreachable!("what is incomplete or to be dropped does not arrive")
            }
        };
        let held = match asked {
            Asked::Read { range, .. } => range.len() as usize,
            _ if op.kind() == OpKind::Write => asked.bytes() as usize,
            _ => 0,
        };
        let (len, capacity) = (self.requests.len(), self.requests.capacity());
        if let Err(error) = memory::check_growth::<InFlight>(len, capacity) {
            return self.fail(&request, op.kind(), start, &error, cx);
        }
        self.held += held;
        let (kind, submitted) = (op.kind(), cx.now());
        let to = ReplyTo::new(self.negotiated.style, &request);
        let request = self.requests.insert(InFlight { to, asked, kind, start, submitted, held });
        self.submit(op, request as u32, cx);
    }

    fn submit(&mut self, op: Op, request: u32, cx: &mut Cx<'_>) {
        if let Some(outcome) = cx.submit(op, request) {
            self.complete(request, outcome, cx);
        }
    }

    /// Puts the reply to a completed request into the next batch.
    fn complete(&mut self, request: u32, outcome: Outcome, cx: &Cx<'_>) {
        let InFlight { to, asked, kind, start, submitted, held } =
            self.requests.remove(request as usize);
        self.held -= held;
        if self.phase == Phase::Gone {
            return;
        }
        match outcome {
            Ok(answer) => match self.reply(|ready| replies::success(ready, to, asked, answer)) {
                Ok(()) => {
                    cx.recorder().add_bytes(kind, asked.bytes());
                    match kind {
                        OpKind::Read => self.bytes_read += asked.bytes(),
                        OpKind::Write => self.bytes_written += asked.bytes(),
                        _ => {}
                    }
                }
                Err(error) => self.reply_failed(to, kind, &error, cx),
            },
            Err(error) => self.reply_failed(to, kind, &error, cx),
        }
        self.note_time(kind, start, submitted);
    }

    /// Answers a request that the backend never got.
    fn fail(&mut self, request: &Request, kind: OpKind, start: Nanos, error: &Error, cx: &Cx<'_>) {
        let to = ReplyTo::new(self.negotiated.style, request);
        self.reply_failed(to, kind, error, cx);
        self.note_time(kind, start, cx.now());
    }

    fn reply_failed(&mut self, to: ReplyTo, kind: OpKind, error: &Error, cx: &Cx<'_>) {
        cx.failed(kind, error);
        let errno = error.kind().nbd_errno();
        self.reply_or_starve(|ready| replies::failure(ready, to, errno, &error.to_string()));
    }

    fn note_time(&mut self, kind: OpKind, start: Nanos, submitted: Nanos) {
        if let Some(last) = self.times.last_mut()
            && last.kind == kind
            && last.start == start
            && last.submitted == submitted
        {
            last.count += 1;
            return;
        }
        // Without memory this op is missing in the statistics.
        if memory::attempt(|| self.times.try_reserve(1)).is_ok() {
            self.times.push(Timed { kind, start, submitted, count: 1 });
        }
    }

    fn answer(&mut self, request: &Request) {
        let to = ReplyTo::new(self.negotiated.style, request);
        let asked = Asked::Done { bytes: 0 };
        self.reply_or_starve(|ready| replies::success(ready, to, asked, Reply::Done));
    }

    fn refuse(&mut self, request: &Request, errno: NbdErrno, message: &str) {
        let to = ReplyTo::new(self.negotiated.style, request);
        self.reply_or_starve(|ready| replies::failure(ready, to, errno, message));
    }

    /// Appends a reply to the next batch.
    fn reply(&mut self, put: impl FnOnce(&mut SendBatch) -> Result<()>) -> Result<()> {
        let before = self.ready.len();
        put(&mut self.ready)?;
        self.held += self.ready.len() - before;
        self.replies_ready += 1;
        Ok(())
    }

    /// The same for a short reply, without which the client would wait for ever.
    fn reply_or_starve(&mut self, put: impl FnOnce(&mut SendBatch) -> Result<()>) {
        if let Err(error) = self.reply(put) {
            self.starve(&error);
        }
    }

    /// Ends the connection, since there is no memory even for a short reply.
    fn starve(&mut self, error: &Error) {
        self.in_span(|| tracing::warn!(%error, "connection dropped"));
        self.finish();
    }

    /// Takes no more requests.
    fn finish(&mut self) {
        if self.phase != Phase::Gone {
            self.phase = Phase::Draining;
        }
        self.backlog = Vec::new();
    }

    fn is_finished(&self) -> bool {
        matches!(self.phase, Phase::Draining | Phase::Gone)
    }
}

impl Session for NbdSession {
    fn received(&mut self, bytes: &mut [u8], cx: &mut Cx<'_>) {
        self.parse_backlog(cx);
        let Some(mut tls) = self.tls.take() else { return self.plain(bytes, cx) };
        let outcome = tls.decrypt(bytes, |plain| self.plain(plain, cx));
        self.tls = Some(tls);
        match outcome {
            Ok(Stream::Open) => {}
            // Equivalent to the end of the connection, which the client may leave to us.
            Ok(Stream::Closed) => {
                self.closing = true;
                self.parse_backlog(cx);
            }
            Err(error) => {
                self.in_span(|| tracing::info!(%error, "TLS connection dropped"));
                self.finish();
            }
        }
    }

    fn received_into(&mut self, payload: Payload, count: usize, cx: &mut Cx<'_>) {
        let arrived = self.incoming.received_into(payload, count, &self.negotiated, cx);
        self.arrived(arrived, cx);
    }

    fn completed(&mut self, request: u32, outcome: Outcome, cx: &mut Cx<'_>) {
        self.complete(request, outcome, cx);
        self.parse_backlog(cx);
    }

    fn taken(&mut self, request: u32, now: Nanos) {
        self.requests[request as usize].submitted = now;
    }

    fn gather(&mut self, batch: &mut SendBatch, now: Nanos, recorder: &Recorder) {
        for Timed { kind, start, submitted, count } in self.times.drain(..) {
            recorder.record_op(kind, start, submitted, now, count);
        }
        let idle = self.is_finished() && self.requests.is_empty();
        match &mut self.tls {
            None => std::mem::swap(batch, &mut self.ready),
            Some(tls) => {
                // Bytes that TLS adds were not counted as held, so they are not subtracted either.
                self.held -= tls.encrypt(&mut self.ready, idle, batch);
                if self.ready.unsent() == 0 {
                    self.ready.clear(drop);
                }
            }
        }
        if self.ready.is_empty() {
            self.replies_sending = std::mem::take(&mut self.replies_ready);
        }
        self.record_held(recorder, self.held);
        if let Some(attached) = &self.attached {
            attached.count(self.bytes_read, self.bytes_written);
        }
    }

    fn sent(&mut self, bytes: usize, cx: &mut Cx<'_>) {
        if self.tls.is_none() {
            self.held -= bytes;
        }
        self.replies_sending = 0;
        self.parse_backlog(cx);
    }

    fn next_read(&mut self) -> NextRead {
        if self.is_finished() {
            return NextRead::Finished;
        }
        if self.is_blocked() || !self.backlog.is_empty() {
            return NextRead::Paused;
        }
        if self.phase == Phase::Quiescing && self.incoming.is_between_requests() {
            return NextRead::Paused;
        }
        self.incoming.next_read(self.tls.is_none())
    }

    fn enter(&mut self, phase: Phase, error: Option<&io::Error>) {
        if let Some(error) = error {
            self.in_span(|| tracing::info!(%error, "connection lost"));
        }
        match phase {
            Phase::Open | Phase::Quiescing if self.is_finished() => {}
            // The state of TLS cannot be handed to another process.
            Phase::Quiescing if self.tls.is_some() => {}
            Phase::Open | Phase::Quiescing => self.phase = phase,
            Phase::Draining => self.finish(),
            Phase::Gone => {
                self.phase = phase;
                self.finish();
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.requests.len()
    }

    fn is_quiescent(&self) -> bool {
        let is_answered =
            self.requests.is_empty() && self.replies_ready + self.replies_sending == 0;
        let is_received = self.backlog.is_empty() && self.incoming.is_between_requests();
        self.phase == Phase::Quiescing && is_answered && is_received
    }

    fn closed(&mut self, recorder: &Recorder) {
        self.record_held(recorder, 0);
        self.in_span(|| tracing::debug!("connection closed"));
    }
}

impl NbdSession {
    /// Logs with the names of client and export.
    fn in_span(&self, log: impl FnOnce()) {
        match &self.attached {
            None => log(),
            Some(one) => {
                tracing::info_span!("connection", peer = one.peer, export = one.export)
                    .in_scope(log);
            }
        }
    }

    fn record_held(&mut self, recorder: &Recorder, held: usize) {
        if held != self.held_recorded {
            recorder.add_bytes_in_flight(held as i64 - self.held_recorded as i64);
            self.held_recorded = held;
        }
    }

    fn plain(&mut self, bytes: &[u8], cx: &mut Cx<'_>) {
        if self.backlog.is_empty() {
            self.parse(bytes, cx);
        } else if !self.is_finished() {
            self.keep(bytes);
        }
    }
}
