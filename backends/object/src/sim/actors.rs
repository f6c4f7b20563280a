//! The openers and writers of a simulation, and what they must never see.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Poll;

use sheave_core::{Error, ErrorKind};

use super::Seen;
use crate::format::{
    Author, Codec, Coding, Committed, Directory, Durability, FramePlace, LastOpening,
    ObjectBuilder, Root, SnapshotNews, State, keys,
};
use crate::ids::{Epoch, Incarnation, Lba, Lsn, Opening, Seq, VolumeId};
use crate::journal::Adopted;
use crate::lineage::Lineage;
use crate::memory_store::{MemoryStore, Random, TurnClock, yield_now};
use crate::open::{Fold, Request, claim, enter, find_any, rules, unless_overtaken};
use crate::retry::{Patience, Requests, Settled};

/// Roots that stay although they are no claims.
const ROOTS_KEPT: u64 = 1;
/// Objects under way.
const WINDOW: usize = 3;
/// Every object of a number that this divides is a checkpoint; the others have a write each.
const CHECKPOINT_EVERY: u64 = 4;

/// What all actors share.
pub(super) struct World {
    pub(super) store: Arc<MemoryStore>,
    random: Arc<Random>,
    requests: Requests,
    truth: Mutex<Truth>,
}

#[derive(Debug, Default)]
struct Truth {
    /// Each acknowledged object with its epoch.
    acknowledged: BTreeMap<u64, u64>,
    /// Each epoch that was opened, with its first object.
    opened: BTreeMap<u64, u64>,
    violation: Option<String>,
}

type InFlight = Pin<Box<dyn Future<Output = Result<Settled, Error>> + Send>>;

/// The writer of an opening.
struct Writer {
    world: Arc<World>,
    requests: Requests,
    root: Root,
    committed: Seq,
    lineage: Lineage,
    /// The newest checkpoint that is committed, and up to which object it has all.
    checkpoint: Option<(FramePlace, Seq)>,
    /// The checkpoint that the newest root names has all up to this object.
    covered: Seq,
    /// Checkpoints that are under way.
    checkpoints: BTreeMap<u64, (FramePlace, Seq)>,
    under_way: BTreeMap<u64, Option<InFlight>>,
}

impl World {
    pub(super) fn new(store: Arc<MemoryStore>, random: Arc<Random>) -> Arc<Self> {
        let requests = Requests::new(store.clone(), Arc::new(TurnClock), "simulated");
        let requests = requests.with_patience(Patience::Endless);
        let opening = Opening { epoch: Epoch(0), incarnation: Incarnation([1; 16]) };
        let root = Root {
            volume: VolumeId([1; 16]),
            number: 0,
            state: State::Closed,
            author: opening,
            node: "n0".to_owned(),
            size: 100,
            committed: Committed::default(),
            last: LastOpening { opening, node: "n0".to_owned(), first: Seq(1), is_closed: true },
            previous: None,
            directory: None,
            durability: Durability::Local,
            codec: Codec::Plain,
            wrapped_key: None,
            owners: Vec::new(),
            snapshots: SnapshotNews::default(),
        };
        store.put(&keys::root(0), Some(root.encode().into()));
        Arc::new(Self { store, random, requests, truth: Mutex::default() })
    }

