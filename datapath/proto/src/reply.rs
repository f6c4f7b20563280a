//! Replies of the transmission phase: appended to a buffer, nothing else is allocated.
//!
//! ```text
//! simple      magic u32 | error u32 | cookie u64                                         16 bytes
//! structured  magic u32 | flags u16 | type u16 | cookie u64 | length u32                 20 bytes
//! extended    magic u32 | flags u16 | type u16 | cookie u64 | offset u64 | length u64    32 bytes
//! ```

use sheave_core::{ByteRange, Extent, NbdErrno};

use crate::bytes::{Put, truncated};
use crate::context::MetaContext;
use crate::request::Request;
use crate::wire::{
    BLOCK_STATUS_EXTENTS_MAX, ReplyStyle, STRING_LEN_MAX, chunk_flag, chunk_type, magic,
};

/// The request that a reply answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// The style of replies.
    pub style: ReplyStyle,
    /// The request's cookie.
    pub cookie: u64,
    /// The request's offset, which extended replies echo.
    pub offset: u64,
}

impl ReplyTo {
    /// Answers `request`.
    #[must_use]
    pub fn new(style: ReplyStyle, request: &Request) -> Self {
        Self { style, cookie: request.cookie, offset: request.offset }
    }
}

/// Appends a whole reply of success. Not for a read of at least one byte.
pub fn success(out: &mut Vec<u8>, to: ReplyTo) {
    match to.style {
        ReplyStyle::Simple => simple(out, to.cookie, None),
        ReplyStyle::Structured | ReplyStyle::Extended => none_chunk(out, to),
    }
}

/// Appends the end of a failed reply; a simple reply consists only of it.
pub fn failure(out: &mut Vec<u8>, to: ReplyTo, error: NbdErrno, message: &str) {
    match to.style {
        ReplyStyle::Simple => simple(out, to.cookie, Some(error)),
        ReplyStyle::Structured | ReplyStyle::Extended => {
            error_chunk(out, to, error, message, true);
        }
    }
}

/// Appends a simple reply. The payload of a successful read follows it.
pub fn simple(out: &mut Vec<u8>, cookie: u64, error: Option<NbdErrno>) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&magic::SIMPLE_REPLY.to_be_bytes());
    header[4..8].copy_from_slice(&error.map_or(0, |error| error as u32).to_be_bytes());
    header[8..].copy_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&header);
}

/// Appends the header of a chunk of `len` bytes of data, which follow, from `at` of the volume. It
/// may be the last chunk only if the bytes are available: an error cannot be sent afterwards.
///
/// # Panics
/// When the style is simple, or `len` zero: a bug of the caller, as in all chunks below.
pub fn data_chunk(out: &mut Vec<u8>, to: ReplyTo, at: u64, len: u32, done: bool) {
    assert_ne!(len, 0, "a data chunk describes at least one byte");
    chunk(out, to, chunk_type::OFFSET_DATA, done, 8 + u64::from(len));
    out.put_u64(at);
}

/// Appends a chunk for `len` zeroes from `at` of the volume.
///
/// # Panics
/// As [`data_chunk`].
pub fn hole_chunk(out: &mut Vec<u8>, to: ReplyTo, at: u64, len: u32, done: bool) {
    assert_ne!(len, 0, "a hole describes at least one byte");
    chunk(out, to, chunk_type::OFFSET_HOLE, done, 12);
    out.put_u64(at);
    out.put_u32(len);
}

/// Appends the chunk that ends a reply.
///
/// # Panics
/// When the style is simple.
pub fn none_chunk(out: &mut Vec<u8>, to: ReplyTo) {
    chunk(out, to, chunk_type::NONE, true, 0);
}

/// Appends an error about the whole request. Messages that are too long are truncated.
///
/// # Panics
/// When the style is simple.
pub fn error_chunk(out: &mut Vec<u8>, to: ReplyTo, error: NbdErrno, message: &str, done: bool) {
    let message = truncated(message, STRING_LEN_MAX);
    chunk(out, to, chunk_type::ERROR, done, 6 + message.len() as u64);
    put_error(out, error, message);
}

/// Appends an error about the byte at `at` of the volume, which lies inside the request.
///
/// # Panics
/// When the style is simple.
pub fn error_offset_chunk(
    out: &mut Vec<u8>,
    to: ReplyTo,
    error: NbdErrno,
    message: &str,
    at: u64,
    done: bool,
) {
    let message = truncated(message, STRING_LEN_MAX);
    chunk(out, to, chunk_type::ERROR_OFFSET, done, 14 + message.len() as u64);
    put_error(out, error, message);
    out.put_u64(at);
}

