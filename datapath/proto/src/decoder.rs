//! Replies of the transmission phase, client side. For their layout see [`crate::reply`].

use sheave_core::NbdErrno;

use crate::bytes::{Reader, truncated};
use crate::request::Request;
use crate::wire::{
    BLOCK_STATUS_EXTENTS_MAX, ReplyStyle, STRING_LEN_MAX, chunk_flag, chunk_type, command,
    command_flag, errno_from_wire, header_len, magic,
};

/// The longest part of a reply in bytes that a client must hold at once. Announced bytes, the
/// payload of a read and the descriptors of a block status, are not included.
pub const REPLY_LEN_MAX: usize = header_len::EXTENDED_REPLY + ERROR_LEN_MAX as usize;

/// Decodes replies. It keeps no bytes: the payload of a read and the descriptors of a block status
/// are announced, and the caller receives them in pieces of any length.
#[derive(Clone, Copy, Debug)]
pub struct ReplyDecoder {
    style: ReplyStyle,
}

/// The result of decoding the front of some input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// Try again with at least this many bytes, at most [`REPLY_LEN_MAX`].
    NeedMore(usize),
    /// A reply, or a part of one.
    Event {
        /// Its length in the input. An announced payload follows it.
        consumed: usize,
        /// Its contents.
        event: ReplyEvent<'a>,
    },
}

/// A reply, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyEvent<'a> {
    /// The cookie of its request.
    pub cookie: u64,
    /// The reply ends with it (and with the payload that it announces).
    pub done: bool,
    /// Its contents.
    pub body: ReplyBody<'a>,
}

/// The contents of a reply, or of a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyBody<'a> {
    /// The end: success, if no error came before.
    Success,
    /// `len` bytes of the volume from `at` on follow in the input. They lie inside the request.
    Data {
        /// Offset in the volume.
        at: u64,
        /// Length in bytes, not zero.
        len: u32,
    },
    /// `len` bytes of the volume from `at` on are zeroes. They lie inside the request.
    Hole {
        /// Offset in the volume.
        at: u64,
        /// Length in bytes, not zero.
        len: u32,
    },
    /// The extents of a metadata context, from the request's offset on. The descriptors follow in
    /// the input; [`ReplyDecoder::descriptor`] decodes them.
    BlockStatus {
        /// The context.
        context: u32,
        /// The number of descriptors that follow, at least 1 and at most
        /// [`BLOCK_STATUS_EXTENTS_MAX`].
        count: u32,
    },
    /// The request failed.
    Error {
        /// Why.
        errno: NbdErrno,
        /// The message; may be empty.
        message: &'a str,
        /// The byte of the volume it is about, which lies inside the request.
        at: Option<u64>,
    },
}

/// The server broke the protocol; the client has to disconnect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// The bytes are no reply.
    #[error("a reply begins with {0:#010x} instead of a magic number")]
    BadMagic(u32),
    /// It answers no request.
    #[error("a reply to an unknown request ({0:#x})")]
    UnknownCookie(u64),
    /// It answers a request that has been answered.
    #[error("a second reply to one request ({0:#x})")]
    Repeated(u64),
    /// It contradicts its request or itself.
    #[error("{0}")]
    Violation(&'static str),
}

/// A chunk's header.
#[derive(Clone, Copy)]
struct Header {
    done: bool,
    kind: u16,
    cookie: u64,
    len: usize,
    payload_len: u64,
}

impl ReplyDecoder {
    /// A decoder of replies of that style.
    #[must_use]
    pub fn new(style: ReplyStyle) -> Self {
        Self { style }
    }

