//! The target of a copy: an existing one, or a new image, which gets its name only when it is
//! complete.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions as FileOptions};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use sheave_core::{Volume, printable};
use sheave_volumes::{OpenOptions, VolumeSpec, path_text};

use super::interrupt::{Interruption, Leftover};
use super::open_options;

/// The longest name of a file, in bytes (NAME_MAX, limits.h).
const NAME_BYTES_MAX: usize = 255;
/// The most temporary files of killed copies, beside one image and with one process number.
const LEFT_BEHIND_MAX: u32 = 100;

/// An open target. Dropping one that is a new image and was not published removes it.
pub(super) struct Target {
    volume: Arc<dyn Volume>,
    image: Option<NewImage>,
    interruption: Interruption,
}

impl Target {
    /// Opens the target that `text` names. An image is made anew, and replaces an existing one.
    pub(super) fn open(text: &str, size: u64, interruption: Interruption) -> anyhow::Result<Self> {
        let spec = VolumeSpec::of_operator(text)?;
        let options = open_options();
        let Some((image, file)) = NewImage::begin(&spec, interruption.clone())? else {
            return Ok(Self { volume: spec.open(&options)?, image: None, interruption });
        };
        let name = || printable(&image.path).to_string();
        file.set_len(size).with_context(name)?;
        // Closed now, since closing it later would drop the volume's lock.
        drop(file);
        let volume = spec.with_file_path(image.partial.clone()).open(&options)?;
        Ok(Self { volume, image: Some(image), interruption })
    }

    /// The volume to write to.
    pub(super) fn volume(&self) -> &Arc<dyn Volume> {
        &self.volume
    }

    /// It was made for this copy, so it reads as zeroes everywhere.
    pub(super) fn is_new(&self) -> bool {
        self.image.is_some()
    }

    /// From now on an interruption leaves it incomplete, unless it is a new image.
    pub(super) fn begin_overwriting(&self, name: &str) {
        if !self.is_new() {
            let name = name.to_owned();
            self.interruption.leaves(|leftover| *leftover = Leftover::Existing(name));
        }
    }

    /// The copy is complete. Gives an image its name.
    pub(super) fn publish(self) -> anyhow::Result<()> {
        match self.image {
            Some(image) => image.publish(),
            None => {
                self.interruption.leaves(|leftover| *leftover = Leftover::Done);
                Ok(())
            }
        }
    }
}

/// An image under a temporary name beside its own, which it gets when it is complete. Dropping it
/// removes the file.
pub(super) struct NewImage {
    /// Its final path.
    path: PathBuf,
    partial: PathBuf,
    /// The file that it replaces. Held open, so that no other program begins to use it.
    old: Option<Arc<dyn Volume>>,
    interruption: Interruption,
}

impl NewImage {
    /// Makes an empty file for the image that `spec` names; `None` if it names a device or no file.
    /// An existing file must be writable and unused, and its mode and owner are kept.
    pub(super) fn begin(
        spec: &VolumeSpec,
        interruption: Interruption,
    ) -> anyhow::Result<Option<(Self, File)>> {
        let Some(path) = spec.file_path() else { return Ok(None) };
        let (path, old) = match path.metadata() {
            _ if is_missing(path) => (path.to_owned(), None),
            // Resolves links, so that they are kept.
            Ok(found) if found.is_file() => (path.canonicalize()?, Some(found)),
            // Opening it gives the error.
            _ => return Ok(None),
        };
        let volume = old.is_some().then(|| spec.open(&OpenOptions::default()));
        let volume = volume.transpose()?;
        if volume.as_ref().is_some_and(|volume| volume.info().read_only) {
            bail!("{}: it is read-only", printable(&path));
        }
        let (partial, file) = interruption.leaves(|leftover| {
            let (partial, file) = make_beside(&path, old.as_ref())
                .with_context(|| format!("{} cannot be made", printable(&path)))?;
            *leftover = Leftover::Partial(partial.clone());
            anyhow::Ok((partial, file))
        })?;
        Ok(Some((Self { path, partial, old: volume, interruption }, file)))
    }

    /// Whether it replaces another file.
    pub(super) fn replaces(&self) -> bool {
        self.old.is_some()
    }

    /// Gives it its name. Never replaces a file that another program has made meanwhile.
    pub(super) fn publish(self) -> anyhow::Result<()> {
        let name = printable(&self.path);
        self.interruption.leaves(|leftover| {
            self.rename()
                .with_context(|| format!("{name} cannot get its name; nothing was left behind"))?;
            *leftover = Leftover::Done;
            anyhow::Ok(())
        })?;
        // The data is durable; the name must be, too.
        sync_directory(&self.path).with_context(|| name.to_string())
    }

    fn rename(&self) -> anyhow::Result<()> {
        let Some(old) = &self.old else { return Ok(rename_new(&self.partial, &self.path)?) };
        let url = path_text(&self.path);
        if VolumeSpec::of_operator(&url)?.identity()? != old.info().identity {
            bail!("another file has taken its place meanwhile");
        }
        Ok(fs::rename(&self.partial, &self.path)?)
    }
}

