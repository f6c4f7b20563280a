//! Where a copy goes: what exists, or a new image, which gets its name only when it is whole.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions as FileOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use sheave_backends::{OpenOptions, VolumeSpec};
use sheave_core::{Volume, printable};

use super::interrupt::{Interruption, Leftover};
use super::{is_nbd, remote};

/// An open target. Dropping one that is new and was not published removes it.
pub(super) struct Target {
    volume: Arc<dyn Volume>,
    /// Where a new image is to be.
    new: Option<PathBuf>,
    interruption: Interruption,
}

impl Target {
    /// Opens what `text` names, or makes it if it is an image that does not exist.
    pub(super) fn open(text: &str, size: u64, interruption: Interruption) -> anyhow::Result<Self> {
        if is_nbd(text) {
            return Ok(Self { volume: remote(text)?, new: None, interruption });
        }
        let spec: VolumeSpec = text.parse()?;
        let options = OpenOptions::default();
        let Some(path) = spec.file_path().filter(|path| is_missing(path)) else {
            return Ok(Self { volume: spec.open(&options)?, new: None, interruption });
        };
        let path = path.to_owned();
        let partial = partial_path(&path)?;
        interruption.leaves(|leftover| {
            make(&partial, size).with_context(|| format!("{} cannot be made", printable(&path)))?;
            *leftover = Leftover::Partial(partial.clone());
            anyhow::Ok(())
        })?;
        let opened = spec.with_file_path(partial).open(&options);
        let volume = opened.inspect_err(|_| remove(&interruption))?;
        Ok(Self { volume, new: Some(path), interruption })
    }

    /// What to write to.
    pub(super) fn volume(&self) -> &Arc<dyn Volume> {
        &self.volume
    }

    /// It was made for this copy, so it reads as zeroes everywhere.
    pub(super) fn is_new(&self) -> bool {
        self.new.is_some()
    }

    /// Gives a new image its name. Never replaces one that somebody has made meanwhile.
    pub(super) fn publish(self) -> anyhow::Result<()> {
        self.interruption.leaves(|leftover| {
            if let (Leftover::Partial(partial), Some(path)) = (&*leftover, &self.new) {
                rename(partial, path).with_context(|| {
                    format!("{} cannot get its name; nothing was left behind", printable(&path))
                })?;
            }
            *leftover = Leftover::Done;
            anyhow::Ok(())
        })?;
        if let Some(path) = &self.new {
            // The bytes are on the disk; so must be the name.
            sync_directory(path).with_context(|| printable(&path).to_string())?;
        }
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        remove(&self.interruption);
    }
}

/// Removes what there is of a new image that has no name yet.
fn remove(interruption: &Interruption) {
    interruption.leaves(|leftover| {
        if let Leftover::Partial(partial) = &*leftover {
            // There is nothing to be done about it; the name says what it is.
            let _ = fs::remove_file(partial);
            *leftover = Leftover::Nothing;
        }
    });
}

/// A link to nothing exists: it must not be found in the way after all has been copied.
fn is_missing(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

/// A name beside the image's, since a file can be renamed only within its file system.
fn partial_path(path: &Path) -> anyhow::Result<PathBuf> {
    let is_directory = path.as_os_str().as_encoded_bytes().ends_with(b"/");
    let Some(name) = path.file_name().filter(|_| !is_directory) else {
        bail!("{} is no name of a file", printable(&path));
    };
    let mut partial = OsString::from(".");
    partial.push(name);
    partial.push(format!(".partial-{}", std::process::id()));
    Ok(path.with_file_name(partial))
}

fn make(path: &Path, size: u64) -> io::Result<()> {
    let file = FileOptions::new().write(true).create_new(true).open(path)?;
    file.set_len(size).inspect_err(|_| drop(fs::remove_file(path)))
}

fn rename(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // File systems without that flag have links, or nothing that is safe.
        Err(Errno::INVAL | Errno::NOSYS) => {
            fs::hard_link(from, to)?;
            // The image has its name; another beside it does no harm.
            let _ = fs::remove_file(from);
            Ok(())
        }
        renamed => Ok(renamed?),
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or_else(|| Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn open(path: &Path) -> anyhow::Result<Target> {
        Target::open(path.to_str().unwrap(), 1 << 20, Interruption::default())
    }

    #[test]
    fn a_new_image_has_its_name_only_when_it_is_whole() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("a.img");
        drop(open(&path).unwrap());
        assert_eq!(names(dir.path()), [""; 0], "it was not published");
        let target = open(&path).unwrap();
        assert!(target.is_new() && !path.exists());
        target.publish().unwrap();
        assert_eq!(names(dir.path()), ["a.img"]);
        assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
        assert!(!open(&path).unwrap().is_new());
        assert_eq!(names(dir.path()), ["a.img"], "what was there before stays");
    }

    #[test]
    fn what_appeared_meanwhile_is_not_replaced() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("a.img");
        let target = open(&path).unwrap();
        fs::write(&path, "other").unwrap();
        target.publish().unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"other");
        assert_eq!(names(dir.path()), ["a.img"]);
    }

    #[test]
    fn names_that_could_not_be_given_are_refused_before_anything_is_copied() {
        let dir = tempfile::TempDir::new().unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("link")).unwrap();
        for name in ["link", "new/", "missing/a.img"] {
            assert!(open(&dir.path().join(name)).is_err(), "{name}");
        }
        assert_eq!(names(dir.path()), ["link"]);
    }
}
