//! The table of memory that is registered with a ring under numbers. Drivers of devices put the
//! memory of their requests into it (`IORING_REGISTER_BUFFERS2`, sparse; Linux's
//! Documentation/block/ublk.rst, "Auto Buffer Registration").

use crate::Ring;

/// Places in the table: those of 32 queues of 128 slots. Who gets none copies.
const PLACES: usize = 4096;

/// Which places are taken; empty until the table is registered.
#[derive(Default)]
pub(crate) struct Buffers(Vec<bool>);

impl Ring {
    /// Takes so many places of the table in a row, and answers the first; `None` if there are not
    /// as many, or this kernel has no such table.
    pub fn take_places(&mut self, count: u16) -> Option<u16> {
        if self.buffers.0.is_empty() {
            self.uring.submitter().register_buffers_sparse(PLACES as u32).ok()?;
            self.buffers = Buffers(vec![false; PLACES]);
        }
        self.buffers.take(count.into())
    }

    /// Gives places back in which there is nothing any more.
    pub fn give_places(&mut self, first: u16, count: u16) {
        self.buffers.give(first.into(), count.into());
    }
}

impl Buffers {
    fn take(&mut self, count: usize) -> Option<u16> {
        let free = |run: &[bool]| run.iter().all(|taken| !taken);
        let first = self.0.windows(count).position(free)?;
        self.0[first..first + count].fill(true);
        u16::try_from(first).ok()
    }

    fn give(&mut self, first: usize, count: usize) {
        self.0[first..first + count].fill(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_in_a_row_are_given_until_there_are_none() {
        let mut buffers = Buffers(vec![false; 10]);
        assert_eq!(
            [4, 4, 4, 2].map(|count| buffers.take(count)),
            [Some(0), Some(4), None, Some(8)]
        );
        buffers.give(4, 4);
        assert_eq!([5, 4, 1].map(|count| buffers.take(count)), [None, Some(4), None]);
    }
}
