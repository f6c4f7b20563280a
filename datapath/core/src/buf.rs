//! Payload memory that threads and the kernel share.
//!
//! A volume in memory is read and written by several shards and, through `recvmsg` and `sendmsg`,
//! by the kernel while other requests run. Block devices promise nothing about overlapping writes
//! in flight, but Rust forbids data races on plain bytes, so the words are atomics: every access is
//! a relaxed load or store, which costs the same instructions as a plain one. The kernel, which
//! fills such memory too, is then just one more writer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{Result, memory};

/// Alignment of every buffer, in bytes: enough for `O_DIRECT` on any device.
pub const PAGE_SIZE: usize = 4096;
const WORD: usize = size_of::<u64>();
const WORDS_PER_PAGE: usize = PAGE_SIZE / WORD;

/// One aligned page of shared memory.
#[repr(C, align(4096))]
pub struct Page([AtomicU64; WORDS_PER_PAGE]);

const _: () = assert!(size_of::<Page>() == PAGE_SIZE && align_of::<Page>() == PAGE_SIZE);

impl Page {
    fn zeroed() -> Self {
        Self([const { AtomicU64::new(0) }; WORDS_PER_PAGE])
    }
}

/// A view of some bytes of a shared block of pages, or of memory that is registered with a ring and
/// that only the kernel sees. Cloning shares the memory.
#[derive(Clone)]
pub struct Buf {
    memory: Memory,
    start: usize,
    len: usize,
}

#[derive(Clone)]
enum Memory {
    Pages(Arc<Box<[Page]>>),
    Registered(u16),
}

impl Buf {
    /// A page-aligned buffer of `len` zero bytes.
    ///
    /// # Errors
    /// [`ErrorKind::NoMemory`](crate::ErrorKind::NoMemory) when there is no memory for it.
    pub fn try_zeroed(len: usize) -> Result<Self> {
        let count = len.div_ceil(PAGE_SIZE);
        let mut pages = Vec::new();
        memory::attempt(|| pages.try_reserve_exact(count))?;
        pages.extend((0..count).map(|_| Page::zeroed()));
        let pages = Arc::new(pages.into_boxed_slice());
        Ok(Self { memory: Memory::Pages(pages), start: 0, len })
    }

