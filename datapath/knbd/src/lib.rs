//! The kernel's NBD client (`nbd.ko`): volumes as `/dev/nbdN`.
//!
//! [`attach`] hands the kernel one end of a connection by generic netlink; the other end is for an
//! NBD session in its transmission phase, without a handshake. [`Device::disconnect`] ends it.
#![forbid(unsafe_code)]

mod device;
mod genl;
mod module;
mod netlink;
mod sysfs;
mod watch;

pub use device::{Device, attach, find, identified, is_available, recover, resize};
pub use watch::DeadLinks;
