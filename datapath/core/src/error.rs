//! Errors, and the one table that maps them to NBD and Linux errors.

use std::error::Error as StdError;
use std::sync::Arc;
use std::{fmt, io};

use rustix::io::Errno;

use crate::printable::printable;

/// Short for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// It is in use; try again later, or end that use.
    Busy,
    /// Stored data failed its check; do not use it.
    Corrupt,
    /// The object to be made exists already; use it, or choose another name.
    Exists,
    /// Another writer has taken over; stop, and do not retry.
    Fenced,
    /// The request is wrong; correct it.
    Invalid,
    /// The device or file failed; look there.
    Io,
    /// Out of memory; free some.
    NoMemory,
    /// Out of space; make some.
    NoSpace,
    /// It does not exist; check the name.
    NotFound,
    /// The same work is in progress; ask again later for its result.
    Pending,
    /// Not allowed, or the volume is read-only.
    Permission,
    /// Shutting down; wait, or use another server.
    Shutdown,
    /// No answer in time; the operation may have been carried out nevertheless.
    TimedOut,
    /// Larger than can be handled; split it.
    TooLarge,
    /// Not available here; do without.
    Unsupported,
}

/// Error numbers that exist on the NBD wire (NBD proto.md, "Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the errno names say it")]
pub enum NbdErrno {
    Perm = 1,
    Io = 5,
    NoMem = 12,
    Inval = 22,
    NoSpc = 28,
    Overflow = 75,
    NotSup = 95,
    Shutdown = 108,
}

/// How one kind is reported by each front.
struct Mapping {
    nbd: NbdErrno,
    linux: Errno,
}

impl ErrorKind {
    /// All kinds.
    pub const ALL: [Self; 15] = [
        Self::Busy,
        Self::Corrupt,
        Self::Exists,
        Self::Fenced,
        Self::Invalid,
        Self::Io,
        Self::NoMemory,
        Self::NoSpace,
        Self::NotFound,
        Self::Pending,
        Self::Permission,
        Self::Shutdown,
        Self::TimedOut,
        Self::TooLarge,
        Self::Unsupported,
    ];

    /// The name used in statistics and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Corrupt => "corrupt",
            Self::Exists => "exists",
            Self::Fenced => "fenced",
            Self::Invalid => "invalid",
            Self::Io => "io",
            Self::NoMemory => "no_memory",
            Self::NoSpace => "no_space",
            Self::NotFound => "not_found",
            Self::Pending => "pending",
            Self::Permission => "permission",
            Self::Shutdown => "shutdown",
            Self::TimedOut => "timed_out",
            Self::TooLarge => "too_large",
            Self::Unsupported => "unsupported",
        }
    }

    /// The one table. Linux: what the block layer makes of a number is in block/blk-core.c,
    /// `blk_errors`; EBADE is a reservation conflict there.
    fn mapping(self) -> Mapping {
        let map = |nbd, linux| Mapping { nbd, linux };
        match self {
            Self::Busy => map(NbdErrno::Io, Errno::BUSY),
            Self::Corrupt => map(NbdErrno::Io, Errno::IO),
            Self::Exists => map(NbdErrno::Inval, Errno::EXIST),
            Self::Fenced => map(NbdErrno::Perm, Errno::BADE),
            Self::Invalid => map(NbdErrno::Inval, Errno::INVAL),
            Self::Io => map(NbdErrno::Io, Errno::IO),
            Self::NoMemory => map(NbdErrno::NoMem, Errno::NOMEM),
            Self::NoSpace => map(NbdErrno::NoSpc, Errno::NOSPC),
            Self::NotFound => map(NbdErrno::Inval, Errno::NOENT),
            Self::Pending => map(NbdErrno::Io, Errno::INPROGRESS),
            Self::Permission => map(NbdErrno::Perm, Errno::PERM),
            Self::Shutdown => map(NbdErrno::Shutdown, Errno::SHUTDOWN),
            Self::TimedOut => map(NbdErrno::Io, Errno::TIMEDOUT),
            Self::TooLarge => map(NbdErrno::Overflow, Errno::OVERFLOW),
            Self::Unsupported => map(NbdErrno::NotSup, Errno::OPNOTSUPP),
        }
    }

    /// Its number on the NBD wire.
    #[must_use]
    pub fn nbd_errno(self) -> NbdErrno {
        self.mapping().nbd
    }

    /// Its Linux errno, as a ublk server answers it (negated).
    #[must_use]
    pub fn linux_errno(self) -> i32 {
        self.mapping().linux.raw_os_error()
    }

    /// The kind of an error that a server answered.
    #[must_use]
    pub fn of_nbd(errno: NbdErrno) -> Self {
        match errno {
            NbdErrno::Perm => Self::Permission,
            NbdErrno::Io => Self::Io,
            NbdErrno::NoMem => Self::NoMemory,
            NbdErrno::Inval => Self::Invalid,
            NbdErrno::NoSpc => Self::NoSpace,
            NbdErrno::Overflow => Self::TooLarge,
            NbdErrno::NotSup => Self::Unsupported,
            NbdErrno::Shutdown => Self::Shutdown,
        }
    }

    /// The kind of a system call's error.
    #[must_use]
    pub fn of_io(error: &io::Error) -> Self {
        match Errno::from_io_error(error) {
            Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => Self::NoSpace,
            Some(Errno::PERM | Errno::ACCESS | Errno::ROFS) => Self::Permission,
            Some(Errno::INVAL) => Self::Invalid,
            Some(Errno::EXIST) => Self::Exists,
            Some(Errno::INPROGRESS | Errno::ALREADY) => Self::Pending,
            Some(Errno::TIMEDOUT) => Self::TimedOut,
            Some(Errno::BADE) => Self::Fenced,
            Some(Errno::NOMEM) => Self::NoMemory,
            Some(Errno::NOENT | Errno::NXIO | Errno::NODEV) => Self::NotFound,
            Some(Errno::BUSY | Errno::TXTBSY | Errno::WOULDBLOCK) => Self::Busy,
            Some(Errno::OPNOTSUPP | Errno::NOSYS) => Self::Unsupported,
            _ => Self::Io,
        }
    }
}