impl Drop for NewImage {
    fn drop(&mut self) {
        remove(&self.interruption);
    }
}

/// Removes a new image that has no name yet.
fn remove(interruption: &Interruption) {
    interruption.leaves(|leftover| {
        if let Leftover::Partial(partial) = &*leftover {
            // An error cannot be handled; the name shows what the file is.
            let _ = fs::remove_file(partial);
            *leftover = Leftover::Nothing;
        }
    });
}

/// A dangling link exists: it must not block the name after everything has been copied.
fn is_missing(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

/// Makes an empty file under a temporary name. A copy that was killed may have left one behind, and
/// processes of containers have the same number time and again.
fn make_beside(path: &Path, old: Option<&Metadata>) -> anyhow::Result<(PathBuf, File)> {
    let mut number = 0;
    loop {
        let partial = partial_path(path, number)?;
        match make(&partial, old) {
            Ok(file) => return Ok((partial, file)),
            Err(error) if number < LEFT_BEHIND_MAX && is_taken(&error) => number += 1,
            Err(error) => return Err(error),
        }
    }
}

fn is_taken(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::AlreadyExists)
}

/// A name beside the image's, since a file can be renamed only within its file system.
fn partial_path(path: &Path, number: u32) -> anyhow::Result<PathBuf> {
    let is_directory = path.as_os_str().as_encoded_bytes().ends_with(b"/");
    let Some(name) = path.file_name().filter(|_| !is_directory) else {
        bail!("{} is no name of a file", printable(&path));
    };
    let pid = std::process::id();
    let end =
        if number == 0 { format!(".partial-{pid}") } else { format!(".partial-{pid}-{number}") };
    let name = name.as_bytes();
    let len = name.len().min(NAME_BYTES_MAX - 1 - end.len());
    let partial = [b".", &name[..len], end.as_bytes()].concat();
    Ok(path.with_file_name(OsString::from_vec(partial)))
}

/// Makes an empty file with mode and owner of the one that it replaces.
fn make(path: &Path, old: Option<&Metadata>) -> anyhow::Result<File> {
    let mode = if old.is_some() { 0o600 } else { 0o666 };
    let file = FileOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    if let Some(old) = old {
        let given = give(&file, old).inspect_err(|_| drop(fs::remove_file(path)));
        given
            .context("its owner and mode cannot be kept; to write over it: sheave copy … - > it")?;
    }
    Ok(file)
}

fn give(file: &File, old: &Metadata) -> io::Result<()> {
    let made = file.metadata()?;
    if (made.uid(), made.gid()) != (old.uid(), old.gid()) {
        fchown(file, Some(old.uid()), Some(old.gid()))?;
    }
    // After the owner, whose change clears bits of the mode.
    file.set_permissions(old.permissions())
}

/// Renames a file, without replacing another one.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // File systems without that flag need links; otherwise there is no safe way.
        Err(Errno::INVAL | Errno::NOSYS) => {
            fs::hard_link(from, to)?;
            // The image has its name; a second name is harmless.
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
    }

    #[test]
    fn the_longest_name_leaves_room_for_the_temporary_one() {
        let dir = tempfile::TempDir::new().unwrap();
        let name = "ü".repeat(127) + "x";
        let path = dir.path().join(&name);
        open(&path).unwrap().publish().unwrap();
        open(&path).unwrap().publish().unwrap();
        assert_eq!(names(dir.path()), [name]);
        drop(open(&dir.path().join("x".repeat(256))).err().unwrap());
    }

    #[test]
    fn what_a_killed_copy_left_stands_in_no_way() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("a.img");
        let left = partial_path(&path, 0).unwrap();
        fs::write(&left, "half").unwrap();
        open(&path).unwrap().publish().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
        assert_eq!(fs::read(&left).unwrap(), b"half", "it may be another's");
    }

    #[test]
    fn an_image_that_exists_is_replaced_only_by_a_whole_one() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::TempDir::new().unwrap();
        let (path, link) = (dir.path().join("a.img"), dir.path().join("link"));
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("a.img", &link).unwrap();
        drop(open(&link).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"old", "it was not published");
        let target = open(&link).unwrap();
        assert!(target.is_new() && target.volume().size() == 1 << 20);
        target.publish().unwrap();
        let found = fs::metadata(&path).unwrap();
        assert_eq!((found.len(), found.permissions().mode() & 0o7777), (1 << 20, 0o640));
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(names(dir.path()).len(), 2);
    }

    #[test]
    fn an_image_that_is_used_or_replaced_meanwhile_stays() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("a.img");
        fs::write(&path, "old").unwrap();
        let used = sheave_volumes::open(path.to_str().unwrap(), &OpenOptions::default()).unwrap();
        assert!(open(&path).is_err());
        drop(used);
        let target = open(&path).unwrap();
        fs::rename(&path, dir.path().join("b.img")).unwrap();
        fs::write(&path, "other").unwrap();
        target.publish().unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"other");
        assert_eq!(names(dir.path()).len(), 2);
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
