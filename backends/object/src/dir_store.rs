//! A directory as a store. An object is a file that appears whole, under a name that is not taken,
//! and on stable storage.
//!
//! ```text
//! DIR/root/ffffffffffffffff    DIR/log/0000000000000001/0000000000000001    DIR/tmp/…
//! ```
//!
//! A file is written and flushed in `tmp`, then linked to its name, which fails if the name is
//! taken, and the directory is flushed. The names of a directory are flushed before they are
//! listed: a process that was killed may have linked one and not flushed it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::Bytes;
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;
use sheave_core::{Error, Result, percent_decode, percent_encode, printable};
use sheave_durable::step;

use crate::store::{Answer, Created, Listed, Store, StoreError, StoreErrorKind};
use crate::stored::{Fencing, VolumeStore};
use crate::threads::Threads;

/// Where files are until they have their names. No key begins with it.
const UNFINISHED: &str = "tmp";
/// What a directory of a volume always has: its newest root is never deleted.
const MARK: &str = "root";
/// Threads for reads, and for writes.
const THREADS_MAX: usize = 4;

/// A directory of objects.
#[derive(Clone, Debug)]
pub struct DirStore {
    dir: Arc<Path>,
    /// Reads do not wait for writes, which wait for the disk.
    reads: Arc<Threads>,
    writes: Arc<Threads>,
}