    /// [`Buf::try_zeroed`] for tests and for lengths that no peer decides.
    ///
    /// # Panics
    /// When there is no memory for it.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        Self::try_zeroed(len).expect("memory for a buffer")
    }

    /// Memory that only the kernel sees: the first `len` bytes of the buffer that is registered
    /// with the ring of this thread under `index`. A volume that asks for it by
    /// [`crate::Volume::takes_registered`] gets it and hands it to [`crate::Io::start`]; access to
    /// its bytes panics.
    #[must_use]
    pub fn registered(index: u16, len: usize) -> Self {
        Self { memory: Memory::Registered(index), start: 0, len }
    }

    /// A buffer that holds a copy of `bytes`.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let buf = Self::zeroed(bytes.len());
        buf.copy_in(0, bytes);
        buf
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Size in bytes of the underlying block of pages; 0 for registered memory.
    #[must_use]
    pub fn capacity(&self) -> usize {
        match &self.memory {
            Memory::Pages(pages) => pages.len() * PAGE_SIZE,
            Memory::Registered(_) => 0,
        }
    }

    /// The block of pages that this buffer is a view of, to hand its address to the kernel.
    ///
    /// # Panics
    /// When it is memory that only the kernel sees: a bug of the caller.
    #[must_use]
    pub fn pages(&self) -> &[Page] {
        match &self.memory {
            Memory::Pages(pages) => pages,
            Memory::Registered(_) => panic!("nobody but the kernel looks at registered memory"),
        }
    }

    /// The index under which it is registered, if only the kernel sees it.
    #[must_use]
    pub fn registered_index(&self) -> Option<u16> {
        match self.memory {
            Memory::Pages(_) => None,
            Memory::Registered(index) => Some(index),
        }
    }

    /// Where the view begins in [`Buf::pages`] or in the registered buffer, in bytes.
    #[must_use]
    pub fn start(&self) -> usize {
        self.start
    }

    /// Whether both are views of the same bytes.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        let is_same_memory = match (&self.memory, &other.memory) {
            (Memory::Pages(pages), Memory::Pages(others)) => Arc::ptr_eq(pages, others),
            (Memory::Registered(index), Memory::Registered(other)) => index == other,
            _ => false,
        };
        is_same_memory && self.start == other.start && self.len == other.len
    }

    /// The whole block as a view of `len` bytes, if this is the only reference to it. A pool reuses
    /// buffers this way.
    #[must_use]
    pub fn reclaim(mut self, len: usize) -> Option<Self> {
        let fits = len <= self.capacity();
        let Memory::Pages(pages) = &mut self.memory else { return None };
        let is_sole = Arc::get_mut(pages).is_some();
        (is_sole && fits).then_some(Self { memory: self.memory, start: 0, len })
    }

    /// A view of `len` bytes that begins `skip` bytes in.
    ///
    /// # Panics
    /// When that is not inside the view: a bug of the caller.
    #[must_use]
    pub fn slice(&self, skip: usize, len: usize) -> Self {
        assert!(skip <= self.len && len <= self.len - skip, "slice inside the buffer");
        Self { memory: self.memory.clone(), start: self.start + skip, len }
    }

    /// Stores `bytes` at `at`.
    ///
    /// # Panics
    /// When they do not fit: a bug of the caller.
    pub fn copy_in(&self, at: usize, bytes: &[u8]) {
        assert!(at <= self.len && bytes.len() <= self.len - at, "copy_in inside the buffer");
        let mut from = bytes;
        for (words, skip, len) in self.runs(at, bytes.len()) {
            let (now, later) = from.split_at(len);
            store_run(words, skip, now);
            from = later;
        }
    }

    /// Loads bytes at `at` into `out`.
    ///
    /// # Panics
    /// When the buffer ends before `out` is full: a bug of the caller.
    pub fn copy_out(&self, at: usize, out: &mut [u8]) {
        assert!(at <= self.len && out.len() <= self.len - at, "copy_out inside the buffer");
        let mut to = out;
        for (words, skip, len) in self.runs(at, to.len()) {
            let (now, later) = to.split_at_mut(len);
            load_run(words, skip, now);
            to = later;
        }
    }

    /// Copies all of `from`, a buffer of the same length, into this one.
    ///
    /// # Panics
    /// When the lengths differ: a bug of the caller.
    pub fn copy_from(&self, from: &Self) {
        assert_eq!(self.len, from.len, "copy between buffers of one length");
        let mut bounce = [0; PAGE_SIZE];
        let mut at = 0;
        while at < self.len {
            let piece = &mut bounce[..(self.len - at).min(PAGE_SIZE)];
            from.copy_out(at, piece);
            self.copy_in(at, piece);
            at += piece.len();
        }
    }

    /// Overwrites `len` bytes at `at` with zeroes.
    ///
    /// # Panics
    /// When they are not inside the buffer: a bug of the caller.
    pub fn zero(&self, at: usize, len: usize) {
        const ZEROES: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        assert!(at <= self.len && len <= self.len - at, "zero inside the buffer");
        for (words, skip, len) in self.runs(at, len) {
            store_run(words, skip, &ZEROES[..len]);
        }
    }

    /// Whether every byte is zero.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        let mut out = [0; PAGE_SIZE];
        self.runs(0, self.len).all(|(words, skip, len)| {
            load_run(words, skip, &mut out[..len]);
            out[..len].iter().all(|byte| *byte == 0)
        })
    }

    /// A copy of the bytes.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.len];
        self.copy_out(0, &mut out);
        out
    }

    /// The pages that `len` bytes at `at` touch: their words, the first byte in them, the count.
    fn runs(&self, at: usize, len: usize) -> impl Iterator<Item = (&[AtomicU64], usize, usize)> {
        let pages = self.pages();
        let mut at = self.start + at;
        let end = at + len;
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let skip = at % PAGE_SIZE;
                let len = (PAGE_SIZE - skip).min(end - at);
                let words = &pages[at / PAGE_SIZE].0[..];
                at += len;
                (words, skip, len)
            })
        })
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

