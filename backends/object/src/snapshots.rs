//! Snapshots of volumes, as commands make and delete them.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use sheave_core::{ErrorKind, Result, printable};

use crate::cipher::WrappingKey;
use crate::clones::clones_of;
use crate::format::{Root, State};
use crate::head::Change;
use crate::ids::Incarnation;
use crate::open::{Fold, find, put_above, unlock};
use crate::retry::Requests;

/// How often a change begins anew when others change the volume at the same time.
const TRIES_MAX: usize = 8;

/// The newest root of a volume, however it is changed.
pub(crate) trait Roots: Sync {
    /// Changes it, on stable storage.
    fn change(&self, change: Change) -> Pin<Box<dyn Future<Output = Result<()>> + Send + '_>>;
}

/// That of a volume that is closed.
pub(crate) struct ClosedRoots<'a> {
    pub(crate) requests: &'a Requests,
    pub(crate) key: Option<&'a WrappingKey>,
}

impl Roots for ClosedRoots<'_> {
    fn change(&self, change: Change) -> Pin<Box<dyn Future<Output = Result<()>> + Send + '_>> {
        Box::pin(async move {
            let Self { requests, key } = *self;
            let newest = find(requests).await?;
            match change_closed((requests, key), newest, &change).await? {
                true => Ok(()),
                false => {
                    let why = "it has just been opened; try again";
                    Err(requests.error(ErrorKind::Busy, "change", "", why))
                }
            }
        })
    }
}

/// Changes the root of a volume that is closed, whose newest root that is. False if it is open, or
/// must be opened for the change: its checkpoint lacks something, or its root is full.
///
/// # Errors
/// The refusal of the change, and those of the store.
pub(crate) async fn change_closed(
    (requests, key): (&Requests, Option<&WrappingKey>),
    mut newest: Root,
    change: &Change,
) -> Result<bool> {
    for _ in 0..TRIES_MAX {
        // A root that is closed has no author any more that could make another one.
        if newest.state != State::Closed {
            return Ok(false);
        }
        let key = unlock(requests, &newest, key)?;
        let fold = Fold::of_committed(requests, &newest, key.as_ref()).await?;
        let mut head = fold.head(newest.clone());
        if !head.has_all(newest.committed.lsn) || !head.has_room(1) {
            return Ok(false);
        }
        let refused = |(kind, why): (_, String)| requests.error(kind, "change", "", &why);
        change(&mut head).map_err(refused)?;
        head.root.number += 1;
        if put_above(requests, &newest, &head.root).await? {
            return Ok(true);
        }
        newest = find(requests).await?;
    }
    Ok(false)
}

/// Deletes a snapshot, unless a clone needs it.
///
/// # Errors
/// [`ErrorKind::Busy`] when it has clones, [`ErrorKind::NotFound`] when there is none, and those of
/// the store.
pub(crate) async fn delete(
    requests: &Requests,
    name: &str,
    author: (Incarnation, &str),
    roots: &impl Roots,
) -> Result<()> {
    let id = Arc::new(AtomicU64::new(0));
    let mark: Change = {
        let (name, id) = (name.to_owned(), Arc::clone(&id));
        Arc::new(move |head| {
            let marked = head.begin_deletion(&name)?;
            id.store(marked, Relaxed);
            Ok(())
        })
    };
    #[cfg(test)]
    let mark: Change = match crate::open::rules::get().marks_first {
        true => mark,
        false => {
            let (name, id) = (name.to_owned(), Arc::clone(&id));
            Arc::new(move |head| head.find(&name).map(|found| id.store(found.id, Relaxed)))
        }
    };
    roots.change(mark).await?;
    let id = id.load(Relaxed);
    let clones = clones_of(requests, id, author).await;
    let has_clones = clones.as_ref().map_or(true, |(clones, _)| !clones.is_empty());
    let end: Change = Arc::new(move |head| {
        head.end_deletion(id, has_clones);
        Ok(())
    });
    roots.change(end).await?;
    let (clones, idle) = clones?;
    if has_clones {
        let clones: Vec<_> = clones.iter().map(|name| printable(name).to_string()).collect();
        let why = format!("it has clones: {}; delete them first", clones.join(", "));
        return Err(requests.error(ErrorKind::Busy, "delete", "", &why));
    }
    for key in idle {
        requests.delete(&key).await?;
    }
    Ok(())
}
