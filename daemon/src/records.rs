//! Records of devices, which survive a crash: one file each, on stable storage before the device
//! can be used.
//!
//! Each is whole or absent, see [`sheave_durable`].

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sheave_core::{Error, ErrorKind, Result, VolumeInfo, printable};
use sheave_durable::{self as durable, UNFINISHED};
use sheave_layers::RateLimits;

use crate::kernel::{DeviceKey, Front, Kernels, unknown_path};
use crate::{AttachOptions, PoolVolume};

/// The version of the format.
const FORMAT: u32 = 1;
/// How long to wait for a killed daemon: the kernel waits for its disks.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);
const LOCK_POLL: Duration = Duration::from_millis(5);

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    format: u32,
    /// The volume, as it was requested.
    pub(crate) volume: String,
    pub(crate) read_only: bool,
    /// Whether that was requested, rather than a property of the volume.
    #[serde(default)]
    pub(crate) asked_read_only: bool,
    /// Whether an orchestrator attached it: its pods may open it at any time, also while nothing
    /// has it open.
    #[serde(default)]
    pub(crate) published: bool,
    /// Of a volume of a pool; none in the records of older programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pool: Option<PoolVolume>,
    pub(crate) front: Front,
    /// Bytes.
    pub(crate) size: u64,
    /// Its logical block in bytes, which it keeps; `512` in the records of older programs.
    #[serde(default = "block_default")]
    pub(crate) block: u32,
    /// Of the volume, see [`VolumeInfo::identity`].
    #[serde(default)]
    pub(crate) identity: Option<String>,
    /// See [`RateLimits`]; 0 in the records of older programs.
    #[serde(default)]
    limit_bps: u64,
    #[serde(default)]
    limit_iops: u64,
    #[serde(rename = "mark")]
    pub(crate) key: DeviceKey,
    /// Its number; `None` until the kernel has assigned it.
    id: Option<u32>,
    /// Its path, if its number is known.
    #[serde(skip)]
    path: Option<PathBuf>,
    /// The boot ID (proc_sys_kernel(5)): devices do not survive a restart of the node.
    boot: String,
}

/// The directory of records. Only one process has it.
pub(crate) struct Records {
    path: PathBuf,
    /// Held until the threads of the process are gone. Its I/O may still be in flight, which
    /// volumes check for themselves.
    _lock: File,
}

impl Record {
    pub(crate) fn new(
        volume: &str,
        asked_read_only: bool,
        info: &VolumeInfo,
        size: u64,
        front: Front,
        key: DeviceKey,
    ) -> Self {
        Self {
            format: FORMAT,
            volume: volume.to_owned(),
            read_only: info.read_only,
            asked_read_only,
            published: false,
            pool: None,
            front,
            size,
            block: info.block.logical,
            identity: info.identity.clone(),
            limit_bps: 0,
            limit_iops: 0,
            key,
            id: None,
            path: None,
            boot: boot_id(),
        }
    }

    /// The same device with this many bytes.
    pub(crate) fn grown(&self, size: u64) -> Self {
        Self { size, ..self.clone() }
    }

    /// The same device, attached like this, too.
    pub(crate) fn attached_as(&self, options: &AttachOptions) -> Self {
        let published = self.published || options.published;
        let pool = self.pool.clone().or_else(|| options.pool.clone());
        Self { published, pool, ..self.clone() }
    }

    /// The same device with these limits.
    pub(crate) fn limited(&self, limits: RateLimits) -> Self {
        let RateLimits { bytes_per_second: limit_bps, ops_per_second: limit_iops } = limits;
        Self { limit_bps, limit_iops, ..self.clone() }
    }

    /// Its limits, beside those of its volume's text.
    pub(crate) fn limits(&self) -> RateLimits {
        RateLimits { bytes_per_second: self.limit_bps, ops_per_second: self.limit_iops }
    }

    /// Its number, if that is known. The kernel may not have the device any more.
    pub(crate) fn id(&self) -> Option<u32> {
        self.id
    }

    /// Its path.
    pub(crate) fn path(&self) -> PathBuf {
        self.path.clone().unwrap_or_else(unknown_path)
    }

    /// Sets its number.
    pub(crate) fn set_id(&mut self, id: u32, kernels: &Kernels) {
        self.id = Some(id);
        self.find_path(kernels);
    }

    /// Sets its path, if its number is known.
    pub(crate) fn find_path(&mut self, kernels: &Kernels) {
        self.path = self.id.map(|id| kernels.of(self.front).path(id));
    }

