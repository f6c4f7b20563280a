//! Commands to the driver of a block device that is served by a ring (`IORING_OP_URING_CMD`), and
//! copies from and to the memory of its requests (Linux's Documentation/block/ublk.rst).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use io_uring::types::Fd;
use io_uring::{opcode, squeue};
use sheave_core::{Payload, Segment};

use crate::Ring;
use crate::iovec::{IoVecs, ZEROES, address, len_u32};
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
/// Entries that must be submitted together.
const PAIR: usize = 2;

impl Ring {
    /// Sends a command. `user` names the starter and what it is about.
    pub fn command(&mut self, device: &OwnedFd, command: &DeviceCommand, user: (u32, u32)) {
        self.push(command_entry(device.as_raw_fd(), command), InFlight::Command { user });
    }

    /// Copies the data of a request, which begins at `at`, to the payload.
    pub fn copy_from_device(
        &mut self,
        device: &OwnedFd,
        at: u64,
        payload: Payload,
        user: (u32, u32),
    ) {
        let mut vectors = IoVecs::default();
        let device = Fd(device.as_raw_fd());
        let entry = match payload.segments() {
            [Segment::Data(buf)] => {
                opcode::Read::new(device, address(buf), len_u32(buf.len())).offset(at).build()
            }
            _ => {
                vectors.set_payload(&payload, 0);
                let (first, count) = (vectors.0.as_ptr(), len_u32(vectors.0.len()));
                opcode::Readv::new(device, first, count).offset(at).build()
            }
        };
        self.push(entry, InFlight::Copy { user, payload, vectors });
    }

    /// Copies the payload to a request whose data begins at `at`, and sends a command when that is
    /// done. Where the copy fails or is short, the command ends with `ECANCELED`.
    pub fn copy_to_device(
        &mut self,
        device: &OwnedFd,
        at: u64,
        payload: Payload,
        then: &DeviceCommand,
        user: (u32, u32),
    ) {
        self.make_room(PAIR);
        let mut vectors = IoVecs::default();
        let file = Fd(device.as_raw_fd());
        let entry = match payload.segments() {
            [Segment::Data(buf)] => {
                let from = address(buf).cast_const();
                opcode::Write::new(file, from, len_u32(buf.len())).offset(at).build()
            }
            [Segment::Zero(zeroes)] if *zeroes <= ZEROES.len() => {
                opcode::Write::new(file, ZEROES.as_ptr(), len_u32(*zeroes)).offset(at).build()
            }
            _ => {
                vectors.set_source(&payload);
                let (first, count) = (vectors.0.as_ptr(), len_u32(vectors.0.len()));
                opcode::Writev::new(file, first, count).offset(at).build()
            }
        };
        let entry = entry.flags(squeue::Flags::IO_LINK);
        self.push(entry, InFlight::Copy { user, payload, vectors });
        self.command(device, then, user);
    }
}

/// How a command or a copy ended. `user` is what the starter gave.
pub enum DeviceEvent {
    /// A [`Ring::command`].
    Command {
        /// The starter's name.
        user: (u32, u32),
        /// The driver's answer, a negative error number if it failed.
        result: i32,
    },
    /// A copy.
    Copied {
        /// The starter's name.
        user: (u32, u32),
        /// How many bytes.
        result: io::Result<usize>,
        /// The memory.
        payload: Payload,
    },
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
