//! One pass over the objects of a volume.

use std::collections::{BTreeMap, BTreeSet};

use sheave_core::{ErrorKind, Result};

use super::faults::Faults;
use super::frames::Frames;
use super::{LISTED_MAX, MISSING, Options, READS_MAX, Report, Sum, roots};
use crate::cipher::VolumeKey;
use crate::fetch::Fetcher;
use crate::format::{Entry, Head, ObjectId, Root, State, keys};
use crate::ids::{BLOCK_BYTES, Blocks, Lsn, Seq};
use crate::lineage::Lineage;
use crate::open::{Fold, read};
use crate::retry::Requests;
use crate::sources::Sources;
use crate::together::{boxed, each};

/// A check by one root.
pub(super) struct Pass<'a> {
    pub(super) requests: &'a Requests,
    /// Its key, if it is encrypted.
    pub(super) key: Option<VolumeKey>,
    options: &'a Options<'a>,
    pub(super) frames: Frames<'a>,
    pub(super) faults: Faults,
    /// The log objects that there are, and their bytes.
    pub(super) listed: BTreeMap<ObjectId, u64>,
    /// Those that the volume needs.
    pub(super) needed: BTreeSet<ObjectId>,
    pub(super) live_blocks: Blocks,
    /// Its first object that is not an ancestor's.
    own_from: Seq,
    lineage: Lineage,
    fences: BTreeSet<ObjectId>,
    dead: Sum,
    late: BTreeMap<ObjectId, u64>,
}

/// What a log object is, by its name.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// It is committed.
    Committed,
    /// It came after another opening had begun in its place.
    Late,
    /// The last opening or a restoration is making it, or did not end that.
    UnderWay,
    /// No root can have led to it.
    Foreign,
}

impl<'a> Pass<'a> {
    pub(super) fn new(
        requests: &'a Requests,
        options: &'a Options<'a>,
        suspects: Option<&'a BTreeSet<Seq>>,
    ) -> Self {
        Self {
            requests,
            key: None,
            options,
            frames: Frames::new(requests, options, suspects),
            faults: Faults::default(),
            listed: BTreeMap::new(),
            needed: BTreeSet::new(),
            live_blocks: 0,
            own_from: Seq(1),
            lineage: Lineage::default(),
            fences: BTreeSet::new(),
            dead: Sum::default(),
            late: BTreeMap::new(),
        }
    }

    /// Checks the volume as a root has it. `false`: its map is lost, so that it is not known what
    /// the volume needs.
    ///
    /// # Errors
    /// Those of the store.
    pub(super) async fn run(&mut self, root: &Root) -> Result<bool> {
        let fences = roots::check_roots(self.requests, root, &mut self.faults).await?;
        self.fences.extend(fences);
        let fold = match self.fold(root).await {
            Ok(fold) => fold,
            Err(error) => {
                self.faults.add_error(self.requests, &keys::root(root.number), error)?;
                return Ok(false);
            }
        };
        self.lineage = fold.lineage.clone();
        self.own_from = root.owners.last().map_or(Seq(1), |owner| owner.end);
        self.list().await?;
        let tail = (fold.covered.seq.0 + 1..=fold.committed().seq.0).map(Seq);
        for seq in fold.directory.map(|place| place.seq).into_iter().chain(tail) {
            self.needed.insert(self.object_of(seq));
        }
        let fetcher = self.fetcher(root, self.lineage.clone())?;
        self.walk(&fold.map, root.size, &fetcher).await?;
        self.check_counts(root, &fetcher).await?;
        self.check_headers(root).await?;
        self.check_fences(root).await?;
        self.classify(root, fold.committed().seq);
        Ok(true)
    }

    async fn fold(&self, root: &Root) -> Result<Fold> {
        let mut fold = Fold::of_committed(self.requests, root, self.key.as_ref()).await?;
        fold.follow_tail(self.requests, root).await?;
        Ok(fold)
    }

    fn fetcher(&self, root: &Root, lineage: Lineage) -> Result<Fetcher> {
        let sources = Sources::new(self.requests, root, self.key.clone())?;
        Ok(Fetcher::of_command(&sources, lineage))
    }

    /// Whether an object is the volume's own, and not one of an ancestor.
    pub(super) fn is_own(&self, object: ObjectId) -> bool {
        object.seq >= self.own_from
    }

    /// The name of an object that is committed.
    pub(super) fn object_of(&self, seq: Seq) -> ObjectId {
        let epoch = self.lineage.epoch_of(seq).expect("the epochs of all committed objects");
        ObjectId { epoch, seq }
    }