    /// Checks that a volume is the one that the device had, as far as its identity is known.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when it is another one, or has become shorter.
    pub(crate) fn check_same(&self, op: &'static str, info: &VolumeInfo, size: u64) -> Result<()> {
        let invalid = |why| Err(Error::new(ErrorKind::Invalid, op, why));
        if let (Some(had), Some(has)) = (&self.identity, &info.identity)
            && had != has
        {
            let volume = &self.volume;
            return invalid(format!(
                "another file or disk is {volume} now; put back the one that the device had, or \
                 detach it by force"
            ));
        }
        if size < self.size {
            let (volume, had) = (&self.volume, self.size);
            return invalid(format!(
                "{volume} has {size} bytes, and the device has {had}; give it its size back, or \
                 detach it by force"
            ));
        }
        Ok(())
    }

    /// Whether the node has been restarted since.
    pub(crate) fn is_stale(&self) -> bool {
        self.boot != boot_id()
    }

    /// Whether this program knows what it says.
    fn check_format(&self) -> Result<(), String> {
        match self.format {
            FORMAT => Ok(()),
            other => Err(format!("it has format {other}, and this program knows {FORMAT}")),
        }
    }
}

impl Records {
    /// Opens the directory once no other process has it.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when another process keeps it, and errors of the file system.
    pub(crate) fn open(path: PathBuf) -> Result<Self> {
        let fail =
            |error| Error::from_io("open", format!("device records {}", printable(&path)), error);
        fs::create_dir_all(&path).map_err(fail)?;
        let name = path.join("lock");
        let lock = OpenOptions::new().create(true).append(true).mode(0o600).open(name);
        let lock = lock.map_err(fail)?;
        let begun = Instant::now();
        loop {
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self { path, _lock: lock }),
                Err(Errno::WOULDBLOCK) if begun.elapsed() < LOCK_TIMEOUT => sleep(LOCK_POLL),
                Err(Errno::WOULDBLOCK) => {
                    let what = format!("{}: another daemon has these records", printable(&path));
                    return Err(Error::new(ErrorKind::Busy, "open", what));
                }
                Err(errno) => return Err(fail(errno.into())),
            }
        }
    }

    /// Writes a record to stable storage.
    ///
    /// # Errors
    /// Errors of the file system.
    pub(crate) fn save(&self, record: &Record) -> Result<()> {
        durable::replace(&self.path_of(record), record)
    }

    /// Removes a record.
    pub(crate) fn remove(&self, record: &Record) {
        let path = self.path_of(record);
        if let Err(error) = durable::remove(&path) {
            // The next start finds that there is no such device.
            tracing::warn!("a device's record is left behind: {error}");
        }
    }

    /// All records that can be read. A damaged one is left as it is, and logged. A record that was
    /// being written when its writer died is removed; its previous version still exists.
    ///
    /// # Errors
    /// When the directory cannot be listed: which volumes are devices is unknown then.
    pub(crate) fn load(&self) -> Result<Vec<Record>> {
        let entries = fs::read_dir(&self.path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let entries = entries
            .map_err(|error| Error::from_io("open", printable(&self.path).to_string(), error))?;
        let is = |path: &PathBuf, kind| path.extension().is_some_and(|found| found == kind);
        let mut records = Vec::new();
        for path in entries.into_iter().map(|entry| entry.path()) {
            if is(&path, UNFINISHED) {
                let _ = fs::remove_file(&path);
            }
            if !is(&path, "json") {
                continue;
            }
            match load_one(&path) {
                Ok(record) => records.extend(record),
                Err(error) => tracing::error!(
                    error,
                    path = %printable(&path),
                    "a device's record cannot be used; the device, if there is one, is ignored: \
                     end it by hand and remove the file"
                ),
            }
        }
        records.sort_by_key(|record| record.id);
        Ok(records)
    }

    fn path_of(&self, record: &Record) -> PathBuf {
        self.path.join(format!("{:016x}.json", record.key.0))
    }
}

fn load_one(path: &Path) -> Result<Option<Record>, String> {
    let found = durable::read::<Record>(path).map_err(|error| error.to_string())?;
    found.as_ref().map_or(Ok(()), Record::check_format)?;
    Ok(found)
}

fn block_default() -> u32 {
    512
}

fn boot_id() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

#[cfg(test)]
pub(crate) mod tests {
    use sheave_core::{BlockSizes, Capabilities};

    use crate::Choice;

    use super::*;

