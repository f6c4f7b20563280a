//! One connection under load: requests in flight, their replies, their latencies.

use std::io;

use anyhow::{Result, bail, ensure};
use sheave_proto::wire::{command, command_flag};
use sheave_proto::{
    Decoded, ReadCoverage, ReplyBody, ReplyDecoder, ReplyStyle, Request as WireRequest,
};

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
/// The most errors in one reply. The protocol has no limit, and a server could go on for ever.
const ERRORS_MAX: usize = 64;

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
    slots: Vec<Slot>,
    free: Vec<usize>,
    style: ReplyStyle,
    rx: Rx,
    tx: Tx,
    /// The read whose payload is being received.
    reading: Option<Reading>,
}

/// A run of payload that is being received.
#[derive(Clone, Copy, Debug)]
struct Reading {
    slot: usize,
    /// Where the next byte belongs in the block.
    at: usize,
    left: usize,
    /// The reply ends with it.
    done: bool,
}

/// A place for one request in flight.
#[derive(Debug, Default)]
struct Slot {
    request: Option<Request>,
    /// Verifying loads only: the payload of a write or of a read.
    data: Vec<u8>,
    /// Of a read: which of its bytes the reply has told so far.
    coverage: Option<ReadCoverage>,
    /// The first error of the reply.
    error: Option<u32>,
    error_count: usize,
    /// Tells apart the requests that used this slot one after the other.
    turn: u32,
}

