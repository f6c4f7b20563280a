//! A block device of this node: its readiness, the settings of its queue, its users.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, OFlags, StatxFlags, flock, major, minor, statx,
};
use rustix::io::Errno;
use sheave_core::{Error, ErrorKind, Result, printable};

/// The largest logical block that the block layer supports: a page.
const BLOCK_MAX: u32 = 4096;
/// The unit of `/sys/block/*/size`, whatever the device's block.
const SECTOR_LEN: u64 = 512;
/// A device's node exists within milliseconds; udev may be slow.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
const READY_POLL: Duration = Duration::from_millis(1);
/// The kernel's default of 128 KiB makes eight requests out of a megabyte.
const MAX_SECTORS_KIB: u64 = 1024;
/// The default is 128 KiB; network storage gains from a longer read-ahead.
const READ_AHEAD_KIB: u64 = 1024;
/// How long the kernel waits before it sends a request again whose nbd connection has died
/// (docs/decisions/0003). Requests on a live connection keep waiting.
const IO_TIMEOUT_MS: u64 = 5_000;
/// A program that has it open may be about to end.
const OPENERS_TIMEOUT: Duration = Duration::from_secs(3);
/// udev opens a device whenever a program that wrote to it has closed it, and always closes it.
const UDEV_TIMEOUT: Duration = Duration::from_secs(30);
const UDEV: [&str; 2] = ["udev-worker", "systemd-udevd"];
const OPENERS_POLL: Duration = Duration::from_millis(20);
/// The most users that an error message names.
const USERS_MAX: usize = 8;

/// Checks that the kernel can make a device with blocks of `block` bytes of a volume of `size`
/// bytes.
///
/// # Errors
/// [`ErrorKind::Invalid`] when it cannot, with what to do.
pub(crate) fn check_blocks(op: &'static str, name: &str, block: u32, size: u64) -> Result<()> {
    let invalid = |why| Err(Error::new(ErrorKind::Invalid, op, format!("{name}: {why}")));
    if block > BLOCK_MAX {
        return invalid(format!("blocks of {block} bytes; the kernel takes {BLOCK_MAX} at most"));
    }
    if size == 0 {
        let what = format!("a device is made of blocks of {block} bytes, and this volume is empty");
        return invalid(format!("{what}; give it a size first: truncate -s 10G FILE"));
    }
    if !size.is_multiple_of(block.into()) {
        let what = format!("a device is made of blocks of {block} bytes, and {size} bytes are not");
        return invalid(format!("{what}; round the image up: truncate -s %{block} FILE"));
    }
    Ok(())
}

/// A device by its name, such as `nbd0`.
pub(crate) struct BlockDevice {
    name: String,
}

