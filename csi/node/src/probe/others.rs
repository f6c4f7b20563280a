//! Signatures of what the engine neither makes nor mounts, so that it is named and left alone.

use super::{Parts, Signature};

/// Name, offset, magic.
const MAGICS: &[(&str, u64, &[u8])] = &[
    ("LUKS", 0, b"LUKS\xba\xbe"),
    ("GPT", 512, b"EFI PART"),
    ("GPT", 4096, b"EFI PART"),
    ("swap", 4096 - 10, b"SWAPSPACE2"),
    ("swap", 4096 - 10, b"SWAP-SPACE"),
    ("swap", 8192 - 10, b"SWAPSPACE2"),
    ("swap", 16384 - 10, b"SWAPSPACE2"),
    ("swap", 65536 - 10, b"SWAPSPACE2"),
    ("a suspended system", 4096 - 10, b"S1SUSPEND"),
    ("RAID", 0, b"\xfc\x4e\x2b\xa9"),
    ("RAID", 4096, b"\xfc\x4e\x2b\xa9"),
    ("bcache", 4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    ("bcachefs", 4096 + 24, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"),
    ("ntfs", 3, b"NTFS    "),
    ("exfat", 3, b"EXFAT   "),
    ("BitLocker", 3, b"-FVE-FS-"),
    ("vfat", 54, b"FAT12   "),
    ("vfat", 54, b"FAT16   "),
    ("vfat", 82, b"FAT32   "),
    ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    ("hfsplus", 1024, b"H+\x00\x04"),
    ("squashfs", 0, b"hsqs"),
    ("iso9660", 32769, b"CD001"),
    ("udf", 32769, b"BEA01"),
    ("jfs", 32768, b"JFS1"),
    ("reiserfs", 65536 + 52, b"ReIsEr"),
    ("gfs2", 65536, b"\x01\x16\x19\x70"),
    ("ocfs2", 8192, b"OCFSV2"),
    ("a Ceph OSD", 0, b"bluestore block device"),
    ("VMFS", 1 << 20, b"\x0d\xd0\x01\xc0"),
    ("qcow2", 0, b"QFI\xfb"),
];

/// Where LUKS2 may keep its second header (LUKS2 on-disk format, 2.2).
const LUKS2_SECOND: [u64; 9] =
    [0x4000, 0x8000, 0x10000, 0x20000, 0x40000, 0x80000, 0x10_0000, 0x20_0000, 0x40_0000];

/// Main signatures.
pub(super) fn main(parts: &Parts<'_>) -> Vec<Signature> {
    let magics = MAGICS.iter().filter(|(_, at, magic)| parts.has(*at, magic));
    let mut found: Vec<_> = magics.map(|(name, at, _)| sign(name, *at)).collect();
    let labels = (0..4).map(|sector| sector * 512);
    let labels = labels.filter(|at| parts.has(*at, b"LABELONE") && parts.has(at + 24, b"LVM2 001"));
    found.extend(labels.map(|at| sign("LVM", at)));
    // ZFS keeps an array of uberblocks in each of its labels, behind the first 128 KiB.
    let uberblocks = (0..128).map(|index| (128 << 10) + index * 1024);
    let magic = 0x00ba_b10c_u64;
    let is_one =
        |at: &u64| parts.has(*at, &magic.to_le_bytes()) || parts.has(*at, &magic.to_be_bytes());
    found.extend(uberblocks.filter(is_one).take(1).map(|at| sign("ZFS", at)));
    if found.is_empty() && has_partitions(parts) {
        found.push(sign("MBR", 0));
    }
    found
}

/// Backups of them.
pub(super) fn backups(parts: &Parts<'_>) -> Vec<Signature> {
    let mut found = Vec::new();
    let luks = LUKS2_SECOND.into_iter().filter(|at| parts.has(*at, b"SKUL\xba\xbe"));
    found.extend(luks.map(|at| sign("LUKS", at)));
    let end = |before: u64| parts.size.checked_sub(before);
    let gpt = [512, 4096].into_iter().filter_map(end).filter(|at| parts.has(*at, b"EFI PART"));
    found.extend(gpt.map(|at| sign("GPT", at)));
    // Versions 0.90 and 1.0 (md(4)) keep their only superblock here.
    let old = end(64 << 10).map(|at| at / (64 << 10) * (64 << 10));
    let new = end(8 << 10).map(|at| at / 4096 * 4096);
    let raid = [old, new].into_iter().flatten().filter(|at| parts.has(*at, b"\xfc\x4e\x2b\xa9"));
    found.extend(raid.map(|at| sign("RAID", at)));
    found
}

/// Whether the first sector has a partition table with an entry.
fn has_partitions(parts: &Parts<'_>) -> bool {
    let Some(sector) = parts.get(0, 512) else { return false };
    let is_entry = |entry: &[u8]| {
        // Boot flag, type, first sector and length (UEFI 2.10, 5.2.1).
        let is_set = |range: std::ops::Range<usize>| entry[range].iter().any(|&byte| byte != 0);
        matches!(entry[0], 0 | 0x80) && entry[4] != 0 && is_set(12..16)
    };
    sector[510..] == [0x55, 0xaa] && sector[446..510].chunks(16).any(is_entry)
}

fn sign(name: &'static str, at: u64) -> Signature {
    Signature { name, at, fs: None }
}
