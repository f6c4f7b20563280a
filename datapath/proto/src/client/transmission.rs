//! The transmission phase, client side: requests in flight, and their replies.

use sheave_core::{Op, OpKind, VolumeInfo};

use super::ClientNegotiated;
use super::gathered::{Answer, Gathered, ServerError};
use super::in_flight::{Cookie, InFlight};
use crate::decoder::{Decoded, ReplyBody, ReplyDecoder, ReplyError, ReplyEvent};
use crate::request::Request;
use crate::wire::{BLOCK_STATUS_EXTENTS_MAX, ReplyStyle, command, command_flag};

/// The most requests of one connection that a client may have in flight.
pub const CLIENT_IN_FLIGHT_MAX: usize = 1 << 18;
/// The longest range of a request without payload in bytes, unless headers are extended: 32 bits,
/// cut to a multiple of every block size.
const COMPACT_LEN_MAX: u64 = 0xffff_0000;

/// One connection in the transmission phase. It takes bytes, returns events, never blocks, and
/// holds no payload: the caller sends that of a write behind the request, and events give the
/// position of that of a read. `T` is a value of the caller for each request.
///
/// A reply is bounded: no byte of a read arrives twice, no metadata context comes twice, and
/// errors are counted. A read that succeeds has arrived as a whole.
#[derive(Debug)]
pub struct Client<T> {
    style: ReplyStyle,
    decoder: ReplyDecoder,
    size: u64,
    info: VolumeInfo,
    /// Ids of the selected metadata contexts.
    contexts: Vec<u32>,
    /// The id of `base:allocation`.
    allocation: Option<u32>,
    in_flight: InFlight<Pending<T>>,
    /// The meaning of the next bytes, unless they begin a reply or a chunk.
    arriving: Option<Arriving>,
    /// The server has broken the protocol; its further bytes are ignored.
    broken: Option<ReplyError>,
}

/// An event in a server's bytes.
#[derive(Debug)]
pub enum ClientEvent<'a, T> {
    /// Step again when the input that is not consumed has at least so many bytes, at most
    /// [`crate::REPLY_LEN_MAX`]. The next bytes may also be received directly into their buffer;
    /// see [`Client::payload`].
    NeedMore(usize),
    /// Bytes of a read.
    Data {
        /// The read.
        cookie: Cookie,
        /// The caller's value.
        state: &'a mut T,
        /// Their offset in the read.
        at: usize,
        /// The bytes, at least one; a piece of the input.
        bytes: &'a [u8],
    },
    /// Bytes of a read that are zero.
    Zeroes {
        /// The read.
        cookie: Cookie,
        /// The caller's value.
        state: &'a mut T,
        /// Their offset in the read.
        at: usize,
        /// Their number, at least one.
        len: usize,
    },
    /// A request has completed.
    Done {
        /// The request.
        cookie: Cookie,
        /// The caller's value.
        state: T,
        /// The outcome. After an error any bytes of a read may be missing.
        outcome: Result<Answer, ServerError>,
    },
}

/// The destination of the next bytes of the stream.
#[derive(Debug)]
pub struct PayloadPlace<'a, T> {
    /// The read.
    pub cookie: Cookie,
    /// The caller's value.
    pub state: &'a mut T,
    /// Their offset in the read.
    pub at: usize,
    /// Their number, at least one.
    pub len: usize,
}

#[derive(Debug)]
struct Pending<T> {
    state: T,
    request: Request,
    gathered: Gathered,
}

/// Announced bytes that have not arrived yet.
#[derive(Clone, Copy, Debug)]
struct Arriving {
    cookie: Cookie,
    what: Part,
    /// The reply ends with it.
    done: bool,
}

#[derive(Clone, Copy, Debug)]
enum Part {
    /// Bytes of a read.
    Data { at: usize, left: usize },
    /// Descriptors of a block status, and whether they are those of `base:allocation`.
    Descriptors { left: u32, is_allocation: bool },
}

/// Replies to others are violations, which the decoder detects.
const IN_FLIGHT: &str = "a request in flight";

