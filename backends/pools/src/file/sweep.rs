//! What is left of calls whose process has died.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::PoisonError;
use std::thread;

use sheave_core::{Error, ErrorKind, Result, printable};
use sheave_durable as durable;
use uuid::Uuid;

use super::FilePool;
use super::layout::{Named, failed};
use super::lock::Locked;
use crate::record::Record;

impl FilePool {
    /// Starts a thread that sweeps. A pool may have so many volumes that a call must not wait for
    /// it.
    pub(super) fn start_sweep(&self) {
        let Some(pool) = self.me.upgrade() else { return };
        let sweep = move || {
            if let Err(error) = pool.sweep() {
                tracing::warn!(
                    pool = pool.info.name,
                    "the next change looks for leftovers: {error}"
                );
                pool.state.lock().unwrap_or_else(PoisonError::into_inner).is_used = false;
            }
        };
        if let Err(error) = thread::Builder::new().name("sweep".to_owned()).spawn(sweep) {
            tracing::warn!(pool = self.info.name, "no thread to look for leftovers: {error}");
        }
    }

    /// Undoes what was being made, and finishes what was being deleted, when a process died. Takes
    /// the pool's lock only for these, and looks at them again then: they may be of another call.
    pub(super) fn sweep(&self) -> Result<()> {
        let unfinished = self.layout.unfinished()?;
        if !unfinished.is_empty() {
            let locked = self.lock()?;
            locked.check_held()?;
            unfinished.iter().try_for_each(|path| durable::remove(path))?;
        }
        for path in self.layout.name_files()? {
            self.logged(self.sweep_name(&path));
        }
        for uuid in self.layout.all_records()? {
            self.logged(self.sweep_record(uuid));
        }
        Ok(())
    }

    /// What is wrong with one volume does not keep others from being swept.
    fn logged(&self, swept: Result<()>) {
        if let Err(error) = swept {
            tracing::error!(pool = self.info.name, "{error}");
        }
    }

    fn sweep_name(&self, path: &Path) -> Result<()> {
        let Some(named) = durable::read::<Named>(path)? else { return Ok(()) };
        if self.record(named.uuid)?.is_some() {
            return Ok(());
        }
        let locked = self.lock()?;
        if self.record(named.uuid)?.is_some() {
            return Ok(());
        }
        self.check_never_used(&named)?;
        self.discard(&locked, named.uuid, &named.name)
    }

    fn sweep_record(&self, uuid: Uuid) -> Result<()> {
        let is_deleting = |record: &Record| record.deleting;
        if !self.record(uuid)?.is_some_and(|record| is_deleting(&record)) {
            return Ok(());
        }
        let locked = self.lock()?;
        match self.record(uuid)?.filter(is_deleting) {
            Some(record) => self.discard(&locked, uuid, &record.name),
            None => Ok(()),
        }
    }

    /// Checks that an image without a record is what a creation that died has left: without data.
    pub(super) fn check_never_used(&self, named: &Named) -> Result<()> {
        let image = self.layout.image(named.uuid);
        match fs::metadata(&image) {
            Ok(found) if found.blocks() > 0 => {
                let why = format!(
                    "{} has data, and its record {} is gone: restore the record from a backup, or \
                     move the image away",
                    printable(&image),
                    printable(&self.layout.record(named.uuid))
                );
                Err(Error::new(ErrorKind::Corrupt, "find", format!("{}: {why}", named.name)))
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(failed(&image, error)),
        }
    }

    /// Removes what is left of a volume that does not exist, if the lock is still held: otherwise
    /// another node may have made it.
    pub(super) fn discard(&self, locked: &Locked<'_>, uuid: Uuid, name: &str) -> Result<()> {
        locked.check_held()?;
        durable::remove(&self.layout.image(uuid))?;
        // The name may be another volume's by now.
        let names = self.layout.name(name);
        if durable::read::<Named>(&names)?.is_some_and(|named| named.uuid == uuid) {
            durable::remove(&names)?;
        }
        durable::remove(&self.layout.record(uuid))
    }
}
