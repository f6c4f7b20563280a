//! Makes, describes and deletes volumes.

use std::sync::Arc;

use sheave_core::{ErrorKind, Result};

use crate::cipher::{VolumeKey, WrappedKey, WrappingKey};
use crate::format::{
    Codec, Committed, Durability, LastOpening, Root, SIZE_MAX, Snapshot, SnapshotNews, State, keys,
};
use crate::head::Refusal;
use crate::ids::{BLOCK_BYTES, Blocks, Epoch, Incarnation, Opening, Seq, VolumeId};
use crate::open::{find, find_any, put_above};
use crate::retry::{Requests, Settled};
use crate::volume::{Census, census};

/// Keys of a listing.
const LISTED_MAX: usize = 1000;
/// How often a deletion begins anew when others open the volume at the same time.
const TRIES_MAX: usize = 8;

/// The identity of a volume that is to be made.
#[derive(Clone, Debug)]
pub struct NewVolume {
    /// What tells it from others.
    pub volume: VolumeId,
    /// Random bytes.
    pub incarnation: Incarnation,
    /// The name of this node.
    pub node: String,
    /// Its size.
    pub size: Blocks,
    /// What flushes wait for.
    pub durability: Durability,
    /// How its blocks are compressed.
    pub codec: Codec,
    /// By what its key is wrapped, if it is encrypted.
    pub key: Option<WrappingKey>,
}

/// Makes a volume, which is closed and reads as zeroes.
///
/// # Errors
/// [`ErrorKind::Exists`] when there is one, [`ErrorKind::Invalid`] for a size that cannot be, and
/// those of the store.
pub async fn create(requests: &Requests, new: &NewVolume) -> Result<Root> {
    check_size(requests, new.size)?;
    let exists = || {
        let why = "there is a volume already; delete it, or choose another name";
        requests.error(ErrorKind::Exists, "create", "", why)
    };
    let is_made = match find_any(requests).await? {
        None => {
            let root = new_root(new, 0, Epoch(0));
            let made = requests.create(&keys::root(0), root.encode().into()).await?;
            (made == Settled::Mine).then_some(root)
        }
        // Numbers and epochs go on behind a deleted volume, so that no key means two objects.
        Some(newest) if newest.state == State::Deleted => {
            let root = new_root(new, newest.number + 1, newest.author.epoch.next());
            put_above(requests, &newest, &root).await?.then_some(root)
        }
        Some(_) => None,
    };
    is_made.ok_or_else(exists)
}

/// Refuses a size that cannot be.
pub(crate) fn check_size(requests: &Requests, size: Blocks) -> Result<()> {
    if (1..=SIZE_MAX).contains(&size) {
        return Ok(());
    }
    let why = format!("a size of {size} blocks cannot be; write --size 10G");
    Err(requests.error(ErrorKind::Invalid, "size", "", &why))
}

/// A volume that was closed and never written.
fn new_root(new: &NewVolume, number: u64, epoch: Epoch) -> Root {
    let author = Opening { epoch, incarnation: new.incarnation };
    let node = new.node.clone();
    let wrap = |by| WrappedKey::wrap(&VolumeKey::random(), by);
    let wrapped_key = new.key.as_ref().map(wrap);
    Root {
        volume: new.volume,
        number,
        state: State::Closed,
        author,
        node: node.clone(),
        size: new.size,
        committed: Committed::default(),
        last: LastOpening { opening: author, node, first: Seq(1), is_closed: true },
        previous: None,
        directory: None,
        durability: new.durability,
        codec: new.codec,
        wrapped_key,
        owners: Vec::new(),
        snapshots: SnapshotNews::default(),
    }
}

/// A change of a root alone. It may be tried on several ones, of which the last one counts.
pub(crate) type RootChange = Arc<dyn Fn(&mut Root) -> Result<(), Refusal> + Send + Sync>;