/// An event without borrows.
enum Found {
    NeedMore(usize),
    Data { cookie: Cookie, at: usize, len: usize },
    Zeroes { cookie: Cookie, at: usize, len: usize },
    Done { cookie: Cookie },
}

impl<T> Client<T> {
    /// Begins behind a handshake.
    ///
    /// # Panics
    /// When `in_flight_max` is 0 or more than [`CLIENT_IN_FLIGHT_MAX`]: a bug of the caller.
    #[must_use]
    pub fn new(negotiated: &ClientNegotiated, in_flight_max: usize) -> Self {
        assert!((1..=CLIENT_IN_FLIGHT_MAX).contains(&in_flight_max), "requests in flight");
        Self {
            style: negotiated.style,
            decoder: ReplyDecoder::new(negotiated.style),
            size: negotiated.size,
            info: negotiated.volume_info(),
            contexts: negotiated.contexts.iter().map(|(id, _)| *id).collect(),
            allocation: negotiated.context("base:allocation"),
            in_flight: InFlight::new(in_flight_max),
            arriving: None,
            broken: None,
        }
    }

    /// Size of the export in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The properties of the export.
    #[must_use]
    pub fn info(&self) -> &VolumeInfo {
        &self.info
    }

    /// The longest range in bytes that one request of this kind may have.
    #[must_use]
    pub fn len_max(&self, kind: OpKind) -> u64 {
        match (kind, self.style) {
            (OpKind::Flush, _) => 0,
            (OpKind::Read | OpKind::Write, _) => {
                let block = &self.info.block;
                (block.maximum_payload - block.maximum_payload % block.minimum).into()
            }
            (_, ReplyStyle::Extended) => i64::MAX as u64 + 1 - (64 << 10),
            (_, ReplyStyle::Simple | ReplyStyle::Structured) => COMPACT_LEN_MAX,
        }
    }

