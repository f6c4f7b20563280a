//! Folds the log: the checkpoint that a root names, the committed objects behind it, then the tail,
//! which a fence ends.

use std::collections::BTreeMap;
use std::ops::Range;

use sheave_core::{ErrorKind, Result};

use super::Claim;
use super::read::{corrupt, missing, parse, read, read_all, read_directory};
use crate::checkpoint::{INTERVAL, tail_max};
use crate::cipher::VolumeKey;
use crate::format::{
    Author, CheckpointPlace, Coding, Committed, Directory, Entry, FramePlace, Head, Header,
    ObjectId, Reach, Root, Snapshot, fence, keys,
};
use crate::gc::Counts;
use crate::head;
use crate::ids::{Lsn, Seq, VolumeId};
use crate::lineage::Lineage;
use crate::map::Map;
use crate::retry::{Requests, Settled};
use crate::sources::Sources;
use crate::upload::WINDOW;

/// Objects that are read at the same time. A volume whose last opening made checkpoints has no more
/// of them to read.
const READS: u64 = tail_max(INTERVAL);
const MIXED_UP: &str = "it is not the object that belongs there";

/// The log up to an object, folded.
#[derive(Debug)]
pub(crate) struct Fold {
    pub(super) volume: VolumeId,
    pub(crate) map: Map,
    /// The epochs that have objects.
    pub(crate) lineage: Lineage,
    pub(crate) committed: Committed,
    /// The newest checkpoint, and what it has.
    pub(crate) directory: Option<FramePlace>,
    pub(crate) covered: Committed,
    /// How much of each object the checkpoint refers to that the root names, with the objects
    /// behind it.
    pub(crate) counts: Counts,
    /// The snapshots of the volume.
    pub(crate) snapshots: Vec<Snapshot>,
    /// The last write of the checkpoint that the root names, and of each object behind it.
    lasts: BTreeMap<Seq, Lsn>,
    /// Objects that have been read and not been folded.
    found: BTreeMap<Seq, Head>,
}

impl Fold {
    /// The objects up to the one that a root says is committed, of a volume with that key.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when one is missing or damaged, and those of the store.
    pub(crate) async fn of_committed(
        requests: &Requests,
        root: &Root,
        key: Option<&VolumeKey>,
    ) -> Result<Self> {
        let mut fold = Self::of_checkpoint(requests, root, key).await?;
        let end = root.committed.seq.next();
        while fold.committed.seq < root.committed.seq {
            let from = fold.committed.seq.next();
            let some = from.0..end.0.min(from.0 + READS);
            fold.read_ahead(requests, some.clone()).await?;
            for seq in some.map(Seq) {
                match fold.found.remove(&seq) {
                    Some(object) => {
                        let reach = fold.reach_of(seq);
                        let id = ObjectId { epoch: reach.epoch, seq };
                        fold.take(requests, id, reach.first, &object)?;
                    }
                    // The checkpoint that the root names. It has no writes.
                    None => {
                        fold.committed.seq = seq;
                        fold.lasts.insert(seq, fold.committed.lsn);
                    }
                }
            }
        }
        if fold.committed != root.committed {
            let key = keys::root(root.number);
            let why = "it contradicts the log objects; the store has lost or mixed up objects";
            return Err(requests.error(ErrorKind::Corrupt, "open", &key, why));
        }
        Ok(fold)
    }

    /// The map of a snapshot, and the epochs of its objects.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when its directory is missing or damaged, and those of the store.
    pub(crate) async fn of_snapshot(
        requests: &Requests,
        root: &Root,
        snapshot: &Snapshot,
        key: Option<&VolumeKey>,
    ) -> Result<(Map, Lineage)> {
        let read = Self::directory_of_snapshot(requests, root, snapshot, key).await;
        read.map(|(directory, lineage)| (Map::of_directory(directory), lineage))
    }

