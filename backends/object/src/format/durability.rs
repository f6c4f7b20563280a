//! What flushes of a volume wait for: part of its root.

use super::code::Wrong;

/// What flushes of a volume wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Durability {
    /// The journal of the node: what is flushed survives a power loss, and not the node.
    #[default]
    Local = 0,
    /// The store: what is flushed survives the node.
    Remote = 1,
    /// Nothing: a power loss takes what was written in the last seconds, flushed or not.
    Unsafe = 2,
}

impl Durability {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Local, Self::Remote, Self::Unsafe];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Remote => "remote",
            Self::Unsafe => "unsafe",
        }
    }

    pub(super) fn of(number: u8) -> Result<Self, Wrong> {
        let found = Self::ALL.into_iter().find(|durability| *durability as u8 == number);
        found.ok_or(Wrong::Newer("its durability is unknown"))
    }
}