    /// Requests without an answer.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether another request may be submitted.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.in_flight.has_room()
    }

    /// The caller's value of a request in flight.
    #[must_use]
    pub fn get(&self, cookie: Cookie) -> Option<&T> {
        self.in_flight.get(cookie).map(|pending| &pending.state)
    }

    /// The caller's values of all requests in flight, in no order.
    pub fn states(&self) -> impl Iterator<Item = &T> {
        self.in_flight.iter().map(|pending| &pending.state)
    }

    /// Appends the header of the request for an op, which the export must have; the payload of a
    /// write follows it on the wire. A server may refuse a write before all of its payload was
    /// sent, which must be sent nevertheless.
    ///
    /// # Errors
    /// The state comes back when too many requests are in flight.
    ///
    /// # Panics
    /// When the op is longer than [`Client::len_max`]: a bug of the caller.
    pub fn submit(&mut self, op: &Op, state: T, out: &mut Vec<u8>) -> Result<Cookie, T> {
        let extents_max = match op {
            Op::BlockStatus { extents_max, .. } => *extents_max,
            _ => 0,
        };
        self.send(Request::from(op), extents_max, state, out)
    }

    /// The same for any request; its cookie is ignored, and writes need not have the flag that
    /// announces a payload. For requests that an op cannot express: `DF`, or deliberately wrong
    /// ones.
    ///
    /// # Errors
    /// As [`Client::submit`].
    ///
    /// # Panics
    /// As [`Client::submit`].
    pub fn submit_request(
        &mut self,
        request: Request,
        state: T,
        out: &mut Vec<u8>,
    ) -> Result<Cookie, T> {
        self.send(request, BLOCK_STATUS_EXTENTS_MAX, state, out)
    }

    /// Appends the disconnect request, which has no answer.
    pub fn disconnect(&self, out: &mut Vec<u8>) {
        Request { command: command::DISC, ..Request::default() }.encode(self.style, out);
    }

    /// Takes `input` up to the first event, and returns the number of consumed bytes. Call it until
    /// the event is [`ClientEvent::NeedMore`]: there may be events without input.
    ///
    /// # Errors
    /// When the server has broken the protocol, now or before.
    #[inline]
    pub fn step<'a>(
        &'a mut self,
        input: &'a [u8],
    ) -> Result<(usize, ClientEvent<'a, T>), ReplyError> {
        if let Some(error) = self.broken {
            return Err(error);
        }
        let (consumed, found) = match self.advance(input) {
            Ok(found) => found,
            Err(error) => return Err(*self.broken.insert(error)),
        };
        let event = match found {
            Found::NeedMore(len) => ClientEvent::NeedMore(len),
            Found::Data { cookie, at, len } => {
                let bytes = &input[consumed - len..consumed];
                ClientEvent::Data { cookie, state: self.state_mut(cookie), at, bytes }
            }
            Found::Zeroes { cookie, at, len } => {
                ClientEvent::Zeroes { cookie, state: self.state_mut(cookie), at, len }
            }
            Found::Done { cookie } => {
                let pending = self.in_flight.remove(cookie).expect(IN_FLIGHT);
                ClientEvent::Done {
                    cookie,
                    state: pending.state,
                    outcome: pending.gathered.outcome(),
                }
            }
        };
        Ok((consumed, event))
    }

    /// The destination of the next bytes of the stream, if they are data of a read. When all input
    /// is consumed, they may be received there directly.
    pub fn payload(&mut self) -> Option<PayloadPlace<'_, T>> {
        match self.arriving {
            Some(Arriving { cookie, what: Part::Data { at, left: len @ 1.. }, .. }) => {
                Some(PayloadPlace { cookie, state: self.state_mut(cookie), at, len })
            }
            _ => None,
        }
    }

    /// `count` bytes have been received at [`Client::payload`]. The next step may have an event
    /// without input.
    ///
    /// # Panics
    /// When there are more than it said: a bug of the caller.
    pub fn payload_received(&mut self, len: usize) {
        let Some(Arriving { what: Part::Data { at, left }, .. }) = &mut self.arriving else {
            return assert_eq!(len, 0, "no payload is due");
        };
        assert!(len <= *left, "no more payload than is due");
        *at += len;
        *left -= len;
    }

    /// Removes all requests in flight, since no answer will come, and returns the caller's values.
    pub fn drain(&mut self) -> impl Iterator<Item = (Cookie, T)> {
        self.arriving = None;
        self.in_flight.drain().map(|(cookie, pending)| (cookie, pending.state))
    }

    fn send(
        &mut self,
        mut request: Request,
        extents_max: usize,
        state: T,
        out: &mut Vec<u8>,
    ) -> Result<Cookie, T> {
        let Some(cookie) = self.in_flight.next_cookie() else { return Err(state) };
        request.cookie = cookie.to_wire();
        if self.style == ReplyStyle::Extended && request.command == command::WRITE {
            request.flags |= command_flag::PAYLOAD_LEN;
        }
        request.encode(self.style, out);
        let gathered = Gathered::new(&request, extents_max);
        self.in_flight.insert(cookie, Pending { state, request, gathered });
        Ok(cookie)
    }

    /// Decodes the front of the input, and returns the length of that.
    #[inline]
    fn advance(&mut self, input: &[u8]) -> Result<(usize, Found), ReplyError> {
        let mut consumed = 0;
        loop {
            if let Some(arriving) = self.arriving {
                let (taken, found) = self.arrive(arriving, &input[consumed..])?;
                consumed += taken;
                match found {
                    Some(found) => return Ok((consumed, found)),
                    None => continue,
                }
            }
            let known = |cookie| {
                self.in_flight.get(Cookie::from_wire(cookie)).map(|pending| pending.request)
            };
            let event = match self.decoder.decode(&input[consumed..], known) {
                Ok(Decoded::NeedMore(len)) => return Ok((consumed, Found::NeedMore(len))),
                Ok(Decoded::Event { consumed: taken, event }) => {
                    consumed += taken;
                    event
                }
                Err(ReplyError::UnknownCookie(cookie))
                    if self.in_flight.has_ended(Cookie::from_wire(cookie)) =>
                {
                    return Err(ReplyError::Repeated(cookie));
                }
                Err(error) => return Err(error),
            };
            if let Some(found) = self.take(&event)? {
                return Ok((consumed, found));
            }
        }
    }

    /// Takes a reply or a chunk, without the bytes that it announces.
    fn take(&mut self, event: &ReplyEvent<'_>) -> Result<Option<Found>, ReplyError> {
        let (cookie, done) = (Cookie::from_wire(event.cookie), event.done);
        let pending = self.in_flight.get_mut(cookie).expect(IN_FLIGHT);
        let index =
            |at: u64| usize::try_from(at - pending.request.offset).expect("reads fit into memory");
        match event.body {
            ReplyBody::Success => {}
            ReplyBody::Data { at, len } => {
                pending.gathered.cover(at, len)?;
                let what = Part::Data { at: index(at), left: len as usize };
                self.arriving = Some(Arriving { cookie, what, done });
                return Ok(None);
            }
            ReplyBody::Hole { at, len } => {
                pending.gathered.cover(at, len)?;
                let (at, len) = (index(at), len as usize);
                // An empty run of data behind it ends the reply.
                let what = Part::Data { at: at + len, left: 0 };
                self.arriving = done.then_some(Arriving { cookie, what, done });
                return Ok(Some(Found::Zeroes { cookie, at, len }));
            }
            ReplyBody::BlockStatus { context, count } => {
                let known = self.contexts.iter().position(|known| *known == context);
                let index = known.ok_or(ReplyError::Violation(
                    "a block status of a metadata context that was not selected",
                ))?;
                pending.gathered.begin_context(index)?;
                let is_allocation = self.allocation == Some(context);
                let what = Part::Descriptors { left: count, is_allocation };
                self.arriving = Some(Arriving { cookie, what, done });
                return Ok(None);
            }
            ReplyBody::Error { errno, message, at } => {
                pending.gathered.fail(errno, message, at)?;
            }
        }
        if done { self.end(cookie).map(Some) } else { Ok(None) }
    }

    /// Takes some of the announced bytes. Returns their number, and an event if there is one.
    fn arrive(
        &mut self,
        arriving: Arriving,
        input: &[u8],
    ) -> Result<(usize, Option<Found>), ReplyError> {
        let Arriving { cookie, what, done } = arriving;
        let is_over =
            |what| matches!(what, Part::Data { left: 0, .. } | Part::Descriptors { left: 0, .. });
        if is_over(what) {
            self.arriving = None;
            let end = if done { Some(self.end(cookie)?) } else { None };
            return Ok((0, end));
        }
        match what {
            Part::Data { at, left } => {
                let len = left.min(input.len());
                if len == 0 {
                    return Ok((0, Some(Found::NeedMore(1))));
                }
                let what = Part::Data { at: at + len, left: left - len };
                self.arriving = Some(Arriving { cookie, what, done });
                Ok((len, Some(Found::Data { cookie, at, len })))
            }
            Part::Descriptors { left, is_allocation } => {
                let Some((len, status)) = self.decoder.descriptor(input)? else {
                    return Ok((0, Some(Found::NeedMore(self.decoder.descriptor_len()))));
                };
                if is_allocation {
                    let pending = self.in_flight.get_mut(cookie).expect(IN_FLIGHT);
                    pending.gathered.add_extent(len, status, self.info.block.minimum.into());
                }
                let what = Part::Descriptors { left: left - 1, is_allocation };
                self.arriving = Some(Arriving { cookie, what, done });
                Ok((self.decoder.descriptor_len(), None))
            }
        }
    }

    /// A reply has ended. If it is incomplete, its request stays in flight without an answer.
    fn end(&self, cookie: Cookie) -> Result<Found, ReplyError> {
        let pending = self.in_flight.get(cookie).expect(IN_FLIGHT);
        pending.gathered.check_whole()?;
        Ok(Found::Done { cookie })
    }

    fn state_mut(&mut self, cookie: Cookie) -> &mut T {
        &mut self.in_flight.get_mut(cookie).expect(IN_FLIGHT).state
    }
}
