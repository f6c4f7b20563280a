//! One connection under load: requests in flight, their replies, their latencies.

use std::io;

use anyhow::{Result, bail};
use sheave_proto::wire::command;
use sheave_proto::{Client, ClientEvent, Request as WireRequest};

use super::connect::Connection;
use super::job::{Job, Phase};
use super::pacer::Pacer;
use super::pattern::Generation;
use super::picker::Picker;
use super::recorder::Recorder;
use super::stream::{Received, Stream, Wait};
use super::tx::Tx;

/// Bytes received at once: all replies that have arrived, or a good part of a long one, while
/// they stay in the CPU's cache.
const RECEIVE_SIZE: usize = 256 << 10;
/// How many blocks a verifying write looks at for one that no other write has claimed.
const CLAIM_TRIES_MAX: usize = 8;

/// A connection and what it has in flight.
#[derive(Debug)]
pub(crate) struct Session<'a> {
    job: &'a Job,
    stream: Stream,
    picker: Picker,
    /// Requests that may still be issued; `None` is no limit.
    ops_left: Option<u64>,
    pacer: Option<Pacer>,
    writes_since_flush: u64,
    /// A verifying session flushes before it ends.
    owes_flush: bool,
    client: Client<Request>,
    /// Verifying loads only: the payload of the write or read in each slot.
    data: Vec<Vec<u8>>,
    rx: Rx,
    tx: Tx,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    kind: Kind,
    block: u64,
    issued_ns: u64,
    /// Of a write: what it writes. Of a read: the oldest that it may see.
    generation: Generation,
}

impl Request {
    fn flush(issued_ns: u64) -> Self {
        Self { kind: Kind::Flush, block: 0, issued_ns, generation: 0 }
    }
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Reads a block.
    Read,
    /// Writes a block.
    Write,
    /// Makes writes stable.
    Flush,
}

impl<'a> Session<'a> {
    /// A session that issues `ops` requests, or as many as the load has time for.
    pub(crate) fn new(
        job: &'a Job,
        connection: Connection,
        picker: Picker,
        ops: Option<u64>,
    ) -> Self {
        let depth = job.workload.queue_depth;
        let data_len = if job.ledger.is_some() { job.workload.block_size } else { 0 };
        Self {
            job,
            owes_flush: job.ledger.is_some() && connection.can_flush(),
            client: connection.client(depth),
            stream: connection.into_stream(),
            picker,
            ops_left: ops,
            pacer: job.workload.rate_per_connection.map(Pacer::new),
            writes_since_flush: 0,
            data: vec![vec![0; data_len]; depth],
            rx: Rx::new(),
            tx: Tx::default(),
        }
    }

    /// The stream, for callers that wait on it or end it.
    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Requests that were issued and not answered.
    pub(crate) fn in_flight(&self) -> usize {
        self.client.in_flight()
    }

    /// Nothing is in flight and nothing more will be issued.
    pub(crate) fn is_finished(&self) -> bool {
        self.in_flight() == 0 && self.is_stopping() && !self.owes_flush
    }

    fn is_stopping(&self) -> bool {
        self.ops_left == Some(0) || self.job.phase() == Phase::Stop
    }

    /// Bytes wait for room in the socket.
    pub(crate) fn wants_to_send(&self) -> bool {
        !self.tx.is_empty() || self.stream.has_unsent()
    }

    /// When the next request is due, if that lies ahead and there is room for it.
    pub(crate) fn due_ns(&self) -> Option<u64> {
        let has_room = self.client.has_room() && self.ops_left != Some(0);
        self.pacer.as_ref().filter(|_| has_room).map(Pacer::due_ns)
    }

    /// Issues all requests for which there is room and time, and sends them.
    ///
    /// # Errors
    /// When the connection fails.
    pub(crate) fn issue(&mut self, now_ns: u64, wait: Wait) -> Result<()> {
        if self.is_stopping() {
            if self.owes_flush && self.in_flight() == 0 {
                self.owes_flush = false;
                self.issue_one(Request::flush(now_ns));
            }
        } else {
            while self.client.has_room() && self.ops_left != Some(0) {
                let Some(issued_ns) = self.take_turn(now_ns) else { break };
                let request = self.pick(issued_ns);
                self.issue_one(request);
                self.ops_left = self.ops_left.map(|left| left - 1);
            }
        }
        self.flush(wait)
    }

