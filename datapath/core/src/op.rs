//! Operations and their completions.

use crate::{Buf, ByteRange, Error, ErrorKind, Payload, Result};

/// An operation that a front submits to a backend. An `Op` owns its buffers until its completion.
#[derive(Clone, Debug)]
pub enum Op {
    /// Read the range.
    Read {
        /// What to read.
        range: ByteRange,
        /// Where to put the bytes, if the volume reads into registered memory
        /// ([`crate::Volume::takes_registered`]); the reply is then [`Reply::Done`].
        into: Option<Buf>,
    },
    /// Write `data`, as long as the range, to the range.
    Write {
        /// Where to write.
        range: ByteRange,
        /// The bytes; best in memory from [`crate::Backend::write_buffer`].
        data: Payload,
        /// Complete only when the data is on stable storage.
        fua: bool,
    },
    /// Make every write that has completed stable.
    Flush,
    /// The range's content is no longer needed; a hint.
    Trim {
        /// What to discard.
        range: ByteRange,
        /// Complete only when the effect is on stable storage.
        fua: bool,
    },
    /// Make the range read as zeroes.
    WriteZeroes {
        /// What to zero.
        range: ByteRange,
        /// Complete only when the effect is on stable storage.
        fua: bool,
        /// Keep the range allocated.
        no_hole: bool,
        /// Fail with [`crate::ErrorKind::Unsupported`] where it is not faster than a write.
        fast: bool,
    },
    /// Fetch the range into a cache; a hint.
    Cache {
        /// What to prefetch.
        range: ByteRange,
    },
    /// Describe which parts of the range are allocated.
    BlockStatus {
        /// What to describe.
        range: ByteRange,
        /// The most extents to answer with; at least 1.
        extents_max: usize,
    },
}

/// The kinds of [`Op`], for tables and statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum OpKind {
    /// [`Op::Read`]
    Read,
    /// [`Op::Write`]
    Write,
    /// [`Op::Flush`]
    Flush,
    /// [`Op::Trim`]
    Trim,
    /// [`Op::WriteZeroes`]
    WriteZeroes,
    /// [`Op::Cache`]
    Cache,
    /// [`Op::BlockStatus`]
    BlockStatus,
}

impl OpKind {
    /// All kinds, in the order of their discriminants.
    pub const ALL: [Self; 7] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Trim,
        Self::WriteZeroes,
        Self::Cache,
        Self::BlockStatus,
    ];

    /// The name used in statistics, metrics and fault rules.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::WriteZeroes => "write_zeroes",
            Self::Cache => "cache",
            Self::BlockStatus => "block_status",
        }
    }

    /// Whether it changes the volume.
    #[must_use]
    pub fn is_write(self) -> bool {
        matches!(self, Self::Write | Self::Trim | Self::WriteZeroes)
    }
}

impl Op {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> OpKind {
        match self {
            Self::Read { .. } => OpKind::Read,
            Self::Write { .. } => OpKind::Write,
            Self::Flush => OpKind::Flush,
            Self::Trim { .. } => OpKind::Trim,
            Self::WriteZeroes { .. } => OpKind::WriteZeroes,
            Self::Cache { .. } => OpKind::Cache,
            Self::BlockStatus { .. } => OpKind::BlockStatus,
        }
    }

    /// Whether its data stays in registered memory ([`Buf::registered`]).
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        match self {
            Self::Read { into, .. } => into.is_some(),
            Self::Write { data, .. } => data.registered().is_some(),
            _ => false,
        }
    }

    /// The error of an op that writes to a volume which is read-only.
    #[must_use]
    pub fn read_only_error(&self) -> Error {
        Error::new(ErrorKind::Permission, self.kind().name(), "the volume is read-only")
    }

    /// The range it touches; a flush has none.
    #[must_use]
    pub fn range(&self) -> Option<ByteRange> {
        match self {
            Self::Flush => None,
            Self::Read { range, .. }
            | Self::Write { range, .. }
            | Self::Trim { range, .. }
            | Self::WriteZeroes { range, .. }
            | Self::Cache { range }
            | Self::BlockStatus { range, .. } => Some(*range),
        }
    }
}

/// A run of bytes with one allocation state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, at least 1.
    pub len: u64,
    /// Not allocated.
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

/// The answer to a successful op.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Success, without data.
    Done,
    /// The bytes of a read that did not go to registered memory, as long as its range.
    Data(Payload),
    /// Extents from the range's start, at least one; the last may end early or (only the last)
    /// go beyond the range, never beyond the volume.
    Extents(Vec<Extent>),
}

/// The result of an op.
pub type Outcome = Result<Reply>;

/// The submitter's identifier of an op in flight, echoed in its completion.
///
/// The low [`crate::OWN_BITS`] are the submitter's. The others are for layers that issue ops of
/// their own ([`Tag::own`]); a submitter that is no layer leaves them clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub u64);

/// The completion of an op that was queued.
#[derive(Debug)]
pub struct Completion {
    /// As given to [`crate::Backend::submit`].
    pub tag: Tag,
    /// Its result.
    pub outcome: Outcome,
}
