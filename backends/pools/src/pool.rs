//! What a pool is.

use std::collections::BTreeMap;

use sheave_core::{Error, ErrorKind, Result};
use uuid::Uuid;

use crate::record::{AccessMode, Publication, Record};

/// Bytes of which a volume's size is a multiple: every block size divides them.
pub const SIZE_UNIT: u64 = 4096;
/// The least and the most bytes of a volume that a pool makes.
pub(crate) const SIZE_MIN: u64 = 1 << 20;
pub(crate) const SIZE_MAX: u64 = 1 << 56;
/// Bytes of a name (the CSI specification, "Size Limits").
const NAME_LEN_MAX: usize = 128;
/// Bytes of all parameters of a volume (the same).
const PARAMETERS_LEN_MAX: usize = 4 << 10;

/// A catalog of volumes. All calls may wait for its storage.
pub trait Pool: Send + Sync {
    /// What can be said without its storage.
    fn info(&self) -> &PoolInfo;

    /// How much room it has.
    ///
    /// # Errors
    /// What its storage says.
    fn capacity(&self) -> Result<Capacity>;

    /// Makes a volume; the one that has the name already, if it is as it is wanted. After a crash
    /// in the middle the same call makes it whole, and nothing is left behind without it.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] when a volume of this name is different, [`ErrorKind::TooLarge`] when
    /// no volume can have this size, [`ErrorKind::NoSpace`] when the pool is full,
    /// [`ErrorKind::Unsupported`] when its volumes are made elsewhere.
    fn create(&self, new: &NewVolume) -> Result<Found>;

    /// Deletes a volume with its data. One that is absent is deleted.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`], and nothing has changed, when it is published or in use.
    fn delete(&self, uuid: Uuid) -> Result<()> {
        self.delete_if(uuid, &|_| Ok(()))
    }

    /// The same if the check allows it, with no change of the record between the two.
    ///
    /// # Errors
    /// As for [`Self::delete`], and what the check says.
    fn delete_if(&self, uuid: Uuid, check: &dyn Fn(&Record) -> Result<()>) -> Result<()>;

    /// Finds a volume.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none, [`ErrorKind::Corrupt`] when its record is
    /// damaged.
    fn get(&self, key: Key<'_>) -> Result<Found>;

    /// At most `max` volumes behind this id, in the order of their ids. One whose record is damaged
    /// has a trouble that says so, and no name.
    ///
    /// # Errors
    /// What its storage says.
    fn list(&self, behind: Option<Uuid>, max: usize) -> Result<Vec<Found>>;

    /// Makes a volume longer, also while it is in use: its users learn of it by other means.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::TooLarge`], [`ErrorKind::NoSpace`],
    /// [`ErrorKind::Unsupported`], as for [`Self::create`].
    fn resize(&self, uuid: Uuid, wanted: SizeRange) -> Result<Found>;

    /// Changes a record. It is on stable storage when this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], and what `change` says: nothing is written then.
    fn update(
        &self,
        uuid: Uuid,
        change: &mut dyn FnMut(&mut Record) -> Result<()>,
    ) -> Result<Found>;

    /// Lets a node use a volume. The epoch is greater than that of every publication before; 0
    /// where there are no records. With `alone`, and in any case where nodes share the pool, the
    /// first one begins only while nothing has the volume open.
    ///
    /// # Errors
    /// Those of [`Record::publish`], and as for [`Self::unpublish`].
    fn publish(&self, uuid: Uuid, wanted: &Publication, alone: bool) -> Result<u64>;

    /// Checks that no byte of the volume was ever written, as far as the pool can tell.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when one was, and what its storage says.
    fn check_blank(&self, uuid: Uuid) -> Result<()>;

    /// Ends the publication to a node, or all; what is not published is done. With `alone`, and in
    /// any case where nodes share the pool, one that may write ends only while nothing has the
    /// volume open.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], and [`ErrorKind::Busy`] when a process or device has it open.
    fn unpublish(&self, uuid: Uuid, node: Option<&str>, alone: bool) -> Result<()>;

    /// Before this daemon attaches a volume for writing. Where nodes share the pool, the record
    /// says so from then on.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when another node has it open.
    fn begin_writing(&self, uuid: Uuid) -> Result<()>;

    /// After this daemon has opened a volume for writing, also one whose device it had before a
    /// crash: whether it may.
    ///
    /// # Errors
    /// [`ErrorKind::Fenced`] when another node has written to it since.
    fn check_writer(&self, uuid: Uuid) -> Result<()>;

    /// The VOLUME text of a volume that was found.
    fn text(&self, uuid: Uuid) -> String;

    /// The volume with this VOLUME text.
    fn uuid_of_text(&self, text: &str) -> Option<Uuid>;
}

/// What can be said of a pool without its storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolInfo {
    /// As the configuration calls it.
    pub name: String,
    /// Its volumes can be used on this node only.
    pub is_local: bool,
    /// Volumes are made, deleted and resized through it.
    pub can_create: bool,
    /// Several nodes may write to a volume at once.
    pub can_share_writers: bool,
    /// What keeps two nodes from writing to a volume at once.
    pub exclusion: Exclusion,
    /// The size of a volume that no size is wanted for, in bytes.
    pub default_size: u64,
}