    /// Receives what has arrived and handles every reply in it. Answers the time, or `None` if
    /// nothing had arrived.
    ///
    /// # Errors
    /// When the connection fails or the server breaks the protocol.
    pub(crate) fn receive(&mut self, wait: Wait, recorder: &mut Recorder) -> Result<Option<u64>> {
        let mut wait = wait;
        loop {
            let skip = self.unwanted();
            match self.stream.receive_after(skip, self.rx.room(), wait) {
                Ok(Received { skipped: 0, stored: 0 }) => {
                    bail!("the server closed the connection, {} in flight", self.in_flight())
                }
                Ok(Received { skipped, stored }) => {
                    self.client.payload_received(skipped);
                    self.rx.end += stored;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match wait {
                    Wait::No => return Ok(None),
                    Wait::Sleep => bail!("no reply for 30 s, {} in flight", self.in_flight()),
                },
                Err(error) => return Err(error.into()),
            }
            let now_ns = self.job.now_ns();
            self.handle_replies(now_ns, recorder)?;
            if !self.stream.has_unread() {
                return Ok(Some(now_ns));
            }
            wait = Wait::No;
        }
    }

    /// Bytes to come that are not looked at: payload, unless the load verifies.
    fn unwanted(&mut self) -> usize {
        let verifies = self.job.ledger.is_some();
        self.client.payload().filter(|_| !verifies).map_or(0, |place| place.len)
    }

    /// Tells the server that this was all.
    pub(crate) fn disconnect(&mut self) {
        self.tx.push_header(|out| self.client.disconnect(out));
        // The server may be gone already, which is what we want.
        let _ = self.flush(Wait::No);
    }

    fn flush(&mut self, wait: Wait) -> Result<()> {
        let (job, data) = (self.job, &self.data);
        let payload = |slot: usize| match job.ledger {
            Some(_) => &data[slot][..],
            None => &job.payload[..],
        };
        self.tx.flush(&mut self.stream, wait, payload)?;
        match self.stream.flush(wait) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && wait == Wait::No => Ok(()),
            ended => Ok(ended?),
        }
    }

    /// The time from which the next request's latency counts, if it is due.
    fn take_turn(&mut self, now_ns: u64) -> Option<u64> {
        match &mut self.pacer {
            None => Some(now_ns),
            Some(pacer) => pacer.take(now_ns),
        }
    }

    fn issue_one(&mut self, request: Request) {
        let wire = self.job.on_the_wire(&request);
        let submitted = self.tx.push_header(|out| self.client.submit_request(wire, request, out));
        let slot = submitted.expect("callers look for room").slot();
        if request.kind == Kind::Write {
            self.job.fill(&mut self.data[slot], request.block, request.generation);
            self.tx.push_payload(slot);
        }
    }

    /// What comes next. A verifying write that finds no unclaimed block becomes a read.
    fn pick(&mut self, issued_ns: u64) -> Request {
        let workload = &self.job.workload;
        if workload.flush_every.is_some_and(|every| self.writes_since_flush >= every) {
            self.writes_since_flush = 0;
            return Request::flush(issued_ns);
        }
        let is_read = self.picker.chance(workload.read_percent);
        let mut block = self.picker.block();
        if !is_read {
            self.writes_since_flush += 1;
            for _ in 0..CLAIM_TRIES_MAX {
                if let Some(generation) = self.job.claim(block) {
                    return Request { kind: Kind::Write, block, issued_ns, generation };
                }
                block = self.picker.block();
            }
        }
        Request { kind: Kind::Read, block, issued_ns, generation: self.job.oldest(block) }
    }

    fn handle_replies(&mut self, now_ns: u64, recorder: &mut Recorder) -> Result<()> {
        loop {
            let (consumed, event) = self.client.step(self.rx.unread())?;
            match event {
                ClientEvent::NeedMore(_) => {
                    self.rx.start += consumed;
                    self.rx.compact();
                    return Ok(());
                }
                ClientEvent::Data { cookie, at, bytes, .. } => {
                    let data = &mut self.data[cookie.slot()];
                    if !data.is_empty() {
                        data[at..][..bytes.len()].copy_from_slice(bytes);
                    }
                }
                ClientEvent::Zeroes { cookie, at, len, .. } => {
                    let data = &mut self.data[cookie.slot()];
                    if !data.is_empty() {
                        data[at..][..len].fill(0);
                    }
                }
                ClientEvent::Done { cookie, state, outcome } => {
                    recorder.record(state.kind, now_ns.saturating_sub(state.issued_ns));
                    match outcome {
                        Ok(_) => self.job.end(&state, &self.data[cookie.slot()], recorder),
                        Err(error) => recorder.record_error(error.errno as u32),
                    }
                }
            }
            self.rx.start += consumed;
        }
    }
}

impl Job {
    /// A request as the server sees it.
    fn on_the_wire(&self, request: &Request) -> WireRequest {
        let (offset, length) = (self.offset_of(request.block), self.workload.block_size as u64);
        let wire = |command| WireRequest { cookie: 0, flags: 0, command, offset, length };
        match request.kind {
            Kind::Read => wire(command::READ),
            Kind::Write => wire(command::WRITE),
            Kind::Flush => WireRequest { command: command::FLUSH, ..WireRequest::default() },
        }
    }

    /// A request has succeeded; `data` is what a verifying load read.
    fn end(&self, request: &Request, data: &[u8], recorder: &mut Recorder) {
        match request.kind {
            Kind::Read => {
                if let Some(ended) = self.check(data, request.block, request.generation) {
                    recorder.record_check(ended);
                }
            }
            Kind::Write => self.acknowledge(request.block, request.generation),
            Kind::Flush => {}
        }
    }
}

/// Received bytes that were not looked at yet.
struct Rx {
    buf: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Rx {
    fn new() -> Self {
        Self { buf: vec![0; RECEIVE_SIZE].into(), start: 0, end: 0 }
    }

    fn room(&mut self) -> &mut [u8] {
        &mut self.buf[self.end..]
    }

    fn unread(&self) -> &[u8] {
        &self.buf[self.start..self.end]
    }

    /// Moves the rest, less than a header, to the front.
    fn compact(&mut self) {
        self.buf.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
    }
}

impl std::fmt::Debug for Rx {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rx({}..{})", self.start, self.end)
    }
}
