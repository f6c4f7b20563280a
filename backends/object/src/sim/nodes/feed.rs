//! What a process writes, and asks its uploads for.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};

use sheave_core::{Error, ErrorKind, Result};

use super::{BLOCKS, Nodes, Write, address, block};
use crate::ask::Ask;
use crate::extents::Span;
use crate::format::{Built, Committed, Placed};
use crate::ids::{Epoch, Lsn, Opening};
use crate::map::{Found, Frozen, Leaf, Map, Settled};
use crate::memory_store::yield_now;
use crate::store::StoreError;
use crate::upload::{Feed, JournalPlace, Next, Plan, Sealed, SealedEntry};

/// Writes of a process, and their way to the store.
pub(super) struct NodeFeed {
    nodes: Nodes,
    node: usize,
    opening: Opening,
    state: Mutex<FeedState>,
}

struct FeedState {
    /// The first write that is in no batch.
    next: u64,
    closes: bool,
    /// What was reported as committed.
    map: Map,
}

impl NodeFeed {
    /// Writes go on behind the prefix that an opening has found.
    pub(super) fn new(
        nodes: &Nodes,
        node: usize,
        opening: Opening,
        (prefix, map): (Lsn, Map),
    ) -> Self {
        let state = FeedState { next: prefix.0 + 1, closes: false, map };
        Self { nodes: nodes.clone(), node, opening, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, FeedState> {
        self.state.lock().expect("no panic with the lock")
    }

    fn closes(&self) -> bool {
        self.state().closes
    }

    /// Acknowledges a write, or begins to close, or does nothing.
    pub(super) fn act(&self) {
        let random = &self.nodes.random;
        match random.below(100) {
            _ if self.closes() => {}
            0..30 => self.write(),
            30 if random.percent(20) => self.state().closes = true,
            _ => {}
        }
    }

    fn write(&self) {
        let random = &self.nodes.random;
        let next = self.state().next;
        let mut truth = self.nodes.truth();
        truth.next_number += 1;
        let number = if random.percent(15) { 0 } else { truth.next_number };
        let write = Write { lba: random.below(BLOCKS), number };
        let last = truth.disks[self.node].writes.keys().next_back().copied();
        let lsn = last.map_or(next, |last| last + 1).max(next);
        truth.disks[self.node].writes.insert(lsn, write);
        // What a node acknowledges after another has taken over does not count.
        if truth.last.is_some_and(|(last, _)| last == self.opening) {
            truth.writes.insert(lsn, write);
        }
    }
}

impl Feed for NodeFeed {
    fn poll_sealed(&self, _: &mut Context<'_>) -> Poll<Next> {
        let mut state = self.state();
        let truth = self.nodes.truth();
        let unsealed = truth.disks[self.node].writes.range(state.next..);
        let count = 1 + self.nodes.random.below(5) as usize;
        let writes: Vec<_> = unsealed.take(count).map(|(&lsn, &write)| (lsn, write)).collect();
        let (Some(first), Some(last)) = (writes.first(), writes.last()) else {
            return if state.closes { Poll::Ready(Next::Drained) } else { Poll::Pending };
        };
        if !state.closes && !self.nodes.random.percent(20) {
            return Poll::Pending;
        }
        state.next = last.0 + 1;
        let entry = |&(_, Write { lba, number }): &(u64, Write)| match number {
            0 => SealedEntry::Zero { lba: address(lba), blocks: 1 },
            _ => {
                let from = JournalPlace { segment: number, page: 0 };
                SealedEntry::Write { lba: address(lba), blocks: 1, from }
            }
        };
        Poll::Ready(Next::Batch(Sealed {
            lsn_first: Lsn(first.0),
            lsn_last: Lsn(last.0),
            entries: writes.iter().map(entry).collect(),
        }))
    }

    fn poll_ask(&self, _: &mut Context<'_>) -> Poll<Ask> {
        let random = &self.nodes.random;
        match random.below(600) {
            0 => Poll::Ready(self.nodes.ask_snapshot(Lsn(self.state().next - 1))),
            1..4 => Poll::Ready(self.nodes.ask_deletion()),
            _ => Poll::Pending,
        }
    }

    fn build(&self, plan: Plan) -> Pin<Box<dyn Future<Output = Result<Built>> + Send + '_>> {
        Box::pin(async move {
            yield_now().await;
            plan.build(|from, _, into| {
                into.extend(block(from.segment));
                Ok(())
            })
        })
    }

    fn freeze(&self) -> Frozen {
        self.nodes.truth().checkpoints += 1;
        self.state().map.freeze()
    }

    fn settle(&self, settled: Settled) {
        self.nodes.truth().leaves += settled.changed.len();
        drop(self.state().map.settle(settled));
    }

    fn compute(
        &self,
        work: Box<dyn FnOnce() + Send>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let random = &self.nodes.random;
        let turns = if random.percent(30) { random.below(80) } else { 0 };
        Box::pin(async move {
            for _ in 0..turns {
                yield_now().await;
            }
            work();
        })
    }

    fn moved(&self, placed: &[Placed]) {
        placed.iter().for_each(|placed| self.state().map.fold(placed));
        self.nodes.truth().moved += placed.len();
    }

    fn cover(&self, span: Span) -> Vec<(Span, Found)> {
        self.state().map.cover(span)
    }

    fn swept(&self, _: u64) {
        self.nodes.truth().swept += 1;
    }

    fn leaf(&self, number: u64) -> Option<Arc<Leaf>> {
        self.state().map.leaf(number).filter(|_| self.nodes.random.percent(50))
    }

    fn committed(&self, committed: Committed, placed: &[Placed]) {
        placed.iter().for_each(|placed| self.state().map.fold(placed));
        let Epoch(epoch) = self.opening.epoch;
        // A commit whose answer comes late is in the successor's prefix.
        let (lsn, open) = (committed.lsn.0, self.nodes.open_roots());
        let mut later = open.iter().filter(|root| root.author.epoch > self.opening.epoch);
        if later.any(|root| root.committed.lsn < committed.lsn) {
            self.nodes.violated(format!("epoch {epoch} commits {lsn} after a takeover"));
        }
        let mut truth = self.nodes.truth();
        truth.committed = truth.committed.max(lsn);
        truth.disks[self.node].writes.retain(|written, _| *written > lsn);
    }

    fn stopped(&self, error: Error) {
        if error.kind() != ErrorKind::Fenced {
            self.nodes.violated(format!("uploads stop: {error}"));
        }
    }

    fn store_says(&self, _: Option<&StoreError>) {}
}