    fn truth(&self) -> MutexGuard<'_, Truth> {
        self.truth.lock().expect("no panic with the lock")
    }

    pub(super) fn violation(&self) -> Option<String> {
        self.truth().violation.clone()
    }

    pub(super) fn seen(&self) -> Seen {
        let truth = self.truth();
        Seen { openings: truth.opened.len(), acknowledged: truth.acknowledged.len() }
    }

    /// Waits for a while, often not at all, sometimes for long.
    async fn stall(&self, long: u64) {
        let turns = if self.random.percent(40) { self.random.below(long) } else { 0 };
        for _ in 0..turns {
            yield_now().await;
        }
    }

    /// Opens the volume until it has it, then writes.
    pub(super) async fn opener(self: Arc<Self>, number: u64) {
        let request = Request {
            node: format!("n{number}"),
            incarnation: Incarnation(self.random.bytes()),
            take_over: true,
            key: None,
        };
        while let Ok(Some(newest)) = find_any(&self.requests).await {
            self.stall(150).await;
            // No root is a tombstone here.
            match self.try_open(&request, &newest).await {
                Ok(Some(writer)) => return writer.run().await,
                Ok(None) if self.random.percent(30) => return,
                Ok(None) => {}
                // Without a rule, a store can look damaged, which is a violation of its own.
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    self.truth().violation.get_or_insert_with(|| error.to_string());
                    return;
                }
                Err(_) => return,
            }
        }
    }

    /// As [`crate::open::open`], with pauses.
    async fn try_open(
        self: &Arc<Self>,
        request: &Request,
        newest: &Root,
    ) -> Result<Option<Writer>, Error> {
        let requests = &self.requests;
        let Some(claim) = claim(requests, request, newest).await? else { return Ok(None) };
        self.stall(40).await;
        let fold = async {
            let mut fold = Fold::of_committed(requests, claim.root(), None).await?;
            self.stall(20).await;
            fold.take_tail(requests, &claim).await?;
            Ok(fold)
        };
        let fold = fold.await;
        let Some(fold) = unless_overtaken(requests, &claim, fold).await? else { return Ok(None) };
        self.stall(40).await;
        let adopted = Adopted::without_journal(claim.opening());
        let Some(root) = enter(requests, &claim, &fold, &adopted).await? else { return Ok(None) };
        Ok(Some(self.opened(root, &fold)))
    }

    /// An opening has its open root: what was acknowledged before must be in its prefix.
    fn opened(self: &Arc<Self>, root: Root, fold: &Fold) -> Writer {
        let mut truth = self.truth();
        let (epoch, first) = (root.author.epoch.0, root.last.first.0);
        for (&seq, &of) in &truth.acknowledged {
            if seq >= first && of < epoch {
                let why = format!("object {seq} of epoch {of} is cut off by epoch {epoch}");
                truth.violation.get_or_insert(why);
                break;
            }
        }
        truth.opened.insert(epoch, first);
        drop(truth);
        Writer {
            world: Arc::clone(self),
            requests: self.requests.clone(),
            committed: root.committed.seq,
            lineage: fold.lineage.with(root.reach()),
            checkpoint: fold.directory.map(|place| (place, fold.covered.seq)),
            covered: fold.covered.seq,
            checkpoints: BTreeMap::new(),
            root,
            under_way: BTreeMap::new(),
        }
    }

    /// An opening acknowledges an object: no later opening may begin below it.
    fn acknowledge(&self, seq: u64, epoch: u64) {
        let mut truth = self.truth();
        let later = truth.opened.range(epoch + 1..).find(|(_, first)| **first <= seq);
        let why = match (later, truth.acknowledged.get(&seq)) {
            (Some((later, first)), _) => Some(format!(
                "epoch {epoch} acknowledges object {seq}, and epoch {later} begins at {first}"
            )),
            (None, Some(&other)) if other != epoch => {
                Some(format!("epochs {other} and {epoch} both acknowledge object {seq}"))
            }
            _ => None,
        };
        truth.acknowledged.insert(seq, epoch);
        if let Some(why) = why {
            truth.violation.get_or_insert(why);
        }
    }
}

impl Writer {
    async fn run(mut self) {
        loop {
            let is_alive = match self.world.random.below(100) {
                0..60 => self.upload().await,
                60..72 => self.put_root(State::Open).await,
                72..90 => {
                    self.collect_garbage().await;
                    true
                }
                90..92 => {
                    if self.world.random.percent(30) {
                        return;
                    }
                    self.world.stall(200).await;
                    true
                }
                92 if self.under_way.values().all(Option::is_none) => {
                    self.put_root(State::Closed).await;
                    return;
                }
                _ => true,
            };
            if !is_alive {
                return;
            }
            yield_now().await;
        }
    }

    /// Goes on with one of the objects under way. Whether the volume is still this opening's.
    async fn upload(&mut self) -> bool {
        while self.under_way.len() < WINDOW {
            let seq = self.committed.0 + 1 + self.under_way.len() as u64;
            let create = self.create(Seq(seq));
            self.under_way.insert(seq, Some(create));
        }
        let unmade: Vec<u64> = self
            .under_way
            .iter()
            .filter(|(_, create)| create.is_some())
            .map(|(&at, _)| at)
            .collect();
        let chosen = unmade[self.world.random.below(unmade.len() as u64) as usize];
        let Some(Some(create)) = self.under_way.get_mut(&chosen) else { return true };
        match poll_fn(|cx| Poll::Ready(create.as_mut().poll(cx))).await {
            Poll::Pending => return true,
            Poll::Ready(Ok(Settled::Mine)) => {}
            Poll::Ready(_) => return false,
        }
        self.under_way.insert(chosen, None);
        while let Some(None) = self.under_way.get(&(self.committed.0 + 1)) {
            self.committed = self.committed.next();
            self.under_way.remove(&self.committed.0);
            self.world.acknowledge(self.committed.0, self.root.author.epoch.0);
            let checkpoint = self.checkpoints.remove(&self.committed.0);
            self.checkpoint = checkpoint.or(self.checkpoint);
        }
        true
    }

