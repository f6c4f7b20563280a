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
use crate::threads::{run_read, run_write};

/// Where files are until they have their names. No key begins with it.
const UNFINISHED: &str = "tmp";

/// A directory of objects.
#[derive(Clone, Debug)]
pub struct DirStore {
    dir: Arc<Path>,
}

impl DirStore {
    /// A directory that exists, or will be made by [`DirStore::make`].
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.into() }
    }

    /// Makes the directory, if there is none, on stable storage. The one above it must exist, since
    /// it may be the mount point of a file system.
    ///
    /// # Errors
    /// What the file system says.
    pub fn make(&self) -> Result<()> {
        let made = match fs::create_dir(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => sheave_durable::sync_parent(&self.dir),
        };
        made.map_err(|error| {
            let hint = match error.kind() {
                io::ErrorKind::NotFound => ": the directory above it must exist",
                _ => "",
            };
            Error::from_io("make", format!("{}{hint}", printable(&*self.dir)), error)
        })
    }

    /// Removes files that killed processes have left unfinished.
    ///
    /// # Errors
    /// What the file system says.
    pub fn sweep(&self) -> Result<()> {
        self.sweep_unfinished()
            .map_err(|error| Error::from_io("sweep", printable(&*self.dir).to_string(), error))
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

    /// Removes the directory, if it is empty but for what was never an object.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove_if_empty(&self) -> Result<()> {
        for name in [UNFINISHED, "log", "root"] {
            let _ = fs::remove_dir(self.dir.join(name));
        }
        match fs::remove_dir(&self.dir) {
            Err(error) if is_full_or_absent(&error) => Ok(()),
            other => other.map_err(|error| {
                Error::from_io("remove", printable(&*self.dir).to_string(), error)
            }),
        }
    }

    fn create_now(&self, key: &str, body: &[u8]) -> Result<Created, StoreError> {
        let path = self.path(key);
        let made = match path.symlink_metadata() {
            Ok(_) => Ok(Created::Exists),
            Err(_) => self.link(&path, body),
        };
        let made = made.map_err(|error| failed(key, &error))?;
        step();
        // Of one that exists, another process may not have done it.
        sheave_durable::sync_parent(&path).map_err(|error| {
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
            io::ErrorKind::NotFound => StoreError::new(StoreErrorKind::NotFound, key),
            _ => failed(key, &error),
        })
    }

    fn list_now(&self, prefix: &str, after: &str, max: usize) -> Result<Vec<Listed>, StoreError> {
        let below = prefix.rsplit_once('/').map_or("", |(dir, _)| dir);
        let mut keys = Vec::new();
        self.collect(below, &mut keys).map_err(|error| failed(prefix, &error))?;
        keys.retain(|key| key.starts_with(prefix) && key.as_str() > after);
        keys.sort_unstable();
        keys.truncate(max);
        let len = |key: &String| self.path(key).metadata().ok().map(|found| found.len());
        // One that is gone by now was deleted.
        let found = keys.into_iter().filter_map(|key| {
            let bytes = len(&key)?;
            Some(Listed { key, bytes })
        });
        Ok(found.collect())
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
            let is_dir = entry.file_type()?.is_dir();
            if is_dir { dirs.push(key) } else { keys.push(key) }
        }
        if keys.len() > begin || !dirs.is_empty() {
            File::open(&dir)?.sync_all()?;
        }
        dirs.iter().try_for_each(|dir| self.collect(dir, keys))
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
        Box::pin(run_write(move || store.create_now(&key, &body)))
    }

    fn get<'a>(&'a self, key: &'a str, range: Range<u64>) -> Answer<'a, Bytes> {
        let (store, key) = (self.clone(), key.to_owned());
        Box::pin(run_read(move || store.get_now(&key, range)))
    }

    fn list<'a>(&'a self, prefix: &'a str, after: &'a str, max: usize) -> Answer<'a, Vec<Listed>> {
        let (store, prefix, after) = (self.clone(), prefix.to_owned(), after.to_owned());
        Box::pin(run_read(move || store.list_now(&prefix, &after, max)))
    }

    fn delete<'a>(&'a self, key: &'a str) -> Answer<'a, ()> {
        let (store, key) = (self.clone(), key.to_owned());
        Box::pin(run_write(move || store.delete_now(&key)))
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

fn is_full_or_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound)
}

