//! Byte ranges that are known to lie inside a volume.

use std::fmt;

/// A range of bytes whose end does not overflow and, when made by [`ByteRange::within`], lies
/// inside a volume. Checked once, where a request enters; all code below relies on it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start: u64,
    len: u64,
}

/// Why a range was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeError {
    /// `start + len` does not fit into 64 bits.
    Overflow,
    /// The range ends beyond the volume.
    PastEnd,
}

impl ByteRange {
    /// The range `[start, start + len)` of a volume of `size` bytes.
    ///
    /// # Errors
    /// [`RangeError::Overflow`] or [`RangeError::PastEnd`].
    pub fn within(start: u64, len: u64, size: u64) -> Result<Self, RangeError> {
        let end = start.checked_add(len).ok_or(RangeError::Overflow)?;
        if end > size {
            return Err(RangeError::PastEnd);
        }
        Ok(Self { start, len })
    }

    /// First byte.
    #[must_use]
    pub fn start(self) -> u64 {
        self.start
    }

    /// Length in bytes; may be zero.
    #[must_use]
    pub fn len(self) -> u64 {
        self.len
    }

    /// One past the last byte.
    #[must_use]
    pub fn end(self) -> u64 {
        self.start + self.len
    }

    /// Whether it covers no byte.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Whether the two share a byte.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    /// Whether start and length are multiples of `block`, a power of two.
    #[must_use]
    pub fn is_aligned(self, block: u64) -> bool {
        debug_assert!(block.is_power_of_two());
        (self.start | self.len) & (block - 1) == 0
    }

    /// The smallest range of whole blocks around this one, cut at `size`.
    #[must_use]
    pub fn widened(self, block: u64, size: u64) -> Self {
        debug_assert!(block.is_power_of_two() && self.end() <= size);
        let start = self.start & !(block - 1);
        let end = self.end().checked_next_multiple_of(block).unwrap_or(size).min(size);
        Self { start, len: end - start }
    }

    /// The part of this range that begins `skip` bytes in and is `len` bytes long.
    ///
    /// # Panics
    /// When the part is not inside the range: a bug of the caller.
    #[must_use]
    pub fn part(self, skip: u64, len: u64) -> Self {
        let end = skip.checked_add(len).expect("part of a range does not overflow");
        assert!(end <= self.len, "part {skip}+{len} of a range of {} bytes", self.len);
        Self { start: self.start + skip, len }
    }

    /// Cuts the range at multiples of `piece` and yields the pieces in order.
    pub fn pieces(self, piece: u64) -> impl Iterator<Item = Self> {
        debug_assert!(piece.is_power_of_two());
        let mut at = self.start;
        let end = self.end();
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let stop = (at | (piece - 1)).saturating_add(1).min(end);
                let cut = Self { start: at, len: stop - at };
                at = stop;
                cut
            })
        })
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_leaves_the_volume() {
        assert_eq!(ByteRange::within(u64::MAX, 1, u64::MAX), Err(RangeError::Overflow));
        assert_eq!(ByteRange::within(10, 1, 10), Err(RangeError::PastEnd));
        assert!(ByteRange::within(10, 0, 10).is_ok_and(ByteRange::is_empty));
    }

    #[test]
    fn pieces_cover_the_range_once() {
        let range = ByteRange::within(5, 20, 100).unwrap();
        let cuts: Vec<_> = range.pieces(8).map(|p| (p.start(), p.len())).collect();
        assert_eq!(cuts, [(5, 3), (8, 8), (16, 8), (24, 1)]);
    }

    #[test]
    fn widening_stops_at_the_end_of_the_volume() {
        let range = ByteRange::within(513, 10, 1000).unwrap();
        let wide = range.widened(512, 1000);
        assert_eq!((wide.start(), wide.end()), (512, 1000));
    }
}
