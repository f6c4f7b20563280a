//! Compares what a checkpoint counts with what its map has.

use std::collections::BTreeMap;
use std::sync::Arc;

use sheave_core::Result;

use super::READS_MAX;
use super::objects::Pass;
use crate::fetch::Fetcher;
use crate::format::{Counted, Directory, LeafRef, Root, keys};
use crate::gc::each_frame;
use crate::ids::Seq;
use crate::map::Leaf;
use crate::open::directory_of;
use crate::together::{boxed, each};

impl Pass<'_> {
    /// Counts anew what the checkpoint that a root names has counted. An object of which it counts
    /// too little would be deleted while it is needed.
    ///
    /// # Errors
    /// Those of the store.
    pub(super) async fn check_counts(&mut self, root: &Root, fetcher: &Fetcher) -> Result<()> {
        let own_from = root.owners.last().map_or(Seq(1), |owner| owner.end);
        let Some(place) = root.directory.filter(|place| place.seq >= own_from) else {
            return Ok(());
        };
        let id = self.object_of(place.seq);
        let key = keys::log(id.epoch, id.seq);
        let directory = match directory_of(self.requests, root, self.key.as_ref(), id).await {
            Ok(directory) => directory,
            Err(error) => return self.faults.add_error(self.requests, &key, error),
        };
        let Some(mut by_leaves) = count_leaves(&directory, fetcher).await? else {
            // A leaf that is needed is damaged, which is a fault by itself.
            return Ok(());
        };
        let mut by_runs = BTreeMap::<Seq, u64>::new();
        each_frame(directory.runs.iter().copied(), |seq, bytes| {
            *by_runs.entry(seq).or_default() += bytes;
        });
        for object in &directory.objects {
            let of = |bytes: &mut BTreeMap<Seq, u64>| bytes.remove(&object.seq).unwrap_or(0);
            let found = (of(&mut by_leaves), of(&mut by_runs));
            let has = self.listed.get(&self.object_of(object.seq)).copied();
            if let Some(why) = contradiction(object, found, has) {
                let why = format!("its counts are wrong: {why} object {}", object.seq);
                self.faults.add(&key, why);
            }
        }
        // What is left is of objects that it does not count.
        let left = by_leaves.into_keys().chain(by_runs.into_keys());
        for seq in left.filter(|seq| *seq >= own_from) {
            self.faults.add(&key, format!("its counts lack object {seq}"));
        }
        Ok(())
    }
}

/// What is wrong with the count of an object, of which leaves and runs need so many bytes, and
/// which has that length.
fn contradiction(
    object: &Counted,
    (by_leaves, by_runs): (u64, u64),
    has: Option<u64>,
) -> Option<&'static str> {
    if by_leaves != u64::from(object.by_leaves) {
        return Some("leaves need more or less of");
    }
    if by_runs > 0 && object.death.is_some() {
        return Some("it needs");
    }
    let is_other = has.is_some_and(|has| has != u64::from(object.bytes));
    (is_other && object.death.is_none()).then_some("it has another length of")
}

/// How many bytes of each object the leaves of a directory need; `None` if one cannot be read.
async fn count_leaves(
    directory: &Directory,
    fetcher: &Fetcher,
) -> Result<Option<BTreeMap<Seq, u64>>> {
    let mut leaves = directory.leaves.iter().chain(&directory.dropped);
    let next = || {
        let leaf = *leaves.next()?;
        Some(boxed(async move { (leaf, fetcher.load(leaf).await) }))
    };
    let (mut bytes_of, mut is_whole) = (BTreeMap::<Seq, u64>::new(), true);
    let take = |(leaf, content): (LeafRef, Result<Arc<Leaf>>)| {
        is_whole &= content.is_ok();
        let runs = content.iter().flat_map(|content| content.within(LeafRef::span_of(leaf.number)));
        each_frame(runs, |seq, bytes| *bytes_of.entry(seq).or_default() += bytes);
        Ok(())
    };
    each(READS_MAX, next, take).await?;
    Ok(is_whole.then_some(bytes_of))
}
