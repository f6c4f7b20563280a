//! Which block comes next, and whether to read or write it.

use std::sync::Arc;

use super::pattern::next_random;

/// In which order a connection visits its blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Uniformly at random.
    Random,
    /// One after the other, again from the start after the last.
    Sequential,
    /// Just these, in this order.
    Listed(Arc<[u64]>),
}

/// Picks blocks for one connection.
#[derive(Debug)]
pub(crate) struct Picker {
    order: Order,
    first: u64,
    count: u64,
    next: u64,
    state: u64,
}

impl Picker {
    /// Picks from `count` blocks (at least one) that begin with block `first`.
    pub(crate) fn new(order: Order, first: u64, count: u64, seed: u64) -> Self {
        debug_assert!(count > 0);
        Self { order, first, count, next: 0, state: seed }
    }

    /// The next block.
    pub(crate) fn block(&mut self) -> u64 {
        match &self.order {
            Order::Random => {
                let random = u128::from(next_random(&mut self.state));
                let scaled = (random * u128::from(self.count)) >> 64;
                self.first + u64::try_from(scaled).expect("a scaled random number is below count")
            }
            Order::Sequential => {
                let at = self.next;
                self.next = if at + 1 == self.count { 0 } else { at + 1 };
                self.first + at
            }
            Order::Listed(blocks) => {
                let index = usize::try_from(self.next).expect("an index fits into memory");
                self.next += 1;
                blocks[index % blocks.len()]
            }
        }
    }

    /// True for `percent` of the calls.
    pub(crate) fn chance(&mut self, percent: u8) -> bool {
        match percent {
            0 => false,
            100.. => true,
            _ => next_random(&mut self.state) % 100 < u64::from(percent),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_blocks_cover_their_part_evenly() {
        let mut picker = Picker::new(Order::Random, 10, 4, 1);
        let mut hits = [0u32; 4];
        for _ in 0..4000 {
            let block = picker.block();
            hits[usize::try_from(block - 10).unwrap()] += 1;
        }
        assert!(hits.iter().all(|&count| (800..1200).contains(&count)), "{hits:?}");
    }

    #[test]
    fn sequential_blocks_wrap() {
        let mut picker = Picker::new(Order::Sequential, 5, 3, 1);
        let blocks: Vec<_> = (0..7).map(|_| picker.block()).collect();
        assert_eq!(blocks, [5, 6, 7, 5, 6, 7, 5]);
    }

    #[test]
    fn listed_blocks_come_in_order() {
        let mut picker = Picker::new(Order::Listed([9, 3].into()), 0, 2, 1);
        assert_eq!([picker.block(), picker.block()], [9, 3]);
    }

    #[test]
    fn chance_is_near_its_percentage() {
        let mut picker = Picker::new(Order::Random, 0, 1, 42);
        let hits = (0..10_000).filter(|_| picker.chance(70)).count();
        assert!((6800..7200).contains(&hits), "{hits}");
        assert!(picker.chance(100) && !picker.chance(0));
    }
}
