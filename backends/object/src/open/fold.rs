//! Folds the log: the committed objects, then the tail, which a fence ends.

use std::collections::BTreeSet;

use bytes::Bytes;
use sheave_core::{ErrorKind, Result};

use super::Claim;
use crate::format::{Author, Committed, Entry, Header, ObjectId, Reach, Root, Wrong, fence, keys};
use crate::ids::{Seq, VolumeId};
use crate::lineage::Lineage;
use crate::map::Map;
use crate::retry::{Requests, Settled};

/// What the first request for an object asks for: its header, and an index of usual length.
const HEAD_BYTES: u64 = 64 << 10;
/// Keys of a listing.
const LISTED_MAX: usize = 1000;

/// The log up to an object, folded.
#[derive(Debug)]
pub(crate) struct Fold {
    pub(super) volume: VolumeId,
    pub(super) map: Map,
    /// The epochs that have objects.
    pub(super) lineage: Lineage,
    pub(super) committed: Committed,
}

impl Fold {
    /// The objects up to the one that a root says is committed.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when one is missing or damaged, and those of the store.
    pub(crate) async fn of_committed(requests: &Requests, root: &Root) -> Result<Self> {
        let lineage = chain(requests, root).await?;
        let begin = Committed::default();
        let mut fold = Self { volume: root.volume, map: Map::default(), lineage, committed: begin };
        let runs: Vec<_> = fold.lineage.runs(root.committed.seq.next()).collect();
        for (epoch, seqs) in runs {
            let first = Seq(seqs.start);
            for seq in seqs {
                let id = ObjectId { epoch, seq: Seq(seq) };
                let object = read(requests, id).await?.ok_or_else(|| missing(requests, id))?;
                fold.take(requests, id, first, &object)?;
            }
        }
        if fold.committed != root.committed {
            let key = keys::root(root.number);
            let why = "it contradicts the log objects; the store has lost or mixed up objects";
            return Err(requests.error(ErrorKind::Corrupt, "open", &key, why));
        }
        Ok(fold)
    }