/// Makes the volume so long. What is new reads as zeroes.
pub(crate) fn to_size(size: Blocks) -> RootChange {
    Arc::new(move |root| {
        if size < root.size {
            let [has, wanted] = [root.size, size].map(|blocks| blocks * BLOCK_BYTES);
            let why = format!("it has {has} bytes; to make it {wanted} would cut data off");
            return Err((ErrorKind::Invalid, why));
        }
        root.size = size;
        Ok(())
    })
}

/// Sets what flushes wait for.
pub(crate) fn to_durability(durability: Durability) -> RootChange {
    Arc::new(move |root| {
        root.durability = durability;
        Ok(())
    })
}

/// Makes a closed volume longer, and returns its newest root.
///
/// # Errors
/// [`ErrorKind::NotFound`] when there is none, [`ErrorKind::Invalid`] when it is longer,
/// [`ErrorKind::Busy`] when it is open, and those of the store.
pub async fn resize(requests: &Requests, size: Blocks) -> Result<Root> {
    change_closed(requests, "resize", &to_size(size)).await
}

/// Sets what flushes of a closed volume wait for.
///
/// # Errors
/// [`ErrorKind::NotFound`] when there is none, [`ErrorKind::Busy`] when it is open, and those of
/// the store.
pub async fn set_durability(requests: &Requests, durability: Durability) -> Result<Root> {
    change_closed(requests, "set", &to_durability(durability)).await
}

/// Changes a closed volume, and returns its newest root. Its author stays the same, since nothing
/// is opened; a claimant that has the number in mind begins anew.
async fn change_closed(requests: &Requests, op: &'static str, change: &RootChange) -> Result<Root> {
    for _ in 0..TRIES_MAX {
        let newest = find(requests).await?;
        let busy = |how: &str| {
            let why = format!("it is {how} on node {} (root {})", newest.node, newest.number);
            Err(requests.error(ErrorKind::Busy, op, "", &why))
        };
        match newest.state {
            // Its author made no root above it, and no opening has begun: those meet this root.
            State::Closed => {}
            State::Claimed if newest.last.is_closed => return busy("being opened"),
            _ => return busy("open, or was not closed,"),
        }
        let mut root = newest.clone();
        change(&mut root).map_err(|(kind, why)| requests.error(kind, op, "", &why))?;
        if root == newest {
            return Ok(newest);
        }
        root.number += 1;
        if put_above(requests, &newest, &root).await? {
            return Ok(root);
        }
    }
    let why = "others open it at the same time; try again";
    Err(requests.error(ErrorKind::Busy, op, "", why))
}

/// What is known of a volume without opening it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Its newest root.
    pub root: Root,
    /// Its log objects.
    pub objects: u64,
    /// Their bytes.
    pub stored_bytes: u64,
    /// Its snapshots; `None` if it is encrypted, and its key is not known here.
    pub snapshots: Option<Vec<Snapshot>>,
    /// Bytes of its objects that its newest checkpoint needs, without snapshots; `None` as there.
    pub live_bytes: Option<u64>,
}

/// Describes a volume, which may be open.
///
/// # Errors
/// [`ErrorKind::NotFound`] when there is none, and those of the store.
pub async fn info(requests: &Requests, key: Option<&WrappingKey>) -> Result<Info> {
    let (root, found) = census(requests, key).await?;
    let (snapshots, live_bytes) =
        found.map(|Census { snapshots, live_bytes }| (snapshots, live_bytes)).unzip();
    let (mut objects, mut stored_bytes) = (0, 0);
    let mut after = String::new();
    loop {
        let listed = requests.list(keys::LOGS, &after, LISTED_MAX).await?;
        objects += listed.len() as u64;
        stored_bytes += listed.iter().map(|listed| listed.bytes).sum::<u64>();
        match listed.last() {
            Some(last) if listed.len() == LISTED_MAX => after.clone_from(&last.key),
            _ => {
                return Ok(Info { root, objects, stored_bytes, snapshots, live_bytes });
            }
        }
    }
}

