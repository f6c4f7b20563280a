//! Errors of the node engine. Their kinds are those that an orchestrator can act on.

use std::{fmt, io};

use rustix::io::Errno;

/// Short for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request is wrong; correct it.
    Invalid,
    /// There is no such volume or path.
    NotFound,
    /// The same was done with other arguments.
    Exists,
    /// The state of volume or node forbids it; a person has to look.
    Refused,
    /// Work on the volume is going on; ask again later how it ended.
    Pending,
    /// A device, daemon or store does not answer; try again.
    Unavailable,
    /// No answer in time; it may have been done all the same.
    TimedOut,
    /// The size asked for cannot be had.
    OutOfRange,
    /// No memory, space or devices are left.
    Exhausted,
    /// A bug of ours.
    Internal,
}

/// An error: what the caller can do, and one line for a person.
#[derive(Clone, Debug)]
pub struct Error {
    kind: Kind,
    text: String,
}

impl Kind {
    /// Whether nothing of the call is left behind and the answer will stay the same, so that an
    /// orchestrator may forget the call. Any other kind leaves the outcome open.
    #[must_use]
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Pending | Self::Unavailable | Self::TimedOut | Self::Exhausted)
    }
}

impl Error {
    /// An error. The text says on what, why and what to do, and is one line.
    #[must_use]
    pub fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }

    /// A system call's error; `what` says what was done, on what.
    #[must_use]
    pub fn of_io(what: impl fmt::Display, error: &io::Error) -> Self {
        let kind = match Errno::from_io_error(error) {
            Some(Errno::NOMEM | Errno::NOSPC | Errno::DQUOT | Errno::MFILE | Errno::NFILE) => {
                Kind::Exhausted
            }
            // What it means depends on the call, so the outcome stays open.
            _ => Kind::Unavailable,
        };
        Self::new(kind, format!("{what}: {error}"))
    }

    /// [`Error::of_io`] of an error number.
    #[must_use]
    pub fn of_errno(what: impl fmt::Display, errno: Errno) -> Self {
        Self::of_io(what, &errno.into())
    }

    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The same with another kind.
    #[must_use]
    pub fn with_kind(self, kind: Kind) -> Self {
        Self { kind, ..self }
    }

    /// The same of a volume, whose id stands first in the text.
    #[must_use]
    pub fn of(self, volume: &str) -> Self {
        Self { text: format!("volume {volume}: {}", self.text), ..self }
    }

    /// The same with more text at its end.
    #[must_use]
    pub fn and(self, more: impl fmt::Display) -> Self {
        Self { text: format!("{}; {more}", self.text), ..self }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", sheave_core::printable(&self.text))
    }
}

impl std::error::Error for Error {}

/// An error of kind [`Kind::Refused`].
pub(crate) fn refused(text: impl Into<String>) -> Error {
    Error::new(Kind::Refused, text)
}

/// An error of kind [`Kind::Invalid`].
pub(crate) fn invalid(text: impl Into<String>) -> Error {
    Error::new(Kind::Invalid, text)
}
