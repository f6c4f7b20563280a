//! The requests of a ublk queue, as the driver describes them in memory that it shares
//! (include/uapi/linux/ublk_cmd.h, `struct ublksrv_io_desc`).

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The driver lays out the queues as if each had this many slots.
const DEPTH_MAX: usize = 4096;

/// A request, as it was when it was read.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Descriptor {
    /// The operation in the lowest byte, flags above.
    pub op_flags: u32,
    /// Its length in sectors of 512 bytes.
    pub sectors: u32,
    /// Its first sector.
    pub start_sector: u64,
    /// Not used when requests are copied by reads and writes.
    pub address: u64,
}

/// The descriptors of one queue, by slot.
pub struct Descriptors {
    first: NonNull<Descriptor>,
    depth: usize,
    mapped_len: usize,
}

// SAFETY: the memory is mapped until the drop, whichever thread that is in, and only read.
// JUSTIFICATION: a queue is made by one thread and served by another.
unsafe impl Send for Descriptors {}

impl Descriptors {
    /// Maps those of this queue, which has `depth` slots.
    ///
    /// # Errors
    /// What the driver says.
    pub fn map(device: BorrowedFd<'_>, queue: u16, depth: u16) -> io::Result<Self> {
        let depth = usize::from(depth);
        let page = rustix::param::page_size();
        let stride = (DEPTH_MAX * size_of::<Descriptor>()).next_multiple_of(page);
        let mapped_len = (depth * size_of::<Descriptor>()).next_multiple_of(page);
        let at = u64::from(queue) * stride as u64;
        let (null, flags) = (std::ptr::null_mut(), MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: a new mapping at a place that the kernel chooses; nothing else refers to it.
        // JUSTIFICATION: the driver tells what is wanted in no other way.
        let mapped = unsafe { mmap(null, mapped_len, ProtFlags::READ, flags, device, at) }?;
        let first = NonNull::new(mapped.cast()).expect("a mapping is not at null");
        Ok(Self { first, depth, mapped_len })
    }

    /// What is in this slot; meaningful from when the driver says so until the slot is given back.
    ///
    /// # Panics
    /// When there is no such slot: a bug of the caller.
    #[must_use]
    pub fn get(&self, slot: usize) -> Descriptor {
        assert!(slot < self.depth, "a slot of the queue");
        // SAFETY: inside the mapping, as just asserted, and any bytes are a descriptor. The driver
        // does not write to a slot between its completion and our answer.
        // JUSTIFICATION: memory that the kernel changes must be read by volatile loads.
        unsafe { self.first.add(slot).read_volatile() }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and `get` returns copies.
        // JUSTIFICATION: the counterpart of `mmap`.
        let _ = unsafe { munmap(self.first.as_ptr().cast(), self.mapped_len) };
    }
}
