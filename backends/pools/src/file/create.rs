//! Making a volume: its name, its image, its record.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;

use sheave_core::{Error, ErrorKind, Result, printable};
use sheave_durable::{self as durable, step};
use uuid::Uuid;

use super::FilePool;
use super::image::is_too_large;
use super::layout::{Named, failed};
use super::lock::Locked;
use crate::pool::{Found, NewVolume};
use crate::record::Record;

impl FilePool {
    /// Makes a volume, see [`crate::Pool::create`].
    pub(super) fn make(&self, new: &NewVolume) -> Result<Found> {
        new.check()?;
        let size = new.size.choose(self.info.default_size)?;
        let locked = self.lock()?;
        let reserved = self.reserved(&locked, &new.name)?;
        if let Some((_, Some(record))) = reserved {
            return self.same_or_exists(record, new);
        }
        self.check_size(&new.name, size)?;
        self.check_room(size)?;
        let uuid = match reserved {
            Some((uuid, _)) => uuid,
            None => self.reserve(&locked, &new.name)?,
        };
        let made = self.make_parts(&locked, uuid, new, size);
        match &made {
            Ok(_) => tracing::info!(pool = self.info.name, volume = new.name, %uuid, "created"),
            Err(_) => {
                if let Err(error) = self.undo(&locked, uuid, &new.name) {
                    tracing::warn!(pool = self.info.name, "what was being made is left: {error}");
                }
            }
        }
        made
    }

    /// The volume that has the name, or the id that was reserved for it by a call that died.
    fn reserved(&self, locked: &Locked<'_>, name: &str) -> Result<Option<(Uuid, Option<Record>)>> {
        let path = self.layout.name(name);
        let Some(named) = durable::read::<Named>(&path)? else { return Ok(None) };
        if named.name != name {
            let why = format!("{} is about another name", printable(&path));
            return Err(Error::new(ErrorKind::Corrupt, "create", why));
        }
        match self.record(named.uuid)? {
            Some(record) if record.deleting => {
                self.discard(locked, named.uuid, name)?;
                Ok(None)
            }
            None => {
                self.check_never_used(&named)?;
                durable::settle(&path)?;
                Ok(Some((named.uuid, None)))
            }
            record => Ok(Some((named.uuid, record))),
        }
    }

    /// Reserves a name for a new volume.
    fn reserve(&self, locked: &Locked<'_>, name: &str) -> Result<Uuid> {
        locked.check_held()?;
        // Ids of later volumes are greater, so pages of a list stay whole.
        let named = Named { name: name.to_owned(), uuid: Uuid::now_v7() };
        self.layout.make_names()?;
        durable::replace(&self.layout.name(name), &named)?;
        Ok(named.uuid)
    }

    /// Makes the parts of a volume whose name is reserved.
    fn make_parts(
        &self,
        locked: &Locked<'_>,
        uuid: Uuid,
        new: &NewVolume,
        size: u64,
    ) -> Result<Found> {
        // Else another node may have made the volume meanwhile, and its image would be cut.
        locked.check_held()?;
        let image = self.layout.image(uuid);
        let make_image = || {
            // What a call that died has left was never used.
            let mut options = OpenOptions::new();
            let file = options.create(true).truncate(true).write(true).mode(0o600).open(&image)?;
            step();
            file.set_len(size)?;
            file.sync_all()?;
            step();
            durable::sync_parent(&image)
        };
        make_image().map_err(|error| match is_too_large(&error) {
            true => {
                let why = format!("{}: its file system has no files of {size} bytes", new.name);
                Error::new(ErrorKind::TooLarge, "create", why)
            }
            false => failed(&image, error),
        })?;
        let record = Record {
            limit_bps: new.limit_bps,
            limit_iops: new.limit_iops,
            parameters: new.parameters.clone(),
            ..Record::new(uuid, &new.name)
        };
        self.save(locked, &record)?;
        Ok(Found { record, size, trouble: None })
    }

    /// Undoes a creation that has failed. The record goes first: what has a record has an image.
    fn undo(&self, locked: &Locked<'_>, uuid: Uuid, name: &str) -> Result<()> {
        locked.check_held()?;
        durable::remove(&self.layout.record(uuid))?;
        self.discard(locked, uuid, name)
    }

    /// The volume of the name that is there, if it is as it is wanted.
    fn same_or_exists(&self, record: Record, new: &NewVolume) -> Result<Found> {
        let name = &new.name;
        let image = self.layout.image(record.uuid);
        let size = self.layout.image_size(record.uuid).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                let why = format!(
                    "{name} is there already, and its image {} is gone: restore the image from a \
                     backup, or delete the volume",
                    printable(&image)
                );
                Error::new(ErrorKind::Corrupt, "create", why)
            }
            _ => failed(&image, error),
        })?;
        let why = if !new.size.has(size) {
            format!("with {size} bytes")
        } else if record.parameters != new.parameters {
            "with other parameters".to_owned()
        } else {
            self.settle(record.uuid)?;
            return Ok(Found { record, size, trouble: None });
        };
        let why = format!("{name} is there already, {why}; choose another name");
        Err(Error::new(ErrorKind::Exists, "create", why))
    }
}
