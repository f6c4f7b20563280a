//! A device of this driver under /sys/block.

use std::fs;
use std::io;
use std::path::PathBuf;

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
    pub(crate) fn identifier(&self) -> Option<String> {
        Some(fs::read_to_string(self.0.join("backend")).ok()?.trim_end_matches('\n').to_owned())
    }

    /// Whether it is connected; sysfs then shows the process that connected it.
    pub(crate) fn is_connected(&self) -> bool {
        self.0.join("pid").exists()
    }
}
