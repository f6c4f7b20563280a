//! Commands to a driver that wait for their end, as those of `/dev/ublk-control`
//! (include/uapi/linux/ublk_cmd.h, `struct ublksrv_ctrl_cmd`).
#![expect(clippy::host_endian_bytes, reason = "structures of the kernel are in the host's order")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode, squeue};

/// One command at a time.
const ENTRIES: u32 = 2;
/// "Not for a queue".
const NO_QUEUE: u16 = u16::MAX;
/// Bytes that a command takes behind the fields of every entry.
const COMMAND_LEN: usize = 80;

/// A ring of long entries, for the commands of one driver.
pub struct ControlRing {
    uring: IoUring<squeue::Entry128, cqueue::Entry>,
    driver: File,
    /// The commands so far: the name of the next.
    calls: u64,
}

impl ControlRing {
    /// Commands to this driver.
    ///
    /// # Errors
    /// What io_uring_setup(2) says: long entries came with Linux 5.19.
    pub fn new(driver: File) -> io::Result<Self> {
        Ok(Self { uring: IoUring::builder().build(ENTRIES)?, driver, calls: 0 })
    }

    /// Sends a command about `device` and waits for its end, however long that takes. The driver
    /// reads and writes `buffer`; `data` goes along.
    ///
    /// # Errors
    /// The driver's.
    pub fn call(
        &mut self,
        command: u32,
        device: u32,
        data: u64,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        // The kernel may write to it until the end, whatever becomes of the caller.
        let mut shared: Box<[u8]> = buffer.into();
        let len = u16::try_from(shared.len()).expect("a structure is shorter than 64 KiB");
        let address = if shared.is_empty() { 0 } else { shared.as_mut_ptr() as u64 };
        let mut bytes = [0; COMMAND_LEN];
        bytes[..4].copy_from_slice(&device.to_ne_bytes());
        bytes[4..6].copy_from_slice(&NO_QUEUE.to_ne_bytes());
        bytes[6..8].copy_from_slice(&len.to_ne_bytes());
        bytes[8..16].copy_from_slice(&address.to_ne_bytes());
        bytes[16..24].copy_from_slice(&data.to_ne_bytes());
        self.calls += 1;
        let entry = opcode::UringCmd80::new(Fd(self.driver.as_raw_fd()), command)
            .cmd(bytes)
            .build()
            .user_data(self.calls);
        // SAFETY: the entry names `shared` and its length, which is freed below after the
        // completion, or never; the descriptor is open while `self` lives.
        // JUSTIFICATION: handing memory to the kernel is what a ring does.
        unsafe { self.uring.submission().push(&entry) }.map_err(io::Error::other)?;
        match self.wait() {
            Ok(result) => {
                buffer.copy_from_slice(&shared);
                if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
            }
            Err(error) => {
                // The command may still be running.
                std::mem::forget(shared);
                Err(error)
            }
        }
    }

    fn wait(&mut self) -> io::Result<i32> {
        loop {
            match self.uring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            // Others are the late ends of commands that could not be waited for.
            let mut ended = self.uring.completion();
            if let Some(entry) = ended.find(|entry| entry.user_data() == self.calls) {
                return Ok(entry.result());
            }
        }
    }
}
