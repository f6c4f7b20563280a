//! What every block of the volume must hold, shared by all connections of a verifying load.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use super::pattern::{Allowed, Generation};

/// The most blocks a verifying load can cover: 8 bytes of memory each.
pub(crate) const BLOCKS_MAX: u64 = 1 << 27;

/// Per block, how often a write was issued and how often one was acknowledged.
///
/// A block has at most one write in flight: the outcome of two would be undefined. A write that
/// fails leaves its block claimed for good: either generation may be on it.
#[derive(Debug)]
pub(crate) struct Ledger {
    blocks: Box<[Block]>,
}

#[derive(Debug, Default)]
struct Block {
    issued: AtomicU32,
    acknowledged: AtomicU32,
}

impl Ledger {
    /// A ledger of `count` unwritten blocks.
    pub(crate) fn new(count: usize) -> Self {
        Self { blocks: (0..count).map(|_| Block::default()).collect() }
    }

    /// Claims a block for a write; its generation, or `None` while another write is in flight.
    pub(crate) fn claim(&self, block: usize) -> Option<Generation> {
        let block = &self.blocks[block];
        let acknowledged = block.acknowledged.load(SeqCst);
        let next = acknowledged.checked_add(1)?;
        // Fails when `next` or a later one has been issued.
        block.issued.compare_exchange(acknowledged, next, SeqCst, SeqCst).ok().map(|_| next)
    }

    /// The server has acknowledged the write of `generation`.
    pub(crate) fn acknowledge(&self, block: usize, generation: Generation) {
        self.blocks[block].acknowledged.store(generation, SeqCst);
    }

    /// The oldest generation that a read issued now may see.
    pub(crate) fn oldest(&self, block: usize) -> Generation {
        self.blocks[block].acknowledged.load(SeqCst)
    }

    /// Which generations a read that ended now may have seen, given [`Ledger::oldest`] from when
    /// it was issued.
    pub(crate) fn allowed(&self, block: usize, oldest: Generation) -> Allowed {
        Allowed { oldest, newest: self.blocks[block].issued.load(SeqCst) }
    }

    /// The blocks that have an acknowledged write, in order.
    pub(crate) fn written(&self) -> impl Iterator<Item = usize> {
        self.blocks
            .iter()
            .enumerate()
            .filter(|(_, block)| block.acknowledged.load(SeqCst) > 0)
            .map(|(index, _)| index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_write_at_a_time() {
        let ledger = Ledger::new(2);
        assert_eq!(ledger.claim(0), Some(1));
        assert_eq!(ledger.claim(0), None);
        assert_eq!(ledger.claim(1), Some(1));
        assert_eq!(ledger.allowed(0, ledger.oldest(0)), Allowed { oldest: 0, newest: 1 });
        ledger.acknowledge(0, 1);
        assert_eq!(ledger.claim(0), Some(2));
        assert_eq!(ledger.allowed(0, ledger.oldest(0)), Allowed { oldest: 1, newest: 2 });
    }

    #[test]
    fn only_acknowledged_blocks_count_as_written() {
        let ledger = Ledger::new(3);
        ledger.claim(0);
        ledger.claim(2);
        ledger.acknowledge(2, 1);
        assert_eq!(ledger.written().collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn claims_of_many_threads_never_overlap() {
        let ledger = Ledger::new(1);
        let total: u32 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let mut won = 0;
                        for _ in 0..10_000 {
                            if let Some(generation) = ledger.claim(0) {
                                ledger.acknowledge(0, generation);
                                won += 1;
                            }
                        }
                        won
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
        });
        assert_eq!(ledger.oldest(0), total);
    }
}
