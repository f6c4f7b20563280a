//! Kernel I/O on shared buffers.
//!
//! [`Ring`] is the only place that pushes submission queue entries; [`plain`] does the same work by
//! ordinary system calls, and copies the data of devices. Together they are the only code of the
//! data path that is `unsafe`: what they take and give is safe.
//!
//! Sources: io_uring(7), io_uring_enter(2), io_uring_register(2), io_uring_setup(2).

mod batch;
mod buffers;
mod config;
mod control;
mod copy;
mod descriptors;
mod device;
mod entries;
mod iovec;
mod lease;
pub mod plain;
mod probe;
mod provided;
mod ring;
mod watch;

pub use batch::SendBatch;
pub use config::RingConfig;
pub use control::ControlRing;
pub use copy::copy_in;
pub use descriptors::{Descriptor, Descriptors};
pub use device::DeviceCommand;
pub use lease::check_only_writer;
pub use probe::{Probe, Support, probe};
pub use provided::Received;
pub use ring::{By, Event, Ring, Socket};