impl BlockDevice {
    pub(crate) fn new(name: String) -> Self {
        Self { name }
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// Waits until it has its size and its node exists.
    pub(crate) fn wait_ready(&self, op: &'static str, size: u64) -> Result<()> {
        let begun = Instant::now();
        while self.size() != Some(size) || !self.has_node() {
            if begun.elapsed() > READY_TIMEOUT {
                let why = format!("/dev/{} did not become ready in {READY_TIMEOUT:?}", self.name);
                return Err(Error::new(ErrorKind::Io, op, why));
            }
            sleep(READY_POLL);
        }
        Ok(())
    }

    /// Writes back the kernel's dirty pages, and opens the device exclusively for as long as the
    /// file is held: nothing can be mounted meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when something uses it, which the error names; errors of the kernel.
    pub(crate) fn claim(&self) -> Result<File> {
        self.open_unused(OFlags::EXCL)
    }

    /// Writes back the kernel's dirty pages of a device that nothing uses. Programs may begin to
    /// use it meanwhile.
    ///
    /// # Errors
    /// As [`Self::claim`].
    pub(crate) fn write_back(&self) -> Result<()> {
        self.open_unused(OFlags::empty()).map(drop)
    }

    fn open_unused(&self, flags: OFlags) -> Result<File> {
        // Opening a device whose volume does not answer may take for ever.
        self.wait_unopened()?;
        let users = self.claimants();
        if !users.is_empty() {
            return Err(self.busy(users));
        }
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(flags.bits() as i32);
        let file =
            options.open(self.path()).map_err(|error| match Errno::from_io_error(&error) {
                Some(Errno::BUSY) => self.busy(self.claimants()),
                _ => self.failed(error),
            })?;
        self.wait_unopened()?;
        if flags.contains(OFlags::EXCL) {
            self.lock(&file)?;
        }
        self.sync(&file).map_err(|error| self.failed(error))?;
        Ok(file)
    }

    /// Keeps udev from probing it, which would fail when the device ends under it: udev does not
    /// read a device that is locked (systemd.io/BLOCK_DEVICE_LOCKING).
    fn lock(&self, file: &File) -> Result<()> {
        let begun = Instant::now();
        loop {
            match flock(file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(()),
                Err(Errno::WOULDBLOCK) if begun.elapsed() < UDEV_TIMEOUT => sleep(OPENERS_POLL),
                Err(Errno::WOULDBLOCK) => {
                    return Err(self.busy(vec!["a program has locked it".to_owned()]));
                }
                Err(error) => return Err(self.failed(error.into())),
            }
        }
    }

    /// Waits until no other process has it open, for a bounded time.
    fn wait_unopened(&self) -> Result<()> {
        let begun = Instant::now();
        loop {
            let openers = self.openers();
            if openers.is_empty() {
                return Ok(());
            }
            let all_go = openers.iter().all(|opener| UDEV.iter().any(|udev| opener.contains(udev)));
            let patience = if all_go { UDEV_TIMEOUT } else { OPENERS_TIMEOUT };
            if begun.elapsed() > patience {
                return Err(self.busy(openers));
            }
            sleep(OPENERS_POLL);
        }
    }

    /// Writes back the kernel's dirty pages.
    fn sync(&self, file: &File) -> io::Result<()> {
        // Pages written through a partition are not among those of the whole device.
        for partition in self.partitions() {
            let name = partition.file_name().unwrap_or_default();
            match File::open(Path::new("/dev").join(name)) {
                Ok(partition) => partition.sync_all()?,
                // A missing node has no dirty pages.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        file.sync_all()
    }

    fn busy(&self, mut users: Vec<String>) -> Error {
        if users.is_empty() {
            users.push("by a mount in another namespace".to_owned());
        }
        users.truncate(USERS_MAX);
        let why = format!("/dev/{} is in use: {}; end that first", self.name, users.join(", "));
        Error::new(ErrorKind::Busy, "detach", why)
    }

    fn failed(&self, error: io::Error) -> Error {
        Error::from_io("detach", printable(&self.path()).to_string(), error)
    }

    /// Exclusive users of it or of one of its partitions, as far as this process sees them.
    fn claimants(&self) -> Vec<String> {
        let parts: Vec<PathBuf> = self.partitions().chain([self.sysfs("")]).collect();
        let holders = parts.iter().flat_map(|part| fs::read_dir(part.join("holders"))).flatten();
        let mut found: Vec<String> = holders
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        let names = parts.iter().filter_map(|part| part.canonicalize().ok());
        let nodes: Vec<PathBuf> =
            names.filter_map(|part| Some(Path::new("/dev").join(part.file_name()?))).collect();
        found.extend(mount_points(&nodes));
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        let swaps = swaps.lines().filter_map(|line| line.split_whitespace().next());
        let swaps = swaps.filter(|swap| nodes.iter().any(|node| node == Path::new(swap)));
        found.extend(swaps.map(|swap| format!("swap on {swap}")));
        found
    }

    /// Processes that have it or one of its partitions open, under any name: a mount opens a device
    /// exclusively, but a program that writes to it does not, and its next writes would be lost.
    fn openers(&self) -> Vec<String> {
        let numbers = self.numbers();
        let own = std::process::id();
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let processes = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let opened = |pid: &u32| {
            let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            let mut devices = files.filter_map(|file| block_number(&file.path()));
            devices.any(|number| numbers.contains(&number))
        };
        let pids = processes.filter(|&pid| pid != own).filter(opened);
        let mut found: Vec<_> =
            pids.map(|pid| format!("process {pid} ({})", command_of(pid))).collect();
        found.extend(self.loops());
        found
    }

    /// Loop devices over it or a partition, such as kubelet's over that of a pod; no process has
    /// those open. The first process may see their backing files where this one does not.
    fn loops(&self) -> Vec<String> {
        let numbers = self.numbers();
        let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
        let over = entries.filter(|entry| {
            let file = fs::read_to_string(entry.path().join("loop/backing_file"));
            file.is_ok_and(|file| {
                let paths = ["", "/proc/1/root"].map(|root| format!("{root}{}", file.trim_end()));
                let mut found = paths.iter().filter_map(|path| block_number(Path::new(path)));
                found.any(|number| numbers.contains(&number))
            })
        });
        over.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Its number and those of its partitions.
    fn numbers(&self) -> Vec<(u32, u32)> {
        let parse = |text: String| {
            let (major, minor) = text.trim().split_once(':')?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        };
        let of = |directory: PathBuf| parse(fs::read_to_string(directory.join("dev")).ok()?);
        self.partitions().chain([self.sysfs("")]).filter_map(of).collect()
    }

    /// The directories of its partitions.
    fn partitions(&self) -> impl Iterator<Item = PathBuf> {
        let entries = fs::read_dir(self.sysfs("")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|path| path.join("partition").exists())
    }

    /// Its size in bytes.
    pub(crate) fn size(&self) -> Option<u64> {
        self.number("size").map(|sectors| sectors * SECTOR_LEN)
    }

    fn has_node(&self) -> bool {
        let Ok(metadata) = self.path().metadata() else { return false };
        let number = format!("{}:{}", major(metadata.rdev()), minor(metadata.rdev()));
        metadata.file_type().is_block_device() && self.text("dev") == Some(number)
    }

    /// Sets large requests, no scheduler, more read-ahead and a short timer. Errors are ignored:
    /// the device works without. The kernel waits for requests in flight.
    pub(crate) fn tune(&self) {
        let hardware = self.number("queue/max_hw_sectors_kb").unwrap_or(MAX_SECTORS_KIB);
        let settings = [
            // ublk does not use it.
            ("queue/io_timeout", IO_TIMEOUT_MS.to_string()),
            ("queue/scheduler", "none".to_owned()),
            ("queue/max_sectors_kb", MAX_SECTORS_KIB.min(hardware).to_string()),
            ("queue/read_ahead_kb", READ_AHEAD_KIB.to_string()),
        ];
        for (name, value) in settings {
            let has = self.text(name).unwrap_or_default();
            // A recovered device has them already, and must not wait.
            if has != value && !has.contains(&format!("[{value}]")) {
                let _: io::Result<()> = fs::write(self.sysfs(name), value);
            }
        }
    }

    /// Finds the partitions by partx(8) where the kernel did not look for them, as with ublk before
    /// Linux 7.1. The kernel waits for the volume.
    ///
    /// # Errors
    /// When there is no partx.
    pub(crate) fn add_partitions(&self) -> Result<()> {
        // Since Linux 6.10 sysfs shows whether the kernel looks.
        if self.number("partscan") == Some(1) {
            return Ok(());
        }
        let mut boot = [0; 512];
        let read = File::open(self.path()).and_then(|mut file| file.read_exact(&mut boot));
        // A GPT begins like an MBR. A device that cannot be read, or is gone, has no table.
        if read.is_ok() && boot.ends_with(&[0x55, 0xaa]) && self.partitions().next().is_none() {
            let mut partx = Command::new("partx");
            // It fails on file systems that begin like a table.
            let ended = partx.arg("--add").arg(self.path()).stdout(Stdio::null()).status();
            let what = "partx, without which the device has no partitions";
            ended.map_err(|error| Error::from_io("attach", what, error))?;
        }
        Ok(())
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.text(name)?.parse().ok()
    }

    fn text(&self, name: &str) -> Option<String> {
        Some(fs::read_to_string(self.sysfs(name)).ok()?.trim().to_owned())
    }

    fn sysfs(&self, name: &str) -> PathBuf {
        Path::new("/sys/block").join(&self.name).join(name)
    }
}

/// The mount points of these devices that the first process and this one see; this one may have a
/// mount namespace of its own (proc_pid_mountinfo(5)). Compares names, since btrfs gives its mounts
/// other device numbers.
fn mount_points(nodes: &[PathBuf]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for table in ["/proc/1/mountinfo", "/proc/self/mountinfo"] {
        let mounts = fs::read_to_string(table).unwrap_or_default();
        for line in mounts.lines() {
            let Some((before, after)) = line.split_once(" - ") else { continue };
            let source = after.split(' ').nth(1).map(Path::new);
            if source.is_some_and(|source| nodes.iter().any(|node| node == source)) {
                found.extend(before.split(' ').nth(4).map(str::to_owned));
            }
        }
    }
    found
}

/// The number of the block device of this name, or behind an entry of /proc/PID/fd, without asking
/// a file server that may be away.
fn block_number(link: &Path) -> Option<(u32, u32)> {
    let (flags, wanted) = (AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE);
    let found = statx(CWD, link, flags, wanted).ok()?;
    let is_block = FileType::from_raw_mode(found.stx_mode.into()) == FileType::BlockDevice;
    is_block.then_some((found.stx_rdev_major, found.stx_rdev_minor))
}

fn command_of(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim().to_owned()
}