impl DirStore {
    /// A directory that exists, or will be made by [`VolumeStore::make`].
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        let [reads, writes] =
            ["object-read", "object-write"].map(|name| Threads::new(name, THREADS_MAX));
        Self { dir: dir.into(), reads, writes }
    }

    /// Checks that this is the directory that [`VolumeStore::make`] has made. Another one may be
    /// there: the mount point of its file system, which is gone for now. What was made there would
    /// be lost.
    fn check_there(&self) -> io::Result<()> {
        match self.dir.join(MARK).symlink_metadata() {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let why = format!(
                    "{} has no volume now; if its file system is not mounted, mount it",
                    printable(&*self.dir)
                );
                Err(io::Error::other(why))
            }
            Err(error) => Err(error),
        }
    }

    fn sweep_unfinished(&self) -> io::Result<()> {
        let entries = match fs::read_dir(self.dir.join(UNFINISHED)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for entry in entries {
            let path = entry?.path();
            let Ok(file) = File::open(&path) else { continue };
            // Its writer holds the lock until it has its name.
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                let _ = fs::remove_file(&path);
            }
        }
        Ok(())
    }

    fn create_now(&self, key: &str, body: &[u8]) -> Result<Created, StoreError> {
        let path = self.path(key);
        let made = match path.symlink_metadata() {
            Ok(_) => Ok(Created::Exists),
            Err(_) => self.link(&path, body),
        };
        let made = made.map_err(|error| failed(key, &error))?;
        step();
        // Of one that exists, another process may not have done it. Opening may fail in passing; a
        // flush that failed does not, since the next one would succeed without the name.
        let parent = path.parent().unwrap_or(&self.dir);
        let parent = File::open(parent).map_err(|error| failed(key, &error))?;
        parent.sync_all().map_err(|error| {
            let why = format!("cannot flush the directory of {key}: {error}");
            StoreError::new(StoreErrorKind::Broken, why)
        })?;
        step();
        Ok(made)
    }

    /// Writes a file beside its place, and links it to its name.
    fn link(&self, path: &Path, body: &[u8]) -> io::Result<Created> {
        let (unfinished, mut file) = self.unfinished()?;
        let mut write = || {
            step();
            file.write_all(body)?;
            file.sync_all()?;
            step();
            match link_or_rename(&unfinished, path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.make_parents(path)?;
                    link_or_rename(&unfinished, path)
                }
                other => other,
            }
        };
        let linked = write();
        step();
        let _ = fs::remove_file(&unfinished);
        match linked {
            Ok(()) => Ok(Created::Made),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Created::Exists),
            Err(error) => Err(error),
        }
    }

    /// A new file, which no sweep removes as long as it is open.
    fn unfinished(&self) -> io::Result<(PathBuf, File)> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let dir = self.dir.join(UNFINISHED);
        loop {
            let name = format!("{}-{}", process::id(), NUMBER.fetch_add(1, Relaxed));
            let path = dir.join(name);
            let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
            let file = match made {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.check_there()?;
                    make_dir(&dir)?;
                    continue;
                }
                // Left by a process of this number, on this node or on another.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other?,
            };
            flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            return Ok((path, file));
        }
    }

    /// Makes the directories between the store's, which must exist, and a file's.
    fn make_parents(&self, path: &Path) -> io::Result<()> {
        self.check_there()?;
        let below = path.parent().and_then(|parent| parent.strip_prefix(&self.dir).ok());
        let mut dir = self.dir.to_path_buf();
        for name in below.into_iter().flatten() {
            dir.push(name);
            make_dir(&dir)?;
        }
        Ok(())
    }

    fn get_now(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let read = || {
            let mut file = File::open(self.path(key))?;
            let end = range.end.min(file.metadata()?.len());
            let mut data = vec![0; end.saturating_sub(range.start) as usize];
            file.seek(SeekFrom::Start(range.start))?;
            file.read_exact(&mut data)?;
            Ok(data.into())
        };
        read().map_err(|error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => match self.check_there() {
                Ok(()) => StoreError::new(StoreErrorKind::NotFound, key),
                Err(error) => failed(key, &error),
            },
            // The disk has lost it: no try will bring it back.
            _ if Errno::from_io_error(&error) == Some(Errno::IO) => {
                StoreError::new(StoreErrorKind::Broken, format!("{key}: {error}"))
            }
            _ => failed(key, &error),
        })
    }

    fn list_now(&self, prefix: &str, after: &str, max: usize) -> Result<Vec<Listed>, StoreError> {
        let below = prefix.rsplit_once('/').map_or("", |(dir, _)| dir);
        let mut keys = Vec::new();
        self.collect(below, &mut keys).map_err(|error| failed(prefix, &error))?;
        keys.retain(|key| key.starts_with(prefix) && key.as_str() > after);
        keys.sort_unstable();
        let len = |key: &String| self.path(key).metadata().ok().map(|found| found.len());
        // One that is gone by now was deleted.
        let found = keys.into_iter().filter_map(|key| {
            let bytes = len(&key)?;
            Some(Listed { key, bytes })
        });
        Ok(found.take(max).collect())
    }

    /// All keys below a directory, which are on stable storage then.
    fn collect(&self, below: &str, keys: &mut Vec<String>) -> io::Result<()> {
        let dir = if below.is_empty() { self.dir.to_path_buf() } else { self.path(below) };
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        let begin = keys.len();
        let mut dirs = Vec::new();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str().and_then(percent_decode) else { continue };
            let Ok(name) = String::from_utf8(name.into_owned()) else { continue };
            if below.is_empty() && name == UNFINISHED {
                continue;
            }
            let key = if below.is_empty() { name } else { format!("{below}/{name}") };
            // Something else has made it, under a name that no object has.
            if self.path(&key) != entry.path() {
                continue;
            }
            let is_dir = entry.file_type()?.is_dir();
            if is_dir { dirs.push(key) } else { keys.push(key) }
        }
        if keys.len() > begin || !dirs.is_empty() {
            File::open(&dir)?.sync_all()?;
        }
        dirs.iter().try_for_each(|dir| self.collect(dir, keys))
    }

    fn siblings_now(&self, max: usize) -> Result<Vec<String>, StoreError> {
        let above = self.dir.parent().unwrap_or(&self.dir);
        let name = |entry: io::Result<fs::DirEntry>| {
            let entry = entry?;
            let is_volume = entry.path().join(MARK).is_dir();
            Ok(entry.file_name().into_string().ok().filter(|_| is_volume))
        };
        let read = || fs::read_dir(above)?.filter_map(|entry| name(entry).transpose()).collect();
        let names: io::Result<Vec<String>> = read();
        let mut names = names.map_err(|error| failed(&above.to_string_lossy(), &error))?;
        names.sort_unstable();
        names.truncate(max);
        Ok(names)
    }

    fn delete_now(&self, key: &str) -> Result<(), StoreError> {
        let path = self.path(key);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(key, &error)),
            _ => {
                // The last object of an epoch takes its directory along.
                if let Some(dir) = path.parent().filter(|dir| **dir != *self.dir) {
                    let _ = fs::remove_dir(dir);
                }
                Ok(())
            }
        }
    }

    /// The file of a key. Parts of keys may have any characters; a name of a file begins with no
    /// dot, and has few.
    fn path(&self, key: &str) -> PathBuf {
        let mut path = self.dir.to_path_buf();
        for part in key.split('/') {
            let is_kept = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            let name = percent_encode(part.as_bytes(), is_kept);
            path.push(match name.strip_prefix('.') {
                Some(rest) => format!("%2E{rest}"),
                None => name,
            });
        }
        path
    }
}

