//! A pool that is a directory of sparse images.
//!
//! ```text
//! UUID.img          a volume's data; its length is the volume's size
//! UUID.json         its record
//! names/HASH.json   which volume has a name
//! .sheave.lock      locked by what changes the others
//! .sheave-pool.json which pool it is
//! .sheave-spare     room for a record on a full file system
//! ```
//!
//! A volume is made in this order: name, image, record; it exists when its record does. It is
//! deleted in this order: its record says so, image, name, record; it is gone with the first. What
//! a crash leaves between is finished or undone by the next call that is about it, and by a thread
//! that looks for it when a process first changes the pool. An image that has data was in use: if
//! its record is gone, it was lost by other means, and the image stays.

#[cfg(test)]
mod crash_tests;
mod create;
mod identity;
mod image;
mod layout;
mod lock;
mod sweep;
#[cfg(test)]
mod tests;
mod writer;

use std::fs::{File, OpenOptions};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};

use sheave_core::{Error, ErrorKind, Result, printable};
use sheave_durable as durable;
use sheave_volumes::{OpenOptions as VolumeOptions, VolumeSpec};
use uuid::Uuid;

use crate::pool::{
    Capacity, Exclusion, Found, Key, NewVolume, Pool, PoolInfo, SIZE_MAX, SIZE_MIN, SizeRange,
};
use crate::record::{Publication, Record};
use crate::sharing::Judge;
use identity::Identified;
use image::{first_data, grow, is_too_large};
use layout::{Layout, Named, failed};
use lock::{Locked, State};

/// The most that the volumes of a pool may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all volumes together.
    pub capacity: Option<u64>,
    /// Bytes of one volume.
    pub max_size: Option<u64>,
    /// Bytes of a volume that no size is wanted for.
    pub default_size: u64,
}

/// A directory of images.
pub struct FilePool {
    info: PoolInfo,
    layout: Layout,
    identified: Identified,
    limits: Limits,
    /// Judges its file system, if nodes share it.
    shared: Option<Judge>,
    state: Mutex<State>,
    /// For the thread that sweeps.
    me: Weak<Self>,
}

impl FilePool {
    /// The pool in this directory. The directory is looked at when the pool is used; which pool it
    /// is, is remembered in the directory `memory`. With a judge nodes share it.
    #[must_use]
    pub fn new(
        name: &str,
        dir: PathBuf,
        limits: Limits,
        memory: Option<PathBuf>,
        shared: Option<Judge>,
    ) -> Arc<Self> {
        let info = PoolInfo {
            name: name.to_owned(),
            is_local: shared.is_none(),
            can_create: true,
            can_share_writers: false,
            exclusion: Exclusion::Recorded,
            default_size: limits.default_size,
        };
        let identified = Identified::new(name, &dir, memory);
        let (layout, state) = (Layout::new(dir), Mutex::default());
        Arc::new_cyclic(|me| Self {
            info,
            layout,
            identified,
            limits,
            shared,
            state,
            me: Weak::clone(me),
        })
    }

    /// Checks that its storage is there.
    fn check(&self) -> Result<()> {
        self.layout.check()?;
        if let Some(judge) = self.shared {
            judge(self.layout.dir())?;
        }
        self.identified.check()
    }