    /// A fold that has nothing to begin with, for a simulation that deletes what is committed.
    #[cfg(test)]
    pub(crate) fn of_root(root: &Root) -> Self {
        let has_objects = root.committed.seq >= root.last.first;
        let chain = has_objects.then(|| root.reach()).into_iter().chain(root.previous);
        Self {
            volume: root.volume,
            map: Map::default(),
            lineage: Lineage::of_chain(chain.collect()),
            committed: root.committed,
        }
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
        let listed = list_tail(requests, reach, self.committed.seq).await?;
        loop {
            let id = ObjectId { epoch: reach.epoch, seq: self.committed.seq.next() };
            // Only the creation of the fence proves that there is no object; a listing does not.
            let found = match listed.contains(&id.seq) {
                true => read(requests, id).await?.ok_or_else(|| missing(requests, id))?,
                false => match self.put_fence(requests, claim, id.seq).await? {
                    None => return Ok(()),
                    Some(found) => found,
                },
            };
            if found.entries == [Entry::Fence] {
                return self.check(requests, id, reach.first, &found.header);
            }
            if id.seq == reach.first {
                self.lineage = self.lineage.with(reach);
            }
            self.take(requests, id, reach.first, &found)?;
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

    /// Makes the fence. If there is an object of that number already, it is that.
    async fn put_fence(
        &self,
        requests: &Requests,
        claim: &Claim,
        seq: Seq,
    ) -> Result<Option<Object>> {
        let author = Author {
            volume: self.volume,
            reach: claim.root().reach(),
            previous: claim.root().previous,
            incarnation: claim.opening().incarnation,
        };
        let fence = fence(&author, seq, self.committed.lsn);
        let key = keys::log(author.reach.epoch, seq);
        match requests.create(&key, fence.body).await? {
            Settled::Mine => Ok(None),
            Settled::Theirs(begin) => parse(requests, fence.header.id, begin).await.map(Some),
        }
    }

    /// Takes the next object.
    fn take(
        &mut self,
        requests: &Requests,
        id: ObjectId,
        first: Seq,
        object: &Object,
    ) -> Result<()> {
        self.check(requests, id, first, &object.header)?;
        if object.entries.contains(&Entry::Fence) {
            let why = "it is a fence, where the root says that an object is; the store has lost it";
            return Err(corrupt(requests, id, why));
        }
        self.map.fold_object(id.seq, &object.entries);
        self.committed = Committed { seq: id.seq, lsn: object.header.lsn_last };
        Ok(())
    }

    /// Checks that an object is the next one, in an epoch with that first object.
    fn check(&self, requests: &Requests, id: ObjectId, first: Seq, header: &Header) -> Result<()> {
        let is_right = header.volume == self.volume
            && header.id == id
            && header.lsn_first == self.committed.lsn.next()
            && header.epoch_first == first;
        match is_right {
            true => Ok(()),
            false => Err(corrupt(requests, id, "it is not the object that belongs there")),
        }
    }
}

/// The epochs that have committed objects, by the header of the first object of each.
async fn chain(requests: &Requests, root: &Root) -> Result<Lineage> {
    let mut found = Vec::new();
    let mut next = match root.committed.seq >= root.last.first {
        true => Some(root.reach()),
        false => root.previous,
    };
    while let Some(reach) = next {
        let id = ObjectId { epoch: reach.epoch, seq: reach.first };
        let object = read(requests, id).await?.ok_or_else(|| missing(requests, id))?;
        let Header { volume, id: is, epoch_first, previous, .. } = object.header;
        if (volume, is, epoch_first) != (root.volume, id, reach.first) {
            return Err(corrupt(requests, id, "it is not the object that belongs there"));
        }
        found.push(reach);
        // The header has been checked: epochs and numbers become less, so this ends.
        next = previous;
    }
    if found.last().is_some_and(|oldest| oldest.first != Seq(1)) {
        let why = "the first objects of the volume are missing";
        return Err(requests.error(ErrorKind::Corrupt, "open", "", why));
    }
    Ok(Lineage::of_chain(found))
}

/// The numbers of the objects of an epoch above one, as far as a listing knows them.
async fn list_tail(requests: &Requests, reach: Reach, above: Seq) -> Result<BTreeSet<Seq>> {
    let prefix = keys::epoch(reach.epoch);
    let mut after = keys::log(reach.epoch, above);
    let mut found = BTreeSet::new();
    loop {
        let listed = requests.list(&prefix, &after, LISTED_MAX).await?;
        let is_all = listed.len() < LISTED_MAX;
        found
            .extend(listed.iter().filter_map(|listed| keys::log_place(&listed.key)).map(|at| at.1));
        match listed.into_iter().next_back() {
            Some(last) if !is_all => after = last.key,
            _ => return Ok(found),
        }
    }
}

/// Header and index of an object.
struct Object {
    header: Header,
    entries: Vec<Entry>,
}

async fn read(requests: &Requests, id: ObjectId) -> Result<Option<Object>> {
    let key = keys::log(id.epoch, id.seq);
    match requests.get(&key, 0..HEAD_BYTES).await? {
        None => Ok(None),
        Some(begin) => parse(requests, id, begin).await.map(Some),
    }
}

/// Reads an object, of which the begin is there.
async fn parse(requests: &Requests, id: ObjectId, begin: Bytes) -> Result<Object> {
    let wrong = |wrong: Wrong| match wrong {
        Wrong::Damaged(why) => corrupt(requests, id, why),
        Wrong::Newer(_) => {
            let key = keys::log(id.epoch, id.seq);
            requests.error(ErrorKind::Unsupported, "open", &key, &wrong.to_string())
        }
    };
    let header = Header::decode(&begin).map_err(wrong)?;
    let index = crate::format::HEADER_BYTES..header.index_end();
    let entries = match begin.get(index.clone()) {
        Some(index) => header.decode_index(index),
        None => {
            let key = keys::log(id.epoch, id.seq);
            let index = requests.get(&key, index.start as u64..index.end as u64).await?;
            header.decode_index(&index.ok_or_else(|| missing(requests, id))?)
        }
    };
    Ok(Object { header, entries: entries.map_err(wrong)? })
}

fn missing(requests: &Requests, id: ObjectId) -> sheave_core::Error {
    corrupt(requests, id, "the object is missing; something else has deleted it")
}

fn corrupt(requests: &Requests, id: ObjectId, why: &str) -> sheave_core::Error {
    requests.error(ErrorKind::Corrupt, "open", &keys::log(id.epoch, id.seq), why)
}
