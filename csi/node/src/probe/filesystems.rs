//! Superblocks of the filesystems that the engine makes: ext2 to ext4, xfs, btrfs.
//!
//! Their layouts are those of the kernel: fs/ext4/ext4.h (`struct ext4_super_block`),
//! fs/xfs/libxfs/xfs_format.h (`struct xfs_dsb`), include/uapi/linux/btrfs_tree.h
//! (`struct btrfs_super_block`).

use super::regions::{BTRFS, ext_backups, xfs_backups};
use super::{FsInfo, Parts, Signature};

const EXT_AT: u64 = 1024;
const EXT_LEN: usize = 1024;
const EXT_MAGIC: u16 = 0xef53;
/// `s_state`.
const EXT_VALID: u16 = 1;
const EXT_ERRORS: u16 = 2;
/// `s_feature_compat`.
const HAS_JOURNAL: u32 = 4;
/// `s_feature_incompat`.
const NEEDS_RECOVERY: u32 = 4;
const JOURNAL_DEV: u32 = 8;
const IS_64BIT: u32 = 0x80;
/// What ext3 has of `s_feature_incompat` and `s_feature_ro_compat`; more makes it ext4.
const EXT3_INCOMPAT: u32 = 0x2 | NEEDS_RECOVERY | JOURNAL_DEV | 0x10;
const EXT3_RO_COMPAT: u32 = 0x1 | 0x2 | 0x4;

const XFS_LEN: usize = 264;
const BTRFS_LEN: usize = 512;

/// Main superblocks.
pub(super) fn main(parts: &Parts<'_>) -> Vec<Signature> {
    let found = [ext(parts, EXT_AT, 0), xfs(parts, 0), btrfs(parts, BTRFS[0])];
    found.into_iter().flatten().collect()
}

/// Backups of them, and what else says that one was there.
pub(super) fn backups(parts: &Parts<'_>) -> Vec<Signature> {
    let ext = ext_backups(parts.size).filter_map(|(group, at)| ext(parts, at, group));
    let xfs_groups = xfs_backups(parts.size).filter_map(|at| xfs(parts, at));
    // Headers of the first allocation group, in the sectors behind the superblock.
    let heads = [512, 1024, 2048, 4096].into_iter().flat_map(|sector| {
        let magics: [&[u8]; 3] = [b"XAGF", b"XAGI", b"XAFL"];
        (1..).zip(magics).map(move |(index, magic)| (index * sector, magic))
    });
    let heads = heads.filter(|(at, magic)| parts.has(*at, magic));
    let heads = heads.map(|(at, _)| Signature { name: "xfs", at, fs: None });
    let btrfs = BTRFS[1..].iter().filter_map(|&at| btrfs(parts, at));
    let mut found: Vec<_> = ext.chain(xfs_groups).chain(heads).chain(btrfs).collect();
    found.sort_by_key(|signature| signature.at);
    found.dedup_by_key(|signature| signature.at);
    found
}

fn ext(parts: &Parts<'_>, at: u64, group: u64) -> Option<Signature> {
    let bytes = parts.get(at, EXT_LEN)?;
    if u16_le(bytes, 56) != EXT_MAGIC || u64::from(u16_le(bytes, 90)) != group {
        return None;
    }
    let log_block = u32_le(bytes, 24);
    let (compat, incompat, ro_compat) = (u32_le(bytes, 92), u32_le(bytes, 96), u32_le(bytes, 100));
    let blocks_high = if incompat & IS_64BIT == 0 { 0 } else { u32_le(bytes, 0x150) };
    let blocks = u64::from(u32_le(bytes, 4)) | u64::from(blocks_high) << 32;
    // More than 64 KiB is not possible, and 0 blocks are none.
    if log_block > 6 || blocks == 0 {
        return None;
    }
    let block = 1024_u64 << log_block;
    let name = if incompat & JOURNAL_DEV != 0 {
        "a journal of ext4"
    } else if incompat & !EXT3_INCOMPAT != 0 || ro_compat & !EXT3_RO_COMPAT != 0 {
        "ext4"
    } else if compat & HAS_JOURNAL != 0 {
        "ext3"
    } else {
        "ext2"
    };
    let state = u16_le(bytes, 58);
    let is_valid = state & (EXT_VALID | EXT_ERRORS) == EXT_VALID;
    let clean = is_valid && incompat & NEEDS_RECOVERY == 0;
    // `s_mtime` is the time of the last mount.
    let was_mounted = u32_le(bytes, 44) != 0;
    let fs = Some(FsInfo { size: blocks.saturating_mul(block), block, clean, was_mounted });
    Some(Signature { name, at, fs })
}

fn xfs(parts: &Parts<'_>, at: u64) -> Option<Signature> {
    let bytes = parts.get(at, XFS_LEN)?;
    let block = u64::from(u32_be(bytes, 4));
    if &bytes[..4] != b"XFSB" || !block.is_power_of_two() || !(512..=65536).contains(&block) {
        return None;
    }
    let size = u64_be(bytes, 8).saturating_mul(block);
    Some(Signature {
        name: "xfs",
        at,
        fs: Some(FsInfo { size, block, clean: true, was_mounted: false }),
    })
}

fn btrfs(parts: &Parts<'_>, at: u64) -> Option<Signature> {
    let bytes = parts.get(at, BTRFS_LEN)?;
    if &bytes[64..72] != b"_BHRfS_M" || u64_le(bytes, 48) != at {
        return None;
    }
    // Of the item that describes this device; the filesystem may have more devices.
    let (size, block) = (u64_le(bytes, 209), u64::from(u32_le(bytes, 144)));
    Some(Signature {
        name: "btrfs",
        at,
        fs: Some(FsInfo { size, block, clean: true, was_mounted: false }),
    })
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("as long as asked for")
}

fn u16_le(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

fn u32_le(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn u64_le(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

fn u32_be(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

fn u64_be(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array(bytes, at))
}
