//! Pages of the journal, and numbers in them. All numbers are little-endian.

use std::ops::Range;

use crate::ids::BLOCK_BYTES;

/// Bytes of a page, the unit in which the journal is written: a block.
pub(crate) const PAGE_BYTES: usize = BLOCK_BYTES as usize;

/// A page.
pub(crate) type Page = [u8; PAGE_BYTES];

/// The bytes at a fixed offset of a page.
pub(crate) fn bytes_at<const N: usize>(page: &Page, at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&page[at..at + N]);
    bytes
}

/// The number there.
pub(crate) fn u32_at(page: &Page, at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(page, at))
}

/// The number there.
pub(crate) fn u64_at(page: &Page, at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(page, at))
}

/// Whether all bytes there are zero.
pub(crate) fn is_zero(page: &Page, range: Range<usize>) -> bool {
    page[range].iter().all(|byte| *byte == 0)
}

/// Puts a number there.
pub(crate) fn put_u32(page: &mut Page, at: usize, value: u32) {
    page[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Puts a number there.
pub(crate) fn put_u64(page: &mut Page, at: usize, value: u64) {
    page[at..at + 8].copy_from_slice(&value.to_le_bytes());
}
