//! The counter of each value: HdrHistogram's layout for fixed bounds.
//!
//! ```text
//! value (ns)   0 ....... 2^20 ....... 2^21 ....... 2^22  ...  2^37
//! step (ns)        2^9          2^10         2^11        ...
//! counters        2048          1024         1024        ...       LEN in all
//! ```
//! The lowest bound is rounded down to a power of two (512 ns); three digits need 2000 steps up to
//! the first doubling, rounded up to 2048; each further doubling takes half as many, twice as wide.

use hdrhistogram::Histogram;

/// The smallest latency that is not counted as zero.
const LOWEST_NS: u64 = 1_000;
/// The longest latency that is counted exactly; longer ones count as about this long.
const HIGHEST_NS: u64 = 100_000_000_000;
/// Decimal digits that are kept of each latency.
const SIGNIFICANT_DIGITS: u8 = 3;

/// Counters below the first doubling.
pub(crate) const SUB_BUCKETS: u64 = 1 << SUB_BUCKET_MAGNITUDE;
/// Counters of a histogram.
pub(crate) const LEN: usize = BLOCKS * BLOCK_LEN;
/// Counters are provided in blocks: two up to the first doubling, one for each doubling.
pub(crate) const BLOCK_LEN: usize = SUB_BUCKETS as usize / 2;
/// Blocks of a histogram.
pub(crate) const BLOCKS: usize = BUCKETS as usize + 1;

const UNIT_MAGNITUDE: u32 = LOWEST_NS.ilog2();
const SUB_BUCKET_MAGNITUDE: u32 =
    (2 * 10_u32.pow(SIGNIFICANT_DIGITS as u32)).next_power_of_two().ilog2();
const FIRST_DOUBLING: u32 = UNIT_MAGNITUDE + SUB_BUCKET_MAGNITUDE;
const BUCKETS: u32 = HIGHEST_NS.ilog2() + 1 - FIRST_DOUBLING + 1;
const SUB_BUCKET_MASK: u64 = (SUB_BUCKETS - 1) << UNIT_MAGNITUDE;
/// HdrHistogram counts values beyond the highest bound at that bound.
const SATURATED: usize = unbounded_index_of(HIGHEST_NS);

const _: () = assert!(SUB_BUCKETS == 2048 && LEN == 19 * 1024 && SATURATED < LEN);

/// An empty histogram with the bounds that every histogram of this crate has.
///
/// # Panics
/// Never: the bounds are valid.
#[must_use]
pub fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(LOWEST_NS, HIGHEST_NS, SIGNIFICANT_DIGITS)
        .expect("the bounds are valid")
}

/// The counter of a value; less than [`LEN`].
pub(crate) const fn index_of(value_ns: u64) -> usize {
    let index = unbounded_index_of(value_ns);
    if index < LEN { index } else { SATURATED }
}

/// The smallest value that a counter counts.
pub(crate) const fn lowest_value_at(index: usize) -> u64 {
    let bucket = (index / BLOCK_LEN).saturating_sub(1);
    ((index - bucket * BLOCK_LEN) as u64) << (bucket as u32 + UNIT_MAGNITUDE)
}

const fn unbounded_index_of(value_ns: u64) -> usize {
    let bucket = u64::BITS - FIRST_DOUBLING - (value_ns | SUB_BUCKET_MASK).leading_zeros();
    let step = value_ns >> (bucket + UNIT_MAGNITUDE);
    bucket as usize * BLOCK_LEN + step as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Where the crate counts a value.
    fn reference_index_of(value_ns: u64) -> usize {
        let mut histogram = new_histogram();
        histogram.saturating_record(value_ns);
        histogram.iter_all().position(|v| v.count_at_value() == 1).expect("it was counted")
    }

    #[test]
    fn has_as_many_counters_as_the_crate() {
        assert_eq!(LEN, new_histogram().distinct_values());
    }

    #[test]
    fn edges_are_where_the_crate_has_them() {
        let powers = (0..u64::BITS).map(|shift| 1 << shift);
        let bounds = [0, LOWEST_NS, HIGHEST_NS, u64::MAX];
        for near in powers.chain(bounds) {
            for value in [near - u64::from(near > 0), near, near.saturating_add(1)] {
                assert_eq!(index_of(value), reference_index_of(value), "{value} ns");
            }
        }
    }

    #[test]
    fn every_counter_knows_its_lowest_value() {
        for (index, value) in new_histogram().iter_all().enumerate() {
            let (lowest, highest) = (lowest_value_at(index), value.value_iterated_to());
            assert_eq!((index_of(lowest), index_of(highest)), (index, index));
            assert!(index == 0 || index_of(lowest - 1) == index - 1);
        }
    }

    proptest! {
        #[test]
        fn any_value_is_counted_as_by_the_crate(bits in any::<u64>(), shift in 0_u32..64) {
            // Shifting makes every magnitude equally likely.
            let value = bits >> shift;
            prop_assert_eq!(index_of(value), reference_index_of(value));
        }
    }
}
