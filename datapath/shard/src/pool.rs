//! Buffers that are used again: few, hot, last in first out.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sheave_core::{Buf, PAGE_SIZE, Payload, Result, Segment, memory};

/// Bytes that a thread's own pool keeps; what comes back beyond that is freed.
const KEPT_BYTES_MAX: usize = 16 << 20;
/// The smallest and the number of size classes: 4 KiB, 8 KiB, … 32 MiB.
const CLASSES: usize = 14;

/// Buffers by power-of-two size.
pub(crate) struct Pool {
    classes: [Vec<Buf>; CLASSES],
    kept_bytes: usize,
    kept_bytes_max: usize,
}

impl Default for Pool {
    fn default() -> Self {
        Self::new(KEPT_BYTES_MAX)
    }
}

impl Pool {
    fn new(kept_bytes_max: usize) -> Self {
        Self { classes: Default::default(), kept_bytes: 0, kept_bytes_max }
    }

    /// A buffer of `len` bytes, page-aligned, with arbitrary content.
    ///
    /// # Errors
    /// When there is no memory for it, even after all that the pool keeps has been freed.
    pub(crate) fn take(&mut self, len: usize) -> Result<Buf> {
        let class = class(len);
        if let Some(buf) = self.classes.get_mut(class).and_then(Vec::pop) {
            self.kept_bytes -= buf.capacity();
            return Ok(buf
                .reclaim(len)
                .expect("a pooled buffer has one holder and its class's size"));
        }
        let capacity = if class < CLASSES { PAGE_SIZE << class } else { len };
        let fresh = Buf::try_zeroed(capacity).or_else(|_| {
            self.release();
            Buf::try_zeroed(capacity)
        })?;
        Ok(fresh.slice(0, len))
    }

    /// Takes a buffer back if nothing else holds it.
    pub(crate) fn give(&mut self, buf: Buf) {
        let capacity = buf.capacity();
        let class = class(capacity);
        let fits = class < CLASSES
            && capacity == PAGE_SIZE << class
            && self.kept_bytes + capacity <= self.kept_bytes_max;
        if fits && let Some(buf) = buf.reclaim(capacity) {
            if memory::attempt(|| self.classes[class].try_reserve(1)).is_err() {
                return;
            }
            self.kept_bytes += capacity;
            self.classes[class].push(buf);
        }
    }

    /// Takes back all buffers of a payload that nothing else holds.
    pub(crate) fn give_all(&mut self, payload: Payload) {
        for segment in payload.into_segments() {
            if let Segment::Data(buf) = segment {
                self.give(buf);
            }
        }
    }

    /// Frees everything: an idle shard keeps no memory.
    pub(crate) fn release(&mut self) {
        *self = Self::new(self.kept_bytes_max);
    }
}

/// Buffers that several [`Blocking`](crate::Blocking)s share, for data that goes from one to
/// another: the volume that is written gives back the buffer into which the next piece is read.
#[derive(Clone)]
pub struct Buffers(Arc<Mutex<Pool>>);

impl Buffers {
    /// Keeps at most so many bytes; what comes back beyond that is freed.
    #[must_use]
    pub fn new(kept_bytes_max: usize) -> Self {
        Self(Arc::new(Mutex::new(Pool::new(kept_bytes_max))))
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        // A panic of another thread leaves a pool that is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the buffers of plain calls come from.
pub(crate) enum PoolRef {
    Own(Box<Pool>),
    Shared(Buffers),
}

impl PoolRef {
    /// As [`Pool::take`].
    pub(crate) fn take(&mut self, len: usize) -> Result<Buf> {
        match self {
            Self::Own(pool) => pool.take(len),
            Self::Shared(buffers) => buffers.lock().take(len),
        }
    }

    /// As [`Pool::give`].
    pub(crate) fn give(&mut self, buf: Buf) {
        match self {
            Self::Own(pool) => pool.give(buf),
            Self::Shared(buffers) => buffers.lock().give(buf),
        }
    }

    /// As [`Pool::give_all`].
    pub(crate) fn give_all(&mut self, payload: Payload) {
        match self {
            Self::Own(pool) => pool.give_all(payload),
            Self::Shared(buffers) => buffers.lock().give_all(payload),
        }
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
        let (one, two) = (pool.take(5000).unwrap(), pool.take(8192).unwrap());
        let address = two.pages().as_ptr();
        pool.give(one);
        pool.give(two);
        let again = pool.take(6000).unwrap();
        assert!(again.pages().as_ptr() == address && again.len() == 6000);
        for _ in 0..4 {
            let buf = Buf::zeroed(8 << 20);
            pool.give(buf);
        }
        assert!(pool.kept_bytes <= KEPT_BYTES_MAX);
    }

    #[test]
    fn what_no_memory_holds_is_an_error_and_the_pool_goes_on() {
        let mut pool = Pool::default();
        let kept = pool.take(4096).unwrap();
        pool.give(kept);
        for len in [1 << 60, usize::MAX / 2] {
            assert_eq!(pool.take(len).unwrap_err().kind(), sheave_core::ErrorKind::NoMemory);
        }
        assert_eq!(pool.kept_bytes, 0, "what it kept has been tried as well");
        pool.take(32 << 20).unwrap();
    }

    #[test]
    fn a_shared_buffer_is_not_pooled() {
        let mut pool = Pool::default();
        let buf = pool.take(4096).unwrap();
        let held = buf.clone();
        pool.give(buf);
        assert_eq!(pool.kept_bytes, 0);
        drop(held);
    }
}