    /// Decodes the front of `input`. `pending` looks up the request in flight that has a cookie;
    /// the request determines the valid answers and their length.
    ///
    /// # Errors
    /// When the server broke the protocol.
    #[inline]
    pub fn decode<'a>(
        &self,
        input: &'a [u8],
        pending: impl FnOnce(u64) -> Option<Request>,
    ) -> Result<Decoded<'a>, ReplyError> {
        let mut fields = Reader::new(input);
        let Some(found) = fields.u32() else {
            return Ok(Decoded::NeedMore(self.header_len_min()));
        };
        let header_len = match (self.style, found) {
            (ReplyStyle::Simple | ReplyStyle::Structured, magic::SIMPLE_REPLY) => {
                return decode_simple(self.style, input, fields, pending);
            }
            (ReplyStyle::Structured, magic::STRUCTURED_REPLY) => header_len::STRUCTURED_REPLY,
            (ReplyStyle::Extended, magic::EXTENDED_REPLY) => header_len::EXTENDED_REPLY,
            _ => return Err(ReplyError::BadMagic(found)),
        };
        if input.len() < header_len {
            return Ok(Decoded::NeedMore(header_len));
        }
        let mut read = || Some((fields.u16()?, fields.u16()?, fields.u64()?));
        let (flags, kind, cookie) = read().expect("the header's length was checked");
        let request = pending(cookie).ok_or(ReplyError::UnknownCookie(cookie))?;
        let payload_len = if self.style == ReplyStyle::Extended {
            if fields.u64() != Some(request.offset) {
                return Err(ReplyError::Violation("a reply with the wrong offset"));
            }
            fields.u64().expect("the header's length was checked")
        } else {
            u64::from(fields.u32().expect("the header's length was checked"))
        };
        let done = flags & chunk_flag::DONE != 0;
        let header = Header { done, kind, cookie, len: header_len, payload_len };
        self.decode_chunk(header, input, &request)
    }

    /// The fewest bytes that [`ReplyDecoder::decode`] needs.
    #[must_use]
    pub fn header_len_min(&self) -> usize {
        match self.style {
            // Structured replies may be mixed with simple ones, which are shorter.
            ReplyStyle::Simple | ReplyStyle::Structured => header_len::SIMPLE_REPLY,
            ReplyStyle::Extended => header_len::EXTENDED_REPLY,
        }
    }

    /// Length of a descriptor of a block status in bytes.
    #[must_use]
    pub fn descriptor_len(&self) -> usize {
        if self.style == ReplyStyle::Extended { WIDE_DESCRIPTOR_LEN } else { DESCRIPTOR_LEN }
    }

    /// The length in bytes, not zero, and the status of the descriptor at the front of `input`.
    /// `None` when the input has less than [`ReplyDecoder::descriptor_len`] bytes.
    ///
    /// # Errors
    /// When the length is zero.
    pub fn descriptor(&self, input: &[u8]) -> Result<Option<(u64, u64)>, ReplyError> {
        let mut fields = Reader::new(input);
        let mut read = || match self.style {
            ReplyStyle::Extended => Some((fields.u64()?, fields.u64()?)),
            _ => Some((fields.u32()?.into(), fields.u32()?.into())),
        };
        match read() {
            Some((0, _)) => Err(ReplyError::Violation("a block status extent without length")),
            descriptor => Ok(descriptor),
        }
    }

    fn decode_chunk<'a>(
        &self,
        header: Header,
        input: &'a [u8],
        request: &Request,
    ) -> Result<Decoded<'a>, ReplyError> {
        let needed = self.payload_needed(&header, request)?;
        let Some(payload) = input.get(header.len..header.len + needed) else {
            return Ok(Decoded::NeedMore(header.len + needed));
        };
        let body = match header.kind {
            chunk_type::NONE if header.done => ReplyBody::Success,
            chunk_type::NONE => return Err(ReplyError::Violation("an empty chunk in mid-reply")),
            chunk_type::OFFSET_DATA => decode_data(header.payload_len, payload, request)?,
            chunk_type::OFFSET_HOLE => decode_hole(payload, request)?,
            chunk_type::BLOCK_STATUS | chunk_type::BLOCK_STATUS_EXT => {
                self.decode_status(header.payload_len, payload, request)?
            }
            kind => decode_error(kind, payload, request)?,
        };
        let event = ReplyEvent { cookie: header.cookie, done: header.done, body };
        Ok(Decoded::Event { consumed: header.len + needed, event })
    }

    fn decode_status<'a>(
        &self,
        payload_len: u64,
        head: &[u8],
        request: &Request,
    ) -> Result<ReplyBody<'a>, ReplyError> {
        let malformed = ReplyError::Violation("a malformed block status chunk");
        let mut fields = Reader::new(head);
        let context = fields.u32().ok_or(malformed)?;
        // Extended chunks only; a count of zero means that the server did not count.
        let counted = fields.u32().filter(|count| *count != 0);
        let (len, each) = (payload_len - head.len() as u64, self.descriptor_len() as u64);
        let count = u32::try_from(len / each).map_err(|_| malformed)?;
        let is_whole = count > 0 && len.is_multiple_of(each);
        if !is_whole || counted.is_some_and(|counted| counted != count) {
            return Err(malformed);
        }
        if request.flags & command_flag::REQ_ONE != 0 && count != 1 {
            return Err(ReplyError::Violation("more than the one extent that was asked for"));
        }
        Ok(ReplyBody::BlockStatus { context, count })
    }

    /// Bytes after the header that must have arrived: the payload without announced bytes. Also
    /// checks that the chunk fits its request, so that the wait is bounded.
    fn payload_needed(&self, header: &Header, request: &Request) -> Result<usize, ReplyError> {
        let is_read = request.command == command::READ;
        let is_status = request.command == command::BLOCK_STATUS;
        let is_wide = self.style == ReplyStyle::Extended;
        let (fits, len_max) = match header.kind {
            chunk_type::NONE => (true, 0),
            chunk_type::OFFSET_DATA => (is_read && header.payload_len > 8, u64::from(u32::MAX)),
            chunk_type::OFFSET_HOLE => (is_read && header.payload_len == 12, 12),
            chunk_type::BLOCK_STATUS => {
                (is_status && !is_wide && header.payload_len >= 4, STATUS_LEN_MAX)
            }
            chunk_type::BLOCK_STATUS_EXT => {
                (is_status && is_wide && header.payload_len >= 8, WIDE_STATUS_LEN_MAX)
            }
            kind => (kind & chunk_type::ERROR_BIT != 0, ERROR_LEN_MAX),
        };
        if !fits {
            return Err(ReplyError::Violation("a chunk that does not fit its request"));
        }
        if header.payload_len > len_max {
            return Err(ReplyError::Violation("a chunk that is too long"));
        }
        Ok(match header.kind {
            chunk_type::OFFSET_DATA | chunk_type::BLOCK_STATUS_EXT => 8,
            chunk_type::BLOCK_STATUS => 4,
            _ => usize::try_from(header.payload_len).expect("chunks but data are bounded"),
        })
    }
}

