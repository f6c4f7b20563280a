//! Commands to the driver of a block device that is served by a ring (`IORING_OP_URING_CMD`).

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use io_uring::types::Fd;
use io_uring::{opcode, squeue};

use crate::Ring;
use crate::ring::InFlight;

/// A command as the driver defines it.
#[derive(Clone, Copy, Debug)]
pub struct DeviceCommand {
    /// Its number.
    pub number: u32,
    /// What it says.
    pub content: [u8; 16],
    /// What it says in the entry's `addr`.
    pub addr: [u8; 8],
}

/// Where a `struct io_uring_sqe` has its `addr`.
const ADDR: usize = 16;
const _: () = assert!(size_of::<squeue::Entry>() == 64);

impl Ring {
    /// Sends a command. `user` names the starter and what it is about.
    pub fn command(&mut self, device: &OwnedFd, command: &DeviceCommand, user: (u32, u32)) {
        self.push(command_entry(device.as_raw_fd(), command), InFlight::Command { user });
    }
}

fn command_entry(device: RawFd, command: &DeviceCommand) -> squeue::Entry {
    let command_entry = opcode::UringCmd16::new(Fd(device), command.number);
    let mut entry = command_entry.cmd(command.content).build();
    // SAFETY: `entry` is owned here and `repr(C)` around the 64 bytes of a `struct io_uring_sqe`,
    // so bytes 16 to 23 lie inside it; they are its `addr`, and a write of bytes is aligned.
    // JUSTIFICATION: the crate has no way to set the `addr` of a command.
    unsafe { (&raw mut entry).byte_add(ADDR).cast::<[u8; 8]>().write(command.addr) };
    entry
}
