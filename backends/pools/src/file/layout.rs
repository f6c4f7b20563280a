//! Where things are in a directory of images.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, OFlags, StatxFlags, statvfs, statx};
use serde::{Deserialize, Serialize};
use sheave_core::{Error, ErrorKind, Result, printable};
use sheave_durable::{self as durable, UNFINISHED};
use sheave_volumes::path_text;
use uuid::Uuid;

/// What hashes of names are made with.
const NAMES: Uuid = Uuid::from_u128(0x5e6f_2d1c_9a74_4b0e_8d3a_c1b2_7f60_94e5);
/// An image is served as it is, whatever its first bytes look like.
const PARAMETERS: &str = "?format=raw";

/// Which volume has a name.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Named {
    pub(super) name: String,
    pub(super) uuid: Uuid,
}

/// Bytes of a file system.
pub(super) struct Room {
    pub(super) total: u64,
    pub(super) free: u64,
}

pub(super) struct Layout {
    dir: PathBuf,
}

impl Layout {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Checks that the directory is there. It is never made: it may be that it is not mounted. To
    /// open a directory has a network file system forget what it remembers of it.
    pub(super) fn check(&self) -> Result<()> {
        let open = |path: &Path| {
            OpenOptions::new().read(true).custom_flags(OFlags::DIRECTORY.bits() as i32).open(path)
        };
        match open(&self.dir) {
            Ok(_) => {}
            Err(error) => {
                let why = format!(
                    "the pool's directory {} cannot be used ({error}); mount or make it",
                    printable(&self.dir)
                );
                return Err(Error::new(ErrorKind::Io, "pool", why));
            }
        }
        match open(&self.names()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed(&self.names(), error))
            }
            _ => Ok(()),
        }
    }

    /// The bytes of an image, as its file server has them now.
    pub(super) fn image_size(&self, uuid: Uuid) -> io::Result<u64> {
        let found = statx(CWD, self.image(uuid), AtFlags::STATX_FORCE_SYNC, StatxFlags::SIZE)?;
        Ok(found.stx_size)
    }

    pub(super) fn lock(&self) -> PathBuf {
        self.dir.join(".sheave.lock")
    }

    /// The bytes of its file system.
    pub(super) fn room(&self) -> Result<Room> {
        let found = statvfs(&self.dir).map_err(|errno| failed(&self.dir, errno.into()))?;
        Ok(Room {
            total: found.f_blocks.saturating_mul(found.f_frsize),
            free: found.f_bavail.saturating_mul(found.f_frsize),
        })
    }

    pub(super) fn image(&self, uuid: Uuid) -> PathBuf {
        self.dir.join(format!("{uuid}.img"))
    }

    pub(super) fn record(&self, uuid: Uuid) -> PathBuf {
        self.dir.join(format!("{uuid}.json"))
    }

    pub(super) fn name(&self, name: &str) -> PathBuf {
        let hash = Uuid::new_v5(&NAMES, name.as_bytes());
        self.names().join(format!("{hash}.json"))
    }

    fn names(&self) -> PathBuf {
        self.dir.join("names")
    }

    pub(super) fn make_names(&self) -> Result<()> {
        let names = self.names();
        match fs::create_dir(&names) {
            Ok(()) => durable::sync_parent(&names).map_err(|error| failed(&names, error)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(failed(&names, error)),
        }
    }

    /// The files of all names.
    pub(super) fn name_files(&self) -> Result<Vec<PathBuf>> {
        of_kind(&self.names(), "json")
    }

    /// The ids of all records, in their order.
    pub(super) fn all_records(&self) -> Result<Vec<Uuid>> {
        self.uuids("json")
    }

    /// Names and records that are being written, or were when their writer died.
    pub(super) fn unfinished(&self) -> Result<Vec<PathBuf>> {
        let records = self.uuids(UNFINISHED)?.into_iter();
        let records = records.map(|uuid| self.record(uuid).with_extension(UNFINISHED));
        Ok(of_kind(&self.names(), UNFINISHED)?.into_iter().chain(records).collect())
    }

    /// The bytes of all images together.
    pub(super) fn image_bytes(&self) -> Result<u64> {
        let mut sum = 0_u64;
        for uuid in self.uuids("img")? {
            match self.image_size(uuid) {
                Ok(size) => sum = sum.saturating_add(size),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(&self.image(uuid), error)),
            }
        }
        Ok(sum)
    }

    fn uuids(&self, kind: &str) -> Result<Vec<Uuid>> {
        let files = of_kind(&self.dir, kind)?.into_iter();
        let mut uuids: Vec<_> = files.filter_map(|path| uuid_of(path.file_stem()?)).collect();
        uuids.sort_unstable();
        Ok(uuids)
    }

    pub(super) fn text(&self, uuid: Uuid) -> String {
        path_text(&self.image(uuid)) + PARAMETERS
    }

    pub(super) fn uuid_of_text(&self, text: &str) -> Option<Uuid> {
        let stem = text.strip_suffix(PARAMETERS)?.strip_suffix(".img")?;
        let uuid = uuid_of(OsStr::new(stem.rsplit('/').next()?))?;
        (self.text(uuid) == text).then_some(uuid)
    }
}

/// What the file system says of a file.
pub(super) fn failed(path: &Path, error: io::Error) -> Error {
    Error::from_io("pool", printable(path).to_string(), error)
}

/// An id in the one way in which it is written.
fn uuid_of(text: &OsStr) -> Option<Uuid> {
    let text = text.to_str()?;
    Uuid::try_parse(text).ok().filter(|uuid| uuid.to_string() == text)
}

/// The files of a directory with this extension; none if it is absent.
fn of_kind(dir: &Path, kind: &str) -> Result<Vec<PathBuf>> {
    let list = match fs::read_dir(dir) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(dir, error)),
    };
    let is = |path: &PathBuf| path.extension().is_some_and(|found| found == kind);
    let paths = list.map(|entry| entry.map(|entry| entry.path()));
    let paths = paths.filter(|path| path.as_ref().map_or(true, is));
    paths.collect::<io::Result<_>>().map_err(|error| failed(dir, error))
}
