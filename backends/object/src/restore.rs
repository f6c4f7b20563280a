//! Brings a closed volume back to a snapshot, in place.
//!
//! ```text
//!  claim ─▶ object: the map of the snapshot, as a checkpoint of all ─▶ closed root that names it
//! ```
//!
//! The root does it in one step. Before it no root names the epoch of the claim as one that has
//! objects, so nothing reads what a restoration leaves that is stopped there.

use sheave_core::{ErrorKind, Result};

use crate::cipher::{VolumeKey, WrappingKey};
use crate::format::{
    Author, Built, Coding, Committed, Directory, LastOpening, OBJECT_BYTES_MAX, ObjectBuilder,
    Reach, Root, State, keys,
};
use crate::ids::Seq;
use crate::open::{Claim, Fold, Request, claim, find, put_above, unless_overtaken, unlock};
use crate::retry::{Requests, Settled};

/// How often it begins anew when others change the volume at the same time.
const TRIES_MAX: usize = 8;
/// What an object has beside its directory takes less.
const OTHER_BYTES: u64 = 4096;

/// Brings a volume back to its snapshot of that name. All snapshots stay, and so does its size.
///
/// # Errors
/// [`ErrorKind::NotFound`] when there is no such snapshot, [`ErrorKind::Busy`] when the volume is
/// not closed, [`ErrorKind::Corrupt`] when its map or that of the snapshot is damaged, and those of
/// the store.
pub(crate) async fn restore(requests: &Requests, request: &Request, name: &str) -> Result<()> {
    for _ in 0..TRIES_MAX {
        let newest = find(requests).await?;
        check_closed(requests, &newest)?;
        // Before anything is made.
        check_named(requests, &newest, request.key.as_ref(), name).await?;
        let Some(claim) = claim(requests, request, &newest).await? else { continue };
        let key = unlock(requests, &newest, request.key.as_ref())?;
        let restored = put_restored(requests, &claim, key, name).await;
        if let Some(true) = unless_overtaken(requests, &claim, restored).await? {
            return Ok(());
        }
    }
    let why = "others open it at the same time; try again";
    Err(requests.error(ErrorKind::Busy, "restore", "", why))
}

/// Refuses a volume whose journal may have writes that its store lacks.
fn check_closed(requests: &Requests, newest: &Root) -> Result<()> {
    let is_closed = match newest.state {
        State::Closed => true,
        State::Claimed => newest.last.is_closed,
        State::Open | State::Deleted => false,
    };
    if is_closed {
        return Ok(());
    }
    let why = format!(
        "it is open on node {} (root {}), or was not closed there; detach it, and if that node is \
         gone, attach it with --take-over before",
        newest.last.node, newest.number
    );
    Err(requests.error(ErrorKind::Busy, "restore", "", &why))
}

async fn check_named(
    requests: &Requests,
    newest: &Root,
    key: Option<&WrappingKey>,
    name: &str,
) -> Result<()> {
    let key = unlock(requests, newest, key)?;
    let fold = Fold::of_checkpoint(requests, newest, key.as_ref()).await?;
    let head = fold.head(newest.clone());
    let found = head.find(name).map(drop);
    found.map_err(|(kind, why)| requests.error(kind, "restore", "", &why))
}

/// Makes object and root. False if another opener has the volume by now.
async fn put_restored(
    requests: &Requests,
    claim: &Claim,
    key: Option<VolumeKey>,
    name: &str,
) -> Result<bool> {
    let claimed = claim.root();
    let fold = Fold::of_committed(requests, claimed, key.as_ref()).await?;
    let (lineage, head) = (fold.lineage.clone(), fold.head(claimed.clone()));
    let refused = |(kind, why): (_, String)| requests.error(kind, "restore", "", &why);
    let snapshot = head.find(name).map_err(refused)?;
    let read = Fold::directory_of_snapshot(requests, claimed, snapshot, key.as_ref());
    let (of_snapshot, _) = read.await?;
    let Committed { seq, lsn } = claimed.committed;
    let missing = |seq: Seq| {
        let why = format!("object {seq} of the snapshot is missing; something else has deleted it");
        requests.error(ErrorKind::Corrupt, "restore", "", &why)
    };
    let (objects, dropped) = fold.counts.restored(seq, &of_snapshot).map_err(missing)?.table();
    let directory = Directory {
        covered: claimed.committed,
        epochs: lineage.up_to(seq),
        snapshots: head.snapshots,
        objects,
        dropped,
        ..of_snapshot
    };
    check_length(requests, &directory)?;
    let opening = claim.opening();
    let reach = Reach { epoch: opening.epoch, first: seq.next() };
    let author = Author {
        volume: claimed.volume,
        reach,
        previous: lineage.newest(),
        incarnation: opening.incarnation,
        coding: Coding { codec: claimed.codec, key },
    };
    let mut builder = ObjectBuilder::new(&author, reach.first, 1, 0);
    let place = builder.directory(&directory, &[]);
    let Built { header, body, .. } = builder.finish(lsn.next(), lsn);
    let key = keys::log(header.id.epoch, header.id.seq);
    if let Settled::Theirs(_) = requests.create(&key, body).await? {
        return Ok(false);
    }
    let last =
        LastOpening { opening, node: claim.node().to_owned(), first: reach.first, is_closed: true };
    let root = Root {
        number: claimed.number + 1,
        state: State::Closed,
        committed: Committed { seq: header.id.seq, lsn },
        last,
        previous: lineage.newest(),
        directory: Some(place),
        snapshots: claimed.snapshots.behind_checkpoint(),
        ..claimed.clone()
    };
    put_above(requests, claimed, &root).await
}

/// Refuses a map that has no room in an object, beside the snapshots that there are now.
fn check_length(requests: &Requests, directory: &Directory) -> Result<()> {
    match directory.encode().len() as u64 + OTHER_BYTES <= OBJECT_BYTES_MAX {
        true => Ok(()),
        false => {
            let why = "its map has become too large; make a clone of the snapshot instead";
            Err(requests.error(ErrorKind::TooLarge, "restore", "", why))
        }
    }
}
