//! Clones: volumes that begin as a snapshot of another one, whose objects they read. A pin says so
//! beside that volume.
//!
//! ```text
//!  clone:     pin ─▶ is the snapshot there, and not being deleted? ─▶ first root of the clone
//!  deletion:  root with the mark "being deleted" ─▶ pins? ─▶ root without the snapshot
//! ```
//!
//! Each side writes before it looks, so that one of them sees the other.

use sheave_core::{ErrorKind, Result};

use crate::cipher::WrappingKey;
use crate::format::{
    CheckpointPlace, Codec, Committed, Durability, LastOpening, Owner, Pin, Root, Snapshot,
    SnapshotNews, State, keys,
};
use crate::ids::{Blocks, Epoch, Incarnation, Opening, Seq, VolumeId};
use crate::open::{find_any, put_above};
use crate::retry::{Requests, Settled};
use crate::volume::find_snapshot;

/// Pins of a listing.
const LISTED_MAX: usize = 1000;
/// More bytes than a pin has.
const PIN_BYTES: u64 = 512;
/// How often it is looked again when others change a place at the same time.
const TRIES_MAX: usize = 8;

/// A clone that is to be made.
#[derive(Clone, Debug)]
pub(crate) struct NewClone {
    /// Its identity.
    pub(crate) volume: VolumeId,
    /// Random bytes.
    pub(crate) incarnation: Incarnation,
    /// The name of this node.
    pub(crate) node: String,
    /// Its size, if not that of the snapshot.
    pub(crate) size: Option<Blocks>,
    /// Its name beside its parent, and that one's.
    pub(crate) name: String,
    pub(crate) parent: String,
}

/// Makes a clone of a snapshot of the volume that `parent` asks, at the place that `target` asks.
///
/// # Errors
/// [`ErrorKind::NotFound`] when there is no such snapshot, [`ErrorKind::Exists`] when there is a
/// volume at that place, [`ErrorKind::Invalid`] for a size that is too small, and those of the
/// store.
pub(crate) async fn clone(
    (parent, target): (&Requests, &Requests),
    (snapshot, unlock): (&str, Option<&WrappingKey>),
    new: &NewClone,
) -> Result<()> {
    let (root, found) = find_snapshot((parent, unlock), snapshot).await?;
    let size = new.size.unwrap_or(found.size);
    if size < found.size {
        let why = format!("it cannot be shorter than the snapshot, {} blocks", found.size);
        return Err(target.error(ErrorKind::Invalid, "clone", "", &why));
    }
    let first = first_root(&root, &found, new, size);
    if !first.fits(0) {
        let why = "it would have too many ancestors; copy it instead, with sheave copy";
        return Err(target.error(ErrorKind::TooLarge, "clone", "", why));
    }
    let key = keys::pin(found.id, new.volume);
    let pin = Pin { clone: new.volume, name: new.name.clone() };
    parent.create(&key, pin.encode().into()).await?;
    let made = match check_still_there((parent, unlock), &root, &found).await {
        Ok(()) => put_first(target, first).await,
        Err(error) => Err(error),
    };
    if made.is_err() {
        // Without a root of the clone it pins nothing, and the deletion of the snapshot removes it.
        drop(parent.delete(&key).await);
    }
    made
}

/// The root of a clone that is closed and has just the snapshot.
fn first_root(parent: &Root, snapshot: &Snapshot, new: &NewClone, size: Blocks) -> Root {
    let end = snapshot.last_object().next();
    let mut owners: Vec<Owner> = Vec::new();
    let own = Owner { end, volume: parent.volume, name: new.parent.clone() };
    for owner in parent.owners.iter().cloned().chain([own]) {
        if owners.last().is_none_or(|before| before.end < end) && end > Seq(1) {
            owners.push(Owner { end: owner.end.min(end), ..owner });
        }
    }
    let previous = snapshot.checkpoint.map(|CheckpointPlace { reach, .. }| reach);
    let epoch = previous.map_or(Epoch(0), |reach| reach.epoch).next();
    let opening = Opening { epoch, incarnation: new.incarnation };
    // What is not said here, such as settings, is that of the volume.
    let mut root = parent.clone();
    (root.volume, root.number, root.state) = (new.volume, 0, State::Closed);
    (root.author, root.node, root.size) = (opening, new.node.clone(), size);
    root.committed = Committed { seq: snapshot.last_object(), lsn: snapshot.committed.lsn };
    let node = new.node.clone();
    root.last = LastOpening { opening, node, first: end, is_closed: true };
    root.previous = previous;
    root.directory = snapshot.checkpoint.map(|CheckpointPlace { directory, .. }| directory);
    (root.owners, root.snapshots) = (owners, SnapshotNews::default());
    root
}

