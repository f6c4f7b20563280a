//! Which epoch has which log objects.
//!
//! The numbers of objects go on over epochs, so each epoch has one run of them. A header names the
//! first object of its own epoch and the epoch before; with the root's last opening this is a chain
//! to the first object. It has no bound, and costs a root no room however often a volume is opened.

use crate::format::Reach;
use crate::ids::{Epoch, Seq};

/// The epochs that have objects, with their first ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    /// In order, both by epoch and by number.
    reaches: Vec<Reach>,
}

impl Lineage {
    /// From the last epoch to the first.
    ///
    /// # Panics
    /// When they are not in that order: what was read is checked before.
    #[must_use]
    pub fn of_chain(mut newest_first: Vec<Reach>) -> Self {
        newest_first.reverse();
        let is_sorted = newest_first
            .windows(2)
            .all(|pair| pair[0].epoch < pair[1].epoch && pair[0].first < pair[1].first);
        assert!(is_sorted, "epochs and their first objects are in order");
        Self { reaches: newest_first }
    }

    /// The epoch of an object, if it is not before all.
    #[must_use]
    pub fn epoch_of(&self, seq: Seq) -> Option<Epoch> {
        self.reach_of(seq).map(|reach| reach.epoch)
    }

    /// The epoch of an object and its first one.
    #[must_use]
    pub fn reach_of(&self, seq: Seq) -> Option<Reach> {
        let after = self.reaches.partition_point(|reach| reach.first <= seq);
        after.checked_sub(1).map(|at| self.reaches[at])
    }

    /// The epochs that have objects up to this one, in order.
    #[must_use]
    pub fn up_to(&self, last: Seq) -> Vec<Reach> {
        self.reaches.iter().take_while(|reach| reach.first <= last).copied().collect()
    }

    /// The newest epoch before one.
    #[must_use]
    pub fn before(&self, epoch: Epoch) -> Option<Reach> {
        self.reaches.iter().rev().find(|reach| reach.epoch < epoch).copied()
    }

    /// The newest epoch.
    #[must_use]
    pub fn newest(&self) -> Option<Reach> {
        self.reaches.last().copied()
    }

    /// The same with a later epoch.
    #[must_use]
    pub fn with(&self, reach: Reach) -> Self {
        let mut reaches = self.reaches.clone();
        reaches.push(reach);
        reaches.reverse();
        Self::of_chain(reaches)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_has_one_epoch() {
        let reach = |(epoch, first)| Reach { epoch: Epoch(epoch), first: Seq(first) };
        let lineage = Lineage::of_chain([(9, 8), (4, 3), (1, 1)].map(reach).to_vec());
        let found: Vec<_> = (0..10).map(|seq| lineage.epoch_of(Seq(seq)).map(|e| e.0)).collect();
        let (a, b, c) = (Some(1), Some(4), Some(9));
        assert_eq!(found, [None, a, a, b, b, b, b, b, c, c]);
        assert_eq!(lineage.up_to(Seq(7)), [(1, 1), (4, 3)].map(reach));
        assert_eq!(lineage.up_to(Seq(8)).len(), 3);
        assert_eq!(lineage.before(Epoch(9)), Some(reach((4, 3))));
        assert_eq!(lineage.before(Epoch(1)), None);
        assert_eq!(lineage.with(reach((11, 10))).epoch_of(Seq(10)), Some(Epoch(11)));
        assert_eq!(Lineage::default().epoch_of(Seq(1)), None);
    }
}
