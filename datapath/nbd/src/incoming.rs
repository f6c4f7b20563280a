//! Makes requests of a stream of bytes, with payloads in memory of the backend.

use sheave_core::{Buf, Error, Nanos, NbdErrno, Payload, Result, memory};
use sheave_proto::{Negotiated, Request, Verdict};
use sheave_shard::{Cx, NextRead};

/// After a write at least this long, the next header is received alone, so that another long
/// payload is received into its own memory, and none of it through the receive buffer.
const LONG_WRITE: usize = 32 << 10;

/// A request whose bytes have all arrived.
pub(crate) struct Arrived {
    pub(crate) request: Request,
    pub(crate) verdict: Verdict,
    /// When its header arrived.
    pub(crate) start: Nanos,
    /// A write's data, or why it could not be received.
    pub(crate) data: Option<Result<Payload>>,
}

/// The receiving half of a session.
pub(crate) struct Incoming {
    state: State,
    /// Bytes of a header that has not arrived whole.
    header: [u8; HEADER_MAX],
    header_len: usize,
    header_have: usize,
    /// The last write was long, see [`LONG_WRITE`].
    expect_long: bool,
    /// The buffer for headers that are received alone, once it was needed.
    place: Option<Buf>,
}

/// The length of an extended header, the longest.
const HEADER_MAX: usize = 32;

enum State {
    Header,
    /// A header is received alone.
    HeaderInPlace(Buf),
    /// A write's data is arriving; `have` bytes are there.
    Data {
        request: Request,
        verdict: Verdict,
        start: Nanos,
        payload: Payload,
        have: usize,
    },
    /// The memory of [`State::Data`] is with the engine.
    IntoBuffer {
        request: Request,
        verdict: Verdict,
        start: Nanos,
        have: usize,
        len: usize,
    },
    /// A filter is arriving.
    Filter {
        request: Request,
        start: Nanos,
        bytes: Vec<u8>,
        len: usize,
    },
    /// The payload of a refused request, or of a write without memory, is arriving and is dropped.
    Skip {
        request: Request,
        verdict: Verdict,
        start: Nanos,
        left: u64,
        error: Option<Error>,
    },
}