/// What keeps two nodes from writing to a volume at once, where they must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exclusion {
    /// The records of its pool.
    Recorded,
    /// The orchestrator: there are no records, and the configuration trusts it.
    Attacher,
    /// Nothing, so only the operator of a node may have it written.
    Readers,
}

impl PoolInfo {
    /// Checks that a node may use a volume for an orchestrator.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when it is to write, and nothing keeps other nodes from doing it.
    pub fn check_writer(&self, op: &'static str, read_only: bool) -> Result<()> {
        if read_only || self.exclusion != Exclusion::Readers {
            return Ok(());
        }
        let why = format!(
            "pool {} has no records that keep a second node from writing; use it read-only \
             (ReadOnlyMany), or, if each volume is written by one node at a time, set \
             trust_attacher = true in the pool's configuration",
            self.name
        );
        Err(Error::new(ErrorKind::Busy, op, why))
    }

    /// Checks that volumes of this pool can be used so.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with what can be had instead.
    pub fn check_mode(&self, mode: AccessMode, block: bool) -> Result<()> {
        let why = match mode {
            AccessMode::SingleNodeWriter
            | AccessMode::SingleNodeReaderOnly
            | AccessMode::SingleNodeSingleWriter
            | AccessMode::SingleNodeMultiWriter
            | AccessMode::MultiNodeReaderOnly => return Ok(()),
            AccessMode::MultiNodeMultiWriter if !block => {
                "a file system cannot be written from several nodes (ReadWriteMany); use \
                 ReadWriteOnce, or a raw block volume"
            }
            AccessMode::MultiNodeMultiWriter if self.can_share_writers => return Ok(()),
            AccessMode::MultiNodeMultiWriter => {
                "its volumes are written from one node at a time; use ReadWriteOnce"
            }
            AccessMode::MultiNodeSingleWriter => {
                "one writer beside readers on other nodes is not supported; use ReadWriteOnce or \
                 ReadOnlyMany"
            }
        };
        let why = format!("pool {}: {why}", self.name);
        Err(Error::new(ErrorKind::Invalid, "check the access mode", why))
    }
}

/// How much room a pool has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Bytes that new volumes may have together; `None` where that is not known.
    pub available: Option<u64>,
    /// The most bytes of one volume.
    pub size_max: u64,
    /// The least.
    pub size_min: u64,
}

/// A volume that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What is known of it.
    pub record: Record,
    /// Bytes, as its device has them; 0 if that is not known.
    pub size: u64,
    /// What is wrong with its data, if something is.
    pub trouble: Option<String>,
}

/// By what a volume is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key<'a> {
    /// Its id in the pool.
    Uuid(Uuid),
    /// Its name.
    Name(&'a str),
}

/// A volume to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewVolume {
    /// Unique in its pool.
    pub name: String,
    /// How long.
    pub size: SizeRange,
    /// Bytes per second; 0 is no limit.
    pub limit_bps: u64,
    /// Ops per second; 0 is no limit.
    pub limit_iops: u64,
    /// Kept with it, and part of what makes two wishes the same.
    pub parameters: BTreeMap<String, String>,
}

/// A size in bytes that is wanted; 0 is no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SizeRange {
    /// At least.
    pub required: u64,
    /// At most.
    pub limit: u64,
}

impl SizeRange {
    /// Whether a size is in it.
    #[must_use]
    pub fn has(self, size: u64) -> bool {
        size >= self.required && (self.limit == 0 || size <= self.limit)
    }

