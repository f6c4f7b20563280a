//! Devices: made, served again after a crash, ended.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread::sleep;
use std::time::{Duration, Instant};

use sheave_core::{ByteRange, Error, ErrorKind, OpKind, Result};
use sheave_ring::Descriptors;
use sheave_shard::{Engine, Opened, QueueAssignment, Served};

use crate::control::Control;
use crate::queue::UblkQueue;
use crate::uapi::{DEAD, DeviceInfo, QUIESCED, feature, parameters};

/// Where the kernel lists the files of devices.
const CLASS: &str = "/sys/class/ublk-char";
/// The queue depth: requests in flight per queue.
const DEPTH: u16 = 128;
/// The longest request, in bytes: as with other block drivers, and a good size for network storage.
pub(crate) const IO_MAX_BYTES: u32 = 1 << 20;
/// The kernel does it at once; udev may be slow.
const FILE_TIMEOUT: Duration = Duration::from_secs(10);
/// A dead server is cleaned up by the kernel within milliseconds, unless its disks are slow.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long programs may keep a device open that was ended.
const DELETE_TIMEOUT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(1);

/// A device of the ublk driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    id: u32,
}

/// Makes a device with blocks of `block` bytes and returns when it is live. The kernel keeps `key`,
/// by which [`recover`] knows the device, and the engine its queues. `made` is called before the
/// device can be used.
///
/// # Errors
/// [`ErrorKind::NotFound`] when the driver is not loaded, [`ErrorKind::Unsupported`] when it is too
/// old or the engine has no ring, and errors of `made`, of the volume and of the kernel.
pub fn attach(
    engine: &Engine,
    served: &Served,
    block: u32,
    key: u64,
    made: impl FnOnce(Device) -> Result<()>,
) -> Result<Device> {
    let (info, size) = (served.volume.info(), served.volume.size());
    let opened = engine.open(served)?;
    let mut control = Control::open()?;
    let io_max_bytes = IO_MAX_BYTES.min(info.block.maximum_payload);
    let queues = u16::try_from(engine.device_queues()).unwrap_or(u16::MAX);
    let features = control.features()?;
    // A volume that takes one of its reads takes most of them.
    let most = u64::from(block.max(info.block.minimum));
    let first = ByteRange::within(0, most, size).ok();
    let takes = first.is_some_and(|first| served.volume.takes_registered(OpKind::Read, first));
    let registers = takes && features & feature::REGISTERS == feature::REGISTERS;
    let added = control.add(DeviceInfo {
        queues,
        depth: DEPTH,
        io_max_bytes,
        features: if registers { feature::AUTO_BUF_REG } else { 0 },
        key,
        ..DeviceInfo::default()
    })?;
    // Before Linux 7.1 the kernel reads the partition table while it starts a device, with the lock
    // that is needed to recover or end it: were the server to die then, both would hang. (6.19
    // reads it later already, but does not report that feature.)
    let shed_privilege = features & feature::NO_AUTO_PART_SCAN == 0;
    let device = Device { id: added.id };
    let live = (|| {
        control.set_parameters(added.id, &mut parameters(info, size, block, added.io_max_bytes))?;
        made(device)?;
        serve(&opened, &added, shed_privilege)?;
        control.start(added.id)
    })();
    if let Err(error) = live {
        // The caller does not know it, so it has to be ended here.
        let _ = device.detach(key, ());
        return Err(error);
    }
    Ok(device)
}

