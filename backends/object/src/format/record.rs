//! The first page of a journal record (docs/format.md, "Record"). The blocks of a write follow it.

use crate::extents::Span;
use crate::ids::{Lsn, VolumeId};

use super::NUMBER_MAX;
use super::page::{self, PAGE_BYTES, Page};
use super::segment::Seed;

const MAGIC: &[u8; 8] = b"SHEAVEJR";
const WRITE: u32 = 1;
const ZERO: u32 = 2;
const CRCS_AT: usize = 80;
/// The most blocks of a write in one record. Longer writes become several records. Tests have
/// segments without room for so many.
pub(crate) const WRITE_BLOCKS_MAX: u64 = if cfg!(test) { 16 } else { 256 };

const _: () = assert!(CRCS_AT + WRITE_BLOCKS_MAX as usize * 4 <= PAGE_BYTES);

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
    /// These blocks get the bytes that follow the record's page. Has the CRC-32 of each block.
    Write { span: Span, crcs: Vec<u32> },
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

impl Record {
    /// The record's first page.
    pub(crate) fn encode(&self, seed: &Seed) -> Page {
        let mut page = [0; PAGE_BYTES];
        page[..8].copy_from_slice(MAGIC);
        let span = self.entry.span();
        page::put_u64(&mut page, 16, self.lsn.0);
        page::put_u64(&mut page, 24, self.durable.0);
        page::put_u64(&mut page, 32, span.start);
        page::put_u64(&mut page, 40, span.blocks);
        let kind = match &self.entry {
            Entry::Zero { .. } => ZERO,
            Entry::Write { crcs, .. } => {
                assert!(
                    crcs.len() as u64 == span.blocks && span.blocks <= WRITE_BLOCKS_MAX,
                    "a record has a checksum for each of its blocks"
                );
                for (index, crc) in crcs.iter().enumerate() {
                    page::put_u32(&mut page, CRCS_AT + 4 * index, *crc);
                }
                WRITE
            }
        };
        page::put_u32(&mut page, 12, kind);
        page[48..64].copy_from_slice(&seed.salt);
        page::put_u64(&mut page, 64, seed.number);
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
        let seed = Seed::new(volume, page::bytes_at(page, 48), number);
        Some((number, Self::decode(page, &seed)?))
    }

    /// The record whose first page this is; `None` if it is none of this segment.
    pub(crate) fn decode(page: &Page, seed: &Seed) -> Option<Self> {
        if &page[..8] != MAGIC || page::u32_at(page, 8) != seed.crc(&page[12..]) {
            return None;
        }
        let span = Span { start: page::u64_at(page, 32), blocks: page::u64_at(page, 40) };
        span.start.checked_add(span.blocks)?;
        let entry = match page::u32_at(page, 12) {
            WRITE if span.blocks <= WRITE_BLOCKS_MAX => {
                let at = |index| page::u32_at(page, CRCS_AT + 4 * index);
                Entry::Write { span, crcs: (0..span.blocks as usize).map(at).collect() }
            }
            ZERO => Entry::Zero { span },
            _ => return None,
        };
        let [lsn, durable] = [16, 24].map(|at| Lsn(page::u64_at(page, at)));
        let is_small = lsn.0 <= NUMBER_MAX && durable.0 <= NUMBER_MAX;
        is_small.then_some(Self { lsn, durable, entry })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VOLUME: VolumeId = VolumeId([1; 16]);

    fn record() -> impl Strategy<Value = Record> {
        let span =
            (0..u64::MAX / 2, 0..u64::MAX / 2).prop_map(|(start, blocks)| Span { start, blocks });
        let write =
            (0..u64::MAX / 2, prop::collection::vec(any::<u32>(), 1..=WRITE_BLOCKS_MAX as usize))
                .prop_map(|(start, crcs)| {
                    let span = Span { start, blocks: crcs.len() as u64 };
                    Entry::Write { span, crcs }
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
            let seed = Seed::new(VOLUME, [7; 16], 3);
            let mut page = record.encode(&seed);
            prop_assert_eq!(Record::decode(&page, &seed), Some(record.clone()));
            prop_assert_eq!(Record::decode_any(&page, VOLUME), Some((3, record)));
            prop_assert_eq!(Record::decode_any(&page, VolumeId([2; 16])), None);
            prop_assert_eq!(Record::decode(&page, &Seed::new(VOLUME, [7; 16], 4)), None);
            page[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Record::decode(&page, &seed), None);
            prop_assert_eq!(Record::decode_any(&page, VOLUME), None);
        }

        #[test]
        fn no_bytes_with_a_right_checksum_panic(
            fields in any::<[u64; 4]>(),
            kind in 0..4u32,
            garbage in prop::collection::vec(any::<u8>(), PAGE_BYTES - 48),
        ) {
            let mut page = [0; PAGE_BYTES];
            page[..8].copy_from_slice(MAGIC);
            page::put_u32(&mut page, 12, kind);
            for (index, field) in fields.into_iter().enumerate() {
                page::put_u64(&mut page, 16 + 8 * index, field);
            }
            page[48..].copy_from_slice(&garbage);
            let seed = Seed::new(VOLUME, [0; 16], 0);
            let crc = seed.crc(&page[12..]);
            page::put_u32(&mut page, 8, crc);
            let decoded = Record::decode(&page, &seed);
            prop_assert!(decoded.is_none_or(|record| record.entry.span().start == fields[2]));
        }
    }
}
