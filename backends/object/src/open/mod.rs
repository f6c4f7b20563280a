//! Opens a volume, so that at most one opening can commit anything.
//!
//! ```text
//!  newest root n ─▶ lock the journal ─▶ claim: root n+1 ─▶ list again ─▶ tail, fence ─▶
//!  the journal is adopted ─▶ open: root n+2 ─▶ first object
//! ```
//!
//! `docs/format.md` has the rules and why they suffice.

mod claim;
mod enter;
mod fold;
mod read;
#[cfg(test)]
pub(crate) mod rules;
#[cfg(test)]
pub(crate) mod tests;

use std::path::PathBuf;

use sheave_core::{ErrorKind, Result};

use crate::cipher::{VolumeKey, WrappingKey};
use crate::fetch::Fetcher;
use crate::format::{Coding, Committed, Durability, Root};
use crate::ids::{Blocks, Incarnation, Opening, VolumeId};
use crate::journal::{Adopted, Summary, Superblock};
use crate::map::Map;
use crate::recover::{self, Verdict};
use crate::retry::Requests;
use crate::sources::Sources;
use crate::upload::Upload;

pub(crate) use claim::{Claim, claim, put_above, unless_overtaken};
pub use claim::{find, find_any};
pub(crate) use enter::enter;
pub(crate) use fold::Fold;
pub(crate) use read::{directory_of, read};

/// How often an opening begins anew when other nodes open the volume at the same time.
const TRIES_MAX: usize = 8;

/// The opener.
#[derive(Clone, Debug)]
pub struct Request {
    /// The name of this node, for messages on others.
    pub node: String,
    /// Random bytes, new for every opening.
    pub incarnation: Incarnation,
    /// Open it although another node has it open, which then cannot write any more.
    pub take_over: bool,
    /// The key that the key of the volume is wrapped by, if it is encrypted.
    pub key: Option<WrappingKey>,
}

/// What an opening needs of the journal on this node, which is locked.
pub trait Journal {
    /// Whose journal it is; `None` if there is none yet.
    ///
    /// # Errors
    /// When it cannot be read.
    fn superblock(&self) -> Result<Option<Superblock>>;

    /// Takes the room that [`Journal::adopt`] needs. Comes before the claim, which a full disk
    /// would leave behind.
    ///
    /// # Errors
    /// When there is no room.
    fn prepare(&mut self, volume: VolumeId) -> Result<()>;

    /// Which writes it has; `None` if there are none.
    ///
    /// # Errors
    /// When it cannot be read.
    fn summary(&self) -> Result<Option<Summary>>;

    /// Moves it aside, where it is kept.
    ///
    /// # Errors
    /// When it cannot be moved.
    fn set_aside(&mut self) -> Result<PathBuf>;

    /// Says in the superblock, on stable storage, of which opening its writes are, if it has any,
    /// and that this opening is adopting it.
    ///
    /// # Errors
    /// When it cannot be written.
    fn adopt(
        &mut self,
        volume: VolumeId,
        current: Option<Opening>,
        opening: Opening,
    ) -> Result<Adopted>;
}

/// An open volume.
#[derive(Debug)]
pub struct Opened<J> {
    /// Its journal.
    pub journal: J,
    /// What tells it from other volumes.
    pub volume: VolumeId,
    /// Its size.
    pub size: Blocks,
    /// What its flushes wait for.
    pub durability: Durability,
    /// This opening.
    pub opening: Opening,
    /// The last one before it.
    pub before: Opening,
    /// What is committed. Writes go on behind it.
    pub committed: Committed,
    /// Where the committed blocks are.
    pub map: Map,
    /// Commits more.
    pub upload: Upload,
    /// Reads committed blocks.
    pub fetcher: Fetcher,
    /// Its key, if it is encrypted.
    pub key: Option<VolumeKey>,
}

