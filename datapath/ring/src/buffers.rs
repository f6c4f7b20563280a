//! The table of buffers that are registered with a ring by index. Drivers of devices put the memory
//! of their requests into it (`IORING_REGISTER_BUFFERS2`, sparse; Linux's
//! Documentation/block/ublk.rst, "Auto Buffer Registration").

use crate::Ring;

/// Entries of the table: enough for 32 queues of 128 slots. A queue that gets none copies.
const BUFFERS_MAX: usize = 4096;

/// Which indices are reserved; empty until the table is registered.
#[derive(Default)]
pub(crate) struct Buffers(Vec<bool>);

impl Ring {
    /// Reserves so many indices in a row, and answers the first; `None` if there are not as many,
    /// if none are wanted, or if this kernel has no such table.
    pub fn reserve_buffers(&mut self, count: u16) -> Option<u16> {
        if count > 0 && self.buffers.0.is_empty() {
            self.uring.submitter().register_buffers_sparse(BUFFERS_MAX as u32).ok()?;
            self.buffers = Buffers(vec![false; BUFFERS_MAX]);
        }
        self.buffers.reserve(count.into())
    }

    /// Gives indices back at which there is no buffer any more.
    pub fn release_buffers(&mut self, first: u16, count: u16) {
        self.buffers.release(first.into(), count.into());
    }
}

impl Buffers {
    fn reserve(&mut self, count: usize) -> Option<u16> {
        if count == 0 {
            return None;
        }
        let are_free = |run: &[bool]| run.iter().all(|reserved| !reserved);
        let first = self.0.windows(count).position(are_free)?;
        self.0[first..first + count].fill(true);
        u16::try_from(first).ok()
    }

    fn release(&mut self, first: usize, count: usize) {
        self.0[first..first + count].fill(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_in_a_row_are_given_until_there_are_none() {
        let mut buffers = Buffers(vec![false; 10]);
        let first = [4, 4, 4, 2].map(|count| buffers.reserve(count));
        assert_eq!(first, [Some(0), Some(4), None, Some(8)]);
        buffers.release(4, 4);
        assert_eq!([5, 4, 1, 0].map(|count| buffers.reserve(count)), [None, Some(4), None, None]);
    }
}
