//! The first page of a journal segment (docs/format.md, "Segment").

use std::sync::Arc;

use crate::cipher::{Key, TAG_BYTES, VolumeKey};
use crate::ids::{Epoch, Incarnation, Lsn, Opening, VolumeId};

use super::NUMBER_MAX;
use super::page::{self, PAGE_BYTES, Page};

const MAGIC: &[u8; 8] = b"SHEAVEJS";
/// The version that this program writes. It refuses others.
const VERSION: u32 = 1;

/// What the records of a segment have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) volume: VolumeId,
    /// The opening that writes the segment.
    pub(crate) opening: Opening,
    /// Counts the segments of a journal in the order in which they were written.
    pub(crate) number: u64,
    /// Random bytes, new at each use of the file.
    pub(crate) salt: [u8; 16],
    /// The LSN of its first record.
    pub(crate) first: Lsn,
    /// All records up to this one were on stable storage when the segment was begun.
    pub(crate) durable: Lsn,
    /// All records up to this one were in committed objects of the bucket then.
    pub(crate) committed: Lsn,
}

/// Why a page is no header of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoHeader {
    /// It never was one, or its write was torn.
    Unused,
    /// It is whole, and of another version.
    Version(u32),
}

impl SegmentHeader {
    /// What the segment's records are checked by. Without the key of an encrypted volume, they
    /// are by their checksums only.
    pub(crate) fn seed(&self, key: Option<&VolumeKey>) -> Seed {
        Seed::new(self.volume, self.salt, self.number, key)
    }

    /// The page.
    pub(crate) fn encode(&self) -> Page {
        let mut page = [0; PAGE_BYTES];
        page[..8].copy_from_slice(MAGIC);
        page::put_u32(&mut page, 12, VERSION);
        page[16..32].copy_from_slice(&self.volume.0);
        page::put_u64(&mut page, 32, self.opening.epoch.0);
        page[40..56].copy_from_slice(&self.opening.incarnation.0);
        page::put_u64(&mut page, 56, self.number);
        page[64..80].copy_from_slice(&self.salt);
        page::put_u64(&mut page, 80, self.first.0);
        page::put_u64(&mut page, 88, self.durable.0);
        page::put_u64(&mut page, 96, self.committed.0);
        let crc = crc32fast::hash(&page[12..]);
        page::put_u32(&mut page, 8, crc);
        page
    }

    /// The header in a page.
    pub(crate) fn decode(page: &Page) -> Result<Self, NoHeader> {
        let crc = crc32fast::hash(&page[12..]);
        if &page[..8] != MAGIC || page::u32_at(page, 8) != crc {
            return Err(NoHeader::Unused);
        }
        match page::u32_at(page, 12) {
            VERSION => {}
            other => return Err(NoHeader::Version(other)),
        }
        let header = Self {
            volume: VolumeId(page::bytes_at(page, 16)),
            opening: Opening {
                epoch: Epoch(page::u64_at(page, 32)),
                incarnation: Incarnation(page::bytes_at(page, 40)),
            },
            number: page::u64_at(page, 56),
            salt: page::bytes_at(page, 64),
            first: Lsn(page::u64_at(page, 80)),
            durable: Lsn(page::u64_at(page, 88)),
            committed: Lsn(page::u64_at(page, 96)),
        };
        let Self { opening, number, first, durable, committed, .. } = &header;
        // So that the number after any of these is a number.
        let numbers = [opening.epoch.0, *number, first.0, durable.0, committed.0];
        let is_small = numbers.iter().all(|number| *number <= NUMBER_MAX);
        match is_small && page::is_zero(page, 104..PAGE_BYTES) {
            true => Ok(header),
            false => Err(NoHeader::Unused),
        }
    }
}

