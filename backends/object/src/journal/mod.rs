//! The journal: segments on a local disk.

use crate::ids::Opening;

/// Proof that the journal's superblock names an opening as the one that is adopting it, on stable
/// storage. Only then may the root say that the volume is open: a crash at any point leaves a
/// journal that is recognised.
#[derive(Debug)]
pub struct Adopted {
    opening: Opening,
}

impl Adopted {
    /// The opening that the superblock names.
    #[must_use]
    pub fn opening(&self) -> Opening {
        self.opening
    }

    /// For tests of the bucket's side, which have no journal.
    #[cfg(test)]
    pub(crate) fn without_journal(opening: Opening) -> Self {
        Self { opening }
    }
}

pub use crate::format::superblock::Superblock;

/// What the segments of a journal say about its writes, for messages and for the judgement whether
/// it is replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// All up to this one was in committed objects of the bucket when the last segment was begun.
    pub committed: crate::ids::Lsn,
    /// The first write that it has.
    pub first: crate::ids::Lsn,
    /// The last one; before `first` if it has none.
    pub last: crate::ids::Lsn,
}