    /// Keeps other processes and threads from changing it.
    fn lock(&self) -> Result<Locked<'_>> {
        self.check()?;
        let is_shared = self.shared.is_some();
        let mut locked = Locked::take(&self.info.name, &self.layout, &self.state, is_shared)?;
        // Again: another node may have changed it until now.
        self.layout.check()?;
        if !locked.state().is_used {
            self.identified.settle()?;
            locked.state().is_used = true;
            self.start_sweep();
        }
        // So that volumes can be unpublished and deleted when there is no room. An earlier change
        // may have used it up.
        let _ = durable::keep_spare(self.layout.dir());
        Ok(locked)
    }

    /// The record of a volume, also of one that is being deleted.
    fn record(&self, uuid: Uuid) -> Result<Option<Record>> {
        let path = self.layout.record(uuid);
        let Some(record) = durable::read::<Record>(&path)? else { return Ok(None) };
        match record.check_format() {
            Ok(()) => Ok(Some(record)),
            Err(why) => {
                let why = format!("the record {} cannot be used: {why}", printable(&path));
                Err(Error::new(ErrorKind::Unsupported, "read", why))
            }
        }
    }

    /// Writes a record, if the lock is still held.
    fn save(&self, locked: &Locked<'_>, record: &Record) -> Result<()> {
        locked.check_held()?;
        durable::replace(&self.layout.record(record.uuid), record)
    }

    /// Makes sure that what a record says, or that there is none, is on stable storage: the call
    /// that changed it may have died or failed before.
    fn settle(&self, uuid: Uuid) -> Result<()> {
        durable::settle(&self.layout.record(uuid))
    }

    fn found(&self, record: Record) -> Found {
        let image = self.layout.image(record.uuid);
        match self.layout.image_size(record.uuid) {
            Ok(size) => Found { record, size, trouble: None },
            Err(error) => {
                let why = format!("its image {} cannot be used: {error}", printable(&image));
                Found { record, size: 0, trouble: Some(why) }
            }
        }
    }

    fn existing(&self, uuid: Uuid) -> Result<Record> {
        let record = self.record(uuid)?.filter(|record| !record.deleting);
        record.ok_or_else(|| self.not_found(&uuid.to_string()))
    }

    fn not_found(&self, what: &str) -> Error {
        let pool = &self.info.name;
        let why = format!("pool {pool} has no volume {}; see: sheave volume ls", printable(what));
        Error::new(ErrorKind::NotFound, "find", why)
    }

    /// Checks that a volume may have this size.
    fn check_size(&self, name: &str, size: u64) -> Result<()> {
        let most = self.size_max()?;
        if size <= most {
            return Ok(());
        }
        let pool = &self.info.name;
        let why = match self.limits.max_size {
            Some(limit) if limit == most => "max_size of its configuration",
            _ => "as many as its file system has",
        };
        let why =
            format!("{name}: {size} bytes, and a volume of pool {pool} has at most {most} ({why})");
        Err(Error::new(ErrorKind::TooLarge, "choose a size", why))
    }

    /// The most bytes of a volume: one that its file system can never hold is of no use.
    fn size_max(&self) -> Result<u64> {
        // A file system without bounds says 0.
        let has = Some(self.layout.room()?.total).filter(|total| *total > 0).unwrap_or(SIZE_MAX);
        Ok(has.min(self.limits.max_size.unwrap_or(SIZE_MAX)).min(SIZE_MAX))
    }

    /// Checks that there is room for `more` bytes.
    fn check_room(&self, more: u64) -> Result<()> {
        let Some(capacity) = self.limits.capacity else {
            return Ok(());
        };
        let available = capacity.saturating_sub(self.layout.image_bytes()?);
        if more > available {
            let pool = &self.info.name;
            let why = format!(
                "pool {pool} has room for {available} bytes, and {more} are wanted; delete \
                 volumes, or raise its capacity in the configuration"
            );
            return Err(Error::new(ErrorKind::NoSpace, "create", why));
        }
        Ok(())
    }

    /// Opens the image as its only writer.
    fn open_alone(&self, uuid: Uuid) -> Result<Option<Arc<dyn sheave_core::Volume>>> {
        let spec: VolumeSpec = self.text(uuid).parse()?;
        match spec.open(&VolumeOptions::default()) {
            Ok(volume) => Ok(Some(volume)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Pool for FilePool {
    fn info(&self) -> &PoolInfo {
        &self.info
    }

    fn capacity(&self) -> Result<Capacity> {
        self.check()?;
        let available = match self.limits.capacity {
            Some(capacity) => capacity.saturating_sub(self.layout.image_bytes()?),
            None => self.layout.room()?.free,
        };
        let most = self.limits.capacity.map_or(SIZE_MAX, |_| available);
        let size_max = most.min(self.size_max()?);
        Ok(Capacity { available: Some(available), size_max, size_min: SIZE_MIN })
    }

    fn create(&self, new: &NewVolume) -> Result<Found> {
        self.make(new)
    }

    fn delete_if(&self, uuid: Uuid, check: &dyn Fn(&Record) -> Result<()>) -> Result<()> {
        let locked = self.lock()?;
        let Some(record) = self.record(uuid)? else { return self.settle(uuid) };
        if record.deleting {
            return self.discard(&locked, uuid, &record.name);
        }
        check(&record)?;
        if let Some(has) = record.publications.first() {
            let why = format!(
                "{} is published to node {}; unpublish it first",
                record.name,
                printable(&has.node)
            );
            return Err(Error::new(ErrorKind::Busy, "delete", why));
        }
        // Held, so that none can open it before it is gone.
        let alone = self.open_alone(uuid)?;
        let deleted = Record { deleting: true, ..record };
        self.save(&locked, &deleted)?;
        let discarded = self.discard(&locked, uuid, &deleted.name);
        drop(alone);
        discarded
    }

    fn get(&self, key: Key<'_>) -> Result<Found> {
        self.check()?;
        let uuid = match key {
            Key::Uuid(uuid) => uuid,
            Key::Name(name) => match durable::read::<Named>(&self.layout.name(name))? {
                Some(named) if named.name == name => named.uuid,
                _ => return Err(self.not_found(name)),
            },
        };
        Ok(self.found(self.existing(uuid)?))
    }

    fn list(&self, behind: Option<Uuid>, max: usize) -> Result<Vec<Found>> {
        self.check()?;
        let mut found = Vec::new();
        let all = self.layout.all_records()?;
        for uuid in all.into_iter().filter(|uuid| behind.is_none_or(|behind| *uuid > behind)) {
            if found.len() == max {
                break;
            }
            match self.record(uuid) {
                Ok(Some(record)) if !record.deleting => found.push(self.found(record)),
                Ok(_) => {}
                // Left out, it would look deleted.
                Err(error) => {
                    let record = Record { never_format: true, ..Record::new(uuid, "") };
                    let found_so = Found { trouble: Some(error.to_string()), ..self.found(record) };
                    found.push(found_so);
                }
            }
        }
        Ok(found)
    }

    fn resize(&self, uuid: Uuid, wanted: SizeRange) -> Result<Found> {
        let _locked = self.lock()?;
        let record = self.existing(uuid)?;
        let image = self.layout.image(uuid);
        let fail = |error| failed(&image, error);
        let file = OpenOptions::new().write(true).open(&image).map_err(fail)?;
        let has = file.metadata().map_err(fail)?.len();
        if !wanted.has(has) {
            let size = wanted.choose(has)?;
            if size < has {
                let why = format!("{} has {has} bytes, and no volume shrinks", record.name);
                return Err(Error::new(ErrorKind::TooLarge, "resize", why));
            }
            self.check_size(&record.name, size)?;
            self.check_room(size - has)?;
            grow(&file, size).map_err(|error| match is_too_large(&error) {
                true => {
                    let name = &record.name;
                    let why = format!("{name}: its file system has no files of {size} bytes");
                    Error::new(ErrorKind::TooLarge, "resize", why)
                }
                false => fail(error),
            })?;
        }
        Ok(self.found(record))
    }

    fn update(
        &self,
        uuid: Uuid,
        change: &mut dyn FnMut(&mut Record) -> Result<()>,
    ) -> Result<Found> {
        let locked = self.lock()?;
        let had = self.existing(uuid)?;
        let mut record = had.clone();
        change(&mut record)?;
        match record == had {
            true => self.settle(uuid)?,
            false => self.save(&locked, &record)?,
        }
        Ok(self.found(record))
    }

    fn publish(&self, uuid: Uuid, wanted: &Publication, alone: bool) -> Result<u64> {
        let locked = self.lock()?;
        let mut record = self.existing(uuid)?;
        let is_checked = (alone || self.shared.is_some()) && record.publications.is_empty();
        // What an operator has attached is not a node's.
        let _alone = is_checked.then(|| self.open_alone(uuid)).transpose()?;
        let had = record.epoch;
        let epoch = record.publish(wanted)?;
        match record.epoch == had {
            true => self.settle(uuid)?,
            false => self.save(&locked, &record)?,
        }
        Ok(epoch)
    }

    fn unpublish(&self, uuid: Uuid, node: Option<&str>, alone: bool) -> Result<()> {
        let locked = self.lock()?;
        let mut record = self.existing(uuid)?;
        let is_checked = (alone || self.shared.is_some()) && record.is_written_by(node);
        // Held, so that none opens it by the publication that ends here.
        let _alone = is_checked.then(|| self.open_alone(uuid)).transpose()?;
        match record.unpublish(node) {
            true => self.save(&locked, &record),
            false => self.settle(uuid),
        }
    }

    fn begin_writing(&self, uuid: Uuid) -> Result<()> {
        if self.shared.is_some() { self.become_writer(uuid) } else { Ok(()) }
    }

    fn check_writer(&self, uuid: Uuid) -> Result<()> {
        if self.shared.is_some() { self.is_writer(uuid) } else { Ok(()) }
    }

    fn check_blank(&self, uuid: Uuid) -> Result<()> {
        let image = self.layout.image(uuid);
        let data = File::open(&image).and_then(|file| first_data(&file));
        match data.map_err(|error| failed(&image, error))? {
            None => Ok(()),
            Some(at) => {
                let why = format!(
                    "{} has data from byte {at} on, although it was never used: delete the \
                     volume if nothing needs it, or put a file system on it by hand",
                    printable(&image)
                );
                Err(Error::new(ErrorKind::Busy, "format", why))
            }
        }
    }

    fn text(&self, uuid: Uuid) -> String {
        self.layout.text(uuid)
    }

    fn uuid_of_text(&self, text: &str) -> Option<Uuid> {
        self.layout.uuid_of_text(text)
    }
}
