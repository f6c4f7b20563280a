//! What an object is made of.

use sheave_core::Result;

use crate::format::{Author, Built, Coding, ObjectBuilder};
use crate::ids::{BLOCK_BYTES, Blocks, Lba, Lsn, Seq};

/// Writes that follow one another become runs of so many bytes.
const RUN_BYTES_MAX: u64 = 1 << 20;

/// Writes of the journal that become an object.
#[derive(Clone, Debug)]
pub struct Sealed {
    /// The first write.
    pub lsn_first: Lsn,
    /// The last write.
    pub lsn_last: Lsn,
    /// Their effect.
    pub entries: Vec<SealedEntry>,
}

/// An entry of a batch.
#[derive(Clone, Copy, Debug)]
pub enum SealedEntry {
    /// Blocks that are in the journal.
    Write {
        /// The first block.
        lba: Lba,
        /// Their count.
        blocks: Blocks,
        /// Where they are.
        from: JournalPlace,
    },
    /// Blocks that are zeroes.
    Zero {
        /// The first block.
        lba: Lba,
        /// Their count.
        blocks: Blocks,
    },
}

impl Sealed {
    /// The most bytes of its frames.
    pub(super) fn bytes_max(&self, coding: &Coding) -> u64 {
        let of = |entry: &SealedEntry| match *entry {
            SealedEntry::Write { blocks, .. } => coding.bytes(blocks),
            SealedEntry::Zero { .. } => 0,
        };
        self.entries.iter().map(of).sum()
    }

    /// The most entries of its object.
    fn entries_max(&self, coding: &Coding) -> usize {
        let of = |entry: &SealedEntry| match *entry {
            SealedEntry::Write { lba, blocks, .. } => coding.entries(lba, blocks),
            SealedEntry::Zero { .. } => 1,
        };
        self.entries.iter().map(of).sum()
    }
}

/// An object to be made.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its opening.
    pub author: Author,
    /// Its number.
    pub seq: Seq,
    /// What it is made of.
    pub sealed: Sealed,
}

impl Plan {
    /// The object. `read` appends the blocks of an entry from the journal, checked.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn build(
        &self,
        mut read: impl FnMut(JournalPlace, Blocks, &mut Vec<u8>) -> Result<()>,
    ) -> Result<Built> {
        let Self { author, seq, sealed } = self;
        let bytes = sealed.bytes_max(&author.coding) as usize;
        let entries = sealed.entries_max(&author.coding);
        let mut builder = ObjectBuilder::new(author, *seq, entries, bytes);
        // Writes that follow one another become one run: the map is shorter, and blocks that were
        // written one by one are compressed together.
        let (mut begin, mut run) = (Lba(0), Vec::new());
        for entry in &sealed.entries {
            match *entry {
                SealedEntry::Zero { lba, blocks } => {
                    builder.write(begin, &run);
                    run.clear();
                    builder.zero(lba, blocks);
                }
                SealedEntry::Write { lba, blocks, from } => {
                    let has = run.len() as u64;
                    let is_next = lba.0 == begin.0 + has / BLOCK_BYTES;
                    if !is_next || has + blocks * BLOCK_BYTES > RUN_BYTES_MAX {
                        builder.write(begin, &run);
                        run.clear();
                        begin = lba;
                    }
                    read(from, blocks, &mut run)?;
                }
            }
        }
        builder.write(begin, &run);
        Ok(builder.finish(sealed.lsn_first, sealed.lsn_last))
    }
}

/// Where blocks are in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalPlace {
    /// The segment.
    pub segment: u64,
    /// The page of the first block in it.
    pub page: u32,
}

#[cfg(test)]
mod tests;