/// The part of a block status request that the form of its answer depends on.
#[derive(Clone, Copy, Debug)]
pub struct StatusQuery {
    /// The range asked about; not empty.
    pub range: ByteRange,
    /// Only one extent is wanted.
    pub req_one: bool,
}

/// Appends a context's status of extents, which begin at the range's start. Neighbours with the
/// same status are joined, those beyond the range left out; lengths are 32 or 64 bits wide,
/// depending on the style. Without extents the whole range counts as allocated, which is always
/// safe.
///
/// # Panics
/// When the style is simple or the range empty: a bug of the caller.
pub fn block_status_chunk(
    out: &mut Vec<u8>,
    to: ReplyTo,
    context: MetaContext,
    extents: &[Extent],
    query: StatusQuery,
    done: bool,
) {
    let is_wide = to.style == ReplyStyle::Extended;
    let kind = if is_wide { chunk_type::BLOCK_STATUS_EXT } else { chunk_type::BLOCK_STATUS };
    let (head_len, descriptor_len) = if is_wide { (8, 16) } else { (4, 8) };
    let count = descriptors(context, extents, query, is_wide).count();
    chunk(out, to, kind, done, head_len + descriptor_len * count as u64);
    out.put_u32(context.id());
    if is_wide {
        out.put_u32(u32::try_from(count).expect("the count of descriptors is bounded"));
    }
    for (len, status) in descriptors(context, extents, query, is_wide) {
        if is_wide {
            out.put_u64(len);
            out.put_u64(u64::from(status));
        } else {
            out.put_u32(u32::try_from(len).expect("compact extents were cut to 32 bits"));
            out.put_u32(status);
        }
    }
}

/// Lengths and statuses for a block status chunk.
fn descriptors(
    context: MetaContext,
    extents: &[Extent],
    query: StatusQuery,
    is_wide: bool,
) -> impl Iterator<Item = (u64, u32)> {
    assert!(!query.range.is_empty(), "the status of at least one byte");
    const WHOLE: &[Extent] = &[Extent { len: u64::MAX, hole: false, zero: false }];
    let known = if extents.iter().any(|extent| extent.len > 0) { extents } else { WHOLE };
    let is_made_up = !std::ptr::eq(known, extents);
    let mut rest = known.iter().filter(|extent| extent.len > 0).peekable();
    let mut left = query.range.len();
    let count_max = if query.req_one { 1 } else { BLOCK_STATUS_EXTENTS_MAX };
    let merged = std::iter::from_fn(move || {
        let first = rest.next().filter(|_| left > 0)?;
        let status = context.status(first);
        let mut len = first.len;
        while let Some(next) = rest.next_if(|next| context.status(next) == status) {
            len = len.saturating_add(next.len);
        }
        // Only the last extent may go beyond the range, and not if it is the only one wanted.
        let len_max = match (query.req_one || is_made_up, is_wide) {
            (true, _) => left,
            (false, true) => u64::MAX,
            (false, false) => left.max(COMPACT_EXTENT_LEN_MAX),
        };
        let len = len.min(len_max);
        left = left.saturating_sub(len);
        Some((len, status))
    });
    merged.take(count_max)
}

/// The longest extent beyond a range in compact descriptors, in bytes: 32 bits, cut to a multiple
/// of every block size.
const COMPACT_EXTENT_LEN_MAX: u64 = 0xffff_0000;

fn put_error(out: &mut Vec<u8>, error: NbdErrno, message: &str) {
    out.put_u32(error as u32);
    out.put_u16(u16::try_from(message.len()).expect("messages are cut to 4096 bytes"));
    out.extend_from_slice(message.as_bytes());
}

fn chunk(out: &mut Vec<u8>, to: ReplyTo, kind: u16, done: bool, payload_len: u64) {
    let flags = if done { chunk_flag::DONE } else { 0 };
    let mut header = [0; 32];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(4, &flags.to_be_bytes());
    put(6, &kind.to_be_bytes());
    put(8, &to.cookie.to_be_bytes());
    let len = match to.style {
        ReplyStyle::Simple => panic!("simple replies have no chunks"),
        ReplyStyle::Structured => {
            put(0, &magic::STRUCTURED_REPLY.to_be_bytes());
            let len = u32::try_from(payload_len).expect("structured chunks are short");
            put(16, &len.to_be_bytes());
            20
        }
        ReplyStyle::Extended => {
            put(0, &magic::EXTENDED_REPLY.to_be_bytes());
            put(16, &to.offset.to_be_bytes());
            put(24, &payload_len.to_be_bytes());
            32
        }
    };
    out.extend_from_slice(&header[..len]);
}
