//! The commands of the family "nbd" (include/uapi/linux/nbd-netlink.h, drivers/block/nbd.c).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::genl::{Attributes, Genl, attributes_of};
use crate::module;

pub(crate) const FAMILY: &str = "nbd";
const MODULE: &str = "nbd";
/// The time after which a request counts as lost and its connection as dead; 0 = never.
const TIMEOUT_S: u64 = 0;

mod command {
    pub(super) const CONNECT: u8 = 1;
    pub(super) const DISCONNECT: u8 = 2;
    pub(super) const RECONFIGURE: u8 = 3;
    pub(super) const STATUS: u8 = 5;
}

mod attribute {
    pub(super) const INDEX: u16 = 1;
    pub(super) const SIZE_BYTES: u16 = 2;
    pub(super) const BLOCK_SIZE_BYTES: u16 = 3;
    pub(super) const TIMEOUT: u16 = 4;
    pub(super) const SERVER_FLAGS: u16 = 5;
    pub(super) const SOCKETS: u16 = 7;
    pub(super) const DEAD_CONN_TIMEOUT: u16 = 8;
    pub(super) const DEVICE_LIST: u16 = 9;
    pub(super) const BACKEND_IDENTIFIER: u16 = 10;

    /// In `SOCKETS`, and in its items.
    pub(super) const SOCKET_ITEM: u16 = 1;
    pub(super) const SOCKET_FD: u16 = 1;
    /// In `DEVICE_LIST`, and in its items.
    pub(super) const DEVICE_ITEM: u16 = 1;
    pub(super) const DEVICE_INDEX: u16 = 1;
    pub(super) const DEVICE_CONNECTED: u16 = 2;
}

/// The parameters of a device.
pub(crate) struct Connect<'a> {
    pub(crate) socket: &'a OwnedFd,
    pub(crate) size: u64,
    pub(crate) block_size: u32,
    /// The server's capabilities ([`sheave_proto::wire::transmission_flag`]).
    pub(crate) server_flags: u16,
    /// How long requests wait for another connection when all are dead.
    pub(crate) dead_connection_s: u64,
    /// The identifier of the device, which /sys/block/nbdN/backend shows.
    pub(crate) identifier: &'a str,
}

/// Checks that the kernel has the driver.
///
/// # Errors
/// `NotFound` when the module is not loaded and cannot be.
pub(crate) fn is_available() -> io::Result<()> {
    open().map(|_| ())
}

/// Makes a device with a free number, and returns the number.
pub(crate) fn connect(connect: &Connect<'_>) -> io::Result<u32> {
    let (mut genl, family) = open()?;
    let answer = genl.call(family, command::CONNECT, &describe(connect))?;
    attributes_of(&answer)
        .find(|found| found.kind == attribute::INDEX)
        .and_then(|found| found.u32())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "nbd: connected, but to what?"))
}

fn describe(connect: &Connect<'_>) -> Attributes {
    let mut attributes = Attributes::default();
    attributes.put_u64(attribute::SIZE_BYTES, connect.size);
    attributes.put_u64(attribute::BLOCK_SIZE_BYTES, connect.block_size.into());
    attributes.put_u64(attribute::TIMEOUT, TIMEOUT_S);
    attributes.put_u64(attribute::SERVER_FLAGS, connect.server_flags.into());
    attributes.put_u64(attribute::DEAD_CONN_TIMEOUT, connect.dead_connection_s);
    attributes.put_nested(attribute::SOCKETS, &socket_list(connect.socket));
    attributes.put_text(attribute::BACKEND_IDENTIFIER, connect.identifier);
    attributes
}

/// Replaces a dead socket, if there is one.
pub(crate) fn reconfigure(
    index: u32,
    socket: &OwnedFd,
    dead_connection_s: u64,
    identifier: &str,
) -> io::Result<()> {
    let mut attributes = Attributes::default();
    attributes.put_u64(attribute::DEAD_CONN_TIMEOUT, dead_connection_s);
    attributes.put_nested(attribute::SOCKETS, &socket_list(socket));
    change(index, identifier, attributes)
}

