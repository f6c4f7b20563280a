//! The data of a read or a write: a sequence of buffers and zeroes.

use smallvec::SmallVec;

use crate::{Buf, Result, memory};

/// A piece of a payload.
#[derive(Clone, Debug)]
pub enum Segment {
    /// Zero bytes, which take no memory.
    Zero(usize),
    /// Bytes in shared memory.
    Data(Buf),
}

impl Segment {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Zero(len) => *len,
            Self::Data(buf) => buf.len(),
        }
    }

    /// Whether it covers no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The bytes of a read or a write, in order.
#[derive(Clone, Debug, Default)]
pub struct Payload {
    segments: SmallVec<[Segment; 1]>,
}

impl Payload {
    /// A payload without bytes.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes room for `count` more segments.
    ///
    /// # Errors
    /// [`ErrorKind::NoMemory`](crate::ErrorKind::NoMemory) when there is no memory for them.
    pub fn try_reserve(&mut self, count: usize) -> Result<()> {
        memory::insist(|| self.segments.try_reserve(count))
    }

    /// Appends a segment; empty ones and adjacent zeroes are folded.
    pub fn push(&mut self, segment: Segment) {
        match (self.segments.last_mut(), segment) {
            (_, segment) if segment.is_empty() => {}
            (Some(Segment::Zero(have)), Segment::Zero(more)) => *have += more,
            (_, segment) => self.segments.push(segment),
        }
    }

    /// The segments in order.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The registered buffer that holds the bytes, if one does.
    #[must_use]
    pub fn registered(&self) -> Option<&Buf> {
        match &self.segments[..] {
            [Segment::Data(buf)] if buf.registered_index().is_some() => Some(buf),
            _ => None,
        }
    }

    /// The segments in order, by value.
    pub fn into_segments(self) -> impl Iterator<Item = Segment> {
        self.segments.into_iter()
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.segments.iter().map(Segment::len).sum()
    }

    /// Whether it holds no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// A payload of the `len` bytes that begin `skip` bytes in.
    ///
    /// # Panics
    /// When that is not inside the payload: a bug of the caller.
    #[must_use]
    pub fn slice(&self, skip: usize, len: usize) -> Self {
        let (mut skip, mut left) = (skip, len);
        let mut out = Self::new();
        for segment in &self.segments {
            let from = skip.min(segment.len());
            let take = left.min(segment.len() - from);
            skip -= from;
            left -= take;
            out.push(match segment {
                Segment::Zero(_) => Segment::Zero(take),
                Segment::Data(buf) => Segment::Data(buf.slice(from, take)),
            });
        }
        assert!(skip == 0 && left == 0, "slice inside the payload");
        out
    }

    /// Stores `bytes` at `at`. A payload that is to be filled must have no zero segments.
    ///
    /// # Panics
    /// When they do not fit, or overlap a zero segment: a bug of the caller.
    pub fn copy_in(&self, at: usize, bytes: &[u8]) {
        let (mut at, mut from) = (at, bytes);
        for segment in &self.segments {
            let skip = at.min(segment.len());
            let (now, later) = from.split_at(from.len().min(segment.len() - skip));
            at -= skip;
            from = later;
            match segment {
                Segment::Data(buf) => buf.copy_in(skip, now),
                Segment::Zero(_) => assert!(now.is_empty(), "no store into a zero segment"),
            }
        }
        assert!(at == 0 && from.is_empty(), "copy_in inside the payload");
    }

    /// Copies all bytes into `out`, which has the payload's length.
    ///
    /// # Panics
    /// When the lengths differ: a bug of the caller.
    pub fn copy_out(&self, out: &mut [u8]) {
        let mut to = out;
        for segment in &self.segments {
            let (now, later) = to.split_at_mut(segment.len());
            to = later;
            match segment {
                Segment::Zero(_) => now.fill(0),
                Segment::Data(buf) => buf.copy_out(0, now),
            }
        }
        assert!(to.is_empty(), "copy_out of the whole payload");
    }

    /// A copy of the bytes.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.len()];
        self.copy_out(&mut out);
        out
    }
}

impl From<Buf> for Payload {
    fn from(buf: Buf) -> Self {
        let mut payload = Self::new();
        payload.push(Segment::Data(buf));
        payload
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_folds_zeroes_and_slices_across_segments() {
        let mut payload = Payload::new();
        payload.push(Segment::Zero(3));
        payload.push(Segment::Zero(2));
        payload.push(Segment::Data(Buf::from_bytes(b"abcdef")));
        payload.push(Segment::Zero(0));
        assert_eq!(payload.segments().len(), 2);
        assert_eq!(payload.to_vec(), b"\0\0\0\0\0abcdef");
        assert_eq!(payload.slice(4, 4).to_vec(), b"\0abc");
    }
}