    /// Lists the log objects.
    async fn list(&mut self) -> Result<()> {
        let mut after = String::new();
        loop {
            let listed = self.requests.list(keys::LOGS, &after, LISTED_MAX).await?;
            let Some(last) = listed.last() else { return Ok(()) };
            after.clone_from(&last.key);
            for object in listed {
                if let Some((epoch, seq)) = keys::log_place(&object.key) {
                    self.listed.insert(ObjectId { epoch, seq }, object.bytes);
                    self.frames.bytes_max += object.bytes;
                }
            }
        }
    }

    /// Reads the headers and indexes of the objects that are needed.
    async fn check_headers(&mut self, root: &Root) -> Result<()> {
        let mut lsns = BTreeMap::<Seq, (Lsn, Lsn)>::new();
        let mut faults = std::mem::take(&mut self.faults);
        let is_there = |id: &&ObjectId| self.listed.contains_key(id);
        for id in self.needed.iter().filter(|id| self.is_own(**id) && !is_there(id)) {
            faults.add(&keys::log(id.epoch, id.seq), MISSING);
        }
        let mut ids = self.needed.iter().filter(is_there);
        let requests = self.requests;
        let next = || {
            let id = *ids.next()?;
            Some(boxed(async move { (id, read(requests, id).await) }))
        };
        each(READS_MAX, next, |(id, outcome): (ObjectId, Result<Option<Head>>)| {
            let key = keys::log(id.epoch, id.seq);
            let object = match outcome {
                Ok(Some(object)) => object,
                Ok(None) => {
                    faults.add(&key, MISSING);
                    return Ok(());
                }
                Err(error) => return faults.add_error(requests, &key, error),
            };
            if let Some(why) = self.contradiction(root, id, &object) {
                faults.add(&key, why);
            }
            lsns.insert(id.seq, (object.header.lsn_first, object.header.lsn_last));
            Ok(())
        })
        .await?;
        let mut before: Option<(Seq, Lsn)> = None;
        for (seq, (first, last)) in lsns {
            let is_right = before.is_none_or(|(of, lsn)| match of.next() == seq {
                true => first == lsn.next(),
                false => first > lsn,
            });
            if !is_right {
                let id = self.object_of(seq);
                let why = "its writes do not follow those of the object before it";
                faults.add(&keys::log(id.epoch, id.seq), why);
            }
            before = Some((seq, last));
        }
        self.faults = faults;
        Ok(())
    }

    /// What the header of an object says against its place.
    fn contradiction(&self, root: &Root, id: ObjectId, object: &Head) -> Option<String> {
        let header = &object.header;
        let reach = self.lineage.reach_of(id.seq);
        let is_right = header.volume == root.volume
            && header.id == id
            && reach.is_some_and(|reach| reach.first == header.epoch_first)
            && header.previous == self.lineage.before(id.epoch)
            && object.entries != [Entry::Fence];
        if !is_right {
            return Some("it is not the object that belongs there".to_owned());
        }
        let has = self.listed.get(&id).copied().unwrap_or_default();
        let wanted = u64::from(header.bytes);
        (has != wanted).then(|| format!("it has {has} bytes instead of {wanted}"))
    }

    /// Checks that the fences are there.
    async fn check_fences(&mut self, root: &Root) -> Result<()> {
        let mut ids = self.fences.iter();
        let (requests, faults) = (self.requests, &mut self.faults);
        let next = || {
            let id = *ids.next()?;
            Some(boxed(async move { (id, read(requests, id).await) }))
        };
        each(READS_MAX, next, |(id, outcome): (ObjectId, Result<Option<Head>>)| {
            let key = keys::log(id.epoch, id.seq);
            let why = match outcome {
                Err(error) => return faults.add_error(requests, &key, error),
                Ok(None) => "the fence is missing; something else has deleted it",
                Ok(Some(Head { header, entries })) => {
                    let is_it = header.volume == root.volume && header.id == id;
                    if is_it && entries == [Entry::Fence] {
                        return Ok(());
                    }
                    "it is not the fence that belongs there"
                }
            };
            faults.add(&key, why);
            Ok(())
        })
        .await
    }

