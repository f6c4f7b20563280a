//! What the kernel tells of a device under /sys/block, and how its queue is to work.

use std::fs;
use std::io;
use std::path::PathBuf;

/// Sectors of `/sys/block/*/size`, whatever the device's block.
const SECTOR_LEN: u64 = 512;
/// The kernel's default of 128 KiB makes eight requests out of a megabyte.
const MAX_SECTORS_KIB: u64 = 1024;
/// Readers of files ask for 128 KiB; a network store wants to know earlier.
const READ_AHEAD_KIB: u64 = 1024;

/// A device's directory.
pub(crate) struct Sysfs(PathBuf);

impl Sysfs {
    pub(crate) fn of(index: u32) -> Self {
        Self(PathBuf::from(format!("/sys/block/nbd{index}")))
    }

    /// Its size in bytes.
    pub(crate) fn size(&self) -> Option<u64> {
        self.number("size").map(|sectors| sectors * SECTOR_LEN)
    }

    /// Who connected it said what it is; `None` on Linux before 5.14, too.
    pub(crate) fn identifier(&self) -> Option<String> {
        self.text("backend")
    }

    /// Whether it is connected: the process that did it is named.
    pub(crate) fn is_connected(&self) -> bool {
        self.0.join("pid").exists()
    }

    /// Its number, as /dev has it.
    pub(crate) fn device_number(&self) -> Option<(u32, u32)> {
        let text = self.text("dev")?;
        let (major, minor) = text.split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    }

    /// Devices and mounts that use it.
    pub(crate) fn holders(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.join("holders")).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Large requests, no scheduler before ours, more read ahead. What cannot be set stays as it
    /// is: the device works without.
    pub(crate) fn tune(&self) {
        let hardware = self.number("queue/max_hw_sectors_kb").unwrap_or(MAX_SECTORS_KIB);
        let settings = [
            ("queue/scheduler", "none".to_owned()),
            ("queue/max_sectors_kb", MAX_SECTORS_KIB.min(hardware).to_string()),
            ("queue/read_ahead_kb", READ_AHEAD_KIB.to_string()),
        ];
        for (name, value) in settings {
            let _: io::Result<()> = fs::write(self.0.join(name), value);
        }
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.text(name)?.parse().ok()
    }

    fn text(&self, name: &str) -> Option<String> {
        Some(fs::read_to_string(self.0.join(name)).ok()?.trim().to_owned())
    }
}