impl Slot {
    /// Notes bytes that the reply tells. The decoder lets only replies to reads have any.
    fn cover(&mut self, at: u64, len: u32) -> Result<()> {
        Ok(self.coverage.as_mut().map_or(Ok(()), |coverage| coverage.add(at, len))?)
    }
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
        let slot = |_| Slot { data: vec![0; data_len], ..Slot::default() };
        Self {
            job,
            owes_flush: job.ledger.is_some() && connection.can_flush(),
            style: connection.style(),
            stream: connection.into_stream(),
            picker,
            ops_left: ops,
            pacer: job.workload.rate_per_connection.map(Pacer::new),
            writes_since_flush: 0,
            slots: (0..depth).map(slot).collect(),
            free: (0..depth).rev().collect(),
            rx: Rx::new(),
            tx: Tx::default(),
            reading: None,
        }
    }

    /// The stream, for whoever waits on it or ends it.
    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Requests that were issued and not answered.
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
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
        let has_room = !self.free.is_empty() && self.ops_left != Some(0);
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
            while !self.free.is_empty() && self.ops_left != Some(0) {
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
                    if let Some(reading) = &mut self.reading {
                        reading.left -= skipped;
                    }
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

    /// Bytes to come that nobody looks at: payload, unless the load verifies.
    fn unwanted(&self) -> usize {
        self.reading.filter(|_| self.job.ledger.is_none()).map_or(0, |reading| reading.left)
    }

    /// Tells the server that this was all.
    pub(crate) fn disconnect(&mut self) {
        let request = WireRequest { command: command::DISC, ..WireRequest::default() };
        self.tx.push_header(|out| request.encode(self.style, out));
        // The server may be gone already, which is what we want.
        let _ = self.flush(Wait::No);
    }

    fn flush(&mut self, wait: Wait) -> Result<()> {
        let (job, slots) = (self.job, &self.slots);
        let payload = |slot: usize| match job.ledger {
            Some(_) => &slots[slot].data[..],
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
        let slot = self.free.pop().expect("callers look for a free slot");
        let place = &mut self.slots[slot];
        place.turn = place.turn.wrapping_add(1);
        (place.error, place.error_count) = (None, 0);
        place.request = Some(request);
        let header = self.job.on_the_wire(&request, self.style, cookie(slot, place.turn));
        place.coverage = (request.kind == Kind::Read).then(|| ReadCoverage::new(&header));
        self.tx.push_header(|out| header.encode(self.style, out));
        if request.kind == Kind::Write {
            self.job.fill(&mut place.data, request.block, request.generation);
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
            if let Some(reading) = self.reading {
                if self.take_payload(reading) {
                    break;
                }
                if reading.done {
                    self.end(reading.slot, now_ns, recorder)?;
                }
            }
            let (slots, style, job) = (&self.slots, self.style, self.job);
            let pending =
                |cookie| in_flight(slots, cookie).map(|r| job.on_the_wire(r, style, cookie));
            let decoded = ReplyDecoder::new(style).decode(self.rx.unread(), pending)?;
            let Decoded::Event { consumed, event } = decoded else { break };
            let (slot, done) = (slot_of(event.cookie), event.done);
            let place = &mut self.slots[slot];
            let start = place.request.map_or(0, |request| job.offset_of(request.block));
            let index = |at: u64| usize::try_from(at - start).expect("inside the block");
            match event.body {
                ReplyBody::Data { at, len } => {
                    place.cover(at, len)?;
                    let (at, left) = (index(at), len as usize);
                    self.reading = Some(Reading { slot, at, left, done });
                }
                ReplyBody::Hole { at, len } => {
                    place.cover(at, len)?;
                    if !place.data.is_empty() {
                        place.data[index(at)..][..len as usize].fill(0);
                    }
                }
                ReplyBody::Error { errno, .. } => {
                    place.error.get_or_insert(errno as u32);
                    place.error_count += 1;
                    ensure!(place.error_count <= ERRORS_MAX, "a reply with too many errors");
                }
                ReplyBody::Success | ReplyBody::BlockStatus { .. } => {}
            }
            self.rx.start += consumed;
            if done && self.reading.is_none() {
                self.end(slot, now_ns, recorder)?;
            }
        }
        self.rx.compact();
        Ok(())
    }

    /// Takes what there is of a run of payload; true if more of it must come.
    fn take_payload(&mut self, reading: Reading) -> bool {
        let Reading { slot, at, left, done } = reading;
        let bytes = self.rx.take_up_to(left);
        let place = &mut self.slots[slot];
        if !place.data.is_empty() {
            place.data[at..][..bytes.len()].copy_from_slice(bytes);
        }
        let (at, left) = (at + bytes.len(), left - bytes.len());
        self.reading = (left > 0).then_some(Reading { slot, at, left, done });
        left > 0
    }

    fn end(&mut self, slot: usize, now_ns: u64, recorder: &mut Recorder) -> Result<()> {
        let place = &mut self.slots[slot];
        let request = place.request.take().expect("replies are to requests in flight");
        self.free.push(slot);
        recorder.record(request.kind, now_ns.saturating_sub(request.issued_ns));
        if let Some(error) = place.error {
            recorder.record_error(error);
            return Ok(());
        }
        match request.kind {
            Kind::Read => {
                let is_whole = place.coverage.as_ref().is_some_and(ReadCoverage::is_complete);
                ensure!(is_whole, "the server left something out of its answer to a read");
                if let Some(ended) = self.job.check(&place.data, request.block, request.generation)
                {
                    recorder.record_check(ended);
                }
            }
            Kind::Write => self.job.acknowledge(request.block, request.generation),
            Kind::Flush => {}
        }
        Ok(())
    }
}

impl Job {
    /// A request as the server sees it.
    fn on_the_wire(&self, request: &Request, style: ReplyStyle, cookie: u64) -> WireRequest {
        let (offset, length) = (self.offset_of(request.block), self.workload.block_size as u64);
        let wire = |command, flags| WireRequest { cookie, flags, command, offset, length };
        match request.kind {
            Kind::Read => wire(command::READ, 0),
            Kind::Write if style == ReplyStyle::Extended => {
                wire(command::WRITE, command_flag::PAYLOAD_LEN)
            }
            Kind::Write => wire(command::WRITE, 0),
            Kind::Flush => {
                WireRequest { cookie, command: command::FLUSH, ..WireRequest::default() }
            }
        }
    }
}

fn in_flight(slots: &[Slot], cookie: u64) -> Option<&Request> {
    let place = slots.get(slot_of(cookie))?;
    place.request.as_ref().filter(|_| cookie == self::cookie(slot_of(cookie), place.turn))
}

fn cookie(slot: usize, turn: u32) -> u64 {
    (slot as u64) << 32 | u64::from(turn)
}

fn slot_of(cookie: u64) -> usize {
    usize::try_from(cookie >> 32).unwrap_or(usize::MAX)
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

    fn take_up_to(&mut self, len_max: usize) -> &[u8] {
        let len = len_max.min(self.end - self.start);
        self.start += len;
        &self.buf[self.start - len..self.start]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn received_bytes_keep_their_order() {
        let mut rx = Rx::new();
        rx.room()[..5].copy_from_slice(b"abcde");
        rx.end += 5;
        assert_eq!(rx.take_up_to(2), b"ab");
        assert_eq!(rx.unread(), b"cde");
        rx.compact();
        rx.room()[..1].copy_from_slice(b"f");
        rx.end += 1;
        assert_eq!(rx.take_up_to(9), b"cdef");
    }
}