impl Store for DirStore {
    fn create<'a>(&'a self, key: &'a str, body: Bytes) -> Answer<'a, Created> {
        let (store, key) = (self.clone(), key.to_owned());
        Box::pin(self.writes.run(move || store.create_now(&key, &body)))
    }

    fn get<'a>(&'a self, key: &'a str, range: Range<u64>) -> Answer<'a, Bytes> {
        let (store, key) = (self.clone(), key.to_owned());
        Box::pin(self.reads.run(move || store.get_now(&key, range)))
    }

    fn list<'a>(&'a self, prefix: &'a str, after: &'a str, max: usize) -> Answer<'a, Vec<Listed>> {
        let (store, prefix, after) = (self.clone(), prefix.to_owned(), after.to_owned());
        Box::pin(self.reads.run(move || store.list_now(&prefix, &after, max)))
    }

    fn delete<'a>(&'a self, key: &'a str) -> Answer<'a, ()> {
        let (store, key) = (self.clone(), key.to_owned());
        Box::pin(self.writes.run(move || store.delete_now(&key)))
    }

    fn sibling(&self, name: &str) -> Option<Arc<dyn Store>> {
        Some(Arc::new(Self { dir: self.dir.with_file_name(name).into(), ..self.clone() }))
    }
}

impl VolumeStore for DirStore {
    /// A link is made, or its name is taken.
    fn fencing(&self) -> Fencing {
        Fencing::Sure
    }

    fn siblings(&self, max: usize) -> Answer<'_, Vec<String>> {
        let store = self.clone();
        Box::pin(self.reads.run(move || store.siblings_now(max)))
    }

    fn place(&self) -> Option<String> {
        let path = fs::canonicalize(&self.dir).ok()?;
        Some(format!("objects in {path:?}"))
    }

    fn home(&self) -> Option<(String, String)> {
        let name = self.dir.file_name()?.to_str()?.to_owned();
        let parent = fs::canonicalize(self.dir.parent()?).ok()?;
        Some((format!("{parent:?}"), name))
    }

    /// Makes the directory, if there is none, on stable storage. The one above it must exist, since
    /// it may be the mount point of a file system.
    fn make(&self) -> Result<()> {
        let make = || {
            make_dir(&self.dir)?;
            make_dir(&self.dir.join(MARK))
        };
        make().map_err(|error| {
            let hint = match error.kind() {
                io::ErrorKind::NotFound => ": the directory above it must exist",
                _ => "",
            };
            Error::from_io("make", format!("{}{hint}", printable(&*self.dir)), error)
        })
    }

    fn sweep(&self) -> Result<()> {
        self.sweep_unfinished()
            .map_err(|error| Error::from_io("sweep", printable(&*self.dir).to_string(), error))
    }
}

/// Gives a file a name that is not taken. Some file systems have no links, but such a rename.
fn link_or_rename(unfinished: &Path, path: &Path) -> io::Result<()> {
    match fs::hard_link(unfinished, path) {
        Err(error) if has_no_links(&error) => {
            Ok(renameat_with(CWD, unfinished, CWD, path, RenameFlags::NOREPLACE)?)
        }
        other => other,
    }
}

fn has_no_links(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::MLINK)
    )
}

/// Makes a directory on stable storage; the one above it must exist.
fn make_dir(dir: &Path) -> io::Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => sheave_durable::sync_parent(dir),
    }
}

/// What the file system says of an object. A full disk, or one that is gone, may come back.
fn failed(key: &str, error: &io::Error) -> StoreError {
    let kind = match error.kind() {
        // A file is where a directory must be.
        io::ErrorKind::PermissionDenied
        | io::ErrorKind::ReadOnlyFilesystem
        | io::ErrorKind::NotADirectory => StoreErrorKind::Denied,
        io::ErrorKind::InvalidFilename | io::ErrorKind::Unsupported => StoreErrorKind::Broken,
        _ => StoreErrorKind::Busy,
    };
    StoreError::new(kind, format!("{key}: {error}"))
}

#[cfg(test)]
mod tests;
