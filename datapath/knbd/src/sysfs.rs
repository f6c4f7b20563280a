//! A device of this driver under /sys/block.

use std::fs;
use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

/// A device's directory.
pub(crate) struct Sysfs(PathBuf);

/// The numbers of all devices, connected or not; none where there is no driver.
///
/// # Errors
/// When they cannot be listed.
pub(crate) fn numbers() -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let name = entry?.file_name();
        let number: Option<u32> =
            name.to_str().and_then(|name| name.strip_prefix("nbd")?.parse().ok());
        numbers.extend(number);
    }
    Ok(numbers)
}

impl Sysfs {
    pub(crate) fn of(index: u32) -> Self {
        Self(PathBuf::from(format!("/sys/block/nbd{index}")))
    }

    /// The identifier that its server gave it when connecting; always `None` before Linux 5.14.
    ///
    /// # Errors
    /// When it cannot be read, such as for want of descriptors: the device may be there.
    pub(crate) fn identifier(&self) -> io::Result<Option<String>> {
        match fs::read(self.0.join("backend")) {
            Ok(text) => Ok(Some(String::from_utf8_lossy(&text).trim_end_matches('\n').to_owned())),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether it is connected; sysfs then shows the process that connected it.
    pub(crate) fn is_connected(&self) -> bool {
        self.0.join("pid").exists()
    }
}

/// Whether there is no such attribute. ENODEV: it went while it was open (fs/kernfs/file.c).
fn is_gone(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOENT | Errno::NODEV))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identifier_that_cannot_be_read_is_not_taken_for_none() {
        let dir = std::env::temp_dir().join(format!("sheave-knbd-{}", std::process::id()));
        let sysfs = Sysfs(dir.join("nbd0"));
        assert_eq!(sysfs.identifier().expect("no such device"), None);
        fs::create_dir_all(sysfs.0.join("backend")).expect("made");
        let unreadable = sysfs.identifier();
        fs::remove_dir(sysfs.0.join("backend")).expect("removed");
        fs::write(sysfs.0.join("backend"), b"sheave-1\xff\n").expect("written");
        let foreign = sysfs.identifier();
        fs::remove_dir_all(&dir).expect("removed");
        assert!(unreadable.is_err(), "{unreadable:?}");
        assert_eq!(foreign.expect("read").as_deref(), Some("sheave-1\u{fffd}"));
    }
}