    /// As [`Fold::of_snapshot`], as it is stored.
    ///
    /// # Errors
    /// As there.
    pub(crate) async fn directory_of_snapshot(
        requests: &Requests,
        root: &Root,
        snapshot: &Snapshot,
        key: Option<&VolumeKey>,
    ) -> Result<(Directory, Lineage)> {
        let Some(CheckpointPlace { directory: place, reach }) = snapshot.checkpoint else {
            return Ok(<_>::default());
        };
        let id = ObjectId { epoch: reach.epoch, seq: place.seq };
        let sources = Sources::new(requests, root, key.cloned())?;
        let (mut directory, _) = read_directory(&sources, id, place).await?;
        let epochs = std::mem::take(&mut directory.epochs);
        let epochs = join_epochs(epochs, reach, directory.covered.seq, vec![reach])
            .ok_or_else(|| corrupt(requests, id, "its directory contradicts its snapshot"))?;
        Ok((directory, Lineage::of_chain(epochs)))
    }

    /// The checkpoint that a root names, and the epochs behind it.
    ///
    /// # Errors
    /// As for [`Fold::of_committed`].
    pub(crate) async fn of_checkpoint(
        requests: &Requests,
        root: &Root,
        key: Option<&VolumeKey>,
    ) -> Result<Self> {
        let Chain { reaches, mut found } = chain(requests, root).await?;
        let snapshots_of = |of_checkpoint| {
            let why = "its snapshots contradict those of its checkpoint";
            let key = keys::root(root.number);
            let wrong = || requests.error(ErrorKind::Corrupt, "open", &key, why);
            root.snapshots.with(of_checkpoint).ok_or_else(wrong)
        };
        let own_from = root.owners.last().map_or(Seq(1), |owner| owner.end);
        let Some(place) = root.directory else {
            return Ok(Self {
                volume: root.volume,
                map: Map::default(),
                lineage: Lineage::of_chain(reaches),
                committed: Committed::default(),
                directory: None,
                covered: Committed::default(),
                lasts: BTreeMap::new(),
                counts: Counts::new(own_from),
                snapshots: snapshots_of(Vec::new())?,
                found,
            });
        };
        let reach = reaches.last().copied().filter(|reach| reach.first <= place.seq);
        let Some(reach) = reach else {
            let why = "it names a checkpoint before the first object";
            return Err(requests.error(ErrorKind::Corrupt, "open", &keys::root(root.number), why));
        };
        let id = ObjectId { epoch: reach.epoch, seq: place.seq };
        let sources = Sources::new(requests, root, key.cloned())?;
        let (mut directory, heads) = read_directory(&sources, id, place).await?;
        let mut covered = directory.covered;
        let epochs = std::mem::take(&mut directory.epochs);
        let epochs = join_epochs(epochs, reach, covered.seq, reaches)
            .ok_or_else(|| corrupt(requests, id, "its directory contradicts its root"))?;
        let mut snapshots = std::mem::take(&mut directory.snapshots);
        // A clone without a checkpoint of its own. What its ancestor has committed behind the
        // snapshot is none of its own, and neither are the ancestor's snapshots.
        if let Some(owner) = root.owners.last().filter(|owner| place.seq < owner.end) {
            covered.seq = Seq(owner.end.0 - 1);
            snapshots.clear();
        } else {
            found.extend(heads.into_iter().map(|head| (head.header.id.seq, head)));
        }
        let snapshots = snapshots_of(snapshots)?;
        let counts = Counts::of_directory(own_from, &directory, place);
        Ok(Self {
            volume: root.volume,
            map: Map::of_directory(directory),
            lineage: Lineage::of_chain(epochs),
            committed: covered,
            directory: Some(place),
            covered,
            lasts: BTreeMap::from([(covered.seq, covered.lsn)]),
            counts,
            snapshots,
            found,
        })
    }

    /// Goes on with what the last opening has committed behind that, and ends its epoch. The claim
    /// has frozen that part of the log, but for objects in flight: the fence decides which of them
    /// count, in one step with the last opening's own creation of the object of that number.
    ///
    /// # Errors
    /// As for [`Fold::of_committed`].
    pub(crate) async fn take_tail(&mut self, requests: &Requests, claim: &Claim) -> Result<()> {
        let last = &claim.root().last;
        if last.is_closed {
            return Ok(());
        }
        let reach = claim.root().reach();
        // The last opening has begun no object above this one, unless it made no checkpoints.
        let checkpoint = self.directory.map_or(0, |directory| directory.seq.0);
        let mut bound = checkpoint + READS;
        let mut probed = self.committed.seq.next().0;
        loop {
            let seq = self.committed.seq.next();
            if seq.0 == probed && seq.0 <= bound {
                probed = (bound + 1).min(seq.0 + WINDOW as u64);
                self.probe(requests, reach, seq.0..probed).await?;
            }
            // Only the creation of the fence proves that there is no object.
            let found = match self.found.remove(&seq) {
                Some(found) => found,
                None => match self.put_fence(requests, claim, seq).await? {
                    None => break,
                    Some(found) => found,
                },
            };
            let id = ObjectId { epoch: reach.epoch, seq };
            if found.entries == [Entry::Fence] {
                self.check(requests, id, reach.first, &found.header)?;
                break;
            }
            self.take(requests, id, reach.first, &found)?;
            if seq == reach.first {
                self.lineage = self.lineage.with(reach);
            }
            if seq.0 > bound {
                (probed, bound) = (seq.0 + 1, seq.0 + WINDOW as u64);
            }
        }
        self.found.clear();
        Ok(())
    }

