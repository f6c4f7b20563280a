//! What commands print, and write to files. All printing goes through here: the macros of std panic
//! when standard output or standard error fails.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use sheave_core::printable;

/// Prints text to `out`, which is standard output but in tests. A reader that has seen enough and
/// closed the pipe is no error.
///
/// # Errors
/// When the output cannot be written.
pub(crate) fn print(out: &mut dyn Write, text: impl AsRef<[u8]>) -> Result<()> {
    let printed = out.write_all(text.as_ref()).and_then(|()| out.flush());
    until_closed(printed).context("cannot write to standard output")
}

/// Prints text to standard output.
///
/// # Errors
/// When it cannot be written.
pub fn to_stdout(text: impl AsRef<[u8]>) -> Result<()> {
    print(&mut io::stdout(), text)
}

/// Prints a line to standard error, without what a terminal would act on. It is lost if that fails,
/// as the command goes on.
pub fn note(line: &str) {
    // In one call, so that lines of several processes stay apart.
    let _ = io::stderr().write_all(format!("{}\n", printable(line)).as_bytes());
}

/// Takes it for a good end that the reader, `head` for instance, has closed the pipe.
///
/// # Errors
/// When printing ended for another reason.
pub fn until_closed(printed: io::Result<()>) -> io::Result<()> {
    match printed {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

/// Finds out whether a file can be written before the work is done that is to fill it.
///
/// # Errors
/// When it cannot.
pub(crate) fn check_writable(path: &Path) -> Result<()> {
    let found = fs::metadata(path);
    // A pipe is not to see its writer go.
    if found.as_ref().is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        return Ok(());
    }
    let what = || format!("write {}", printable(&path));
    match OpenOptions::new().write(true).create_new(true).open(path) {
        // An empty file would look like a result.
        Ok(_) => fs::remove_file(path).with_context(what),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            OpenOptions::new().write(true).open(path).map(drop).with_context(what)
        }
        Err(error) => Err(error).with_context(what),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_closed_pipe_is_a_good_end() {
        let (reader, mut writer) = io::pipe().unwrap();
        drop(reader);
        assert!(print(&mut writer, "text").is_ok());
        let mut full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = print(&mut full, "text").unwrap_err().downcast::<io::Error>().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        let mut kept = Vec::new();
        print(&mut kept, "text").unwrap();
        assert_eq!(kept, b"text");
    }

    #[test]
    fn a_look_at_a_file_leaves_it_as_it_was() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("out.json");
        check_writable(&path).unwrap();
        assert!(!path.exists());
        fs::write(&path, "old").unwrap();
        check_writable(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        for wrong in [dir.path(), &dir.path().join("missing/out.json")] {
            assert!(check_writable(wrong).is_err(), "{}", wrong.display());
        }
    }
}
