//! A file that has room on a full file system. Of several processes that write to a directory with
//! one, one does at a time; threads of a process may at once.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::{UNFINISHED, step, sync_parent};

const NAME: &str = ".sheave-spare";
/// A block of most file systems, in which nearly all values fit.
const LEN: usize = 4096;

/// One lock for each directory: a file system that hangs holds up no other one.
static LOCKS: Mutex<BTreeMap<PathBuf, Arc<Mutex<()>>>> = Mutex::new(BTreeMap::new());

/// Does the work while no other thread has the spare file: two would write into one file.
fn alone<T>(spare: &Path, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let mut locks = LOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    let lock = Arc::clone(locks.entry(spare.to_owned()).or_default());
    drop(locks);
    let _held = lock.lock().unwrap_or_else(PoisonError::into_inner);
    work()
}

/// Makes the spare file of a directory, if it has none.
///
/// # Errors
/// What the file system says.
pub fn keep_spare(dir: &Path) -> io::Result<()> {
    let spare = dir.join(NAME);
    if spare.exists() {
        return Ok(());
    }
    alone(&spare, || make(&spare))
}

fn make(spare: &Path) -> io::Result<()> {
    // Another thread may have been first. One that is writing would write into what is a record
    // by then.
    if spare.exists() {
        return Ok(());
    }
    let unfinished = spare.with_extension(UNFINISHED);
    let mut options = OpenOptions::new();
    let mut file = options.create(true).truncate(true).write(true).mode(0o600).open(&unfinished)?;
    // Not a hole, which has no room.
    let filled = file.write_all(&[b'\n'; LEN]).and_then(|()| file.sync_all());
    filled.inspect_err(|_| drop(fs::remove_file(&unfinished)))?;
    fs::rename(&unfinished, spare)?;
    sync_parent(spare)
}

/// Puts a text in place of a file without taking room. What was there is the next spare. A new file
/// does not get the spare: then nothing could be deleted any more.
pub(crate) fn put(path: &Path, text: &[u8]) -> io::Result<()> {
    let spare = path.with_file_name(NAME);
    alone(&spare, || exchange(&spare, path, text))
}

fn exchange(spare: &Path, path: &Path, text: &[u8]) -> io::Result<()> {
    fs::symlink_metadata(path)?;
    let file = File::options().write(true).open(spare)?;
    file.write_all_at(text, 0)?;
    file.set_len(text.len() as u64)?;
    file.sync_all()?;
    step();
    match renameat_with(CWD, spare, CWD, path, RenameFlags::EXCHANGE) {
        // This file system cannot exchange; the room of the old file becomes free.
        Err(Errno::INVAL) => fs::rename(spare, path)?,
        exchanged => exchanged?,
    }
    step();
    sync_parent(path)
}

#[cfg(test)]
mod tests {
    use crate::{read, replace};

    use super::*;

    #[test]
    fn a_spare_takes_the_place_of_a_file_and_the_file_that_of_the_spare() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        assert!(put(&path, b"x").is_err(), "there is none");
        keep_spare(dir.path()).unwrap();
        replace(&path, &vec![1]).unwrap();
        for value in 2..5 {
            let text = crate::to_text(&vec![value]).unwrap();
            put(&path, text.as_bytes()).unwrap();
            assert_eq!(read(&path).unwrap(), Some(vec![value]));
            keep_spare(dir.path()).unwrap();
            let names = fs::read_dir(dir.path()).unwrap().count();
            assert_eq!(names, 2, "the file and one spare");
        }
    }

    #[test]
    fn threads_at_once_each_write_their_own_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = &|thread: u32| dir.path().join(format!("{thread}.json"));
        keep_spare(dir.path()).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                scope.spawn(move || {
                    let path = path(thread);
                    replace(&path, &(thread, 0)).unwrap();
                    for round in 0..50 {
                        let text = crate::to_text(&(thread, round)).unwrap();
                        put(&path, text.as_bytes()).unwrap();
                        assert_eq!(read(&path).unwrap(), Some((thread, round)));
                    }
                });
            }
        });
    }

    #[test]
    fn a_new_file_does_not_get_the_spare() {
        let dir = tempfile::tempdir().unwrap();
        keep_spare(dir.path()).unwrap();
        let error = put(&dir.path().join("new.json"), b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(dir.path().join(NAME).exists(), "it is kept for files that are there");
    }
}
