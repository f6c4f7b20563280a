//! Opens many files with a single search for other programs that have them open.
//!
//! The search of all processes takes time in proportion to the files that are open on the machine.
//! For each of a thousand files, it would take minutes.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::Instant;

use sheave_core::Result;

use super::lock::{EXEC_POLL, EXEC_TIMEOUT, Identity, WRITES, refusal, writer};

/// Files that wait for the search, while there is a batch.
static WAITING: Mutex<Option<Vec<(Identity, PathBuf)>>> = Mutex::new(None);

/// While it exists, files that this process opens are locked at once, and looked up in
/// [`OpenBatch::check`], which must come before they are used.
#[must_use = "its files must be checked"]
#[derive(Debug)]
pub struct OpenBatch(());

impl OpenBatch {
    /// Begins the only batch of this process.
    pub fn begin() -> Self {
        waiting().get_or_insert_default();
        Self(())
    }

    /// Looks up all files opened since [`OpenBatch::begin`].
    ///
    /// # Errors
    /// [`sheave_core::ErrorKind::Busy`] when another program has one open for writing.
    pub fn check(self) -> Result<()> {
        let files = waiting().take().unwrap_or_default();
        if files.is_empty() {
            return Ok(());
        }
        let (identities, paths): (Vec<Identity>, Vec<PathBuf>) = files.into_iter().unzip();
        let begun = Instant::now();
        loop {
            match writer(&identities) {
                None => return Ok(()),
                // Perhaps by a child of ours that has not called exec yet.
                Some(_) if begun.elapsed() < EXEC_TIMEOUT => sleep(EXEC_POLL),
                Some((index, holder)) => {
                    return Err(refusal(&paths[index], &holder, WRITES));
                }
            }
        }
    }
}

impl Drop for OpenBatch {
    fn drop(&mut self) {
        *waiting() = None;
    }
}

/// Leaves the search for this file to the batch, if there is one.
pub(super) fn defer(identity: &Identity, path: &Path) -> bool {
    let mut waiting = waiting();
    let Some(files) = waiting.as_mut() else { return false };
    files.push((*identity, path.to_owned()));
    true
}

fn waiting() -> MutexGuard<'static, Option<Vec<(Identity, PathBuf)>>> {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}
