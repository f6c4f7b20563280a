//! Commands to /dev/ublk-control.

use std::fs::File;
use std::io;

use sheave_core::{Error, ErrorKind, Result};
use sheave_ring::ControlRing;

use crate::uapi::{DeviceInfo, SECTOR_SHIFT, control, feature};

const CONTROL: &str = "/dev/ublk-control";
/// Requests any free number.
const ANY: u32 = u32::MAX;
/// The features that are needed: devices outlive their server, and data is copied straight from and
/// to a volume's memory. Linux 6.5 has all of them.
const NEEDED: u64 = feature::USER_RECOVERY
    | feature::USER_RECOVERY_REISSUE
    | feature::CMD_IOCTL_ENCODE
    | feature::USER_COPY;

/// The driver.
pub(crate) struct Control(ControlRing);

/// Checks that the driver is loaded and has the features that are needed, without making a device.
///
/// # Errors
/// [`sheave_core::ErrorKind::NotFound`] when it is not loaded, otherwise the features that it
/// lacks, or why it cannot be queried.
pub fn check() -> Result<()> {
    let mut control = Control::open()?;
    let has = control.features()?;
    if has & NEEDED == NEEDED {
        return Ok(());
    }
    let what = "the kernel's driver is older than Linux 6.5; use nbd";
    Err(Error::new(ErrorKind::Unsupported, "ublk", what))
}

/// Makes a device that is never started, and ends it. On some kernels this kills or hangs the
/// caller, so call it in a process that can be lost, and wait for a bounded time.
///
/// # Errors
/// As [`check`], and what the driver says.
pub fn probe() -> Result<()> {
    check()?;
    let mut control = Control::open()?;
    let wanted = DeviceInfo { queues: 1, depth: 1, io_max_bytes: 4096, ..DeviceInfo::default() };
    let info = control.add(wanted)?;
    control.delete(info.id)
}

impl Control {
    pub(crate) fn open() -> Result<Self> {
        let opened = File::options().read(true).write(true).open(CONTROL);
        let driver = opened.map_err(|error| {
            let what = match error.kind() {
                io::ErrorKind::NotFound => {
                    "the kernel's driver is not loaded (try: modprobe ublk_drv)"
                }
                _ => CONTROL,
            };
            Error::from_io("ublk", what, error)
        })?;
        let ring = ControlRing::new(driver)
            .map_err(|error| Error::from_io("ublk", "io_uring with long entries", error))?;
        Ok(Self(ring))
    }

    pub(crate) fn features(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.call(control::GET_FEATURES, ANY, 0, &mut bytes)?;
        #[expect(clippy::host_endian_bytes, reason = "the kernel's are in the host's order")]
        Ok(u64::from_ne_bytes(bytes))
    }

    /// Adds a device like this one, with the features that are needed besides its own, and a number
    /// that the driver chooses.
    pub(crate) fn add(&mut self, wanted: DeviceInfo) -> Result<DeviceInfo> {
        let features = wanted.features | NEEDED;
        let mut bytes = DeviceInfo { id: ANY, features, ..wanted }.to_bytes();
        self.call(control::ADD_DEV, ANY, 0, &mut bytes)?;
        Ok(DeviceInfo::of_bytes(&bytes))
    }

    pub(crate) fn info(&mut self, id: u32) -> Result<DeviceInfo> {
        let mut bytes = [0; DeviceInfo::LEN];
        self.call(control::GET_DEV_INFO, id, 0, &mut bytes)?;
        Ok(DeviceInfo::of_bytes(&bytes))
    }

    pub(crate) fn set_parameters(&mut self, id: u32, parameters: &mut [u8]) -> Result<()> {
        self.call(control::SET_PARAMS, id, 0, parameters)
    }

    pub(crate) fn set_size(&mut self, id: u32, size: u64) -> Result<()> {
        self.call(control::UPDATE_SIZE, id, size >> SECTOR_SHIFT, &mut [])
    }

    /// Starts the device once all slots of all queues have been offered.
    pub(crate) fn start(&mut self, id: u32) -> Result<()> {
        self.call(control::START_DEV, id, own_pid(), &mut [])
    }

    pub(crate) fn stop(&mut self, id: u32) -> Result<()> {
        self.call(control::STOP_DEV, id, 0, &mut [])
    }

    /// Ends the device; its number is free once no program has it open.
    pub(crate) fn delete(&mut self, id: u32) -> Result<()> {
        match self.call(control::DEL_DEV_ASYNC, id, 0, &mut []) {
            // Before Linux 6.9 only DEL_DEV exists, which waits until the device is closed.
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                self.call(control::DEL_DEV, id, 0, &mut [])
            }
            ended => ended,
        }
    }

    /// Takes the device over from a server that is gone; `Busy` until it is.
    pub(crate) fn start_recovery(&mut self, id: u32) -> Result<()> {
        self.call(control::START_USER_RECOVERY, id, 0, &mut [])
    }

    /// Lets requests flow again, once all slots of all queues have been offered.
    pub(crate) fn end_recovery(&mut self, id: u32) -> Result<()> {
        self.call(control::END_USER_RECOVERY, id, own_pid(), &mut [])
    }

    fn call(&mut self, command: u32, id: u32, data: u64, buffer: &mut [u8]) -> Result<()> {
        self.0.call(command, id, data, buffer).map_err(|error| {
            let what = match error.kind() {
                io::ErrorKind::PermissionDenied => "the kernel's driver wants CAP_SYS_ADMIN",
                _ => "the kernel's driver",
            };
            Error::from_io("ublk", what, error)
        })
    }
}

fn own_pid() -> u64 {
    std::process::id().into()
}
