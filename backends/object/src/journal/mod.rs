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