/// A header with a wrong magic, or a request after which the connection cannot go on.
pub(crate) struct Broken(pub(crate) &'static str);

impl Incoming {
    pub(crate) fn new(negotiated: &Negotiated) -> Self {
        Self {
            state: State::Header,
            header: [0; HEADER_MAX],
            header_len: Request::header_len(negotiated.style),
            header_have: 0,
            expect_long: false,
            place: None,
        }
    }

    /// Takes bytes from the front of `input` until a request has arrived or it is empty.
    pub(crate) fn take(
        &mut self,
        input: &mut &[u8],
        negotiated: &Negotiated,
        cx: &mut Cx<'_>,
    ) -> Result<Option<Arrived>, Broken> {
        loop {
            let state = std::mem::replace(&mut self.state, State::Header);
            match state {
                State::Header | State::HeaderInPlace(_) => {
                    let Some(header) = self.take_header(input) else { return Ok(None) };
                    if let Some(arrived) = self.begin(&header, negotiated, cx)? {
                        return Ok(Some(arrived));
                    }
                }
                State::Data { request, verdict, start, payload, have } => {
                    let bytes = split(input, payload.len() - have);
                    sheave_ring::copy_in(&payload, have, bytes);
                    let have = have + bytes.len();
                    if have == payload.len() {
                        let data = Some(Ok(payload));
                        return Ok(Some(Arrived { request, verdict, start, data }));
                    }
                    self.state = State::Data { request, verdict, start, payload, have };
                    return Ok(None);
                }
                State::IntoBuffer { .. } => {
                    unreachable!("no bytes arrive while a payload is received into its buffer")
                }
                State::Filter { request, start, mut bytes, len } => {
                    bytes.extend_from_slice(split(input, len - bytes.len()));
                    if bytes.len() == len {
                        let verdict = negotiated.block_status_filter(&request, &bytes);
                        return Ok(Some(Arrived { request, verdict, start, data: None }));
                    }
                    self.state = State::Filter { request, start, bytes, len };
                    return Ok(None);
                }
                State::Skip { request, verdict, start, left, error } => {
                    let skipped = split(input, usize::try_from(left).unwrap_or(usize::MAX));
                    let left = left - skipped.len() as u64;
                    if left == 0 {
                        let data = error.map(Err);
                        return Ok(Some(Arrived { request, verdict, start, data }));
                    }
                    self.state = State::Skip { request, verdict, start, left, error };
                    return Ok(None);
                }
            }
        }
    }

    /// Whether the next byte is the first of a request.
    pub(crate) fn is_between_requests(&self) -> bool {
        matches!(self.state, State::Header | State::HeaderInPlace(_)) && self.header_have == 0
    }

    /// What the engine should receive next. `in_place` says whether it may receive directly into
    /// memory of requests.
    pub(crate) fn next_read(&mut self, in_place: bool) -> NextRead {
        let state = std::mem::replace(&mut self.state, State::Header);
        match state {
            State::Data { request, verdict, start, payload, have } if in_place => {
                let len = payload.len();
                self.state = State::IntoBuffer { request, verdict, start, have, len };
                NextRead::Into { payload, skip: have }
            }
            State::Header
                if in_place
                    && self.expect_long
                    && self.header_have == 0
                    && let Some(buf) = self.place() =>
            {
                self.state = State::HeaderInPlace(buf.clone());
                NextRead::Into { payload: buf.into(), skip: 0 }
            }
            // The bytes of the header that have arrived are at the front of its buffer.
            State::HeaderInPlace(buf) if in_place && self.header_have > 0 => {
                let skip = self.header_have;
                self.state = State::HeaderInPlace(buf.clone());
                NextRead::Into { payload: buf.into(), skip }
            }
            other => {
                self.state = other;
                NextRead::Stream
            }
        }
    }

    /// The buffer for a header that is received alone; `None` without memory for it.
    fn place(&mut self) -> Option<Buf> {
        if self.place.is_none() {
            self.place = Buf::try_zeroed(self.header_len).ok();
        }
        self.place.clone()
    }

    /// `count` bytes have been received into the buffer.
    pub(crate) fn received_into(
        &mut self,
        payload: Payload,
        count: usize,
        negotiated: &Negotiated,
        cx: &mut Cx<'_>,
    ) -> Result<Option<Arrived>, Broken> {
        match std::mem::replace(&mut self.state, State::Header) {
            State::IntoBuffer { request, verdict, start, have, len } => {
                let have = have + count;
                debug_assert!(have <= len && payload.len() == len);
                if have == len {
                    self.expect_long = len >= LONG_WRITE;
                    let data = Some(Ok(payload));
                    return Ok(Some(Arrived { request, verdict, start, data }));
                }
                self.state = State::Data { request, verdict, start, payload, have };
                Ok(None)
            }
            State::HeaderInPlace(buf) => {
                self.header_have += count;
                if self.header_have < self.header_len {
                    self.state = State::HeaderInPlace(buf);
                    return Ok(None);
                }
                self.header_have = 0;
                self.expect_long = false;
                let mut header = [0; HEADER_MAX];
                buf.copy_out(0, &mut header[..self.header_len]);
                self.begin(&header, negotiated, cx)
            }
            _ => unreachable!("something lands only when it was asked for"),
        }
    }

    fn take_header(&mut self, input: &mut &[u8]) -> Option<[u8; HEADER_MAX]> {
        let bytes = split(input, self.header_len - self.header_have);
        self.header[self.header_have..self.header_have + bytes.len()].copy_from_slice(bytes);
        self.header_have += bytes.len();
        if self.header_have < self.header_len {
            return None;
        }
        self.header_have = 0;
        Some(self.header)
    }

    /// Decodes a header; returns the request if nothing follows it.
    fn begin(
        &mut self,
        header: &[u8; HEADER_MAX],
        negotiated: &Negotiated,
        cx: &mut Cx<'_>,
    ) -> Result<Option<Arrived>, Broken> {
        let start = cx.now();
        let request = Request::decode(negotiated.style, &header[..self.header_len])
            .map_err(|_| Broken("request with a wrong magic"))?;
        let verdict = negotiated.check(&request);
        match verdict {
            Verdict::Drop(reason) => return Err(Broken(reason)),
            Verdict::Write { range, .. } => {
                self.state = match cx.write_buffer(range) {
                    Ok(payload) => State::Data { request, verdict, start, payload, have: 0 },
                    Err(error) => {
                        let (left, error) = (range.len(), Some(error));
                        State::Skip { request, verdict, start, left, error }
                    }
                };
            }
            Verdict::BlockStatusFilter { payload_len } => {
                let (mut bytes, len) = (Vec::new(), payload_len as usize);
                self.state = match memory::attempt(|| bytes.try_reserve_exact(len)) {
                    Ok(()) => State::Filter { request, start, bytes, len },
                    Err(_) => {
                        let (error, skip) = (NbdErrno::NoMem, u64::from(payload_len));
                        let verdict =
                            Verdict::Refuse { error, message: "no memory for the filter", skip };
                        State::Skip { request, verdict, start, left: skip, error: None }
                    }
                };
            }
            Verdict::Refuse { skip, .. } if skip > 0 => {
                self.state = State::Skip { request, verdict, start, left: skip, error: None };
            }
            _ => return Ok(Some(Arrived { request, verdict, start, data: None })),
        }
        Ok(None)
    }
}

/// Takes at most `len` bytes from the front.
fn split<'a>(input: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (now, later) = input.split_at(len.min(input.len()));
    *input = later;
    now
}
