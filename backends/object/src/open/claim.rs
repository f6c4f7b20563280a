//! Claims: the root by which an opening takes the volume from all before.

use bytes::Bytes;
use sheave_core::{ErrorKind, Result};

use super::Request;
use crate::format::{ROOT_BYTES_MAX, Root, State, keys};
use crate::ids::{Epoch, Opening};
use crate::retry::{Requests, Settled};

/// How often the newest root may be gone when it is read.
const FINDS_MAX: usize = 16;

/// A claim that is valid: when it was made, no root was above it. From then on the opening before
/// it can make no root.
#[derive(Debug)]
pub(crate) struct Claim {
    root: Root,
    opening: Opening,
    node: String,
}

impl Claim {
    /// The claim itself.
    pub(crate) fn root(&self) -> &Root {
        &self.root
    }

    /// The opening that has made it.
    pub(crate) fn opening(&self) -> Opening {
        self.opening
    }

    /// The node of the opening.
    pub(crate) fn node(&self) -> &str {
        &self.node
    }
}

/// The newest root of a volume; `None` if there is none. It may be a tombstone.
///
/// # Errors
/// [`ErrorKind::Corrupt`] when it is damaged, [`ErrorKind::Unsupported`] when a newer program has
/// written it, and those of the store.
pub async fn find_any(requests: &Requests) -> Result<Option<Root>> {
    let mut key = String::new();
    for _ in 0..FINDS_MAX {
        let listed = requests.list(keys::ROOTS, "", 1).await?;
        let Some(first) = listed.into_iter().next() else { return Ok(None) };
        key = first.key;
        // One that is gone again has a newer one above it.
        if let Some(bytes) = requests.get(&key, 0..ROOT_BYTES_MAX + 1).await? {
            return decode(requests, &key, &bytes).map(Some);
        }
    }
    let why = "the store lists it and does not have it";
    Err(requests.error(ErrorKind::Corrupt, "open", &key, why))
}

/// The newest root of a volume that exists.
///
/// # Errors
/// [`ErrorKind::NotFound`] when there is none, or it is deleted; and as for [`find_any`].
pub async fn find(requests: &Requests) -> Result<Root> {
    let why = match find_any(requests).await? {
        Some(root) if root.state != State::Deleted => return Ok(root),
        Some(_) => "the volume is deleted",
        None => "there is no volume; make it with: sheave volume create",
    };
    Err(requests.error(ErrorKind::NotFound, "open", "", why))
}

fn decode(requests: &Requests, key: &str, bytes: &Bytes) -> Result<Root> {
    use crate::format::Wrong;
    let root = Root::decode(bytes).map_err(|wrong| {
        let kind = match wrong {
            Wrong::Damaged(_) => ErrorKind::Corrupt,
            Wrong::Newer(_) => ErrorKind::Unsupported,
        };
        requests.error(kind, "open", key, &wrong.to_string())
    })?;
    match keys::root_number(key) == Some(root.number) {
        true => Ok(root),
        false => {
            let why = format!("it is root {}; the store has mixed up objects", root.number);
            Err(requests.error(ErrorKind::Corrupt, "open", key, &why))
        }
    }
}

/// Makes a root above the newest one, and makes sure that it is the newest one then. `None` if
/// another one came before.
///
/// # Errors
/// Those of the store.
pub(crate) async fn put_above(requests: &Requests, newest: &Root, root: &Root) -> Result<bool> {
    assert_eq!(root.number, newest.number + 1, "roots are numbered without gaps");
    let key = keys::root(root.number);
    match requests.create(&key, root.encode().into()).await? {
        Settled::Theirs(_) => Ok(false),
        // The place may have been free because its root, of which this process did not know, was
        // deleted: then a higher one exists.
        Settled::Mine => {
            #[cfg(test)]
            if !super::rules::get().lists_again {
                return Ok(true);
            }
            is_newest(requests, &key).await
        }
    }
}

async fn is_newest(requests: &Requests, key: &str) -> Result<bool> {
    let listed = requests.list(keys::ROOTS, "", 1).await?;
    Ok(listed.first().is_some_and(|first| first.key == key))
}

/// What an opening found in the log. `None` if it found damage because another opener has claimed
/// the volume since, and has deleted what it no longer needs.
///
/// # Errors
/// The error of the opening, and those of the store.
pub(crate) async fn unless_overtaken<T>(
    requests: &Requests,
    claim: &Claim,
    found: Result<T>,
) -> Result<Option<T>> {
    match found {
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            match is_newest(requests, &keys::root(claim.root.number)).await? {
                true => Err(error),
                false => Ok(None),
            }
        }
        other => other.map(Some),
    }
}

/// Claims the volume whose newest root this is. `None` if another opener was faster.
///
/// # Errors
/// Those of the store.
pub(crate) async fn claim(
    requests: &Requests,
    request: &Request,
    newest: &Root,
) -> Result<Option<Claim>> {
    let Request { node, incarnation, .. } = request;
    let opening = Opening { epoch: Epoch(newest.author.epoch.0 + 1), incarnation: *incarnation };
    let claim = |root| Some(Claim { root, opening, node: node.clone() });
    #[cfg(test)]
    if !super::rules::get().claims_first {
        return Ok(claim(newest.clone()));
    }
    let root = Root {
        number: newest.number + 1,
        state: State::Claimed,
        author: opening,
        node: node.clone(),
        ..newest.clone()
    };
    let is_valid = put_above(requests, newest, &root).await?;
    Ok(is_valid.then(|| claim(root)).flatten())
}
