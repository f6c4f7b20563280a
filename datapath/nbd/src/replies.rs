//! Replies, composed of headers from the protocol crate and payload that is not copied.

use sheave_core::{ByteRange, Extent, NbdErrno, Payload, Reply, Result};
use sheave_proto::reply::{self, ReplyTo, StatusQuery};
use sheave_proto::{ContextSet, ReplyStyle, read_chunks};
use sheave_ring::SendBatch;

/// The part of a request that its reply depends on.
#[derive(Clone, Copy)]
pub(crate) enum Asked {
    /// The bytes of a range.
    Read { range: ByteRange, df: bool },
    /// Its block status.
    Status { query: StatusQuery, contexts: ContextSet },
    /// Only success or failure; `bytes` of data were written.
    Done { bytes: u64 },
}

impl Asked {
    /// Bytes of data that it moves when it succeeds.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Read { range, .. } => range.len(),
            Self::Status { .. } => 0,
            Self::Done { bytes } => *bytes,
        }
    }
}

/// The longest header, of a chunk that describes a hole.
const HEADER_LEN_MAX: usize = 48;
/// The longest description of an extent.
const EXTENT_LEN_MAX: usize = 16;

/// Appends the reply to a request that succeeded.
///
/// # Errors
/// When there is no memory for it; nothing is appended then, as in all that follow.
pub(crate) fn success(out: &mut SendBatch, to: ReplyTo, asked: Asked, answer: Reply) -> Result<()> {
    match (asked, answer) {
        (Asked::Read { range, df }, Reply::Data(payload)) => read(out, to, range, df, payload),
        (Asked::Status { query, contexts }, Reply::Extents(extents)) => {
            status(out, to, query, contexts, &extents)
        }
        (Asked::Done { .. }, _) => {
            out.try_reserve(HEADER_LEN_MAX, 1)?;
            out.head(|head| reply::success(head, to));
            Ok(())
        }
        (Asked::Read { .. } | Asked::Status { .. }, _) => {
            // Any other answer is a bug of the backend, but the client must not hang.
            debug_assert!(false, "a backend answers what it was asked");
            failure(out, to, NbdErrno::Io, "the volume gave a wrong answer")
        }
    }
}

/// Appends the reply to a request that failed.
pub(crate) fn failure(
    out: &mut SendBatch,
    to: ReplyTo,
    errno: NbdErrno,
    message: &str,
) -> Result<()> {
    out.try_reserve(HEADER_LEN_MAX + message.len(), 1)?;
    out.head(|head| reply::failure(head, to, errno, message));
    Ok(())
}

fn read(
    out: &mut SendBatch,
    to: ReplyTo,
    range: ByteRange,
    df: bool,
    payload: Payload,
) -> Result<()> {
    if payload.len() as u64 != range.len() {
        debug_assert!(false, "a backend reads as much as it was asked for");
        return failure(out, to, NbdErrno::Io, "the volume gave a short answer");
    }
    let segments = payload.segments().len();
    if to.style == ReplyStyle::Simple {
        out.try_reserve(HEADER_LEN_MAX, 1 + segments)?;
        out.head(|head| reply::simple(head, to.cookie, None));
        out.payload(payload);
        return Ok(());
    }
    // A hole may leave a piece of data on either side.
    let chunks = 2 * segments + 1;
    out.try_reserve(chunks * HEADER_LEN_MAX, 2 * chunks + segments)?;
    for chunk in read_chunks(to.style, df, range, &payload) {
        out.head(|head| chunk.encode(head, to));
        if !chunk.hole {
            out.part(&payload, chunk.skip, chunk.len as usize);
        }
    }
    Ok(())
}

fn status(
    out: &mut SendBatch,
    to: ReplyTo,
    query: StatusQuery,
    contexts: ContextSet,
    extents: &[Extent],
) -> Result<()> {
    let count = contexts.len();
    out.try_reserve(count * (HEADER_LEN_MAX + extents.len() * EXTENT_LEN_MAX), 1)?;
    for (index, context) in contexts.iter().enumerate() {
        let done = index + 1 == count;
        out.head(|head| reply::block_status_chunk(head, to, context, extents, query, done));
    }
    Ok(())
}