const WIDE_STATUS_HEAD_LEN: usize = 8;
const DESCRIPTOR_LEN: usize = 8;
const WIDE_DESCRIPTOR_LEN: usize = 16;
const STATUS_LEN_MAX: u64 = 4 + (BLOCK_STATUS_EXTENTS_MAX * DESCRIPTOR_LEN) as u64;
const WIDE_STATUS_LEN_MAX: u64 =
    (WIDE_STATUS_HEAD_LEN + BLOCK_STATUS_EXTENTS_MAX * WIDE_DESCRIPTOR_LEN) as u64;
/// An error's fixed fields and message, with room for future kinds of errors.
const ERROR_LEN_MAX: u64 = 4 * STRING_LEN_MAX as u64;

fn decode_simple<'a>(
    style: ReplyStyle,
    input: &'a [u8],
    mut fields: Reader<'a>,
    pending: impl FnOnce(u64) -> Option<Request>,
) -> Result<Decoded<'a>, ReplyError> {
    if input.len() < header_len::SIMPLE_REPLY {
        return Ok(Decoded::NeedMore(header_len::SIMPLE_REPLY));
    }
    let mut read = || Some((fields.u32()?, fields.u64()?));
    let (error, cookie) = read().expect("the header's length was checked");
    let request = pending(cookie).ok_or(ReplyError::UnknownCookie(cookie))?;
    let is_read = request.command == command::READ;
    if style == ReplyStyle::Structured && is_read {
        return Err(ReplyError::Violation("a simple reply to a read"));
    }
    let body = match (error, u32::try_from(request.length)) {
        (0, Ok(len)) if is_read && len > 0 => ReplyBody::Data { at: request.offset, len },
        (0, _) if request.command == command::BLOCK_STATUS => {
            return Err(ReplyError::Violation("a simple reply to a block status request"));
        }
        (0, _) => ReplyBody::Success,
        (error, _) => ReplyBody::Error { errno: errno_from_wire(error), message: "", at: None },
    };
    let event = ReplyEvent { cookie, done: true, body };
    Ok(Decoded::Event { consumed: header_len::SIMPLE_REPLY, event })
}

fn decode_data<'a>(
    payload_len: u64,
    payload: &[u8],
    request: &Request,
) -> Result<ReplyBody<'a>, ReplyError> {
    let at = Reader::new(payload).u64();
    let len = u32::try_from(payload_len - 8).ok();
    let (at, len) = at.zip(len).expect("the chunk's length was checked");
    check_inside(at, u64::from(len), request)?;
    Ok(ReplyBody::Data { at, len })
}

fn decode_hole<'a>(payload: &[u8], request: &Request) -> Result<ReplyBody<'a>, ReplyError> {
    let mut fields = Reader::new(payload);
    let mut read = || Some((fields.u64()?, fields.u32()?));
    let (at, len) = read().expect("the chunk's length was checked");
    if len == 0 {
        return Err(ReplyError::Violation("a hole without length"));
    }
    check_inside(at, u64::from(len), request)?;
    Ok(ReplyBody::Hole { at, len })
}

fn decode_error<'a>(
    kind: u16,
    payload: &'a [u8],
    request: &Request,
) -> Result<ReplyBody<'a>, ReplyError> {
    let malformed = ReplyError::Violation("a malformed error chunk");
    let mut fields = Reader::new(payload);
    let error = fields.u32().ok_or(malformed)?;
    let message_len = fields.u16().ok_or(malformed)?;
    let message = fields.bytes(usize::from(message_len)).ok_or(malformed)?;
    if error == 0 {
        return Err(ReplyError::Violation("an error chunk without an error"));
    }
    let at = match kind {
        chunk_type::ERROR_OFFSET => {
            let at = fields.u64().ok_or(malformed)?;
            check_inside(at, 1, request)?;
            Some(at)
        }
        _ => None,
    };
    // An unreadable message is dropped.
    let message = truncated(std::str::from_utf8(message).unwrap_or(""), STRING_LEN_MAX);
    Ok(ReplyBody::Error { errno: errno_from_wire(error), message, at })
}

fn check_inside(at: u64, len: u64, request: &Request) -> Result<(), ReplyError> {
    let end = request.offset.saturating_add(request.length);
    let is_inside = at >= request.offset && at.checked_add(len).is_some_and(|stop| stop <= end);
    is_inside.then_some(()).ok_or(ReplyError::Violation("a chunk outside of its request"))
}