/// What a segment's records are checked by: the begin of all checksums, so that records of earlier
/// uses of its file fail them, and those of other volumes; and a key, if they are encrypted.
#[derive(Clone, Debug)]
pub(crate) struct Seed {
    pub(super) salt: [u8; 16],
    pub(super) number: u64,
    hasher: crc32fast::Hasher,
    /// By which records and blocks are encrypted, if they are.
    key: Option<Arc<Key>>,
}

impl Seed {
    pub(crate) fn new(
        volume: VolumeId,
        salt: [u8; 16],
        number: u64,
        key: Option<&VolumeKey>,
    ) -> Self {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&volume.0);
        hasher.update(&salt);
        hasher.update(&number.to_le_bytes());
        let name = [b"sheave journal", &volume.0[..], &number.to_le_bytes()];
        let key = key.map(|key| Arc::new(key.derive(&salt, &name)));
        Self { salt, number, hasher, key }
    }

    /// Whether records and blocks are encrypted.
    pub(crate) fn is_sealed(&self) -> bool {
        self.key.is_some()
    }

    /// Encrypts what goes to a page in place, if it is to be. Nothing else ever goes there while
    /// the file is this segment.
    pub(crate) fn seal(&self, page: u32, with: &[u8], bytes: &mut [u8]) -> Option<[u8; TAG_BYTES]> {
        self.key.as_ref().map(|key| key.seal(page, with, bytes))
    }

    /// Decrypts what is in a page, if it is encrypted. `None` if it is not what was encrypted.
    #[must_use]
    pub(crate) fn open(
        &self,
        page: u32,
        with: &[u8],
        (sealed, tag): (&[u8], &[u8]),
        out: &mut [u8],
    ) -> Option<()> {
        match &self.key {
            Some(key) => key.open(page, with, (sealed, tag), out),
            None => Some(()),
        }
    }

    /// The checksum of some bytes.
    pub(crate) fn crc(&self, bytes: &[u8]) -> u32 {
        let mut hasher = self.hasher.clone();
        hasher.update(bytes);
        hasher.finalize()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> impl Strategy<Value = SegmentHeader> {
        (any::<[[u8; 16]; 3]>(), any::<[u64; 5]>()).prop_map(|([volume, incarnation, salt], n)| {
            let n = n.map(|number| number & NUMBER_MAX);
            SegmentHeader {
                volume: VolumeId(volume),
                opening: Opening { epoch: Epoch(n[0]), incarnation: Incarnation(incarnation) },
                number: n[1],
                salt,
                first: Lsn(n[2]),
                durable: Lsn(n[3]),
                committed: Lsn(n[4]),
            }
        })
    }

    proptest! {
        #[test]
        fn a_header_is_read_as_written_and_every_flipped_bit_shows(
            header in header(),
            bit in 0..PAGE_BYTES * 8,
        ) {
            let mut page = header.encode();
            prop_assert_eq!(SegmentHeader::decode(&page), Ok(header));
            page[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(SegmentHeader::decode(&page), Err(NoHeader::Unused));
        }
    }

    #[test]
    fn a_newer_version_is_named_and_a_page_of_zeroes_is_unused() {
        let zeroes = [0; PAGE_BYTES];
        assert_eq!(SegmentHeader::decode(&zeroes), Err(NoHeader::Unused));
        let mut page = zeroes;
        page[..8].copy_from_slice(MAGIC);
        page::put_u32(&mut page, 12, VERSION + 1);
        let crc = crc32fast::hash(&page[12..]);
        page::put_u32(&mut page, 8, crc);
        assert_eq!(SegmentHeader::decode(&page), Err(NoHeader::Version(VERSION + 1)));
    }

    #[test]
    fn another_volume_salt_or_number_makes_another_checksum() {
        let crc = |volume, salt, number| {
            Seed::new(VolumeId([volume; 16]), [salt; 16], number, None).crc(b"abc")
        };
        let same = crc(1, 1, 5);
        assert_eq!(crc(1, 1, 5), same);
        assert!([crc(2, 1, 5), crc(1, 2, 5), crc(1, 1, 6)].iter().all(|other| *other != same));
    }
}
