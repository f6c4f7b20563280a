//! A feed of batches.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use sheave_core::{Error, Result};

use super::{FakeJournal, Opened};
use crate::ask::Ask;
use crate::extents::Span;
use crate::format::{Built, Committed, Placed};
use crate::ids::{BLOCK_BYTES, Lba, Lsn};
use crate::map::{Found, Frozen, Leaf, Map, Settled};
use crate::store::StoreError;
use crate::threads::block_on;
use crate::upload::{Feed, JournalPlace, Next, Plan, Sealed, SealedEntry};

/// Gives batches of blocks that are filled with a byte; zeroes are zero entries.
struct Batches {
    map: Mutex<Map>,
    next: Mutex<Vec<Sealed>>,
    closes: AtomicBool,
    committed: Mutex<Vec<(Committed, usize)>>,
    stopped: Mutex<Option<Error>>,
    asks: Mutex<VecDeque<Ask>>,
}

fn batch(first: u64, entries: &[(u64, u64, u8)]) -> Sealed {
    let entry = |&(lba, blocks, fill): &(u64, u64, u8)| match fill {
        0 => SealedEntry::Zero { lba: Lba(lba), blocks },
        _ => {
            let from = JournalPlace { segment: u64::from(fill), page: 0 };
            SealedEntry::Write { lba: Lba(lba), blocks, from }
        }
    };
    Sealed {
        lsn_first: Lsn(first),
        lsn_last: Lsn(first + entries.len() as u64 - 1),
        entries: entries.iter().map(entry).collect(),
    }
}

impl Feed for Batches {
    fn poll_sealed(&self, _: &mut Context<'_>) -> Poll<Next> {
        let mut next = self.next.lock().unwrap();
        match next.is_empty() {
            false => Poll::Ready(Next::Batch(next.remove(0))),
            true if self.closes.load(Relaxed) => Poll::Ready(Next::Drained),
            true => Poll::Pending,
        }
    }

    fn poll_ask(&self, _: &mut Context<'_>) -> Poll<Ask> {
        self.asks.lock().unwrap().pop_front().map_or(Poll::Pending, Poll::Ready)
    }

    fn build(
        &self,
        plan: Plan,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Built>> + Send + '_>> {
        let read = |from: JournalPlace, blocks, into: &mut Vec<u8>| {
            let end = into.len() + (blocks * BLOCK_BYTES) as usize;
            into.resize(end, from.segment as u8);
            Ok(())
        };
        Box::pin(async move { plan.build(read) })
    }

    fn freeze(&self) -> Frozen {
        self.map.lock().unwrap().freeze()
    }

    fn settle(&self, settled: Settled) {
        drop(self.map.lock().unwrap().settle(settled));
    }

    fn leaf(&self, number: u64) -> Option<Arc<Leaf>> {
        self.map.lock().unwrap().leaf(number)
    }

    fn committed(&self, committed: Committed, placed: &[Placed]) {
        placed.iter().for_each(|placed| self.map.lock().unwrap().fold(placed));
        self.committed.lock().unwrap().push((committed, placed.len()));
    }

    fn moved(&self, placed: &[Placed]) {
        placed.iter().for_each(|placed| self.map.lock().unwrap().fold(placed));
    }

    fn cover(&self, span: Span) -> Vec<(Span, Found)> {
        self.map.lock().unwrap().cover(span)
    }

    fn stopped(&self, error: Error) {
        *self.stopped.lock().unwrap() = Some(error);
    }

    fn store_says(&self, _: Option<&StoreError>) {}
}

/// Commits batches, and closes the volume or lets go of it.
pub(crate) fn commit(
    opened: Opened<FakeJournal>,
    batches: &[&[(u64, u64, u8)]],
    closes: bool,
) -> Result<()> {
    commit_asking(opened, batches, Vec::new(), (closes, 0))
}

/// The same, asks for something at the begin, and goes on for so many turns before the end.
pub(crate) fn commit_asking(
    opened: Opened<FakeJournal>,
    batches: &[&[(u64, u64, u8)]],
    asks: Vec<Ask>,
    (closes, mut turns): (bool, usize),
) -> Result<()> {
    let mut lsn = opened.committed.lsn.0 + 1;
    let mut next = Vec::new();
    for entries in batches {
        next.push(batch(lsn, entries));
        lsn += entries.len() as u64;
    }
    let count = next.len();
    let (committed, stopped) = (Mutex::default(), Mutex::default());
    let (map, next) = (Mutex::new(opened.map), Mutex::new(next));
    let asks = Mutex::new(asks.into());
    let closes_now = AtomicBool::new(closes && turns == 0);
    let feed = Arc::new(Batches { map, next, closes: closes_now, committed, stopped, asks });
    let first = opened.committed.seq.0;
    let mut run = std::pin::pin!(opened.upload.run(feed.clone()));
    let ended = block_on(std::future::poll_fn(|cx| {
        let polled = run.as_mut().poll(cx);
        let all = feed.committed.lock().unwrap().len() == count;
        if all && turns > 0 {
            turns -= 1;
            feed.closes.store(closes && turns == 0, Relaxed);
            cx.waker().wake_by_ref();
            return if polled.is_pending() { Poll::Pending } else { polled };
        }
        if polled.is_pending() && all && !closes { Poll::Ready(Ok(())) } else { polled }
    }));
    if ended.is_ok() {
        let seqs: Vec<_> = feed.committed.lock().unwrap().iter().map(|at| at.0.seq.0).collect();
        // A number that is left out is that of a checkpoint.
        let mut last = first;
        for seq in seqs {
            assert!(seq == last + 1 || seq == last + 2, "{seq} follows {last}");
            last = seq;
        }
    }
    assert_eq!(ended.is_err(), feed.stopped.lock().unwrap().is_some());
    ended
}
