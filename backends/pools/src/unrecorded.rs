//! Pools that keep no records. Their volumes are made, changed and deleted elsewhere, so they are
//! never formatted, and which node may use one is left to the orchestrator (docs/decisions/0017).

use sheave_core::{Error, ErrorKind, Result};
use uuid::Uuid;

use crate::pool::{
    Capacity, Exclusion, Found, Key, NewVolume, Pool, PoolInfo, SIZE_MAX, SIZE_MIN, SizeRange,
};
use crate::record::{Publication, Record};

/// What differs between such pools.
pub(crate) trait Unrecorded: Send + Sync {
    /// As [`Pool::info`].
    fn info(&self) -> &PoolInfo;

    /// Where its volumes are made, changed and deleted, in one sentence.
    fn elsewhere(&self) -> String;

    /// As [`Pool::get`].
    fn find(&self, key: Key<'_>) -> Result<Found>;

    /// As [`Pool::list`].
    fn page(&self, behind: Option<Uuid>, max: usize) -> Result<Vec<Found>>;

    /// As [`Pool::text`].
    fn text_of(&self, uuid: Uuid) -> String;

    /// As [`Pool::uuid_of_text`].
    fn uuid_of(&self, text: &str) -> Option<Uuid>;
}

/// What can be said of a pool of that name. With `trusts_attacher` its volumes may be written for
/// an orchestrator: then it alone keeps two nodes from doing it at once.
pub(crate) fn info(name: &str, trusts_attacher: bool) -> PoolInfo {
    let exclusion = match trusts_attacher {
        true => Exclusion::Attacher,
        false => Exclusion::Readers,
    };
    PoolInfo {
        name: name.to_owned(),
        is_local: false,
        can_create: false,
        can_share_writers: false,
        exclusion,
        default_size: 0,
    }
}

/// The record of a volume, made when it is asked for.
pub(crate) fn record(uuid: Uuid, name: &str) -> Record {
    Record { never_format: true, ..Record::new(uuid, name) }
}

/// A volume whose size could not be learned.
pub(crate) fn without_size(record: Record, error: &Error) -> Found {
    Found { record, size: 0, trouble: Some(format!("its size is not known: {error}")) }
}

fn refused<T>(pool: &impl Unrecorded, op: &'static str) -> Result<T> {
    Err(Error::new(ErrorKind::Unsupported, op, pool.elsewhere()))
}

impl<P: Unrecorded> Pool for P {
    fn info(&self) -> &PoolInfo {
        Unrecorded::info(self)
    }

    fn capacity(&self) -> Result<Capacity> {
        Ok(Capacity { available: Some(0), size_max: SIZE_MAX, size_min: SIZE_MIN })
    }

    fn create(&self, _: &NewVolume) -> Result<Found> {
        refused(self, "create")
    }

    fn delete_if(&self, _: Uuid, _: &dyn Fn(&Record) -> Result<()>) -> Result<()> {
        refused(self, "delete")
    }

    fn get(&self, key: Key<'_>) -> Result<Found> {
        self.find(key)
    }

    fn list(&self, behind: Option<Uuid>, max: usize) -> Result<Vec<Found>> {
        self.page(behind, max)
    }

    fn resize(&self, uuid: Uuid, wanted: SizeRange) -> Result<Found> {
        let found = self.find(Key::Uuid(uuid))?;
        if wanted.has(found.size) { Ok(found) } else { refused(self, "resize") }
    }

    fn update(&self, _: Uuid, _: &mut dyn FnMut(&mut Record) -> Result<()>) -> Result<Found> {
        refused(self, "set")
    }

    fn publish(&self, uuid: Uuid, wanted: &Publication, _: bool) -> Result<u64> {
        self.find(Key::Uuid(uuid))?;
        Unrecorded::info(self).check_writer("publish", wanted.read_only)?;
        Ok(0)
    }

    fn check_blank(&self, _: Uuid) -> Result<()> {
        refused(self, "format")
    }

    fn unpublish(&self, _: Uuid, _: Option<&str>, _: bool) -> Result<()> {
        Ok(())
    }

    fn begin_writing(&self, _: Uuid) -> Result<()> {
        Ok(())
    }

    fn check_writer(&self, _: Uuid) -> Result<()> {
        Ok(())
    }

    fn text(&self, uuid: Uuid) -> String {
        self.text_of(uuid)
    }

    fn uuid_of_text(&self, text: &str) -> Option<Uuid> {
        self.uuid_of(text)
    }
}
