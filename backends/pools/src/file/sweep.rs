//! What is left of calls whose process has died.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use sheave_core::{Error, ErrorKind, Result, printable};
use sheave_durable as durable;
use uuid::Uuid;

use super::FilePool;
use super::layout::{Named, failed};

impl FilePool {
    /// Undoes what was being made, and finishes what was being deleted, when a process died.
    pub(super) fn sweep(&self) -> Result<()> {
        for named in self.layout.all_names()? {
            let is_unmade = || match self.record(named.uuid)? {
                Some(_) => Ok(false),
                None => self.check_never_used(&named).map(|()| true),
            };
            match is_unmade() {
                Ok(true) => self.discard(named.uuid, &named.name)?,
                Ok(false) => {}
                Err(error) => tracing::error!(pool = self.info.name, "{error}"),
            }
        }
        self.layout.remove_unfinished()?;
        for uuid in self.layout.all_records()? {
            match self.record(uuid) {
                Ok(Some(record)) if record.deleting => self.discard(uuid, &record.name)?,
                Ok(_) => {}
                Err(error) => tracing::error!(pool = self.info.name, "{error}"),
            }
        }
        Ok(())
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

    /// Removes what is left of a volume that does not exist.
    pub(super) fn discard(&self, uuid: Uuid, name: &str) -> Result<()> {
        durable::remove(&self.layout.image(uuid))?;
        // The name may be another volume's by now.
        let names = self.layout.name(name);
        if durable::read::<Named>(&names)?.is_some_and(|named| named.uuid == uuid) {
            durable::remove(&names)?;
        }
        durable::remove(&self.layout.record(uuid))
    }
}
