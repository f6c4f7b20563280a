//! A file that has room on a full file system.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::{UNFINISHED, step, sync_parent};

const NAME: &str = ".sheave-spare";
/// A block of most file systems, in which nearly all values fit.
const LEN: usize = 4096;

/// Makes the spare file of a directory, if it has none.
///
/// # Errors
/// What the file system says.
pub fn keep_spare(dir: &Path) -> io::Result<()> {
    let spare = dir.join(NAME);
    if spare.exists() {
        return Ok(());
    }
    let unfinished = spare.with_extension(UNFINISHED);
    let mut options = OpenOptions::new();
    let mut file = options.create(true).truncate(true).write(true).mode(0o600).open(&unfinished)?;
    // Not a hole, which has no room.
    let filled = file.write_all(&[b'\n'; LEN]).and_then(|()| file.sync_all());
    filled.inspect_err(|_| drop(fs::remove_file(&unfinished)))?;
    fs::rename(&unfinished, &spare)?;
    sync_parent(&spare)
}

/// Puts a text in place of a file without taking room. What was there is the next spare. A new file
/// does not get the spare: then nothing could be deleted any more.
pub(crate) fn put(path: &Path, text: &[u8]) -> io::Result<()> {
    let spare = path.with_file_name(NAME);
    fs::symlink_metadata(path)?;
    let file = File::options().write(true).open(&spare)?;
    file.write_all_at(text, 0)?;
    file.set_len(text.len() as u64)?;
    file.sync_all()?;
    step();
    match renameat_with(CWD, &spare, CWD, path, RenameFlags::EXCHANGE) {
        // This file system cannot exchange; the room of the old file becomes free.
        Err(Errno::INVAL) => fs::rename(&spare, path)?,
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
    fn a_new_file_does_not_get_the_spare() {
        let dir = tempfile::tempdir().unwrap();
        keep_spare(dir.path()).unwrap();
        let error = put(&dir.path().join("new.json"), b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(dir.path().join(NAME).exists(), "it is kept for files that are there");
    }
}
