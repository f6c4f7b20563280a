//! Makes, finds, recovers and ends devices.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use sheave_core::{Error, ErrorKind, Result, Volume};
use sheave_proto::{ContextSet, ReplyStyle, transmission_flags};

use crate::netlink::{self, Connect};
use crate::sysfs::{self, Sysfs};

/// The kernel releases a device once requests in flight have failed and all files are closed.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// A socket of a dead process is closed by the kernel within milliseconds.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(1);

/// A device of the kernel's NBD client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    index: u32,
}

/// Checks that the kernel has the driver.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when it is not loaded and cannot be, and errors of the kernel.
pub fn is_available() -> Result<()> {
    netlink::is_available().map_err(explain)
}

/// Makes a device with blocks of `block_size` bytes of a volume. `serve` gets the server's end of
/// its connection and must begin to serve it, since the kernel reads the device at once. It may
/// take some milliseconds until the device has its size and its node. When its connection dies, I/O
/// waits for another one for `dead_connection_s`, and then fails.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when the driver is not loaded, and errors of the kernel.
pub fn attach(
    volume: &dyn Volume,
    block_size: u32,
    dead_connection_s: u64,
    identifier: &str,
    serve: impl FnOnce(OwnedFd) -> Result<()>,
) -> Result<Device> {
    let (kernel, server) = connection()?;
    serve(server)?;
    let flags = transmission_flags(volume.info(), ReplyStyle::Simple, ContextSet::default());
    let index = netlink::connect(&Connect {
        socket: &kernel,
        size: volume.size(),
        block_size,
        server_flags: flags,
        dead_connection_s,
        identifier,
    })
    .map_err(explain)?;
    Ok(Device { index })
}

/// The connected device with this identifier.
///
/// # Errors
/// Errors of the kernel.
pub fn find(identifier: &str) -> Result<Option<Device>> {
    for (device, found) in identified()? {
        if found == identifier && netlink::is_connected(device.index).map_err(explain)? {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

/// The devices that have an identifier, with it. None where there is no driver.
///
/// # Errors
/// Errors of the kernel.
pub fn identified() -> Result<Vec<(Device, String)>> {
    let numbers = sysfs::numbers().map_err(explain)?;
    let mut all = Vec::new();
    for index in numbers {
        let device = Device { index };
        all.extend(device.identifier()?.map(|identifier| (device, identifier)));
    }
    Ok(all)
}

/// Gives a device whose server has died a new connection. Requests in flight are sent again when
/// the timer of the device's queue expires. False if the device was ended: the kernel shows it as
/// connected for as long as it is open, and fails its I/O (`nbd_disconnect_and_put` of
/// drivers/block/nbd.c).
///
/// # Errors
/// [`ErrorKind::Busy`] when its old connection does not die, and errors of the kernel.
pub fn recover(
    device: Device,
    dead_connection_s: u64,
    identifier: &str,
    serve: impl FnOnce(OwnedFd) -> Result<()>,
) -> Result<bool> {
    let begun = Instant::now();
    loop {
        let (kernel, server) = connection()?;
        match netlink::reconfigure(device.index, &kernel, dead_connection_s, identifier) {
            Err(error) if netlink::is_ended(device.index, identifier, &error) => return Ok(false),
            done => done.map_err(explain)?,
        }
        // The driver reports no error when it did not take the socket because it had no dead one to
        // replace: our end is then the last one open.
        drop(kernel);
        if !is_closed(&server)? {
            // Nothing else may be set now: most settings wait for requests in flight.
            return serve(server).map(|()| true);
        }
        if begun.elapsed() > RECOVERY_TIMEOUT {
            let why = format!("{device}: its old connection is still alive");
            return Err(Error::new(ErrorKind::Busy, "recover", why));
        }
        sleep(POLL);
    }
}

/// Sets the size of the device of this number, in bytes. The server must serve that size already.
/// Waits in the kernel for requests in flight, so call it in another process than the server.
///
/// # Errors
/// Errors of the kernel.
pub fn resize(index: u32, size: u64, identifier: &str) -> Result<()> {
    netlink::resize(index, size, identifier).map_err(explain)
}

impl Device {
    /// The device of this number, if there is one.
    #[must_use]
    pub fn numbered(index: u32) -> Self {
        Self { index }
    }

    /// Its number.
    #[must_use]
    pub fn index(self) -> u32 {
        self.index
    }

    /// Its name under /dev and /sys/block.
    #[must_use]
    pub fn name(self) -> String {
        format!("nbd{}", self.index)
    }

    /// Whether it has this identifier, and not that of a later device with its number.
    ///
    /// # Errors
    /// When that cannot be read.
    pub fn has(self, identifier: &str) -> Result<bool> {
        Ok(self.identifier()?.as_deref() == Some(identifier))
    }

    fn identifier(self) -> Result<Option<String>> {
        let read = Sysfs::of(self.index).identifier();
        read.map_err(|error| Error::from_io("nbd", format!("the identifier of {self}"), error))
    }

    /// Ends its connection, unless it is another device by now; requests in flight fail. Returns
    /// when the kernel has released it. `claim` keeps other programs from using the device, and is
    /// dropped once none can.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn disconnect(self, identifier: &str, claim: impl Sized) -> Result<()> {
        let is_ours = || match Sysfs::of(self.index).is_connected() {
            true => self.has(identifier),
            false => Ok(false),
        };
        if !is_ours()? {
            return Ok(());
        }
        netlink::disconnect(self.index).map_err(explain)?;
        // The kernel keeps it for as long as it is open.
        drop(claim);
        let begun = Instant::now();
        while is_ours()? {
            if begun.elapsed() > END_TIMEOUT {
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
        write!(f, "/dev/nbd{}", self.index)
    }
}

/// Both ends of a connection: the kernel's and the server's.
fn connection() -> Result<(OwnedFd, OwnedFd)> {
    let (flags, family) = (SocketFlags::CLOEXEC, AddressFamily::UNIX);
    socketpair(family, SocketType::STREAM, flags, None)
        .map_err(|errno| Error::from_io("attach", "socket pair", errno.into()))
}

/// Whether the other end of a connection is closed.
fn is_closed(socket: &OwnedFd) -> Result<bool> {
    let mut polled = [PollFd::new(socket, PollFlags::RDHUP)];
    poll(&mut polled, Some(&Timespec::default()))
        .map_err(|errno| Error::from_io("recover", "socket pair", errno.into()))?;
    Ok(polled[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP))
}

fn explain(error: io::Error) -> Error {
    let what = match error.kind() {
        // It is the driver that does not exist, not what the caller has named.
        io::ErrorKind::NotFound => {
            let what = "the kernel's nbd driver is not loaded (try: modprobe nbd)";
            return Error::new(ErrorKind::Unsupported, "nbd", what).because(error);
        }
        io::ErrorKind::PermissionDenied => "the kernel's nbd driver wants CAP_SYS_ADMIN",
        _ => "the kernel's nbd driver",
    };
    Error::from_io("nbd", what, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_is_absent_is_not_a_volume_that_is_not_found() {
        let error = explain(io::ErrorKind::NotFound.into());
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("modprobe nbd"), "{error}");
    }

    #[test]
    fn a_node_without_the_driver_is_told_which() {
        if let Err(error) = is_available() {
            assert!(error.to_string().contains("the kernel's nbd driver"), "{error}");
        }
    }
}
