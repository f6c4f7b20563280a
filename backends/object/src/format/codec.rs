//! Compression of blocks.

use super::code::Wrong;
use crate::ids::{BLOCK_BYTES, Lba};

/// The most blocks that are compressed together. A read needs all of them for one. Eight would make
/// programs and texts shorter by another 2 to 5 %, and such a read twice as dear.
pub(super) const PACK_BLOCKS_MAX: u64 = 4;
/// Blocks are stored compressed if that takes at most this part of their bytes.
const WORTH: (usize, usize) = (7, 8);

/// How new blocks are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As they are.
    #[default]
    Plain = 0,
    /// Compressed by LZ4, where that makes them shorter.
    Lz4 = 1,
}

impl Codec {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "none",
            Self::Lz4 => "lz4",
        }
    }

    /// That of a number.
    pub(super) fn of(number: u8) -> Result<Self, Wrong> {
        match number {
            0 => Ok(Self::Plain),
            1 => Ok(Self::Lz4),
            _ => Err(Wrong::Newer("its codec is unknown")),
        }
    }

    /// Blocks in groups that are compressed together. They end at multiples of a group, so that
    /// writes of whole groups cover them.
    pub(super) fn groups(self, lba: Lba, blocks: u64) -> impl Iterator<Item = (Lba, u64)> {
        let end = lba.0 + blocks;
        let mut next = lba.0;
        std::iter::from_fn(move || {
            let begin = next;
            next = match self {
                Self::Plain => end,
                Self::Lz4 => ((begin / PACK_BLOCKS_MAX + 1) * PACK_BLOCKS_MAX).min(end),
            };
            (begin < end).then(|| (Lba(begin), next - begin))
        })
    }

    /// The blocks of a group in fewer bytes, if that is worth it.
    pub(super) fn pack<'a>(self, data: &[u8], scratch: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        if self == Self::Plain {
            return None;
        }
        scratch.resize(lz4_flex::block::get_maximum_output_size(data.len()), 0);
        let len = lz4_flex::block::compress_into(data, scratch).ok()?;
        let most = data.len() / WORTH.1 * WORTH.0;
        scratch.get(..len).filter(|packed| packed.len() <= most)
    }
}

/// The blocks of a frame that [`Codec::pack`] has packed.
pub(super) fn unpack(blocks: u8, packed: &[u8]) -> Result<Vec<u8>, Wrong> {
    const WRONG: Wrong = Wrong::Damaged("the blocks of a frame cannot be decompressed");
    if !(1..=PACK_BLOCKS_MAX).contains(&u64::from(blocks)) {
        return Err(WRONG);
    }
    let mut data = vec![0; usize::from(blocks) * BLOCK_BYTES as usize];
    match lz4_flex::block::decompress_into(packed, &mut data) {
        Ok(len) if len == data.len() => Ok(data),
        _ => Err(WRONG),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn groups_end_at_multiples() {
        let groups = |codec: Codec, lba, blocks| {
            let groups = codec.groups(Lba(lba), blocks);
            groups.map(|(lba, blocks)| (lba.0, blocks)).collect::<Vec<_>>()
        };
        assert_eq!(groups(Codec::Lz4, 6, 12), [(6, 2), (8, 4), (12, 4), (16, 2)]);
        assert_eq!(groups(Codec::Lz4, 8, 4), [(8, 4)]);
        assert_eq!(groups(Codec::Lz4, 9, 1), [(9, 1)]);
        assert_eq!(groups(Codec::Plain, 6, 20), [(6, 20)]);
    }

    #[test]
    fn what_gains_little_is_not_packed() {
        let block = BLOCK_BYTES as usize;
        let mut random = 1_u64;
        let mut noise = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 56) as u8
        };
        let mut scratch = Vec::new();
        for noisy in 0..=block {
            let mut data: Vec<u8> = (0..noisy).map(|_| noise()).collect();
            data.resize(block, 0);
            match Codec::Lz4.pack(&data, &mut scratch) {
                Some(packed) => assert_eq!(unpack(1, packed), Ok(data)),
                None => {
                    assert!(noisy > block * 4 / 5, "{noisy} bytes of noise");
                    return;
                }
            }
        }
        panic!("noise was packed");
    }

    proptest! {
        #[test]
        fn no_packed_bytes_panic(blocks: u8, packed in prop::collection::vec(any::<u8>(), 0..200)) {
            let len = unpack(blocks, &packed).map_or(0, |data| data.len());
            prop_assert!(len == 0 || len == usize::from(blocks) * BLOCK_BYTES as usize);
        }
    }
}
