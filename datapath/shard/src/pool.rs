//! Buffers that are used again: few, hot, last in first out.

use sheave_core::{Buf, PAGE_SIZE, Payload, Segment};

/// Bytes that a pool keeps; what comes back beyond that is freed.
const KEPT_BYTES_MAX: usize = 16 << 20;
/// The smallest and the number of size classes: 4 KiB, 8 KiB, … 32 MiB.
const CLASSES: usize = 14;

/// One thread's buffers, by power-of-two size.
#[derive(Default)]
pub(crate) struct Pool {
    classes: [Vec<Buf>; CLASSES],
    kept_bytes: usize,
}

impl Pool {
    /// A buffer of `len` bytes, page-aligned, with arbitrary content.
    pub(crate) fn take(&mut self, len: usize) -> Buf {
        let class = class(len);
        match self.classes.get_mut(class).and_then(Vec::pop) {
            Some(buf) => {
                self.kept_bytes -= buf.capacity();
                buf.reclaim(len).expect("a pooled buffer has one holder and its class's size")
            }
            None if class < CLASSES => Buf::zeroed(PAGE_SIZE << class).slice(0, len),
            None => Buf::zeroed(len),
        }
    }

    /// Takes a buffer back if nobody else holds it.
    pub(crate) fn give(&mut self, buf: Buf) {
        let capacity = buf.capacity();
        let class = class(capacity);
        let fits = class < CLASSES
            && capacity == PAGE_SIZE << class
            && self.kept_bytes + capacity <= KEPT_BYTES_MAX;
        if fits && let Some(buf) = buf.reclaim(capacity) {
            self.kept_bytes += capacity;
            self.classes[class].push(buf);
        }
    }

    /// Takes all buffers of a payload back that nobody else holds.
    pub(crate) fn give_all(&mut self, payload: Payload) {
        for segment in payload.into_segments() {
            if let Segment::Data(buf) = segment {
                self.give(buf);
            }
        }
    }

    /// Frees everything: an idle shard keeps no memory.
    pub(crate) fn release(&mut self) {
        *self = Self::default();
    }
}

fn class(len: usize) -> usize {
    len.div_ceil(PAGE_SIZE).next_power_of_two().trailing_zeros() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_last_buffer_first_and_keeps_a_bounded_amount() {
        let mut pool = Pool::default();
        let (one, two) = (pool.take(5000), pool.take(8192));
        let address = two.pages().as_ptr();
        pool.give(one);
        pool.give(two);
        let again = pool.take(6000);
        assert!(again.pages().as_ptr() == address && again.len() == 6000);
        for _ in 0..4 {
            let buf = Buf::zeroed(8 << 20);
            pool.give(buf);
        }
        assert!(pool.kept_bytes <= KEPT_BYTES_MAX);
    }

    #[test]
    fn a_shared_buffer_is_not_pooled() {
        let mut pool = Pool::default();
        let buf = pool.take(4096);
        let held = buf.clone();
        pool.give(buf);
        assert_eq!(pool.kept_bytes, 0);
        drop(held);
    }
}