/// Checks that a snapshot that is pinned since is not being deleted.
async fn check_still_there(
    (parent, unlock): (&Requests, Option<&WrappingKey>),
    root: &Root,
    snapshot: &Snapshot,
) -> Result<()> {
    #[cfg(test)]
    if !crate::open::rules::get().clones_look_again {
        return Ok(());
    }
    let newest = parent.list(keys::ROOTS, "", 1).await?;
    let is_same = newest.first().is_some_and(|first| first.key == keys::root(root.number));
    let is_deleting = match is_same {
        true => root.snapshots.deleting.contains(&snapshot.id),
        false => {
            let (newer, found) = find_snapshot((parent, unlock), &snapshot.name).await?;
            newer.volume != root.volume
                || found.id != snapshot.id
                || newer.snapshots.deleting.contains(&snapshot.id)
        }
    };
    match is_deleting {
        false => Ok(()),
        true => Err(parent.error(ErrorKind::NotFound, "clone", "", "it is being deleted")),
    }
}

/// Makes the first root of a clone, unless there is a volume.
async fn put_first(target: &Requests, mut first: Root) -> Result<()> {
    let newest = find_any(target).await?;
    let is_made = match newest {
        None => put_root_0(target, &first).await?,
        // Numbers and epochs go on behind a deleted volume, so that no key means two objects.
        Some(newest) if newest.state == State::Deleted && newest.volume != first.volume => {
            first.number = newest.number + 1;
            first.author.epoch = first.author.epoch.max(newest.author.epoch.next());
            first.last.opening = first.author;
            put_above(target, &newest, &first).await?
        }
        Some(_) => false,
    };
    match is_made {
        true => Ok(()),
        false => {
            let why = "there is a volume already, or its snapshot has just been deleted";
            Err(target.error(ErrorKind::Exists, "clone", "", why))
        }
    }
}

/// Makes the first root of a place. False if there is another one by now.
async fn put_root_0(target: &Requests, root: &Root) -> Result<bool> {
    let key = keys::root(0);
    match target.create(&key, root.encode().into()).await? {
        Settled::Theirs(_) => Ok(false),
        // There may have been one that was deleted, below newer ones.
        Settled::Mine => {
            let newest = target.list(keys::ROOTS, "", 1).await?;
            Ok(newest.first().is_some_and(|first| first.key == key))
        }
    }
}

/// The names of the clones for which a snapshot of this volume must stay, and the keys of pins that
/// mean nothing: their clones are deleted, or were never made, and never will be from now on.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for a pin that is damaged, and those of the store.
pub(crate) async fn clones_of(
    parent: &Requests,
    snapshot: u64,
    author: (Incarnation, &str),
) -> Result<(Vec<String>, Vec<String>)> {
    let (mut clones, mut idle) = (Vec::new(), Vec::new());
    let mut after = String::new();
    loop {
        let listed = parent.list(&keys::pins(snapshot), &after, LISTED_MAX).await?;
        for object in &listed {
            let Some(bytes) = parent.get(&object.key, 0..PIN_BYTES).await? else { continue };
            let pin = Pin::decode(&bytes);
            let damaged = |wrong: crate::format::Wrong| {
                parent.error(ErrorKind::Corrupt, "delete", &object.key, &wrong.to_string())
            };
            let pin = pin.map_err(damaged)?;
            match is_alive(&parent.beside(&pin.name)?, &pin, author).await? {
                true => clones.push(pin.name),
                false => idle.push(object.key.clone()),
            }
        }
        match listed.into_iter().next_back() {
            Some(last) => after = last.key,
            None => return Ok((clones, idle)),
        }
    }
}

/// Whether the clone of a pin exists. If not, it makes sure that it never will: a root is made in
/// the place of its first one.
async fn is_alive(target: &Requests, pin: &Pin, author: (Incarnation, &str)) -> Result<bool> {
    for _ in 0..TRIES_MAX {
        let newest = find_any(target).await?;
        let is_settled = match newest {
            Some(newest) if newest.state != State::Deleted => {
                return Ok(newest.volume == pin.clone);
            }
            Some(newest) if newest.volume == pin.clone => return Ok(false),
            Some(newest) => {
                let (number, epoch) = (newest.number + 1, newest.author.epoch.next());
                let tombstone = tombstone(pin.clone, (number, epoch), author);
                put_above(target, &newest, &tombstone).await?
            }
            None => put_root_0(target, &tombstone(pin.clone, (0, Epoch(1)), author)).await?,
        };
        if is_settled {
            return Ok(false);
        }
    }
    let why = "others use the place of its clone at the same time; try again";
    Err(target.error(ErrorKind::Busy, "delete", "", why))
}

/// The tombstone of a clone that was never made.
fn tombstone(
    volume: VolumeId,
    (number, epoch): (u64, Epoch),
    (incarnation, node): (Incarnation, &str),
) -> Root {
    let last = Opening { epoch: Epoch(epoch.0 - 1), incarnation };
    Root {
        volume,
        number,
        state: State::Deleted,
        author: Opening { epoch, incarnation },
        node: node.to_owned(),
        size: 1,
        committed: Committed::default(),
        last: LastOpening { opening: last, node: node.to_owned(), first: Seq(1), is_closed: true },
        previous: None,
        directory: None,
        durability: Durability::default(),
        codec: Codec::Plain,
        wrapped_key: None,
        owners: Vec::new(),
        snapshots: SnapshotNews::default(),
    }
}
