//! One change of a pool at a time, of all threads and processes that use it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sheave_core::{Error, ErrorKind, Result};

use super::layout::{Layout, failed};

/// How long a change waits for others. It is less than what callers wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(2);

/// What this process knows of a pool.
#[derive(Default)]
pub(super) struct State {
    /// It has changed the pool, and looks or has looked for what others have left.
    pub(super) is_used: bool,
}

/// The right to change a pool.
pub(super) struct Locked<'a> {
    state: MutexGuard<'a, State>,
    file: File,
    path: PathBuf,
    is_shared: bool,
}

impl<'a> Locked<'a> {
    /// # Errors
    /// [`ErrorKind::Pending`] when others take too long, and what the file system says.
    pub(super) fn take(
        pool: &str,
        layout: &Layout,
        state: &'a Mutex<State>,
        is_shared: bool,
    ) -> Result<Self> {
        let begun = Instant::now();
        let wait = || {
            if begun.elapsed() > TIMEOUT {
                let why = format!("pool {pool} is being changed by other calls; try again later");
                return Err(Error::new(ErrorKind::Pending, "change a pool", why));
            }
            sleep(POLL);
            Ok(())
        };
        let state = loop {
            match state.try_lock() {
                Ok(state) => break state,
                // What is on disk counts, and it is whole after each step.
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => wait()?,
            }
        };
        layout.check()?;
        let path = layout.lock();
        let mut options = OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.map_err(|error| failed(&path, error))?;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self { state, file, path, is_shared }),
                Err(Errno::WOULDBLOCK) => wait()?,
                Err(errno) => return Err(failed(&path, errno.into())),
            }
        }
    }

    /// Checks that a file server has not given the lock to another node meanwhile: the file of a
    /// lock that is lost cannot be written.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn check_held(&self) -> Result<()> {
        if !self.is_shared {
            return Ok(());
        }
        let written = self.file.write_all_at(b"\n", 0).and_then(|()| self.file.sync_data());
        written.map_err(|error| failed(&self.path, error))
    }

    pub(super) fn state(&mut self) -> &mut State {
        &mut self.state
    }
}