    /// The creation of an object of one write, or of a checkpoint of what is committed.
    fn create(&mut self, seq: Seq) -> InFlight {
        let Root { volume, previous, author, .. } = self.root;
        let reach = self.root.reach();
        let (incarnation, coding) = (author.incarnation, Coding::default());
        let author = Author { volume, reach, previous, incarnation, coding };
        let write = |seq: Seq| {
            let mut builder = ObjectBuilder::new(&author, seq, 1, 0);
            builder.zero(Lba(seq.0 % 100), 1);
            let Committed { lsn, .. } = committed(seq);
            builder.finish(lsn, lsn)
        };
        let body = match seq.0.is_multiple_of(CHECKPOINT_EVERY) {
            true => {
                let epochs = self.lineage.up_to(self.committed);
                let covered = committed(self.committed);
                let directory = Directory { covered, epochs, ..Directory::default() };
                let between = self.committed.0 + 1..seq.0;
                let heads: Vec<_> = between.map(|seq| write(Seq(seq)).head()).collect();
                let mut builder = ObjectBuilder::new(&author, seq, 1, 0);
                let place = builder.directory(&directory, &heads);
                // With the heads it has all that an opening needs of the objects before it.
                self.checkpoints.insert(seq.0, (place, Seq(seq.0 - 1)));
                let Committed { lsn, .. } = committed(seq);
                builder.finish(lsn.next(), lsn).body
            }
            false => write(seq).body,
        };
        let requests = self.requests.clone();
        Box::pin(async move {
            let key = keys::log(author.reach.epoch, seq);
            requests.create(&key, body).await
        })
    }

    async fn put_root(&mut self, state: State) -> bool {
        let mut root = self.root.clone();
        root.number += 1;
        root.state = state;
        root.committed = committed(self.committed);
        root.directory = self.checkpoint.map(|(place, _)| place);
        root.last.is_closed = state == State::Closed;
        let body = root.encode().into();
        let made = self.requests.create(&keys::root(root.number), body).await;
        self.root = root;
        let is_mine = made.is_ok_and(|made| made == Settled::Mine);
        if is_mine && let Some((_, covered)) = self.checkpoint {
            self.covered = covered;
        }
        is_mine
    }

    /// Deletes objects that the named checkpoint has, as if they were dead, and old roots.
    async fn collect_garbage(&self) {
        let covered = self.covered.0;
        for seq in covered.saturating_sub(6).max(1)..=covered {
            if let Some(epoch) = self.lineage.epoch_of(Seq(seq))
                && self.world.random.percent(60)
            {
                let _ = self.requests.delete(&keys::log(epoch, Seq(seq))).await;
            }
        }
        let oldest_kept = self.root.number.saturating_sub(ROOTS_KEPT);
        for key in self.world.store.keys() {
            if keys::root_number(&key).is_none_or(|number| number >= oldest_kept) {
                continue;
            }
            let root = self.world.store.object(&key).and_then(|body| Root::decode(&body).ok());
            if root.is_some_and(|root| !is_kept(&root)) {
                let _ = self.requests.delete(&key).await;
            }
        }
    }
}

/// The log up to an object: all but the checkpoints have a write each.
fn committed(seq: Seq) -> Committed {
    Committed { seq, lsn: Lsn(seq.0 - seq.0 / CHECKPOINT_EVERY) }
}

/// Whether a root is never deleted. Where openings do not claim, their first roots are their
/// claims.
fn is_kept(root: &Root) -> bool {
    let rules = rules::get();
    let is_claim = match rules.claims_first {
        true => root.state == State::Claimed,
        false => root.committed.seq.next() == root.last.first,
    };
    is_claim && rules.keeps_claims
}