    /// The state that a root says, which names the newest checkpoint.
    pub(crate) fn head(&self, root: Root) -> head::Head {
        let reach = self.directory.and_then(|directory| self.lineage.reach_of(directory.seq));
        head::Head { root, covered: self.covered, reach, snapshots: self.snapshots.clone() }
    }

    /// Goes on with what the last opening of a volume has made behind that, which may be open: no
    /// fence is made. Objects that are made meanwhile may be in it or not.
    ///
    /// # Errors
    /// As for [`Fold::of_committed`].
    pub(crate) async fn follow_tail(&mut self, requests: &Requests, root: &Root) -> Result<()> {
        if root.last.is_closed {
            return Ok(());
        }
        let reach = root.reach();
        loop {
            let seq = self.committed.seq.next();
            if !self.found.contains_key(&seq) {
                self.probe(requests, reach, seq.0..seq.0 + WINDOW as u64).await?;
            }
            let Some(found) = self.found.remove(&seq) else { return Ok(()) };
            let id = ObjectId { epoch: reach.epoch, seq };
            if found.entries == [Entry::Fence] {
                return self.check(requests, id, reach.first, &found.header);
            }
            self.take(requests, id, reach.first, &found)?;
            if seq == reach.first {
                self.lineage = self.lineage.with(reach);
            }
        }
    }

    /// What is committed.
    pub(crate) fn committed(&self) -> Committed {
        self.committed
    }

    /// The newest epoch that has objects.
    pub(crate) fn newest_reach(&self) -> Option<Reach> {
        self.lineage.newest()
    }

    /// Reads objects that are committed.
    async fn read_ahead(&mut self, requests: &Requests, seqs: Range<u64>) -> Result<()> {
        let directory = self.directory.map(|directory| directory.seq);
        let is_wanted = |seq: &Seq| !self.found.contains_key(seq) && directory != Some(*seq);
        let ids = seqs.map(Seq).filter(is_wanted);
        let id = |seq| ObjectId { epoch: self.reach_of(seq).epoch, seq };
        let ids: Vec<_> = ids.map(id).collect();
        let outcomes = read_all(requests, &ids).await;
        for (id, outcome) in ids.into_iter().zip(outcomes) {
            self.found.insert(id.seq, outcome?.ok_or_else(|| missing(requests, id))?);
        }
        Ok(())
    }

    /// Reads objects that may exist, up to the first one that does not.
    async fn probe(&mut self, requests: &Requests, reach: Reach, seqs: Range<u64>) -> Result<()> {
        let id = |seq| ObjectId { epoch: reach.epoch, seq: Seq(seq) };
        let ids: Vec<_> = seqs.map(id).collect();
        for (id, outcome) in ids.iter().zip(read_all(requests, &ids).await) {
            let Some(object) = outcome? else { break };
            self.found.insert(id.seq, object);
        }
        Ok(())
    }

    /// The epoch of a committed object.
    fn reach_of(&self, seq: Seq) -> Reach {
        self.lineage.reach_of(seq).expect("the epochs of all committed objects")
    }

    /// Makes the fence. If there is an object of that number already, it is that.
    async fn put_fence(
        &self,
        requests: &Requests,
        claim: &Claim,
        seq: Seq,
    ) -> Result<Option<Head>> {
        let author = Author {
            volume: self.volume,
            reach: claim.root().reach(),
            previous: claim.root().previous,
            incarnation: claim.opening().incarnation,
            // It has no frames.
            coding: Coding::default(),
        };
        let fence = fence(&author, seq, self.committed.lsn);
        let key = keys::log(author.reach.epoch, seq);
        match requests.create(&key, fence.body).await? {
            Settled::Mine => Ok(None),
            Settled::Theirs(begin) => parse(requests, fence.header.id, begin).await.map(Some),
        }
    }

