//! Which pool a directory is, so that the empty directory of a missing mount is not taken for it.
//!
//! The directory has a file with an id, made at its first change. A daemon remembers the id in its
//! own state. From then on another id, or none, is an error.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use sheave_core::{Error, ErrorKind, Result, printable};
use sheave_durable as durable;
use uuid::Uuid;

/// The file in the directory.
pub(super) const NAME: &str = ".sheave-pool.json";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    pool: Uuid,
}

/// Which daemon has a state directory.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Daemon {
    daemon: Uuid,
}

/// What a daemon remembers.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Remembered {
    pool: Uuid,
    /// The directory; with another one the pool is another pool.
    directory: String,
}

/// The identity of a pool's directory.
pub(super) struct Identified {
    in_pool: PathBuf,
    directory: String,
    /// The file where it is remembered; without it as long as this process lives.
    memory: Option<PathBuf>,
    /// The file with the id of the daemon.
    daemon: Option<PathBuf>,
    known: Mutex<Option<Uuid>>,
}

impl Identified {
    pub(super) fn new(name: &str, dir: &Path, state: Option<PathBuf>) -> Self {
        let file = |name: &str| state.as_ref().map(|state| state.join(name));
        Self {
            in_pool: dir.join(NAME),
            directory: dir.to_string_lossy().into_owned(),
            memory: file(&format!("pools/{name}.json")),
            daemon: file("daemon.json"),
            known: Mutex::default(),
        }
    }

    /// The id of this daemon, made when it is first asked for; `None` in a process without state.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn daemon(&self) -> Result<Option<Uuid>> {
        let Some(path) = &self.daemon else { return Ok(None) };
        if let Some(found) = durable::read::<Daemon>(path)? {
            return Ok(Some(found.daemon));
        }
        // Only one daemon has the state directory, and the pool's lock is held by the first call.
        let made = Daemon { daemon: Uuid::now_v7() };
        durable::replace(path, &made)?;
        Ok(Some(made.daemon))
    }

    /// Checks that the directory is the pool that it was.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when it is not, and what the file systems say.
    pub(super) fn check(&self) -> Result<()> {
        let found = durable::read::<Identity>(&self.in_pool)?.map(|identity| identity.pool);
        // Of calls at once, one remembers it.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match (self.remembered(&mut known)?, found) {
            (None, None) => Ok(()),
            (None, Some(found)) => self.remember(&mut known, found),
            (Some(known), Some(found)) if known == found => Ok(()),
            (Some(_), None) => self.refuse("is not the pool's any more; is it mounted?"),
            (Some(_), Some(_)) => {
                self.refuse("is another pool now; is another disk mounted there?")
            }
        }
    }

    /// Gives the directory an id, if it has none. The pool must be locked, and checked.
    ///
    /// # Errors
    /// What the file systems say.
    pub(super) fn settle(&self) -> Result<()> {
        if durable::read::<Identity>(&self.in_pool)?.is_none() {
            durable::replace(&self.in_pool, &Identity { pool: Uuid::now_v7() })?;
        }
        self.check()
    }

    fn remembered(&self, known: &mut Option<Uuid>) -> Result<Option<Uuid>> {
        if let (None, Some(memory)) = (*known, &self.memory) {
            let found = durable::read::<Remembered>(memory)?;
            *known = found.filter(|has| has.directory == self.directory).map(|has| has.pool);
        }
        Ok(*known)
    }

    fn remember(&self, known: &mut Option<Uuid>, pool: Uuid) -> Result<()> {
        if let Some(memory) = &self.memory {
            let fail = |error| Error::from_io("pool", printable(memory).to_string(), error);
            if let Some(dir) = memory.parent() {
                std::fs::create_dir_all(dir).map_err(fail)?;
            }
            let directory = self.directory.clone();
            durable::replace(memory, &Remembered { pool, directory })?;
        }
        *known = Some(pool);
        Ok(())
    }

    fn refuse(&self, what: &str) -> Result<()> {
        let advice = match &self.memory {
            Some(memory) => format!("remove {}", printable(memory)),
            None => "restart this process".to_owned(),
        };
        let why = format!(
            "the directory {} {what} For a new pool there, {advice}",
            printable(&self.directory)
        );
        Err(Error::new(ErrorKind::Io, "pool", why))
    }
}