/// Opens a volume. `lock` locks the journal that this node has for it, and makes one if it has
/// none.
///
/// # Errors
/// [`ErrorKind::NotFound`] when there is none, [`ErrorKind::Busy`] when it is open elsewhere,
/// [`ErrorKind::Corrupt`] when an object is missing or damaged, [`ErrorKind::Invalid`] when the
/// journal on this node does not fit, and those of the store and of the journal.
pub async fn open<J: Journal>(
    requests: &Requests,
    request: &Request,
    mut lock: impl FnMut(VolumeId) -> Result<J>,
) -> Result<Opened<J>> {
    for _ in 0..TRIES_MAX {
        let newest = find(requests).await?;
        let key = unlock(requests, &newest, request.key.as_ref())?;
        let mut journal = lock(newest.volume)?;
        let superblock = journal.superblock()?;
        let verdict = recover::judge(newest.volume, &newest.last, superblock.as_ref())
            .map_err(|why| requests.error(ErrorKind::Invalid, "open", "", why))?;
        check_free(requests, request, &newest, verdict)?;
        journal.prepare(newest.volume)?;
        let Some(claim) = claim(requests, request, &newest).await? else { continue };
        let fold = fold_log(requests, &claim, key.as_ref()).await;
        let Some(fold) = unless_overtaken(requests, &claim, fold).await? else { continue };
        settle_journal(requests, &mut journal, verdict, fold.committed())?;
        // The journal may name the last opening only as one that was adopting it. From now on it
        // must name it as its own, since this opening may also die before its open root.
        let current = (verdict == Verdict::Replay).then_some(newest.last.opening);
        let adopted = journal.adopt(newest.volume, current, claim.opening())?;
        let Some(root) = enter(requests, &claim, &fold, &adopted).await? else { continue };
        let head = fold.head(root.clone());
        let Fold { map, lineage, committed, counts, .. } = fold;
        let lineage = lineage.with(root.reach());
        let coding = Coding { codec: root.codec, key: key.clone() };
        let sources = Sources::new(requests, &root, key.clone())?;
        let fetcher = Fetcher::new(&sources, lineage.clone());
        let (requests, head) = (requests.clone(), (head, counts));
        let upload = Upload::new(requests, head, coding, lineage, fetcher.clone());
        return Ok(Opened {
            journal,
            volume: root.volume,
            size: root.size,
            durability: root.durability,
            opening: root.author,
            before: newest.last.opening,
            committed,
            map,
            upload,
            fetcher,
            key,
        });
    }
    let why = "other nodes open it at the same time; try again";
    Err(requests.error(ErrorKind::Busy, "open", "", why))
}

async fn fold_log(requests: &Requests, claim: &Claim, key: Option<&VolumeKey>) -> Result<Fold> {
    let mut fold = Fold::of_committed(requests, claim.root(), key).await?;
    fold.take_tail(requests, claim).await?;
    Ok(fold)
}

/// The key of a volume, if it is encrypted.
pub(crate) fn unlock(
    requests: &Requests,
    root: &Root,
    key: Option<&WrappingKey>,
) -> Result<Option<VolumeKey>> {
    let refused = |why: &str| requests.error(ErrorKind::Invalid, "open", "", why);
    match (&root.wrapped_key, key) {
        (None, None) => Ok(None),
        (Some(wrapped), Some(key)) => {
            let unlocked = wrapped.open(key);
            unlocked.map(Some).map_err(|why| refused(&why.to_string()))
        }
        (Some(wrapped), None) => Err(refused(&format!(
            "the volume is encrypted, and no key is given; add ?key-file=FILE with key {}",
            wrapped.key_id()
        ))),
        (None, Some(_)) => Err(refused("the volume is not encrypted; leave the key out")),
    }
}

/// Refuses a volume that is open elsewhere.
fn check_free(
    requests: &Requests,
    request: &Request,
    newest: &Root,
    verdict: Verdict,
) -> Result<()> {
    let last = &newest.last;
    if last.is_closed || request.take_over || verdict == Verdict::Replay {
        return Ok(());
    }
    let why = format!(
        "it is open on node {} (root {}); end it there, or use --take-over if that node is gone: \
         what it has not uploaded is left out then",
        last.node, newest.number
    );
    Err(requests.error(ErrorKind::Busy, "open", "", &why))
}

/// Keeps aside a journal of writes that do not continue what is committed.
fn settle_journal(
    requests: &Requests,
    journal: &mut impl Journal,
    verdict: Verdict,
    committed: Committed,
) -> Result<()> {
    let summary = journal.summary()?;
    if verdict == Verdict::Replay {
        return recover::continues(committed, summary.as_ref())
            .map_err(|why| requests.error(ErrorKind::Invalid, "open", "", why));
    }
    if let Some(Summary { first, last, .. }) = summary {
        let kept = journal.set_aside()?;
        tracing::warn!(
            "{}: the volume was written on another node since; the journal of this one, with \
             writes {first} to {last}, is kept as {}",
            requests.name(),
            sheave_core::printable(&kept)
        );
    }
    Ok(())
}