/// An error: what the caller can do, what was being done, on what, and why. A clone shares the
/// cause, so that one failure can fail several ops.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    op: &'static str,
    context: String,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error without a cause. `op` is a verb ("open"), `context` says on what and why.
    #[must_use]
    pub fn new(kind: ErrorKind, op: &'static str, context: impl Into<String>) -> Self {
        Self { kind, op, context: context.into(), source: None }
    }

    /// A system call's error; its errno decides the kind.
    #[must_use]
    pub fn from_io(op: &'static str, context: impl Into<String>, source: io::Error) -> Self {
        Self::new(ErrorKind::of_io(&source), op, context).because(source)
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(Arc::from(source.into()));
        self
    }

    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether it has a cause, such as a system call's error.
    #[must_use]
    pub fn has_cause(&self) -> bool {
        self.source.is_some()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It contains names of files and exports, which come from outside.
        write!(f, "{}: {}", self.op, printable(&self.context))?;
        match &self.source {
            Some(source) => write!(f, ": {}", printable(&source.to_string())),
            None => Ok(()),
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        // Display already shows the direct cause; a printer of the chain must not repeat it.
        self.source.as_deref().and_then(StdError::source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_numbers() {
        let table = ErrorKind::ALL.map(|kind| (kind.nbd_errno() as u32, kind.linux_errno()));
        let want = [
            (5, 16),
            (5, 5),
            (22, 17),
            (1, 52),
            (22, 22),
            (5, 5),
            (12, 12),
            (28, 28),
            (22, 2),
            (5, 115),
            (1, 1),
            (108, 108),
            (5, 110),
            (75, 75),
            (95, 95),
        ];
        assert_eq!(table, want);
    }

    #[test]
    fn what_callers_tell_apart_survives_a_system_call() {
        for kind in [ErrorKind::Exists, ErrorKind::Fenced, ErrorKind::Pending, ErrorKind::TimedOut]
        {
            let error = io::Error::from_raw_os_error(kind.linux_errno());
            assert_eq!(ErrorKind::of_io(&error), kind);
        }
    }

    #[test]
    fn quota_and_file_size_count_as_no_space() {
        for errno in [Errno::DQUOT, Errno::FBIG, Errno::NOSPC] {
            let error = Error::from_io("write", "a.img", io::Error::from(errno));
            assert_eq!(error.kind().nbd_errno(), NbdErrno::NoSpc);
        }
    }

    #[test]
    fn display_tells_what_on_what_and_why() {
        let error = Error::from_io("open", "a.img", io::Error::from(Errno::NOENT));
        assert_eq!(error.to_string(), "open: a.img: No such file or directory (os error 2)");
        let error = Error::new(ErrorKind::Invalid, "open", "a\n\x1b[2J").because("b\r");
        assert_eq!(error.to_string(), r"open: a\n\u{1b}[2J: b\r");
    }

    #[test]
    fn an_error_can_be_cloned() {
        let cause = io::Error::from(Errno::IO);
        let error = Error::from_io("write", "a.img", cause);
        let clone = error.clone();
        assert_eq!((clone.kind(), clone.to_string()), (error.kind(), error.to_string()));
        assert!(clone.has_cause());
    }
}