    /// Takes the next object, of an epoch with that first one.
    fn take(&mut self, requests: &Requests, id: ObjectId, first: Seq, object: &Head) -> Result<()> {
        self.check(requests, id, first, &object.header)?;
        match object.entries[..] {
            [Entry::Fence] => {
                let why =
                    "it is a fence, where the root says that an object is; the store has lost it";
                return Err(corrupt(requests, id, why));
            }
            // It may be newer than the one that the root names.
            [.., Entry::Directory { covered, frame: at, bytes }] => {
                let lsn = self.lasts.get(&covered).copied().unwrap_or_default();
                if covered < self.covered.seq || covered.next() < first {
                    return Err(corrupt(requests, id, MIXED_UP));
                }
                self.directory = Some(FramePlace { seq: id.seq, at, bytes });
                self.covered = Committed { seq: covered, lsn };
            }
            _ => self.map.fold_object(id.seq, &object.entries),
        }
        self.committed = Committed { seq: id.seq, lsn: object.header.lsn_last };
        self.lasts.insert(id.seq, object.header.lsn_last);
        self.counts.add(id.seq, u64::from(object.header.bytes));
        Ok(())
    }

    /// Checks that an object is the next one, in an epoch with that first object.
    fn check(&self, requests: &Requests, id: ObjectId, first: Seq, header: &Header) -> Result<()> {
        let is_right = header.volume == self.volume
            && header.id == id
            && header.lsn_first == self.committed.lsn.next()
            && header.epoch_first == first
            && header.previous == self.lineage.before(id.epoch);
        match is_right {
            true => Ok(()),
            false => Err(corrupt(requests, id, MIXED_UP)),
        }
    }
}

/// The epochs that a directory has, with that of its object and the later ones, from the last one
/// on; `None` if they contradict one another. What a checkpoint lacks is of its own epoch.
fn join_epochs(
    mut epochs: Vec<Reach>,
    reach: Reach,
    covered: Seq,
    later: Vec<Reach>,
) -> Option<Vec<Reach>> {
    let is_in = epochs.last().is_some_and(|last| *last == reach);
    let is_before =
        covered.next() == reach.first && epochs.last().is_none_or(|last| last.epoch < reach.epoch);
    if !is_in && !is_before {
        return None;
    }
    epochs.truncate(epochs.len() - usize::from(is_in));
    epochs.extend(later.into_iter().rev());
    epochs.reverse();
    Some(epochs)
}

/// The epochs behind the checkpoint that a root names, and its own, from the last one on.
struct Chain {
    reaches: Vec<Reach>,
    /// The first objects of those behind it.
    found: BTreeMap<Seq, Head>,
}

/// The epochs that have committed objects, by the header of the first object of each.
async fn chain(requests: &Requests, root: &Root) -> Result<Chain> {
    let (mut reaches, mut found) = (Vec::new(), BTreeMap::new());
    let mut next = match root.committed.seq >= root.last.first {
        true => Some(root.reach()),
        false => root.previous,
    };
    let checkpoint = root.directory.map_or(Seq(0), |directory| directory.seq);
    while let Some(reach) = next {
        reaches.push(reach);
        if reach.first <= checkpoint {
            return Ok(Chain { reaches, found });
        }
        let id = ObjectId { epoch: reach.epoch, seq: reach.first };
        let object = read(requests, id).await?.ok_or_else(|| missing(requests, id))?;
        let Header { volume, id: is, epoch_first, previous, .. } = object.header;
        if (volume, is, epoch_first) != (root.volume, id, reach.first) {
            return Err(corrupt(requests, id, MIXED_UP));
        }
        found.insert(reach.first, object);
        // The header has been checked: epochs and numbers become less, so this ends.
        next = previous;
    }
    if reaches.last().is_some_and(|oldest| oldest.first != Seq(1)) {
        let why = "the first objects of the volume are missing";
        return Err(requests.error(ErrorKind::Corrupt, "open", "", why));
    }
    Ok(Chain { reaches, found })
}
