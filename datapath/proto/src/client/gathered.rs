//! Gathers the chunks of one reply.

use std::fmt;

use sheave_core::{Error, ErrorKind, Extent, NbdErrno, printable};

use crate::coverage::ReadCoverage;
use crate::decoder::ReplyError;
use crate::request::Request;
use crate::wire::{allocation_status, command, command_flag};

/// The most errors in one reply. The specification has no limit, and a server could go on for ever.
pub const REPLY_ERRORS_MAX: u32 = 64;

/// The answer to a successful request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Success; every byte of a read has arrived.
    Done,
    /// The extents of `base:allocation` from the start of the request on: at least one, none beyond
    /// its end. They may end early.
    Extents(Vec<Extent>),
}

/// A request failed. If a server reports several errors it is the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerError {
    /// Why.
    pub errno: NbdErrno,
    /// The server's message; may be empty.
    pub message: Box<str>,
    /// The byte of the volume that it is about, if the server reports it.
    pub at: Option<u64>,
}

impl ServerError {
    /// The kind of the error.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::of_nbd(self.errno)
    }
}

impl ServerError {
    fn text(&self) -> String {
        let what = match self.errno {
            NbdErrno::Perm => "operation not permitted",
            NbdErrno::Io => "I/O error",
            NbdErrno::NoMem => "out of memory",
            NbdErrno::Inval => "invalid request",
            NbdErrno::NoSpc => "no space left",
            NbdErrno::Overflow => "too large",
            NbdErrno::NotSup => "not supported",
            NbdErrno::Shutdown => "shutting down",
        };
        match &*self.message {
            "" => what.to_owned(),
            message => format!("{what}: {}", printable(message)),
        }
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the server reports an error: {}", self.text())
    }
}

impl std::error::Error for ServerError {}

impl From<ServerError> for Error {
    fn from(error: ServerError) -> Self {
        Self::new(error.kind(), "server", error.text())
    }
}

/// The contents of a reply so far.
#[derive(Debug)]
pub(super) struct Gathered {
    content: Content,
    error: Option<Box<ServerError>>,
    errors: u32,
}

#[derive(Debug)]
enum Content {
    /// Success or failure only.
    Nothing,
    Read(ReadCoverage),
    Status(Box<Status>),
}

/// The allocation of a range, from its start on.
#[derive(Debug)]
struct Status {
    /// The offset of the next extent in the volume.
    next: u64,
    end: u64,
    extents: Vec<Extent>,
    extents_max: usize,
    /// The rest of the extents is ignored.
    is_over: bool,
    /// One bit per metadata context that has arrived.
    contexts: u64,
}

impl Gathered {
    #[inline]
    pub(super) fn new(request: &Request, extents_max: usize) -> Self {
        let end = match request.flags & command_flag::PAYLOAD_LEN {
            0 => request.offset.saturating_add(request.length),
            // The length is that of a filter.
            _ => u64::MAX,
        };
        let content = match request.command {
            command::READ => Content::Read(ReadCoverage::new(request)),
            command::BLOCK_STATUS => Content::Status(Box::new(Status {
                next: request.offset,
                end,
                extents: Vec::new(),
                extents_max: extents_max.max(1),
                is_over: false,
                contexts: 0,
            })),
            _ => Content::Nothing,
        };
        Self { content, error: None, errors: 0 }
    }

    /// Notes data or a hole, which the decoder accepts for reads only.
    pub(super) fn cover(&mut self, at: u64, len: u32) -> Result<(), ReplyError> {
        match &mut self.content {
            Content::Read(coverage) => coverage.add(at, len),
            _ => Err(ReplyError::Violation("data that was not asked for")),
        }
    }

    /// Notes that the descriptors of a context follow; `index` is below
    /// [`crate::CONTEXTS_MAX`].
    pub(super) fn begin_context(&mut self, index: usize) -> Result<(), ReplyError> {
        let Content::Status(status) = &mut self.content else {
            return Err(ReplyError::Violation("a block status that was not asked for"));
        };
        let bit = 1_u64 << index;
        if status.contexts & bit != 0 {
            return Err(ReplyError::Violation("two block status chunks of one metadata context"));
        }
        status.contexts |= bit;
        Ok(())
    }

    /// Notes an extent of `base:allocation`.
    pub(super) fn add_extent(&mut self, len: u64, status: u64, block: u64) {
        if let Content::Status(found) = &mut self.content {
            found.add(len, status, block);
        }
    }

    /// Notes an error.
    pub(super) fn fail(
        &mut self,
        errno: NbdErrno,
        message: &str,
        at: Option<u64>,
    ) -> Result<(), ReplyError> {
        self.errors += 1;
        if self.errors > REPLY_ERRORS_MAX {
            return Err(ReplyError::Violation("a reply with too many errors"));
        }
        self.error = Some(Box::new(ServerError { errno, message: message.into(), at }));
        Ok(())
    }

    /// Whether a reply may end here: a success must be complete.
    #[inline]
    pub(super) fn check_whole(&self) -> Result<(), ReplyError> {
        let why = match &self.content {
            _ if self.error.is_some() => return Ok(()),
            Content::Read(coverage) if !coverage.is_complete() => {
                "a read that ended without all of its bytes"
            }
            Content::Status(status) if status.extents.is_empty() => {
                "a block status that ended without an extent"
            }
            _ => return Ok(()),
        };
        Err(ReplyError::Violation(why))
    }

    #[inline]
    pub(super) fn outcome(self) -> Result<Answer, ServerError> {
        match (self.error, self.content) {
            (Some(error), _) => Err(*error),
            (None, Content::Status(status)) => Ok(Answer::Extents(status.extents)),
            (None, _) => Ok(Answer::Done),
        }
    }
}

impl Status {
    /// Adds the part of an extent that lies inside the request. Some servers end extents inside of
    /// a block, such as at the end of a file whose size is no multiple of it. That block then
    /// counts as data, or is left for the next request.
    fn add(&mut self, len: u64, status: u64, block: u64) {
        if self.is_over || self.extents.len() == self.extents_max || self.next == self.end {
            return;
        }
        let stop = self.next.saturating_add(len).min(self.end);
        let has = |bit: u32| status & u64::from(bit) != 0;
        let (hole, zero) = (has(allocation_status::HOLE), has(allocation_status::ZERO));
        let aligned = if stop == self.end { stop } else { stop - stop % block };
        let extent = if aligned > self.next {
            Extent { len: aligned - self.next, hole, zero }
        } else {
            let len = block.min(self.end - self.next);
            Extent { len, hole: false, zero: false }
        };
        self.is_over = aligned != stop;
        self.next += extent.len;
        self.extents.push(extent);
    }
}
