//! Addresses of shared buffers, as the kernel wants them.

use libc::{c_void, iovec};
use sheave_core::{Buf, Payload, Segment, memory};

/// The kernel takes at most this many vectors a call (`UIO_MAXIOV`).
pub(crate) const IOV_MAX: usize = 1024;

pub(crate) static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A list of vectors. The pointers are only followed by the kernel, while their owner keeps the
/// memory alive.
#[derive(Default)]
pub(crate) struct IoVecs(pub(crate) Vec<iovec>);

// SAFETY: the raw pointers are plain addresses to the holder of the list; memory behind them is
// either shared atomics (`Buf`), immutable, or owned by the same struct that owns the list.
// JUSTIFICATION: `iovec` is a kernel type that holds raw pointers, and batches move with sessions.
unsafe impl Send for IoVecs {}

impl IoVecs {
    /// Appends what of a buffer comes after its first `skip` bytes. False when the list is full, as
    /// in all that follow: it holds [`IOV_MAX`] vectors, or what memory there is for.
    pub(crate) fn push_buf(&mut self, buf: &Buf, skip: usize) -> bool {
        buf.len() <= skip || self.push(vector(buf, skip))
    }

    /// Bytes that outlive the list and do not move; the kernel only reads them.
    pub(crate) fn push_bytes(&mut self, bytes: &[u8]) -> bool {
        let base = bytes.as_ptr().cast_mut().cast::<c_void>();
        bytes.is_empty() || self.push(iovec { iov_base: base, iov_len: bytes.len() })
    }

    /// Zeroes to be sent, never to be received into.
    pub(crate) fn push_zeroes(&mut self, len: usize) -> bool {
        let mut left = len;
        while left > 0 {
            let take = left.min(ZEROES.len());
            if !self.push_bytes(&ZEROES[..take]) {
                return false;
            }
            left -= take;
        }
        true
    }

    fn push(&mut self, vector: iovec) -> bool {
        let has_room = self.0.len() < self.0.capacity().min(IOV_MAX) || self.grow();
        if has_room {
            self.0.push(vector);
        }
        has_room
    }

    /// There is always room for one, so that no call is without effect.
    #[cold]
    fn grow(&mut self) -> bool {
        let len = self.0.len();
        len == 0 || len < IOV_MAX && memory::attempt(|| self.0.try_reserve(1)).is_ok()
    }

    /// The segments, from byte `skip` on, of a payload that the kernel may write to, as many as the
    /// list takes.
    ///
    /// # Panics
    /// On a zero segment: a payload given to the kernel has none.
    pub(crate) fn set_payload(&mut self, payload: &Payload, skip: usize) {
        let is_data = |segment: &Segment| matches!(segment, Segment::Data(_));
        assert!(payload.segments().iter().all(is_data), "payload for the kernel is all data");
        self.set_source(payload, skip);
    }

    /// All segments, from byte `skip` on, of a payload that is only read, as many as the list
    /// takes.
    pub(crate) fn set_source(&mut self, payload: &Payload, mut skip: usize) {
        self.0.clear();
        for segment in payload.segments() {
            let from = skip.min(segment.len());
            skip -= from;
            let has_room = match segment {
                Segment::Data(buf) => self.push_buf(buf, from),
                Segment::Zero(len) => self.push_zeroes(len - from),
            };
            if !has_room {
                return;
            }
        }
    }

    /// A message header that points at the list, valid while the list neither moves nor changes.
    pub(crate) fn header(&mut self) -> libc::msghdr {
        header(self.0.as_mut_ptr(), self.0.len())
    }
}

/// A message header that points at these vectors.
fn header(vectors: *mut iovec, count: usize) -> libc::msghdr {
    // SAFETY: all zeroes is a valid `msghdr`: null pointers with zero lengths.
    // JUSTIFICATION: the struct has private padding on some targets, so no literal.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = vectors;
    header.msg_iovlen = count as _;
    header
}

/// The vectors of one call, without a list on the heap for a payload that is one buffer, as most
/// are.
pub(crate) enum Vectors {
    One([iovec; 1]),
    Many(IoVecs),
}

impl Vectors {
    /// Those of a payload from byte `skip` on; `set` makes a list of them.
    pub(crate) fn of(
        payload: &Payload,
        skip: usize,
        set: fn(&mut IoVecs, &Payload, usize),
    ) -> Self {
        if let [Segment::Data(buf)] = payload.segments() {
            return Self::One([vector(buf, skip)]);
        }
        let mut list = IoVecs::default();
        set(&mut list, payload, skip);
        Self::Many(list)
    }

    /// A message header that points at them, valid while they neither move nor change. The kernel
    /// does not write to the vectors of a message.
    pub(crate) fn header(&self) -> libc::msghdr {
        let vectors = self.as_slice();
        header(vectors.as_ptr().cast_mut(), vectors.len())
    }

    pub(crate) fn as_slice(&self) -> &[iovec] {
        match self {
            Self::One(one) => one,
            Self::Many(list) => &list.0,
        }
    }
}

/// What of a buffer comes after its first `skip` bytes.
fn vector(buf: &Buf, skip: usize) -> iovec {
    let base = address(buf).wrapping_add(skip).cast::<c_void>();
    iovec { iov_base: base, iov_len: buf.len() - skip }
}

/// Where the bytes of a buffer begin.
///
/// The pages are atomics, so writing through this pointer while others hold the buffer is allowed;
/// they are contiguous, so `start` bytes in is still inside the same allocation.
pub(crate) fn address(buf: &Buf) -> *mut u8 {
    buf.pages().as_ptr().cast::<u8>().cast_mut().wrapping_add(buf.start())
}
