//! The first page of a journal record (docs/format.md, "Record"). The blocks of a write follow it.

use crate::extents::Span;
use crate::ids::{Lsn, VolumeId};

use super::NUMBER_MAX;
use super::page::{self, PAGE_BYTES, Page};
use super::segment::Seed;
use crate::cipher::TAG_BYTES;

const MAGIC: &[u8; 8] = b"SHEAVEJR";
const WRITE: u32 = 1;
const ZERO: u32 = 2;
pub(super) const SEALED: u32 = 3;
const CRCS_AT: usize = 80;
/// Tags of the blocks of an encrypted write, and that of the page itself.
const TAGS_AT: usize = CRCS_AT + SEALED_BLOCKS_MAX as usize * 4;
const TAG_AT: usize = PAGE_BYTES - TAG_BYTES;
/// The most blocks of a write in one record. Longer writes become several records. Tests have
/// segments without room for so many.
pub(crate) const WRITE_BLOCKS_MAX: u64 = if cfg!(test) { 16 } else { 256 };

/// The same of an encrypted one, which has more to be checked by.
pub(crate) const SEALED_BLOCKS_MAX: u64 = if cfg!(test) { 16 } else { 128 };

const _: () = assert!(CRCS_AT + WRITE_BLOCKS_MAX as usize * 4 <= TAG_AT);
const _: () = assert!(TAGS_AT + SEALED_BLOCKS_MAX as usize * TAG_BYTES <= TAG_AT);

/// What a block is checked by, as it is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Check {
    /// Its CRC-32.
    pub(crate) crc: u32,
    /// Zeroes if it is not encrypted.
    pub(crate) tag: [u8; TAG_BYTES],
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// Its number.
    pub(crate) lsn: Lsn,
    /// All records up to this one were on stable storage when it was written.
    pub(crate) durable: Lsn,
    /// What it changes.
    pub(crate) entry: Entry,
}

/// The change that a record makes to the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// These blocks get the bytes that follow the record's page.
    Write { span: Span, checks: Vec<Check> },
    /// These blocks become zeroes. Without blocks, the record only states what is durable.
    Zero { span: Span },
}

impl Entry {
    /// The blocks that it changes.
    pub(crate) fn span(&self) -> Span {
        match self {
            Self::Write { span, .. } | Self::Zero { span } => *span,
        }
    }

    /// Pages of the record in its segment.
    pub(crate) fn pages(&self) -> u64 {
        match self {
            Self::Write { span, .. } => 1 + span.blocks,
            Self::Zero { .. } => 1,
        }
    }
}

/// The most blocks of a write in one record of a segment.
pub(crate) fn blocks_max(seed: &Seed) -> u64 {
    if seed.is_sealed() { SEALED_BLOCKS_MAX } else { WRITE_BLOCKS_MAX }
}

impl Record {
    /// The record's first page, which is that one of its segment.
    pub(crate) fn encode(&self, seed: &Seed, at: u32) -> Page {
        let mut page = [0; PAGE_BYTES];
        page[..8].copy_from_slice(MAGIC);
        let span = self.entry.span();
        page::put_u64(&mut page, 16, self.lsn.0);
        page::put_u64(&mut page, 24, self.durable.0);
        page::put_u64(&mut page, 32, span.start);
        page::put_u64(&mut page, 40, span.blocks);
        let kind = match &self.entry {
            Entry::Zero { .. } => ZERO,
            Entry::Write { checks, .. } => {
                assert!(
                    checks.len() as u64 == span.blocks && span.blocks <= blocks_max(seed),
                    "a record has a checksum for each of its blocks"
                );
                for (index, check) in checks.iter().enumerate() {
                    page::put_u32(&mut page, CRCS_AT + 4 * index, check.crc);
                }
                if seed.is_sealed() {
                    let (tags, _) = page[TAGS_AT..].as_chunks_mut();
                    tags.iter_mut().zip(checks).for_each(|(into, check)| *into = check.tag);
                }
                if seed.is_sealed() { SEALED } else { WRITE }
            }
        };
        page::put_u32(&mut page, 12, kind);
        page[48..64].copy_from_slice(&seed.salt);
        page::put_u64(&mut page, 64, seed.number);
        if let Some(tag) = seed.seal(at, &page[12..TAG_AT], &mut []) {
            page[TAG_AT..].copy_from_slice(&tag);
        }
        let crc = seed.crc(&page[12..]);
        page::put_u32(&mut page, 8, crc);
        page
    }

    /// The record whose first page this is, of whatever segment of the volume, and the number of
    /// that.
    pub(crate) fn decode_any(page: &Page, volume: VolumeId) -> Option<(u64, Self)> {
        if &page[..8] != MAGIC {
            return None;
        }
        let number = page::u64_at(page, 64);
        let seed = Seed::new(volume, page::bytes_at(page, 48), number, None);
        Some((number, Self::decode(page, 0, &seed)?))
    }

