//! Nodes with journals that open one volume, write, upload, are killed, come back and take the
//! volume from one another. The openings, folds and uploads are the real ones; a journal is a list
//! of writes that survives a kill, and its superblock.
//!
//! Each opening is checked: on the node of the last opening it has every acknowledged write,
//! elsewhere a prefix of them that has all that was committed; and the blocks in the store are
//! those of the prefix.

mod audit;
mod feed;
mod journal;

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Poll;

use sheave_core::{Error, ErrorKind};

use crate::checkpoint::Cadence;
use crate::cipher::WrappingKey;
use crate::extents::Span;
use crate::fetch::Fetcher;
use crate::format::{LEAF_BLOCKS, Root, State};
use crate::gc::Cleaning;
use crate::ids::{BLOCK_BYTES, Epoch, Incarnation, Lba, Lsn, Opening};
use crate::journal::Superblock;
use crate::life;
use crate::map::{Map, MergeLimits, read_committed};
use crate::memory_store::{MemoryStore, Random, TurnClock};
use crate::open::{self, Opened, Request};
use crate::retry::{Patience, Requests};
use crate::threads::block_on;

use super::executor::killed_after;
use super::new_volume;
use feed::NodeFeed;
use journal::{NodeJournal, NodeLock};

const BLOCKS: u64 = 8;
const NODES: usize = 3;

/// A write of a number to a block; 0 makes zeroes of it.
#[derive(Clone, Copy, Debug)]
struct Write {
    lba: u64,
    number: u64,
}

/// The disk of a node.
#[derive(Clone, Debug, Default)]
struct Disk {
    superblock: Option<Superblock>,
    writes: BTreeMap<u64, Write>,
    is_locked: bool,
}

#[derive(Default)]
struct Truth {
    disks: [Disk; NODES],
    /// All writes of the volume that count: those of the last opening go on behind its prefix.
    writes: BTreeMap<u64, Write>,
    /// The last opening, and its node.
    last: Option<(Opening, usize)>,
    /// The last write that a commit was reported for.
    committed: u64,
    next_number: u64,
    openings: usize,
    replays: usize,
    takeovers: usize,
    checkpoints: usize,
    leaves: usize,
    snapshots: usize,
    swept: usize,
    moved: usize,
    violation: Option<String>,
}

impl Truth {
    fn acknowledged(&self) -> u64 {
        self.writes.keys().next_back().copied().unwrap_or_default()
    }

    /// An opening begins: on another node than the last one it leaves out what is not committed.
    fn begin(&mut self, root: &Root) -> Result<(), String> {
        let (epoch, prefix) = (root.author.epoch, root.committed.lsn.0);
        if prefix < self.committed || prefix > self.acknowledged() {
            let [committed, acknowledged] = [self.committed, self.acknowledged()];
            return Err(format!(
                "epoch {epoch}: prefix {prefix}, {committed} committed, {acknowledged} acknowledged"
            ));
        }
        let node = (0..NODES).find(|node| node_name(*node) == root.node).expect("a node");
        if self.last.is_none_or(|(_, last)| last != node) {
            self.writes.retain(|lsn, _| *lsn <= prefix);
            self.takeovers += 1;
        }
        self.last = Some((root.author, node));
        Ok(())
    }
}

fn node_name(node: usize) -> String {
    format!("n{node}")
}

/// What all nodes share.
#[derive(Clone)]
pub(super) struct Nodes {
    pub(super) store: Arc<MemoryStore>,
    random: Arc<Random>,
    requests: Requests,
    pub(super) key: Option<WrappingKey>,
    truth: Arc<Mutex<Truth>>,
}

impl Nodes {
    pub(super) fn new(store: Arc<MemoryStore>, random: Arc<Random>) -> Self {
        let requests = Requests::new(store.clone(), Arc::new(TurnClock), "simulated");
        let requests = requests.with_patience(Patience::Endless);
        let new = new_volume(&random, BLOCKS * LEAF_BLOCKS);
        block_on(life::create(&requests, &new)).expect("a new volume");
        Self { store, random, requests, key: new.key, truth: Arc::default() }
    }

