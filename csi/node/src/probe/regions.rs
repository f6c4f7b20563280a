//! Which regions of a device are probed.

use std::collections::BTreeSet;

/// A range to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) at: u64,
    /// Bytes.
    pub(crate) len: usize,
}

/// Read as a whole: it holds nearly all main superblocks.
const START: u64 = 1 << 20;
/// Read as a whole: backups of partition tables, RAID superblocks.
const END: u64 = 1 << 20;
/// Of every other place.
const PAGE: u64 = 4096;

/// Groups of ext with a backup superblock, as far as they are probed (ext4: sparse_super).
pub(super) const EXT_GROUPS: [u64; 9] = [1, 3, 5, 7, 9, 25, 27, 49, 81];
/// Bytes of a block of ext, and the offset of group 0's superblock block.
pub(super) const EXT_BLOCKS: [u64; 7] =
    [1 << 10, 2 << 10, 4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10];
/// Superblocks of btrfs (btrfs: `btrfs_sb_offset`).
pub(super) const BTRFS: [u64; 3] = [64 << 10, 64 << 20, 256 << 30];
/// The longest allocation group of xfs.
const XFS_GROUP_MAX: u64 = 1 << 40;
/// Groups of this length that are probed.
const XFS_GROUPS_PROBED: u64 = 16;

/// The regions of a device of `size` bytes, in order, none of which overlap.
pub(crate) fn regions(size: u64) -> Vec<Region> {
    let end = size.saturating_sub(END) / PAGE * PAGE;
    let mut pages = BTreeSet::new();
    pages.extend(ext_backups(size).map(|(_, at)| at));
    pages.extend(BTRFS);
    pages.extend(xfs_backups(size));
    // Samples: each MiB near the start, where btrfs begins its chunks; powers of two; 64 places of
    // equal distance.
    pages.extend((0..64).map(|place| place << 20));
    pages.extend((0..64).map(|power| 1 << power));
    pages.extend((0..64).map(|part| size / 64 * part));
    let inside = |at: u64| (START.min(size)..end).contains(&at);
    let pages: BTreeSet<u64> =
        pages.into_iter().map(|at| at / PAGE * PAGE).filter(|at| inside(*at)).collect();
    let start = Region { at: 0, len: START.min(size) as usize };
    let pages = pages.into_iter().map(|at| Region { at, len: PAGE as usize });
    let end = end.max(START);
    let last = (end < size).then(|| Region { at: end, len: (size - end) as usize });
    let all = std::iter::once(start).chain(pages).chain(last);
    all.filter(|region| region.len > 0).collect()
}

/// Group and offset of the superblocks that ext keeps as backups, for each size of its blocks.
pub(super) fn ext_backups(size: u64) -> impl Iterator<Item = (u64, u64)> {
    let places = EXT_BLOCKS.into_iter().flat_map(|block| {
        // One block is the group's bitmap, with a bit a block. Blocks of 1 KiB begin at number 1.
        let (group_len, first) = (block * 8 * block, if block == 1024 { block } else { 0 });
        EXT_GROUPS.into_iter().map(move |group| (group, group * group_len + first))
    });
    places.filter(move |(_, at)| at.saturating_add(PAGE) <= size)
}

/// Starts of allocation groups, as mkfs.xfs chooses their length for a device of this size.
pub(super) fn xfs_backups(size: u64) -> impl Iterator<Item = u64> {
    let parts = (1..=5).flat_map(move |shift| {
        let count = 1_u64 << shift;
        let blocks = (size / PAGE).div_ceil(count);
        (1..count).map(move |group| group * blocks * PAGE)
    });
    let longest = (1..=XFS_GROUPS_PROBED).map(|group| group * XFS_GROUP_MAX);
    parts.chain(longest).filter(move |at| at.saturating_add(PAGE) <= size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_inside_in_order_and_apart() {
        for size in
            [0, 512, 4096, 1 << 20, (1 << 20) + 512, 3 << 20, 5 << 30, 16 << 40, u64::MAX >> 1]
        {
            let size = size / 512 * 512;
            let mut end = 0;
            let regions = regions(size);
            for region in &regions {
                assert!(region.at >= end, "{size}: {region:?} overlaps");
                assert!(region.at % PAGE == 0 && region.len % 512 == 0, "{size}: {region:?}");
                end = region.at + region.len as u64;
            }
            assert!(end == size, "{size}: the end is read");
            assert!(regions.len() < 400, "{size}: {} regions", regions.len());
        }
    }

    #[test]
    fn a_small_device_is_read_as_a_whole() {
        let len: usize = regions(2 << 20).iter().map(|region| region.len).sum();
        assert_eq!(len, 2 << 20);
    }
}