/// What the file system says of an object. A full disk, or one that is gone, may come back.
fn failed(key: &str, error: &io::Error) -> StoreError {
    let kind = match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            StoreErrorKind::Denied
        }
        io::ErrorKind::InvalidFilename | io::ErrorKind::Unsupported => StoreErrorKind::Broken,
        _ => StoreErrorKind::Busy,
    };
    StoreError::new(kind, format!("{key}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use super::*;
    use crate::threads::block_on;

    /// Names the step and the directory of a child that dies.
    const CHILD: &str = "SHEAVE_DIR_STORE_CHILD";
    const SIGABRT: i32 = 6;

    fn store(dir: &Path) -> DirStore {
        let store = DirStore::new(&dir.join("v"));
        store.make().unwrap();
        store
    }

    fn keys(store: &DirStore, prefix: &str, after: &str, max: usize) -> Vec<String> {
        let listed = block_on(store.list(prefix, after, max)).unwrap();
        listed.into_iter().map(|listed| listed.key).collect()
    }

    #[test]
    fn an_object_is_made_once_and_read_in_ranges() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let create = |body: &'static str| block_on(store.create("log/1/2", body.into())).unwrap();
        assert_eq!(create("hello"), Created::Made);
        assert_eq!(create("other"), Created::Exists);
        let get = |range| block_on(store.get("log/1/2", range)).unwrap();
        assert_eq!((get(0..5), get(1..3), get(3..99)), ("hello".into(), "el".into(), "lo".into()));
        assert_eq!(get(7..9), "");
        let missing = block_on(store.get("log/1/3", 0..1)).unwrap_err();
        assert_eq!(missing.kind, StoreErrorKind::NotFound);
        block_on(store.delete("log/1/2")).unwrap();
        block_on(store.delete("log/1/2")).unwrap();
        assert_eq!(create("again"), Created::Made, "its directory was deleted with it");
        assert_eq!(fs::read_dir(dir.path().join("v/tmp")).unwrap().count(), 0);
    }

    #[test]
    fn listings_are_sorted_by_the_bytes_of_keys() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let mut all = ["b/1", "a/2", "a/1", "a-b/1", "a/10", "c/.x", "c/ä %", "c/d/e"];
        for key in all {
            assert_eq!(block_on(store.create(key, key.into())), Ok(Created::Made), "{key}");
        }
        all.sort_unstable();
        assert_eq!(keys(&store, "", "", 99), all);
        assert_eq!(keys(&store, "", "a/10", 3), all[3..6]);
        assert_eq!(keys(&store, "a/", "", 99), ["a/1", "a/10", "a/2"]);
        assert_eq!(keys(&store, "a/1", "a/1", 99), ["a/10"]);
        assert_eq!(keys(&store, "x/", "", 99), [""; 0]);
        let listed = block_on(store.list("c/ä", "", 1)).unwrap();
        assert_eq!(listed, [Listed { key: "c/ä %".to_owned(), bytes: 6 }]);
        assert!(dir.path().join("v/c/%2Ex").exists());
    }

    #[test]
    fn of_many_creations_of_one_name_exactly_one_succeeds() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        for round in 0..50 {
            let key = format!("root/{round}");
            let bodies: Vec<_> = (0..8).map(|body: u8| Bytes::from(vec![body; 9])).collect();
            let tries: Vec<_> =
                bodies.iter().map(|body| store.create(&key, body.clone())).collect();
            let made: Vec<_> = tries.into_iter().map(|made| block_on(made).unwrap()).collect();
            let winners: Vec<_> = (0..8).filter(|at| made[*at] == Created::Made).collect();
            assert_eq!(winners.len(), 1, "{made:?}");
            assert_eq!(block_on(store.get(&key, 0..99)).unwrap(), bodies[winners[0]]);
        }
    }

    #[test]
    fn a_directory_that_is_gone_is_not_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        fs::remove_dir_all(dir.path().join("v")).unwrap();
        let error = block_on(store.create("root/1", "x".into())).unwrap_err();
        assert_eq!(error.kind, StoreErrorKind::Busy, "it may be mounted again");
        assert!(!dir.path().join("v").exists());
        let nowhere = DirStore::new(&dir.path().join("x/y")).make().unwrap_err();
        assert_eq!(nowhere.kind(), sheave_core::ErrorKind::NotFound);
    }

    #[test]
    fn a_sweep_leaves_what_is_being_written() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let (path, file) = store.unfinished().unwrap();
        store.sweep().unwrap();
        assert!(path.exists());
        drop(file);
        store.sweep().unwrap();
        assert!(!path.exists());
    }

    /// Not a test by itself: what the next test runs as a process of its own.
    #[test]
    fn child_of_the_crash_test() {
        let Ok(task) = env::var(CHILD) else { return };
        let (step, dir) = task.split_once(':').unwrap();
        sheave_durable::on_step(step.parse().unwrap(), process::abort);
        let store = DirStore::new(Path::new(dir));
        store.create_now("log/1/1", &[7; 100]).unwrap();
    }

    #[test]
    fn an_object_is_whole_or_absent_after_its_writer_was_killed_at_any_step() {
        let mut found = Vec::new();
        for step in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let store = store(dir.path());
            let mut child = Command::new(env::current_exe().unwrap());
            child.args(["--exact", "dir_store::tests::child_of_the_crash_test"]);
            let place = dir.path().join("v");
            let output = child.env(CHILD, format!("{step}:{}", place.display())).output().unwrap();
            let is_killed = output.status.signal() == Some(SIGABRT);
            assert!(output.status.success() || is_killed, "{output:?}");
            store.sweep().unwrap();
            assert!(fs::read_dir(place.join(UNFINISHED)).map_or(0, Iterator::count) == 0);
            let body = block_on(store.get("log/1/1", 0..999)).ok();
            assert_eq!(keys(&store, "", "", 9).len(), usize::from(body.is_some()));
            found.push(body.map(|body| body.len()));
            if output.status.success() {
                break;
            }
        }
        let whole = Some(100);
        assert_eq!(found, [None, None, whole, whole, whole, whole]);
    }
}