    fn truth(&self) -> MutexGuard<'_, Truth> {
        self.truth.lock().expect("no panic with the lock")
    }

    pub(super) fn violation(&self) -> Option<String> {
        self.truth().violation.clone()
    }

    /// Openings, those with a replay, those of another node's volume, checkpoints, leaves,
    /// snapshots, objects that were deleted, and runs that were moved.
    pub(super) fn seen(&self) -> [usize; 8] {
        let Truth { openings, replays, takeovers, checkpoints, leaves, .. } = *self.truth();
        let Truth { snapshots, swept, moved, .. } = *self.truth();
        [openings, replays, takeovers, checkpoints, leaves, snapshots, swept, moved]
    }

    fn violated(&self, why: String) {
        self.truth().violation.get_or_insert(why);
    }

    /// A node on which no process has the volume.
    pub(super) fn idle_node(&self) -> Option<usize> {
        let node = self.random.below(NODES as u64) as usize;
        (!self.truth().disks[node].is_locked).then_some(node)
    }

    /// A process on a node: opens the volume, writes, and is killed or closes it.
    pub(super) fn process(self, node: usize) -> impl Future<Output = ()> {
        let lock = NodeLock::take(&self, node);
        self.run(node, lock)
    }

    async fn run(self, node: usize, _lock: NodeLock) {
        let request = Request {
            node: node_name(node),
            incarnation: Incarnation(self.random.bytes()),
            take_over: self.random.percent(12),
            key: self.key.clone(),
        };
        // It may be killed while it opens, at any step.
        let life = if self.random.percent(20) { self.random.below(120) } else { u64::MAX };
        let journal = NodeJournal { nodes: self.clone(), node };
        let opening = open::open(&self.requests, &request, |_| Ok(journal.clone()));
        let Some(opened) = killed_after(life, opening).await else { return };
        match opened {
            Ok(opened) => self.use_volume(node, opened).await,
            Err(error) => self.check_refusal(node, &request, &error),
        }
    }

    /// The last opening's own node is never refused.
    fn check_refusal(&self, node: usize, request: &Request, error: &Error) {
        let is_own = self.open_roots().last().is_some_and(|last| last.node == node_name(node));
        let is_race = error.to_string().contains("at the same time");
        match error.kind() {
            ErrorKind::Busy if is_race => {}
            ErrorKind::Busy if !is_own && !request.take_over => {}
            _ => {
                let superblock = self.truth().disks[node].superblock;
                let roots = self.roots();
                let root = |root: &Root| (root.number, root.state, root.author, root.last.opening);
                let roots: Vec<_> = roots.iter().map(root).collect();
                self.violated(format!(
                    "node {node} is refused: {error}; {superblock:?}; {roots:?}"
                ));
            }
        }
    }

    async fn use_volume(&self, node: usize, opened: Opened<NodeJournal>) {
        if let Err(why) = self.check_opening(node, &opened) {
            return self.violated(why);
        }
        if let Err(why) = self.check_blocks(&opened).await {
            return self.violated(why);
        }
        // Killed before the journal says that this opening is its current one?
        if self.random.percent(10) {
            return;
        }
        let opening = opened.opening;
        self.truth().disks[node].superblock =
            Some(Superblock { volume: opened.volume, current: Some(opening), adopting: None });
        let found = (opened.committed.lsn, opened.map);
        let feed = Arc::new(NodeFeed::new(self, node, opening, found));
        // So that some are made in a short life.
        let limits = MergeLimits {
            runs_min: self.random.below(6) as usize,
            runs_max: 1 + self.random.below(8) as usize,
            ..MergeLimits::of_bytes(1 << 20)
        };
        let interval = 1 + self.random.below(8);
        let roots_kept = 1 + self.random.below(4);
        let (space_percent, move_bytes) =
            (100 + self.random.below(30), 1 + self.random.below(9000));
        let cleaning = Cleaning { space_percent, move_bytes };
        let cadence = Cadence { interval, limits, roots_kept, cleaning };
        let upload = opened.upload.with_cadence(cadence);
        let ended = {
            let mut upload = pin!(upload.run(feed.clone()));
            let life = self.random.below(600);
            let mut turns = 0;
            poll_fn(|cx| {
                turns += 1;
                feed.act();
                cx.waker().wake_by_ref();
                match upload.as_mut().poll(cx) {
                    Poll::Ready(ended) => Poll::Ready(Some(ended)),
                    Poll::Pending if turns >= life => Poll::Ready(None),
                    Poll::Pending => Poll::Pending,
                }
            })
            .await
        };
        // A clean end empties the journal.
        if let Some(Ok(())) = ended {
            self.truth().disks[node].writes.clear();
        }
    }

    /// The roots by which openings began, in order. Later roots of an opening name checkpoints.
    fn open_roots(&self) -> Vec<Root> {
        let begins = |root: &Root| root.committed.seq.next() == root.last.first;
        let is_first = |root: &Root| root.state == State::Open && begins(root);
        self.roots().into_iter().filter(is_first).collect()
    }

    fn roots(&self) -> Vec<Root> {
        let roots = self.store.roots_ever().into_iter();
        let mut roots: Vec<_> = roots.filter_map(|body| Root::decode(&body).ok()).collect();
        roots.sort_by_key(|root| root.number);
        roots
    }

    /// Compares an opening with what was acknowledged and committed before. Openings between it and
    /// the last one that was seen were killed before they knew that they had the volume.
    fn check_opening(&self, node: usize, opened: &Opened<NodeJournal>) -> Result<(), String> {
        let open = self.open_roots();
        let mut truth = self.truth();
        let seen = truth.last.map_or(Epoch(0), |(last, _)| last.epoch);
        let mine = opened.opening;
        for root in open.iter().filter(|root| root.author.epoch > seen) {
            if root.author.epoch > mine.epoch {
                break;
            }
            truth.begin(root)?;
        }
        let what = format!("epoch {} on node {node}", mine.epoch);
        if truth.last != Some((mine, node)) {
            return Err(format!("{what}: it is not the last one: {:?}", truth.last));
        }
        // The journal goes on behind the prefix.
        let prefix = opened.committed.lsn.0;
        truth.disks[node].writes.retain(|lsn, _| *lsn > prefix);
        let replayed = truth.disks[node].writes.keys().next_back().copied().unwrap_or(prefix);
        if replayed != truth.acknowledged() {
            let want = truth.acknowledged();
            return Err(format!("{what}: {replayed} behind {prefix}, and {want} acknowledged"));
        }
        truth.openings += 1;
        truth.replays += usize::from(replayed > prefix);
        Ok(())
    }

    /// Compares the blocks in the store with the prefix.
    async fn check_blocks(&self, opened: &Opened<NodeJournal>) -> Result<(), String> {
        self.check_map(&opened.map, &opened.fetcher, opened.committed.lsn).await
    }

    /// Compares the blocks of a map with all writes up to one.
    async fn check_map(&self, map: &Map, fetcher: &Fetcher, last: Lsn) -> Result<(), String> {
        let prefix = last.0;
        let writes: Vec<_> =
            self.truth().writes.range(..=prefix).map(|(_, write)| *write).collect();
        for lba in 0..BLOCKS {
            let last = writes.iter().rev().find(|write| write.lba == lba);
            let want = last.map_or(0, |write| write.number);
            let span = Span { start: address(lba).0, blocks: 1 };
            let data = read_committed(map, fetcher, span).await;
            let data = data.map_err(|error| error.to_string())?;
            if data != block(want) {
                return Err(format!("block {lba} of prefix {prefix} is not {want}"));
            }
        }
        Ok(())
    }
}

/// The address of a block: the last one or the first one of a leaf.
fn address(block: u64) -> Lba {
    Lba((block / 2 + 1) * LEAF_BLOCKS - 1 + block % 2)
}

fn block(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(BLOCK_BYTES as usize / 8)
}
