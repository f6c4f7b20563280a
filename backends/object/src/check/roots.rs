//! The roots of a volume: all that there are, and what they say of one another.

use std::collections::BTreeMap;

use sheave_core::Result;

use super::faults::Faults;
use super::{LISTED_MAX, READS_MAX};
use crate::format::{ObjectId, ROOT_BYTES_MAX, Root, State, Wrong, keys};
use crate::ids::Epoch;
use crate::retry::Requests;
use crate::together::{boxed, each};

/// Reads the roots up to the newest one, and checks them. Returns the fences that there must be.
///
/// # Errors
/// Those of the store.
pub(super) async fn check_roots(
    requests: &Requests,
    newest: &Root,
    faults: &mut Faults,
) -> Result<Vec<ObjectId>> {
    let all = read_roots(requests, newest, faults).await?;
    let valid = without_void(&all);
    check_claims(&valid, newest, faults);
    for pair in valid.windows(2) {
        let [before, root] = pair else { continue };
        let [had, has] = [before.committed, root.committed];
        if has.seq < had.seq || has.lsn < had.lsn {
            let why = format!("it states that less is committed than root {} does", before.number);
            faults.add(&keys::root(root.number), why);
        }
    }
    Ok(fences(&valid))
}

/// The roots of this volume, oldest first.
async fn read_roots(requests: &Requests, newest: &Root, faults: &mut Faults) -> Result<Vec<Root>> {
    let mut roots = BTreeMap::new();
    // The newest one has been read.
    let mut after = keys::root(newest.number);
    roots.insert(newest.number, newest.clone());
    loop {
        let listed = requests.list(keys::ROOTS, &after, LISTED_MAX).await?;
        let Some(last) = listed.last() else { break };
        after.clone_from(&last.key);
        let mut keys = listed.into_iter().map(|listed| listed.key);
        let next = || {
            let key = keys.next()?;
            Some(boxed(async move {
                let found = requests.get(&key, 0..ROOT_BYTES_MAX + 1).await;
                (key, found)
            }))
        };
        each(READS_MAX, next, |(key, found)| {
            let bytes = match found {
                // It was deleted meanwhile.
                Ok(None) => return Ok(()),
                Ok(Some(bytes)) => bytes,
                Err(error) => return faults.add_error(requests, &key, error),
            };
            match Root::decode(&bytes) {
                Ok(root) if keys::root_number(&key) != Some(root.number) => {
                    faults.add(&key, format!("it is root {}", root.number));
                }
                // A tombstone, or what its deletion has left.
                Ok(root) if root.volume != newest.volume => {}
                Ok(root) => drop(roots.insert(root.number, root)),
                Err(Wrong::Damaged(why) | Wrong::Newer(why)) => faults.add(&key, why),
            }
            Ok(())
        })
        .await?;
    }
    Ok(roots.into_values().collect())
}

/// The roots without the claims that were void: a claimant that was stopped for long may have made
/// a deleted root again.
fn without_void(roots: &[Root]) -> Vec<&Root> {
    let mut valid = Vec::with_capacity(roots.len());
    let mut lowest: Option<&Root> = None;
    for root in roots.iter().rev() {
        let is_void = lowest.is_some_and(|lowest| {
            root.author.epoch > lowest.author.epoch
                || (root.author.epoch == lowest.author.epoch && root.author != lowest.author)
        });
        if root.state == State::Claimed && is_void {
            continue;
        }
        if lowest.is_none_or(|lowest| root.author.epoch < lowest.author.epoch) {
            lowest = Some(root);
        }
        valid.push(root);
    }
    valid.reverse();
    valid
}

/// Each opening has made a claim, which is never deleted.
fn check_claims(valid: &[&Root], newest: &Root, faults: &mut Faults) {
    let is_claim = |root: &&&Root| root.state == State::Claimed;
    let claims: Vec<_> = valid.iter().filter(is_claim).map(|root| root.author.epoch.0).collect();
    let Some(oldest) = valid.first() else { return };
    // A volume begins with a root that is no claim.
    let first = oldest.author.epoch.0 + u64::from(oldest.state != State::Claimed);
    for epoch in first..=newest.author.epoch.0 {
        if claims.binary_search(&epoch).is_err() {
            let why = format!("the claim of opening {epoch} is missing");
            faults.add(keys::ROOTS, why);
        }
    }
}

/// The fences of openings that did not close the volume: each is where the next opening begins.
fn fences(valid: &[&Root]) -> Vec<ObjectId> {
    let mut fences = Vec::new();
    // What the roots say of the openings, in their order; the last word of each.
    let mut openings = BTreeMap::<Epoch, &Root>::new();
    for root in valid {
        openings.insert(root.last.opening.epoch, root);
    }
    let mut before: Option<&Root> = None;
    for root in openings.values() {
        if let Some(before) = before.filter(|before| !before.last.is_closed) {
            let (epoch, seq) = (before.last.opening.epoch, root.last.first);
            fences.push(ObjectId { epoch, seq });
        }
        before = Some(root);
    }
    fences
}
