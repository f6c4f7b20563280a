//! Small files that are whole or absent, whenever the power goes.
//!
//! A file is a line of JSON and a line with its CRC-32. It is written beside its place, flushed and
//! renamed, and its directory is flushed. Where the file system has no room for that, the new value
//! goes into the spare file of the directory, if there is one, so volumes of a full disk can be
//! deleted.
#![forbid(unsafe_code)]

mod spare;
mod steps;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use sheave_core::{Error, ErrorKind, Result, printable};

pub use spare::keep_spare;
pub use steps::{on_step, step};

/// The extension of a file that is being written. One that is left was never in its place.
pub const UNFINISHED: &str = "new";
/// No file is longer: names, parameters and publications have bounds.
const LEN_MAX: u64 = 4 << 20;

/// Puts a value in place of what is at `path`, on stable storage. Its directory must exist.
///
/// # Errors
/// What the file system says; the file then has its old or its new value.
pub fn replace<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = to_text(value).map_err(|error| failed("write", path, error))?;
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
    let written = write().or_else(|error| match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            // It may have taken the last room.
            let _ = fs::remove_file(path.with_extension(UNFINISHED));
            spare::put(path, text.as_bytes()).map_err(|_| error)
        }
        _ => Err(error),
    });
    written.map_err(|error| failed("write", path, error))
}

/// What is at `path`; `None` if nothing is.
///
/// # Errors
/// [`ErrorKind::Corrupt`] when it is damaged, and what the file system says.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    parse_at(path, of_text)
}

/// As [`read`], and also what older programs have written: JSON without a checksum.
///
/// # Errors
/// As for [`read`].
pub fn read_unsealed<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    parse_at(path, |text| match text.contains(&b'\n') {
        true => of_text(text),
        false => serde_json::from_slice(text).map_err(|error| error.to_string()),
    })
}

fn parse_at<T>(path: &Path, parse: impl Fn(&[u8]) -> Result<T, String>) -> Result<Option<T>> {
    let text = match fs::metadata(path).and_then(|found| match found.len() > LEN_MAX {
        true => Err(io::Error::other("it is too long to be a record")),
        false => fs::read(path),
    }) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("read", path, error)),
    };
    parse(&text).map(Some).map_err(|why| {
        let why = format!("{} is damaged ({why}); restore it from a backup", printable(path));
        Error::new(ErrorKind::Corrupt, "read", why)
    })
}

/// A value as a file has it.
///
/// # Errors
/// When it cannot be written as JSON.
pub fn to_text<T: Serialize>(value: &T) -> io::Result<String> {
    let json = serde_json::to_string(value)?;
    Ok(format!("{json}\n{:08x}\n", crc32fast::hash(json.as_bytes())))
}

/// The value of a file's text.
///
/// # Errors
/// What is wrong with it.
pub fn of_text<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    let text = std::str::from_utf8(text).map_err(|_| "it is no text")?;
    let (json, rest) = text.split_once('\n').ok_or("it ends too early")?;
    if u32::from_str_radix(rest.trim_end(), 16) != Ok(crc32fast::hash(json.as_bytes())) {
        return Err("its checksum is wrong".to_owned());
    }
    serde_json::from_str(json).map_err(|error| error.to_string())
}

/// Removes a file, if there is one, on stable storage, and what a killed [`replace`] has left.
///
/// # Errors
/// What the file system says.
pub fn remove(path: &Path) -> Result<()> {
    let _ = fs::remove_file(path.with_extension(UNFINISHED));
    step();
    let is_absent = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let removed = match fs::remove_file(path) {
        // By an earlier call, which may have died or failed before the flush.
        Err(error) if is_absent(&error) => Ok(()),
        other => other,
    };
    step();
    match removed.and_then(|()| sync_parent(path)) {
        // Its directory.
        Err(error) if is_absent(&error) => Ok(()),
        other => other.map_err(|error| failed("remove", path, error)),
    }
}

/// Makes sure that what [`replace`] or [`remove`] has done at `path` is on stable storage, also if
/// its process was killed, or its last flush has failed.
///
/// # Errors
/// What the file system says.
pub fn settle(path: &Path) -> Result<()> {
    sync_parent(path).map_err(|error| failed("flush", path, error))
}

/// Flushes the directory of a file: the file's name is on stable storage, or its absence.
///
/// # Errors
/// What the file system says.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// What the file system says of a file.
fn failed(op: &'static str, path: &Path, error: io::Error) -> Error {
    Error::from_io(op, printable(path).to_string(), error)
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{self, Command};

    use super::*;

    /// Names the step and the file of a child that dies.
    const CHILD: &str = "SHEAVE_DURABLE_CHILD";
    const SIGABRT: i32 = 6;

    #[test]
    fn a_value_is_found_again_and_a_damaged_one_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), None);
        replace(&path, &vec![1, 2]).unwrap();
        replace(&path, &vec![3, 4]).unwrap();
        assert_eq!(read(&path).unwrap(), Some(vec![3, 4]));
        assert_eq!(fs::read_to_string(&path).unwrap(), "[3,4]\nf4d83fb2\n", "the format on disk");
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() - 1 {
            let mut text = whole.clone();
            text[at] ^= 0x10;
            fs::write(&path, &text).unwrap();
            for found in [read::<Vec<u32>>(&path), read_unsealed::<Vec<u32>>(&path)] {
                assert_eq!(found.unwrap_err().kind(), ErrorKind::Corrupt, "byte {at}");
            }
            fs::write(&path, &whole[..at]).unwrap();
            assert!(read::<Vec<u32>>(&path).is_err(), "{at} bytes");
        }
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), None);
    }

    #[test]
    fn a_value_without_a_checksum_is_read_where_older_programs_wrote_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        fs::write(&path, "[1,2]").unwrap();
        assert!(read::<Vec<u32>>(&path).is_err());
        assert_eq!(read_unsealed(&path).unwrap(), Some(vec![1, 2]));
        replace(&path, &vec![3]).unwrap();
        assert_eq!(read_unsealed(&path).unwrap(), Some(vec![3]));
        for text in ["", "[1,", "\0\0\0"] {
            fs::write(&path, text).unwrap();
            let found = read_unsealed::<Vec<u32>>(&path);
            assert_eq!(found.unwrap_err().kind(), ErrorKind::Corrupt, "{text:?}");
        }
    }

    /// Not a test by itself: what the next test runs as a process of its own.
    #[test]
    fn child_of_the_crash_test() {
        let Ok(task) = env::var(CHILD) else { return };
        let (step, path) = task.split_once(':').unwrap();
        on_step(step.parse().unwrap(), process::abort);
        replace(Path::new(path), &vec![7; 100]).unwrap();
        remove(Path::new(path)).unwrap();
    }

    #[test]
    fn a_file_has_one_of_its_values_after_its_writer_was_killed_at_any_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let mut found = Vec::new();
        for step in 0.. {
            replace(&path, &vec![1]).unwrap();
            let mut child = Command::new(env::current_exe().unwrap());
            child.args(["--exact", "tests::child_of_the_crash_test"]);
            let output = child.env(CHILD, format!("{step}:{}", path.display())).output().unwrap();
            assert!(
                output.status.success() || output.status.signal() == Some(SIGABRT),
                "{output:?}"
            );
            found.push(read::<Vec<u32>>(&path).unwrap());
            if output.status.success() {
                break;
            }
        }
        let (old, new) = (Some(vec![1]), Some(vec![7; 100]));
        let want = [old.clone(), old, new.clone(), new, None, None];
        assert_eq!(found, want, "opened, written, renamed, flushed, removed, all");
    }
}