    /// Tells what is not needed.
    fn classify(&mut self, root: &Root, committed: Seq) {
        for (&id, &bytes) in &self.listed {
            match kind_of(root, &self.lineage, committed, id) {
                Kind::Committed if self.needed.contains(&id) => {}
                Kind::Committed => self.dead.add(bytes),
                Kind::Late if self.fences.contains(&id) => {}
                Kind::Late => drop(self.late.insert(id, bytes)),
                Kind::UnderWay => {}
                Kind::Foreign => {
                    let why = "no root leads to it; the store has lost newer roots";
                    self.faults.add(&keys::log(id.epoch, id.seq), why);
                }
            }
        }
    }

    /// Checks each object by itself, since the map that says what is needed is lost; without a
    /// root, only headers and indexes.
    ///
    /// # Errors
    /// Those of the store.
    pub(super) async fn check_alone(&mut self, root: Option<&Root>) -> Result<()> {
        self.listed.clear();
        self.list().await?;
        let ids: Vec<_> = self.listed.keys().copied().collect();
        for id in ids {
            let key = keys::log(id.epoch, id.seq);
            let object = match read(self.requests, id).await {
                Ok(Some(object)) => object,
                Ok(None) => continue,
                Err(error) => {
                    self.faults.add_error(self.requests, &key, error)?;
                    continue;
                }
            };
            let volume = object.header.volume;
            if object.header.id != id || root.is_some_and(|root| root.volume != volume) {
                self.faults.add(&key, "it is not the object that belongs there");
                continue;
            }
            // Whether they are encrypted is not known without a root.
            let Some(root) = root else { continue };
            let lineage = Lineage::default().with(object.header.reach());
            let fetcher = self.fetcher(root, lineage)?;
            for placed in object.entries.iter().filter_map(|entry| entry.placed(id.seq)) {
                if let Some(part) = fetcher.part_of(placed.place, placed.blocks) {
                    self.frames.take(&fetcher, part, placed.lba, &mut self.faults).await?;
                }
            }
            self.frames.verify(&fetcher, &mut self.faults).await?;
        }
        Ok(())
    }

    /// The report. What came too late is removed if that is asked for and nothing is wrong: roots
    /// that are missing may have known better.
    ///
    /// # Errors
    /// Those of the store.
    pub(super) async fn finish(self, root: Option<Root>) -> Result<Report> {
        let mut removed = 0;
        if self.options.repairs && self.faults.is_empty() {
            for id in self.late.keys() {
                removed += u64::from(self.remove_late(*id).await?);
            }
        }
        let sum = |objects: &mut dyn Iterator<Item = u64>| {
            let mut sum = Sum::default();
            objects.for_each(|bytes| sum.add(bytes));
            sum
        };
        let needed = self.needed.iter().filter_map(|id| self.listed.get(id).copied());
        Ok(Report {
            root,
            has_read_data: self.options.reads_data,
            read_bytes: self.frames.read_bytes,
            live_bytes: self.live_blocks * BLOCK_BYTES,
            needed: sum(&mut { needed }),
            dead: self.dead,
            late: sum(&mut self.late.values().copied()),
            removed,
            faults: self.faults.into_vec(),
        })
    }

    /// Removes an object that came too late. A fence stays, also one that no root speaks of.
    async fn remove_late(&self, id: ObjectId) -> Result<bool> {
        let key = keys::log(id.epoch, id.seq);
        match read(self.requests, id).await {
            Ok(None) => Ok(false),
            Ok(Some(object)) if object.entries == [Entry::Fence] => Ok(false),
            // Without its index it is not known to be no fence.
            Err(error) if error.kind() == ErrorKind::Corrupt => Ok(false),
            Err(error) => Err(error),
            Ok(Some(_)) => self.requests.delete(&key).await.map(|()| true),
        }
    }
}

fn kind_of(root: &Root, lineage: &Lineage, committed: Seq, id: ObjectId) -> Kind {
    let last = root.last.opening.epoch;
    let is_in_log = lineage.epoch_of(id.seq) == Some(id.epoch);
    if is_in_log && id.seq <= committed {
        Kind::Committed
    } else if id.epoch < last {
        Kind::Late
    } else if is_of_restoration(root, committed, id)
        || (id.epoch == last && id.seq > committed && !root.last.is_closed)
    {
        Kind::UnderWay
    } else {
        Kind::Foreign
    }
}

/// Whether a claimant has made the object to restore a snapshot. An opening makes no object before
/// its root, but a restoration does.
fn is_of_restoration(root: &Root, committed: Seq, id: ObjectId) -> bool {
    root.state == State::Claimed
        && root.last.is_closed
        && id == ObjectId { epoch: root.author.epoch, seq: committed.next() }
}