/// The device with this key, which has this number if one is known. A device that was never live,
/// or is not any more, is ended: its server died while making or ending it.
///
/// # Errors
/// Errors of the kernel.
pub fn find(id: Option<u32>, key: u64) -> Result<Option<Device>> {
    let ids = match id {
        Some(id) => vec![id],
        None => numbers(),
    };
    let mut control = match Control::open() {
        Ok(control) => control,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    for id in ids {
        let device = Device { id };
        match control.info(id) {
            Ok(info) if info.key != key => {}
            Ok(info) if info.state == DEAD => device.detach(key, ())?,
            Ok(_) => return Ok(Some(device)),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Serves a device again whose server has died, and returns when its requests flow. The kernel
/// issues those again that were in flight.
///
/// # Errors
/// [`ErrorKind::NotFound`] when there is no such device, or it has another key;
/// [`ErrorKind::Busy`] when its server has not died; what the kernel says.
pub fn recover(opened: &Opened<'_>, device: Device, key: u64) -> Result<()> {
    let mut control = Control::open()?;
    let info = control.info(device.id)?;
    if info.key != key {
        let why = format!("{device} is not the device it was");
        return Err(Error::new(ErrorKind::NotFound, "recover", why));
    }
    let begun = Instant::now();
    while let Err(error) = control.start_recovery(device.id) {
        if error.kind() == ErrorKind::Invalid && control.info(device.id)?.state == QUIESCED {
            // Another server began the recovery, and died before its queues were ready.
            break;
        }
        if error.kind() != ErrorKind::Busy || begun.elapsed() > RECOVERY_TIMEOUT {
            return Err(error);
        }
        sleep(POLL);
    }
    serve(opened, &info, false)?;
    control.end_recovery(device.id)
}

impl Device {
    /// The device of this number, if there is one.
    #[must_use]
    pub fn numbered(id: u32) -> Self {
        Self { id }
    }

    /// Whether it has this key, and is not a later device with its number. True if the kernel does
    /// not say.
    #[must_use]
    pub fn has_key(self, key: u64) -> bool {
        match Control::open().and_then(|mut control| control.info(self.id)) {
            Ok(info) => info.key == key,
            Err(error) => error.kind() != ErrorKind::NotFound,
        }
    }

    /// Its number.
    #[must_use]
    pub fn id(self) -> u32 {
        self.id
    }

    /// Its name under /dev and /sys/block.
    #[must_use]
    pub fn name(self) -> String {
        format!("ublkb{}", self.id)
    }

    /// Sets the size in bytes. The server must serve that size already.
    ///
    /// # Errors
    /// What the kernel says; see [`check_resize`].
    pub fn resize(self, size: u64) -> Result<()> {
        Control::open()?.set_size(self.id, size)
    }

    /// Ends it, unless it is another device by now. Dirty pages of the kernel are lost, so write
    /// them back before. `claim` keeps other programs from using the device, and is dropped once
    /// none can.
    ///
    /// # Errors
    /// What the kernel says; none when there is no such device any more.
    pub fn detach(self, key: u64, claim: impl Sized) -> Result<()> {
        let mut control = Control::open()?;
        match control.info(self.id) {
            Ok(info) if info.key != key => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        let stopped = control.stop(self.id);
        // The kernel keeps it for as long as it is open.
        drop(claim);
        match stopped.and_then(|()| control.delete(self.id)) {
            // It was ended by other means meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            other => other?,
        }
        // Until then the number is not free, and the shards may hold the volume.
        let begun = Instant::now();
        while control.info(self.id).is_ok_and(|info| info.key == key) {
            if begun.elapsed() > DELETE_TIMEOUT {
                tracing::warn!(device = %self, "ended, but somebody still has it open");
                break;
            }
            sleep(POLL);
        }
        Ok(())
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/dev/ublkb{}", self.id)
    }
}

/// Hands all queues to the shards, and returns when they serve them. With `shed_privilege` the
/// shards give up the privilege that makes the kernel read partition tables.
fn serve(opened: &Opened<'_>, info: &DeviceInfo, shed_privilege: bool) -> Result<()> {
    let device = open_device(info.id)?;
    let fail = |error| Error::from_io("attach", format!("/dev/ublkc{}", info.id), error);
    let mut queues = Vec::with_capacity(info.queues.into());
    for number in 0..info.queues {
        let descriptors = Descriptors::map(device.as_fd(), number, info.depth).map_err(fail)?;
        let queue = UblkQueue::new(number, descriptors, info, shed_privilege);
        queues.push(QueueAssignment {
            key: info.key,
            device: OwnedFd::from(device.try_clone().map_err(fail)?),
            queue: Box::new(queue),
        });
    }
    drop(device);
    opened.serve(queues)
}

/// Whether the size of a device can be changed.
///
/// # Errors
/// [`ErrorKind::Unsupported`] before Linux 6.16, and what the kernel says.
pub fn check_resize() -> Result<()> {
    if Control::open()?.features()? & feature::UPDATE_SIZE != 0 {
        return Ok(());
    }
    let what =
        "the size of a ublk device cannot be changed before Linux 6.16; detach and attach it";
    Err(Error::new(ErrorKind::Unsupported, "resize", what))
}

/// The numbers of all devices.
fn numbers() -> Vec<u32> {
    let entries = fs::read_dir(CLASS).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name());
    names.filter_map(|name| name.to_str()?.strip_prefix("ublkc")?.parse().ok()).collect()
}

/// Opens the device's file for commands once its node is there.
fn open_device(id: u32) -> Result<File> {
    let path = format!("/dev/ublkc{id}");
    let begun = Instant::now();
    loop {
        match File::options().read(true).write(true).open(&path) {
            Ok(file) => return Ok(file),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::from_io("attach", path, error));
            }
            Err(_) if begun.elapsed() < FILE_TIMEOUT => sleep(POLL),
            Err(error) => return Err(Error::from_io("attach", path, error)),
        }
    }
}