/// Stores `bytes` into a page, `skip` bytes in.
fn store_run(words: &[AtomicU64], skip: usize, bytes: &[u8]) {
    let head = (skip.next_multiple_of(WORD) - skip).min(bytes.len());
    let (head, rest) = bytes.split_at(head);
    let first = skip / WORD;
    store_part(words, skip, head);
    let (whole, tail) = rest.as_chunks::<WORD>();
    let first = first + usize::from(!skip.is_multiple_of(WORD));
    for (word, bytes) in words[first.min(words.len())..].iter().zip(whole) {
        word.store(u64::from_le_bytes(*bytes).to_le(), Relaxed);
    }
    store_part(words, (first + whole.len()) * WORD, tail);
}

/// Stores less than a word, inside one word.
fn store_part(words: &[AtomicU64], skip: usize, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    let shift = skip % WORD;
    // The closure always answers Some, so this cannot fail.
    let _ = words[skip / WORD].fetch_update(Relaxed, Relaxed, |old| {
        let mut word = u64::from_le(old).to_le_bytes();
        word[shift..shift + bytes.len()].copy_from_slice(bytes);
        Some(u64::from_le_bytes(word).to_le())
    });
}

/// Loads from a page, `skip` bytes in, until `out` is full.
fn load_run(words: &[AtomicU64], skip: usize, out: &mut [u8]) {
    let head = (skip.next_multiple_of(WORD) - skip).min(out.len());
    let (head, rest) = out.split_at_mut(head);
    load_part(words, skip, head);
    let first = skip.div_ceil(WORD);
    let (whole, tail) = rest.as_chunks_mut::<WORD>();
    let count = whole.len();
    for (word, bytes) in words[first.min(words.len())..].iter().zip(whole) {
        *bytes = u64::from_le(word.load(Relaxed)).to_le_bytes();
    }
    load_part(words, (first + count) * WORD, tail);
}

/// Loads less than a word, from one word.
fn load_part(words: &[AtomicU64], skip: usize, out: &mut [u8]) {
    if out.is_empty() {
        return;
    }
    let shift = skip % WORD;
    let word = u64::from_le(words[skip / WORD].load(Relaxed)).to_le_bytes();
    out.copy_from_slice(&word[shift..shift + out.len()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_no_memory_holds_is_an_error() {
        for len in [usize::MAX, usize::MAX - PAGE_SIZE, 1 << 60] {
            let error = Buf::try_zeroed(len).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::NoMemory, "{len} bytes");
        }
        assert_eq!(Buf::try_zeroed(5000).unwrap().to_vec(), [0; 5000]);
    }

    #[test]
    fn copies_at_every_alignment() {
        let model: Vec<u8> = (0..3 * PAGE_SIZE).map(|i| (i * 7 + i / 255) as u8).collect();
        for skip in [0, 1, 7, 8, 9, 4090, 4095, 4096, 4097] {
            for len in [0, 1, 3, 7, 8, 9, 15, 4096, 5000] {
                let buf = Buf::zeroed(3 * PAGE_SIZE);
                buf.copy_in(skip, &model[skip..skip + len]);
                let mut want = vec![0; 3 * PAGE_SIZE];
                want[skip..skip + len].copy_from_slice(&model[skip..skip + len]);
                assert_eq!(buf.to_vec(), want, "skip {skip} len {len}");
                assert_eq!(buf.slice(skip, len).to_vec(), &model[skip..skip + len]);
                buf.zero(skip, len);
                assert!(buf.is_zero(), "skip {skip} len {len}");
            }
        }
    }

    #[test]
    fn registered_memory_is_sliced_but_neither_looked_at_nor_reclaimed() {
        let buf = Buf::registered(7, 4096);
        let part = buf.slice(512, 1024);
        assert_eq!((part.registered_index(), part.start(), part.len()), (Some(7), 512, 1024));
        assert!(buf.is_same(&buf.clone()) && !buf.is_same(&part));
        assert!(!buf.is_same(&Buf::zeroed(4096)));
        assert!(buf.clone().reclaim(0).is_none());
        assert!(std::panic::catch_unwind(|| buf.to_vec()).is_err());
    }

    #[test]
    fn a_shared_block_is_not_reclaimed() {
        let buf = Buf::zeroed(100);
        let other = buf.slice(3, 4);
        assert!(buf.reclaim(100).is_none());
        assert!(other.reclaim(4096).is_some_and(|buf| buf.start() == 0 && buf.len() == 4096));
    }
}