    /// The record whose first page this is, that one of its segment; `None` if it is none of this
    /// segment.
    pub(crate) fn decode(page: &Page, at: u32, seed: &Seed) -> Option<Self> {
        if &page[..8] != MAGIC || page::u32_at(page, 8) != seed.crc(&page[12..]) {
            return None;
        }
        seed.open(at, &page[12..TAG_AT], (&[], &page[TAG_AT..]), &mut [])?;
        let span = Span { start: page::u64_at(page, 32), blocks: page::u64_at(page, 40) };
        span.start.checked_add(span.blocks)?;
        let entry = match page::u32_at(page, 12) {
            kind @ (WRITE | SEALED) => {
                let (most, tags) = match kind {
                    SEALED => (SEALED_BLOCKS_MAX, page[TAGS_AT..TAG_AT].as_chunks().0),
                    // Without the key, no one can make a record of an encrypted journal.
                    _ if seed.is_sealed() => return None,
                    _ => (WRITE_BLOCKS_MAX, &[][..]),
                };
                let check = |index: usize| Check {
                    crc: page::u32_at(page, CRCS_AT + 4 * index),
                    tag: tags.get(index).copied().unwrap_or_default(),
                };
                let is_right = (1..=most).contains(&span.blocks);
                let count = is_right.then_some(span.blocks as usize)?;
                Entry::Write { span, checks: (0..count).map(check).collect() }
            }
            ZERO => Entry::Zero { span },
            _ => return None,
        };
        let [lsn, durable] = [16, 24].map(|at| Lsn(page::u64_at(page, at)));
        let is_small = lsn.0 <= NUMBER_MAX && durable.0 <= NUMBER_MAX;
        let used = match &entry {
            _ if page::u32_at(page, 12) == SEALED => TAG_AT,
            Entry::Write { checks, .. } => CRCS_AT + 4 * checks.len(),
            Entry::Zero { .. } => CRCS_AT,
        };
        let is_rest_zero = page::is_zero(page, 72..CRCS_AT) && page::is_zero(page, used..TAG_AT);
        (is_small && is_rest_zero).then_some(Self { lsn, durable, entry })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cipher::VolumeKey;

    const VOLUME: VolumeId = VolumeId([1; 16]);

    fn record() -> impl Strategy<Value = Record> {
        let span =
            (0..u64::MAX / 2, 0..u64::MAX / 2).prop_map(|(start, blocks)| Span { start, blocks });
        let write =
            (0..u64::MAX / 2, prop::collection::vec(any::<u32>(), 1..=WRITE_BLOCKS_MAX as usize))
                .prop_map(|(start, crcs)| {
                    let span = Span { start, blocks: crcs.len() as u64 };
                    let checks = crcs.into_iter().map(|crc| Check { crc, ..Check::default() });
                    Entry::Write { span, checks: checks.collect() }
                });
        let entry = prop_oneof![write, span.prop_map(|span| Entry::Zero { span })];
        (any::<[u64; 2]>(), entry).prop_map(|([lsn, durable], entry)| Record {
            lsn: Lsn(lsn & NUMBER_MAX),
            durable: Lsn(durable & NUMBER_MAX),
            entry,
        })
    }

    proptest! {
        #[test]
        fn a_record_is_read_as_written_and_every_flipped_bit_shows(
            record in record(),
            bit in 0..PAGE_BYTES * 8,
        ) {
            let seed = Seed::new(VOLUME, [7; 16], 3, None);
            let mut page = record.encode(&seed, 9);
            prop_assert_eq!(Record::decode(&page, 9, &seed), Some(record.clone()));
            prop_assert_eq!(Record::decode_any(&page, VOLUME), Some((3, record)));
            prop_assert_eq!(Record::decode_any(&page, VolumeId([2; 16])), None);
            prop_assert_eq!(Record::decode(&page, 9, &Seed::new(VOLUME, [7; 16], 4, None)), None);
            page[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Record::decode(&page, 9, &seed), None);
            prop_assert_eq!(Record::decode_any(&page, VOLUME), None);
        }

        /// Nothing of it can be changed by one that has no key, also not with a right checksum.
        #[test]
        fn a_record_of_an_encrypted_volume_needs_its_key(
            record in record(),
            tag: [u8; 16],
            bit in 12 * 8..PAGE_BYTES * 8,
        ) {
            let mut record = record;
            if let Entry::Write { checks, .. } = &mut record.entry {
                checks.iter_mut().for_each(|check| check.tag = tag);
            }
            let seed = |key| Seed::new(VOLUME, [7; 16], 3, key);
            let [key, other] = [1, 2].map(|byte| VolumeKey::new([byte; 32]));
            let sealed = seed(Some(&key));
            let mut page = record.encode(&sealed, 9);
            prop_assert_eq!(Record::decode(&page, 9, &sealed), Some(record.clone()));
            prop_assert_eq!(Record::decode(&page, 8, &sealed), None, "another page");
            prop_assert_eq!(Record::decode(&page, 9, &seed(Some(&other))), None);
            // For messages.
            prop_assert_eq!(Record::decode(&page, 9, &seed(None)), Some(record.clone()));
            page[bit / 8] ^= 1 << (bit % 8);
            let crc = sealed.crc(&page[12..]);
            page::put_u32(&mut page, 8, crc);
            prop_assert_eq!(Record::decode(&page, 9, &sealed), None);
            let plain = record.encode(&seed(None), 9);
            prop_assert_eq!(Record::decode(&plain, 9, &sealed), None);
        }

        #[test]
        fn no_bytes_with_a_right_checksum_panic(
            fields in any::<[u64; 4]>(),
            kind in 0..5u32,
            garbage in prop::collection::vec(any::<u8>(), PAGE_BYTES - 48),
        ) {
            let mut page = [0; PAGE_BYTES];
            page[..8].copy_from_slice(MAGIC);
            page::put_u32(&mut page, 12, kind);
            for (index, field) in fields.into_iter().enumerate() {
                page::put_u64(&mut page, 16 + 8 * index, field);
            }
            page[48..].copy_from_slice(&garbage);
            let seed = Seed::new(VOLUME, [0; 16], 0, None);
            let crc = seed.crc(&page[12..]);
            page::put_u32(&mut page, 8, crc);
            let decoded = Record::decode(&page, 9, &seed);
            prop_assert!(decoded.is_none_or(|record| record.entry.span().start == fields[2]));
        }
    }
}