/// Changes the size of a device, in bytes. Waits for requests in flight.
pub(crate) fn resize(index: u32, size: u64, identifier: &str) -> io::Result<()> {
    let mut attributes = Attributes::default();
    attributes.put_u64(attribute::SIZE_BYTES, size);
    change(index, identifier, attributes)
}

/// Whether a device could not be reconfigured with this error since it was ended. It is asked for a
/// change of nothing: the error does not say what is wrong, and may be that of a parameter.
pub(crate) fn is_ended(index: u32, identifier: &str, error: &io::Error) -> bool {
    let is_invalid = |error: &io::Error| error.kind() == io::ErrorKind::InvalidInput;
    let nothing = || change(index, identifier, Attributes::default());
    is_invalid(error) && nothing().is_err_and(|error| is_invalid(&error))
}

/// Changes attributes of a device that has this identifier.
fn change(index: u32, identifier: &str, mut attributes: Attributes) -> io::Result<()> {
    attributes.put_u32(attribute::INDEX, index);
    attributes.put_text(attribute::BACKEND_IDENTIFIER, identifier);
    let (mut genl, family) = open()?;
    genl.call(family, command::RECONFIGURE, &attributes).map(|_| ())
}

/// Ends a device.
pub(crate) fn disconnect(index: u32) -> io::Result<()> {
    let mut attributes = Attributes::default();
    attributes.put_u32(attribute::INDEX, index);
    let (mut genl, family) = open()?;
    genl.call(family, command::DISCONNECT, &attributes).map(|_| ())
}

/// Whether the device of this number is connected. Queried one by one: with thousands of devices,
/// the list of all does not fit into a message.
pub(crate) fn is_connected(index: u32) -> io::Result<bool> {
    let mut attributes = Attributes::default();
    attributes.put_u32(attribute::INDEX, index);
    let (mut genl, family) = open()?;
    let answer = genl.call(family, command::STATUS, &attributes)?;
    let lists = attributes_of(&answer).filter(|found| found.kind == attribute::DEVICE_LIST);
    let items = lists.flat_map(|list| attributes_of(list.content));
    let connected = items.filter(|item| item.kind == attribute::DEVICE_ITEM).find_map(|item| {
        let field = |kind| attributes_of(item.content).find(|found| found.kind == kind);
        let found = field(attribute::DEVICE_INDEX)?.u32()?;
        (found == index).then_some(field(attribute::DEVICE_CONNECTED)?.u8()? != 0)
    });
    let no_answer = || io::Error::new(io::ErrorKind::InvalidData, "nbd: no answer about a device");
    connected.ok_or_else(no_answer)
}

fn socket_list(socket: &OwnedFd) -> Attributes {
    let fd = u32::try_from(socket.as_raw_fd()).expect("an open descriptor is not negative");
    let (mut item, mut list) = (Attributes::default(), Attributes::default());
    item.put_u32(attribute::SOCKET_FD, fd);
    list.put_nested(attribute::SOCKET_ITEM, &item);
    list
}

fn open() -> io::Result<(Genl, u16)> {
    let mut genl = Genl::open()?;
    let family = match genl.family(FAMILY) {
        // Newer kernels than 6.1 load it when its family is asked for.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            module::load(MODULE);
            genl.family(FAMILY)?
        }
        found => found?,
    };
    Ok((genl, family))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::host_endian_bytes, reason = "netlink is")]
    fn the_kernel_is_given_size_and_block() {
        let socket = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let (size, block_size) = (1 << 40, 4096);
        let attributes = describe(&Connect {
            socket: &socket,
            size,
            block_size,
            server_flags: 1,
            dead_connection_s: 600,
            identifier: "sheave-0",
        });
        let number = |kind| {
            let found = attributes_of(attributes.bytes()).find(|found| found.kind == kind).unwrap();
            u64::from_ne_bytes(found.content.try_into().unwrap())
        };
        assert_eq!(number(attribute::SIZE_BYTES), size);
        assert_eq!(number(attribute::BLOCK_SIZE_BYTES), 4096);
    }
}
