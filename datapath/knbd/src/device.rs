//! Devices: made, waited for, found again, ended.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use sheave_core::{Error, ErrorKind, Result, VolumeInfo};
use sheave_proto::{ContextSet, ReplyStyle, transmission_flags};

use crate::netlink::{self, Connect};
use crate::sysfs::Sysfs;

/// What the block layer addresses at least.
const BLOCK_MIN: u32 = 512;
/// What the driver takes at most: a page.
const BLOCK_MAX: u32 = 4096;
/// A device is there within milliseconds of its connection; udev may be slow.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
const READY_POLL: Duration = Duration::from_millis(1);

/// A device of the kernel's NBD client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    index: u32,
}

/// How long the kernel waits, in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For an answer, before it takes the connection for dead; 0 = for ever.
    pub request_s: u64,
    /// For another connection when all are dead, before I/O fails.
    pub dead_connection_s: u64,
}

/// Makes a device of a volume, with so many connections. `serve` gets the server's end of each and
/// must begin to serve it, since the kernel reads the device before it is ready.
///
/// # Errors
/// [`ErrorKind::NotFound`] when the driver is not loaded, [`ErrorKind::Invalid`] for a volume whose
/// size or block the kernel cannot have, and what the kernel says.
pub fn attach(
    info: &VolumeInfo,
    connections: usize,
    timeouts: Timeouts,
    identifier: &str,
    mut serve: impl FnMut(OwnedFd) -> Result<()>,
) -> Result<Device> {
    let block_size = block_size(info)?;
    let mut ours = Vec::with_capacity(connections);
    for _ in 0..connections {
        let (flags, family) = (SocketFlags::CLOEXEC, AddressFamily::UNIX);
        let (kernel, server) = socketpair(family, SocketType::STREAM, flags, None)
            .map_err(|errno| Error::from_io("attach", "socket pair", errno.into()))?;
        serve(server)?;
        ours.push(kernel);
    }
    let flags = transmission_flags(info, ReplyStyle::Simple, ContextSet::default());
    let index = netlink::connect(&Connect {
        sockets: &ours,
        size: info.size,
        block_size,
        server_flags: flags,
        timeout_s: timeouts.request_s,
        dead_conn_timeout_s: timeouts.dead_connection_s,
        identifier,
    })
    .map_err(explain)?;
    let device = Device { index };
    if let Err(error) = device.wait_ready(info.size) {
        // The caller has not learned of it, so nobody else would end it.
        let _ = device.disconnect();
        return Err(error);
    }
    Sysfs::of(index).tune();
    Ok(device)
}

/// The connected device with this identifier.
///
/// # Errors
/// What the kernel says.
pub fn find(identifier: &str) -> Result<Option<Device>> {
    let connected = netlink::connected().map_err(explain)?;
    let found = connected
        .into_iter()
        .find(|&index| Sysfs::of(index).identifier().as_deref() == Some(identifier));
    Ok(found.map(|index| Device { index }))
}

impl Device {
    /// `/dev/nbdN`.
    #[must_use]
    pub fn path(self) -> PathBuf {
        PathBuf::from(format!("/dev/nbd{}", self.index))
    }

    /// What has claimed it, such as a mounted file system, in any namespace; empty if nothing has.
    ///
    /// # Errors
    /// When it cannot be opened to find out.
    pub fn users(self) -> Result<Vec<String>> {
        let exclusive = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        match rustix::fs::open(self.path(), exclusive, Mode::empty()) {
            Ok(_) => return Ok(Vec::new()),
            Err(Errno::BUSY) => {}
            Err(errno) => {
                return Err(Error::from_io("detach", self.to_string(), errno.into()));
            }
        }
        let mut users = Sysfs::of(self.index).holders();
        users.extend(self.mount_points());
        if users.is_empty() {
            users.push("by a mount in another namespace, or as swap".to_owned());
        }
        Ok(users)
    }

    /// Where it is mounted, as far as the first process and this one see it, which may have a mount
    /// namespace of its own (proc_pid_mountinfo(5)). By its name: btrfs gives its mounts other
    /// device numbers.
    fn mount_points(self) -> BTreeSet<String> {
        let (path, mut found) = (self.to_string(), BTreeSet::new());
        for table in ["/proc/1/mountinfo", "/proc/self/mountinfo"] {
            let mounts = std::fs::read_to_string(table).unwrap_or_default();
            for line in mounts.lines() {
                let Some((before, after)) = line.split_once(" - ") else { continue };
                if after.split(' ').nth(1) == Some(&path) {
                    found.extend(before.split(' ').nth(4).map(str::to_owned));
                }
            }
        }
        found
    }

    /// Ends its connections; what it has in flight fails. Returns when the kernel has let go.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn disconnect(self) -> Result<()> {
        netlink::disconnect(self.index).map_err(explain)?;
        let begun = Instant::now();
        while Sysfs::of(self.index).is_connected() {
            if begun.elapsed() > READY_TIMEOUT {
                let why = format!("{self}: the kernel does not let go of it");
                return Err(Error::new(ErrorKind::Busy, "detach", why));
            }
            sleep(READY_POLL);
        }
        Ok(())
    }

    /// Waits until it is connected, has its size, and its node is there: the driver returns before.
    fn wait_ready(self, size: u64) -> Result<()> {
        let begun = Instant::now();
        loop {
            let sysfs = Sysfs::of(self.index);
            if sysfs.is_connected() && sysfs.size() == Some(size) && self.has_node(&sysfs) {
                return Ok(());
            }
            if begun.elapsed() > READY_TIMEOUT {
                let why = format!("{self} did not become ready in {READY_TIMEOUT:?}");
                return Err(Error::new(ErrorKind::Io, "attach", why));
            }
            sleep(READY_POLL);
        }
    }

    fn has_node(self, sysfs: &Sysfs) -> bool {
        let Ok(metadata) = self.path().metadata() else { return false };
        let number = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
        metadata.file_type().is_block_device() && sysfs.device_number() == Some(number)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/dev/nbd{}", self.index)
    }
}

fn block_size(info: &VolumeInfo) -> Result<u32> {
    let invalid = |why| Err(Error::new(ErrorKind::Invalid, "attach", why));
    let block = info.block.minimum.max(BLOCK_MIN);
    if block > BLOCK_MAX {
        return invalid(format!("blocks of {block} bytes; the kernel takes {BLOCK_MAX} at most"));
    }
    if info.size == 0 || !info.size.is_multiple_of(block.into()) {
        let size = info.size;
        return invalid(format!("a device is made of blocks of {block} bytes, and not of {size}"));
    }
    Ok(block)
}

fn explain(error: io::Error) -> Error {
    let what = match error.kind() {
        io::ErrorKind::NotFound => "the kernel's nbd driver is not loaded; try: modprobe nbd",
        io::ErrorKind::PermissionDenied => "the kernel's nbd driver wants CAP_SYS_ADMIN",
        _ => "the kernel's nbd driver",
    };
    Error::from_io("attach", what, error)
}