    fn info(identity: Option<&str>) -> VolumeInfo {
        VolumeInfo {
            block: BlockSizes::default(),
            read_only: true,
            rotational: false,
            volatile: false,
            identity: identity.map(str::to_owned),
            can: Capabilities::default(),
        }
    }

    /// A record, written and read again; `cut` is what an older program has not written.
    fn again(record: &Record, cut: &str) -> Record {
        let json = serde_json::to_string(record).unwrap();
        assert!(json.contains(cut));
        serde_json::from_str(&json.replace(cut, "")).unwrap()
    }

    pub(crate) fn record() -> Record {
        let info = info(Some("file 5"));
        let mut record =
            Record::new("/images/a.img", true, &info, 1 << 30, Front::Ublk, DeviceKey(0x1234));
        record.id = Some(3);
        record
    }

    #[test]
    fn rule_32_a_volume_that_another_one_has_taken_the_name_of_is_not_served() {
        let same = |identity, size| record().check_same("recover", &info(identity), size);
        assert!(same(Some("file 5"), 1 << 30).is_ok());
        assert!(same(Some("file 5"), 2 << 30).is_ok(), "it may have grown");
        assert!(same(Some("file 5"), 1 << 29).is_err());
        assert!(same(Some("file 6"), 1 << 30).is_err());
        // The identity is unknown.
        assert!(same(None, 1 << 30).is_ok());
        let old = again(&record(), r#""identity":"file 5","#);
        assert!(old.identity.is_none(), "of an older program");
        assert!(old.check_same("recover", &info(Some("file 6")), 1 << 30).is_ok());
    }

    #[test]
    fn a_device_keeps_its_block() {
        let mut info = info(None);
        info.block.logical = 4096;
        let made = Record::new("/images/a.img", false, &info, 1 << 30, Front::Nbd, DeviceKey(7));
        let found = again(&made, "");
        assert_eq!((found.block, &found), (4096, &made));
        assert_eq!(again(&made, r#""block":4096,"#).block, 512, "of an older program");
    }

    #[test]
    fn a_device_keeps_its_limits() {
        let limits = RateLimits { bytes_per_second: 1 << 20, ops_per_second: 500 };
        let limited = record().limited(limits);
        let found = again(&limited, "");
        assert_eq!((found.limits(), &found), (limits, &limited));
        let old = again(&record(), r#""limit_bps":0,"limit_iops":0,"#);
        assert_eq!(old.limits(), RateLimits::default(), "of an older program");
    }

    #[test]
    fn a_device_stays_that_of_a_publication() {
        let attached_as = |published, id: Option<&str>| AttachOptions {
            read_only: false,
            take_over: false,
            front: Choice::Fastest,
            published,
            pool: id.map(|id| PoolVolume {
                id: id.to_owned(),
                shared: true,
                node: "n1".to_owned(),
            }),
        };
        let published = record().attached_as(&attached_as(true, Some("fast/1")));
        let found = again(&published, "");
        assert!(found.published);
        assert_eq!(
            (found.pool.as_ref().map(|pool| pool.id.as_str()), &found),
            (Some("fast/1"), &published)
        );
        let more = published.attached_as(&attached_as(false, None));
        assert_eq!(more, published, "it stays what it was");
        let old = again(&record(), r#""published":false,"#);
        assert!(!old.published && old.pool.is_none(), "of an older program");
    }

    #[test]
    fn a_record_is_found_again_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path().join("devices")).unwrap();
        records.save(&record()).unwrap();
        assert_eq!(records.load().unwrap(), [record()]);
        assert!(!record().is_stale());
        let unfinished = records.path_of(&record()).with_extension("new");
        fs::write(&unfinished, "{").unwrap();
        assert_eq!(records.load().unwrap(), [record()]);
        assert!(!unfinished.exists());
        records.remove(&record());
        assert_eq!(records.load().unwrap(), []);
    }

    #[test]
    fn a_record_with_a_flipped_bit_is_not_believed_and_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path().to_owned()).unwrap();
        records.save(&record()).unwrap();
        let path = records.path_of(&record());
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut text = whole.clone();
            text[at] ^= 1;
            fs::write(&path, &text).unwrap();
            // A newline may be replaced by other white space.
            let believed = records.load().unwrap();
            assert!(believed.is_empty() || believed == [record()], "byte {at}");
        }
        for len in 0..whole.len() - 1 {
            fs::write(&path, &whole[..len]).unwrap();
            assert_eq!(records.load().unwrap(), [], "{len} bytes");
        }
        assert!(path.exists());
    }
}
