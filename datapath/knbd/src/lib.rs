//! The kernel's NBD client (`nbd.ko`): volumes as `/dev/nbdN`.
//!
//! [`attach`] hands the kernel one end of each connection by generic netlink and waits until the
//! device can be used; the other ends are for an NBD session in its transmission phase, without a
//! handshake. [`Device::disconnect`] ends it.
#![forbid(unsafe_code)]

mod device;
mod genl;
mod netlink;
mod sysfs;

pub use device::{Device, Timeouts, attach, find};
pub use netlink::is_available;
