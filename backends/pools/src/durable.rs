//! Small files that are whole or not there, whenever the power goes.
//!
//! A file is a line of JSON and a line with its CRC-32. It is written beside its place, flushed and
//! renamed, and its directory is flushed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use sheave_core::{Error, ErrorKind, Result, printable};

/// The extension of what is being written.
pub(crate) const UNFINISHED: &str = "new";
/// No file of ours is longer: names, parameters and publications have bounds.
const LEN_MAX: u64 = 4 << 20;

/// Puts a value in place of what is at `path`, on stable storage.
pub(crate) fn replace<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let json = serde_json::to_string(value).map_err(|error| failed(path, error.into()))?;
    let text = format!("{json}\n{:08x}\n", crc32fast::hash(json.as_bytes()));
    let write = || {
        let unfinished = path.with_extension(UNFINISHED);
        let mut options = OpenOptions::new();
        let mut file =
            options.create(true).truncate(true).write(true).mode(0o600).open(&unfinished)?;
        step();
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        step();
        fs::rename(&unfinished, path)?;
        step();
        sync_parent(path)
    };
    write().map_err(|error| failed(path, error))
}

/// What is at `path`, if something is.
///
/// # Errors
/// [`ErrorKind::Corrupt`] when it is damaged, and what the file system says.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let text = match fs::metadata(path).and_then(|found| match found.len() > LEN_MAX {
        true => Err(io::Error::other("it is too long to be a record")),
        false => fs::read(path),
    }) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(path, error)),
    };
    match parse(&text) {
        Ok(value) => Ok(Some(value)),
        Err(why) => {
            let why = format!(
                "the record {} is damaged ({why}); its volume is left as it is: restore the record \
                 from a backup",
                printable(path)
            );
            Err(Error::new(ErrorKind::Corrupt, "read", why))
        }
    }
}

fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    let text = std::str::from_utf8(text).map_err(|_| "it is no text")?;
    let (json, rest) = text.split_once('\n').ok_or("it ends too early")?;
    if u32::from_str_radix(rest.trim_end(), 16) != Ok(crc32fast::hash(json.as_bytes())) {
        return Err("its checksum is wrong".to_owned());
    }
    serde_json::from_str(json).map_err(|error| error.to_string())
}

/// Removes a file, if there is one, on stable storage.
pub(crate) fn remove(path: &Path) -> Result<()> {
    step();
    let removed = match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other,
    };
    step();
    removed.and_then(|()| sync_parent(path)).map_err(|error| failed(path, error))
}

/// Has the names of a file's directory on stable storage.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// What the file system says of a file.
pub(crate) fn failed(path: &Path, error: io::Error) -> Error {
    Error::from_io("pool", printable(path).to_string(), error)
}

/// Where a process may die, in tests.
pub(crate) fn step() {
    #[cfg(test)]
    tests::step();
}

#[cfg(test)]
pub(crate) mod tests {
    use std::process;
    use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

    use rustix::process::{Signal, getpid, kill_process};

    use super::*;

    static STEPS_LEFT: AtomicI64 = AtomicI64::new(i64::MAX);

    /// Has this process killed at its nth step from now, counted from 0.
    pub(crate) fn die_at_step(n: i64) {
        STEPS_LEFT.store(n, Relaxed);
    }

    pub(super) fn step() {
        if STEPS_LEFT.fetch_sub(1, Relaxed) == 0 {
            let _ = kill_process(getpid(), Signal::KILL);
            process::abort();
        }
    }

    #[test]
    fn a_value_is_found_again_and_a_damaged_one_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), None);
        replace(&path, &vec![1, 2]).unwrap();
        replace(&path, &vec![3, 4]).unwrap();
        assert_eq!(read(&path).unwrap(), Some(vec![3, 4]));
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() - 1 {
            let mut text = whole.clone();
            text[at] ^= 0x10;
            fs::write(&path, &text).unwrap();
            let found = read::<Vec<u32>>(&path);
            assert_eq!(found.unwrap_err().kind(), ErrorKind::Corrupt, "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert!(read::<Vec<u32>>(&path).is_err(), "{at} bytes");
        }
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), None);
    }
}