/// Deletes a volume. Its tombstone stays, so that no opener of before can go on. Of a volume that
/// is deleted already, it deletes what has come since.
///
/// # Errors
/// [`ErrorKind::NotFound`] when there is none, [`ErrorKind::Busy`] when it is open and that is not
/// to be ended (`take_over`), and those of the store.
pub async fn delete(
    requests: &Requests,
    author: (Incarnation, &str),
    take_over: bool,
) -> Result<()> {
    let mut tried: Option<Root> = None;
    for _ in 0..TRIES_MAX {
        let newest = match find_any(requests).await? {
            Some(newest) => newest,
            None => find(requests).await?,
        };
        // A volume that was made here since stays: the one that was meant is deleted.
        if let Some(tombstone) = tried.take_if(|tried| tried.volume != newest.volume) {
            return delete_all_before(requests, &tombstone).await;
        }
        let (mut is_made, mut tombstone) = (true, newest.clone());
        if newest.state != State::Deleted {
            check_closed(requests, &newest, take_over)?;
            check_no_snapshots(requests, &newest)?;
            tombstone.number += 1;
            tombstone.state = State::Deleted;
            tombstone.author = Opening { epoch: newest.author.epoch.next(), incarnation: author.0 };
            author.1.clone_into(&mut tombstone.node);
            is_made = put_above(requests, &newest, &tombstone).await?;
        }
        if is_made {
            return delete_all_before(requests, &tombstone).await;
        }
        tried = Some(tombstone);
    }
    let why = "others open it at the same time; try again";
    Err(requests.error(ErrorKind::Busy, "delete", "", why))
}

/// Deletes what a deleted volume has left, but for this tombstone.
async fn delete_all_before(requests: &Requests, tombstone: &Root) -> Result<()> {
    delete_epochs(requests, tombstone.author.epoch).await?;
    delete_roots(requests, &keys::root(tombstone.number)).await
}

fn check_closed(requests: &Requests, newest: &Root, take_over: bool) -> Result<()> {
    if newest.last.is_closed || take_over {
        return Ok(());
    }
    let why = format!(
        "it is open on node {} (root {}); end it there, or use --take-over if that node is gone",
        newest.last.node, newest.number
    );
    Err(requests.error(ErrorKind::Busy, "delete", "", &why))
}

/// Clones may need its snapshots, which are deleted one by one.
fn check_no_snapshots(requests: &Requests, newest: &Root) -> Result<()> {
    let why = match newest.snapshots.count {
        0 => return Ok(()),
        1 => "it has a snapshot; delete that first, as VOLUME@NAME".to_owned(),
        count => format!("it has {count} snapshots; delete them first, as VOLUME@NAME"),
    };
    Err(requests.error(ErrorKind::Busy, "delete", "", &why))
}

/// Deletes the log objects of epochs up to one. Those of later ones are of a volume that was made
/// at this place since: this deletion may have been stopped for long.
async fn delete_epochs(requests: &Requests, last: Epoch) -> Result<()> {
    let mut after = String::new();
    loop {
        let listed = requests.list(keys::LOGS, &after, LISTED_MAX).await?;
        for object in &listed {
            match keys::log_place(&object.key) {
                Some((epoch, _)) if epoch > last => return Ok(()),
                Some(_) => requests.delete(&object.key).await?,
                // It is no log object.
                None => {}
            }
        }
        match listed.into_iter().next_back() {
            Some(last) => after = last.key,
            None => return Ok(()),
        }
    }
}

/// Deletes the roots that are older than one.
async fn delete_roots(requests: &Requests, newest: &str) -> Result<()> {
    let mut after = newest.to_owned();
    loop {
        let listed = requests.list(keys::ROOTS, &after, LISTED_MAX).await?;
        for object in &listed {
            requests.delete(&object.key).await?;
        }
        match listed.into_iter().next_back() {
            Some(last) => after = last.key,
            None => return Ok(()),
        }
    }
}