    /// The size to make, the smallest that fits; `default` if there are no bounds, or as much of it
    /// as the limit allows.
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`] when no size fits.
    pub fn choose(self, default: u64) -> Result<u64> {
        let Self { required, limit } = self;
        let most = if limit == 0 { SIZE_MAX } else { limit.min(SIZE_MAX) };
        let wanted =
            if required == 0 { default.min(most / SIZE_UNIT * SIZE_UNIT) } else { required };
        let size = wanted.max(SIZE_MIN).checked_next_multiple_of(SIZE_UNIT);
        size.filter(|size| *size <= most).ok_or_else(|| {
            let wanted = match limit {
                0 => format!("{required} bytes"),
                _ => format!("{required} to {limit} bytes"),
            };
            let why = format!(
                "{wanted}: no volume can have that: sizes are multiples of {SIZE_UNIT} from \
                 {SIZE_MIN} to {SIZE_MAX}"
            );
            Error::new(ErrorKind::TooLarge, "choose a size", why)
        })
    }
}

impl NewVolume {
    /// Checks what does not depend on the pool.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with what is wrong.
    pub fn check(&self) -> Result<()> {
        let invalid = |why| Err(Error::new(ErrorKind::Invalid, "create", why));
        let len = self.name.len();
        if len == 0 || len > NAME_LEN_MAX {
            return invalid(format!("a name has 1 to {NAME_LEN_MAX} bytes, and this one {len}"));
        }
        if self.name.chars().any(char::is_control) {
            return invalid("a name has no control characters".to_owned());
        }
        let len: usize = self.parameters.iter().map(|(key, value)| key.len() + value.len()).sum();
        if len > PARAMETERS_LEN_MAX {
            return invalid(format!(
                "parameters have at most {PARAMETERS_LEN_MAX} bytes, and these {len}"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(required: u64, limit: u64) -> Option<u64> {
        SizeRange { required, limit }.choose(1 << 30).ok()
    }

    #[test]
    fn rule_04_a_size_fits_or_there_is_none() {
        assert_eq!(choose(0, 0), Some(1 << 30));
        assert_eq!(choose(0, 5 << 20), Some(5 << 20));
        assert_eq!(choose((2 << 20) + 1, 0), Some((2 << 20) + 4096));
        assert_eq!(choose(1, 0), Some(SIZE_MIN));
        for (required, limit) in [
            (2 << 20, 1 << 20),
            ((2 << 20) + 1, (2 << 20) + 2),
            (0, 4096),
            (SIZE_MAX + 1, 0),
            (u64::MAX, u64::MAX),
        ] {
            assert_eq!(choose(required, limit), None, "{required} to {limit}");
        }
        let refused = SizeRange { required: 2, limit: 1 }.choose(0).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::TooLarge);
    }

    #[test]
    fn rule_09_every_access_mode_is_judged() {
        use AccessMode::*;
        let info = |can_share_writers| PoolInfo {
            name: "fast".to_owned(),
            is_local: false,
            can_create: true,
            can_share_writers,
            exclusion: Exclusion::Recorded,
            default_size: 0,
        };
        let ok = |shares, mode, block| info(shares).check_mode(mode, block).is_ok();
        for mode in [
            SingleNodeWriter,
            SingleNodeReaderOnly,
            MultiNodeReaderOnly,
            SingleNodeSingleWriter,
            SingleNodeMultiWriter,
        ] {
            assert!(ok(false, mode, false) && ok(false, mode, true), "{mode:?}");
        }
        assert!(!ok(true, MultiNodeSingleWriter, true));
        assert!(ok(true, MultiNodeMultiWriter, true));
        assert!(!ok(true, MultiNodeMultiWriter, false), "no file system from several nodes");
        assert!(!ok(false, MultiNodeMultiWriter, true), "where the pool cannot");
    }

    #[test]
    fn rule_04_names_have_up_to_128_bytes_of_any_script() {
        let named = |name: &str| NewVolume {
            name: name.to_owned(),
            size: SizeRange::default(),
            limit_bps: 0,
            limit_iops: 0,
            parameters: BTreeMap::new(),
        };
        for good in ["a", "pvc/../..", "müller ☃", &"ü".repeat(64)] {
            named(good).check().unwrap();
        }
        for bad in ["", "a\nb", "\0", &"n".repeat(129)] {
            assert_eq!(named(bad).check().unwrap_err().kind(), ErrorKind::Invalid, "{bad:?}");
        }
    }
}
