//! Receive buffers that the kernel picks from when data arrives, so that connections share them
//! (provided buffer rings, io_uring_register(2) `IORING_REGISTER_PBUF_RING`).

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering::Release};

use io_uring::{IoUring, types::BufRingEntry};
use sheave_core::memory;

pub(crate) const GROUP: u16 = 0;

/// Bytes that arrived, in a buffer that goes back to the ring by [`crate::Ring::give_back`].
pub struct Received {
    id: u16,
    bytes: Box<[u8]>,
    len: usize,
}

impl Received {
    /// What arrived. Writable, because TLS decrypts in place.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

/// The buffers, and the ring through which the kernel takes them.
pub(crate) struct Provided {
    entries: NonNull<BufRingEntry>,
    count: u16,
    tail: u16,
    /// `None` while the bytes are with their reader, or there are none; else they belong to the
    /// kernel.
    lent: Vec<Option<Box<[u8]>>>,
    /// Bytes in each buffer.
    buffer_len: usize,
    /// Ids without a buffer.
    unused: Vec<u16>,
    /// How many buffers are to circulate.
    wanted: u16,
}

// SAFETY: the entries are owned by this struct alone; the kernel reads them, whichever thread
// stores. JUSTIFICATION: a ring is made before the thread that will own it starts.
unsafe impl Send for Provided {}

impl Provided {
    /// Registers a ring for at most `count` (a power of two) buffers of `len` bytes. It has none
    /// before [`Self::circulate`].
    ///
    /// Must be dropped after the ring, which may write to the buffers until it is gone.
    pub(crate) fn register(uring: &IoUring, count: u16, len: usize) -> io::Result<Self> {
        assert!(count.is_power_of_two());
        let layout = layout(count);
        // SAFETY: the layout has a size above zero.
        // JUSTIFICATION: the kernel wants the ring on a page boundary.
        let Some(entries) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            handle_alloc_error(layout)
        };
        let provided = Self {
            entries: entries.cast(),
            count,
            tail: 0,
            lent: (0..count).map(|_| None).collect(),
            buffer_len: len,
            unused: (0..count).rev().collect(),
            wanted: 0,
        };
        // SAFETY: the memory is page-aligned, `count` entries long, zeroed, and lives until this
        // struct is dropped, which is after the ring is closed.
        // JUSTIFICATION: sharing memory with the kernel is the point.
        unsafe {
            uring.submitter().register_buf_ring_with_flags(
                entries.as_ptr() as u64,
                count,
                GROUP,
                0,
            )?;
        }
        Ok(provided)
    }

    /// Lets so many buffers circulate, or all there can be. The kernel takes them in turn, so the
    /// fewer there are, the warmer they stay.
    ///
    /// Without memory for more than one, those that there are must do: sockets then wait for one
    /// another.
    pub(crate) fn circulate(&mut self, wanted: usize) {
        self.wanted = wanted.min(self.count.into()) as u16;
        while self.circulating() < self.wanted {
            let mut bytes = Vec::new();
            let has_room = memory::attempt(|| bytes.try_reserve_exact(self.buffer_len)).is_ok();
            if !has_room && self.circulating() > 0 {
                return;
            }
            let Some(id) = self.unused.pop() else { return };
            bytes.resize(self.buffer_len, 0);
            self.lend(id, bytes.into_boxed_slice());
        }
    }

    fn circulating(&self) -> u16 {
        self.count - self.unused.len() as u16
    }

    /// The buffer that a completion names.
    pub(crate) fn take(&mut self, id: u16, len: usize) -> Received {
        let bytes = self.lent[usize::from(id)].take().expect("the kernel had this buffer");
        assert!(len <= bytes.len(), "the kernel filled no more than the buffer");
        Received { id, bytes, len }
    }

    pub(crate) fn give_back(&mut self, received: Received) {
        if self.circulating() > self.wanted {
            return self.unused.push(received.id);
        }
        self.lend(received.id, received.bytes);
    }

    fn lend(&mut self, id: u16, bytes: Box<[u8]>) {
        let slot = usize::from(self.tail & (self.count - 1));
        // From where it stays: moving a box ends the use of pointers taken before.
        let bytes = self.lent[usize::from(id)].insert(bytes);
        // SAFETY: `slot` is below `count`, and the entries live as long as this struct. The kernel
        // reads an entry only once the tail has passed it.
        // JUSTIFICATION: sharing memory with the kernel is the point.
        unsafe {
            let entry = self.entries.add(slot).as_mut();
            entry.set_addr(bytes.as_mut_ptr() as u64);
            entry.set_len(u32::try_from(bytes.len()).expect("a receive buffer is small"));
            entry.set_bid(id);
        }
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the tail lies in the reserved field of the first entry, is aligned, and only
        // this thread stores to it. Release makes the entry visible before the tail.
        // JUSTIFICATION: as above.
        unsafe {
            let tail = BufRingEntry::tail(self.entries.as_ptr()).cast::<AtomicU16>();
            (*tail).store(self.tail, Release);
        }
    }
}

impl Drop for Provided {
    fn drop(&mut self) {
        // SAFETY: allocated in `register` with the same layout; the ring is closed by now.
        // JUSTIFICATION: pairs with `alloc_zeroed`.
        unsafe { dealloc(self.entries.as_ptr().cast(), layout(self.count)) }
    }
}

fn layout(count: u16) -> Layout {
    Layout::from_size_align(usize::from(count) * size_of::<BufRingEntry>(), 4096)
        .expect("a few pages")
}
