//! Many replies in one send.

use sheave_core::{Buf, Payload, Segment};

use crate::iovec::{IoVecs, ZEROES};

/// Replies of one connection, gathered for one `sendmsg`. Reused, so that a busy connection
/// allocates nothing.
#[derive(Default)]
pub struct SendBatch {
    /// All headers, one after the other; [`Part::Head`] counts bytes of it.
    head: Vec<u8>,
    parts: Vec<Part>,
    len: usize,
    sent: usize,
    iov: IoVecs,
    header: Option<MsgHeader>,
}

enum Part {
    Head(usize),
    Zero(usize),
    Data(Buf),
}

struct MsgHeader(libc::msghdr);

// SAFETY: the header's only pointer is to the vectors of the batch that owns it, see `IoVecs`.
// JUSTIFICATION: a batch moves between threads with its session, never while a send is in flight.
unsafe impl Send for MsgHeader {}

impl SendBatch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes in it that are not sent yet.
    #[must_use]
    pub fn unsent(&self) -> usize {
        self.len - self.sent
    }

    /// Bytes in it in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends header bytes that `write` pushes to the vector it is given.
    pub fn head(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let before = self.head.len();
        write(&mut self.head);
        let grown = self.head.len() - before;
        self.len += grown;
        match self.parts.last_mut() {
            Some(Part::Head(len)) => *len += grown,
            _ => self.parts.push(Part::Head(grown)),
        }
    }

    /// Appends one segment of payload.
    pub fn segment(&mut self, segment: Segment) {
        self.len += segment.len();
        self.parts.push(match segment {
            Segment::Zero(len) => Part::Zero(len),
            Segment::Data(buf) => Part::Data(buf),
        });
    }

    /// Appends a payload.
    pub fn payload(&mut self, payload: Payload) {
        for segment in payload.into_segments() {
            self.segment(segment);
        }
    }

    /// Empties it and hands each payload buffer to `recycle`.
    pub fn clear(&mut self, mut recycle: impl FnMut(Buf)) {
        for part in self.parts.drain(..) {
            if let Part::Data(buf) = part {
                recycle(buf);
            }
        }
        self.head.clear();
        // A burst must not pin its memory to an idle connection.
        if self.head.capacity() > HEAD_CAPACITY_KEPT {
            *self = Self::default();
        }
        (self.len, self.sent) = (0, 0);
    }

    /// Calls `each` with all bytes in order, in short runs: how TLS reads a batch.
    pub fn visit(&self, bounce: &mut Vec<u8>, mut each: impl FnMut(&[u8])) {
        let mut head = &self.head[..];
        for part in &self.parts {
            match part {
                Part::Head(len) => {
                    let (now, later) = head.split_at(*len);
                    each(now);
                    head = later;
                }
                Part::Zero(len) => {
                    for at in (0..*len).step_by(ZEROES.len()) {
                        each(&ZEROES[..ZEROES.len().min(len - at)]);
                    }
                }
                Part::Data(buf) => {
                    for at in (0..buf.len()).step_by(BOUNCE_LEN) {
                        let run = buf.slice(at, BOUNCE_LEN.min(buf.len() - at));
                        bounce.resize(run.len(), 0);
                        crate::copy::load(&run, bounce);
                        each(bounce);
                    }
                }
            }
        }
    }

    /// Notes that `count` more bytes are sent.
    ///
    /// # Panics
    /// When that is more than there was: the kernel never says so.
    pub fn advance(&mut self, count: usize) {
        assert!(count <= self.unsent(), "sent no more than was there");
        self.sent += count;
    }

    /// The message header of what is unsent, as far as one call can take it. The batch must stay
    /// where it is until the call has ended.
    pub(crate) fn prepare(&mut self) -> *const libc::msghdr {
        self.iov.0.clear();
        let mut skip = self.sent;
        let mut head = &self.head[..];
        for part in &self.parts {
            if self.iov.is_full() {
                break;
            }
            let len = match part {
                Part::Head(len) | Part::Zero(len) => *len,
                Part::Data(buf) => buf.len(),
            };
            let from = skip.min(len);
            skip -= from;
            match part {
                Part::Head(_) => {
                    let (now, later) = head.split_at(len);
                    self.iov.push_bytes(&now[from..]);
                    head = later;
                }
                Part::Zero(_) => self.iov.push_zeroes(len - from),
                Part::Data(buf) => self.iov.push_buf(buf, from),
            }
        }
        let header = MsgHeader(self.iov.header());
        &raw const self.header.insert(header).0
    }
}

const HEAD_CAPACITY_KEPT: usize = 16 << 10;
/// Bytes of a payload that are copied at once: four of the longest TLS records.
const BOUNCE_LEN: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn gathered(batch: &mut SendBatch) -> Vec<u8> {
        batch.prepare();
        // SAFETY: `prepare` just made the vectors from memory that the batch holds.
        let run = |iov: &libc::iovec| unsafe {
            std::slice::from_raw_parts(iov.iov_base.cast::<u8>(), iov.iov_len).to_vec()
        };
        batch.iov.0.iter().flat_map(run).collect()
    }

    #[test]
    fn gathers_in_order_and_continues_where_a_short_send_stopped() {
        let mut batch = SendBatch::new();
        batch.head(|out| out.extend(b"ab"));
        batch.head(|out| out.extend(b"cd"));
        batch.payload(Buf::from_bytes(b"efg").into());
        batch.segment(Segment::Zero(2));
        batch.head(|out| out.extend(b"h"));
        let all = b"abcdefg\0\0h";
        for sent in 0..all.len() {
            assert_eq!(gathered(&mut batch), &all[sent..]);
            batch.advance(1);
        }
        assert_eq!(batch.unsent(), 0);
        let mut buffers = 0;
        batch.clear(|_| buffers += 1);
        assert!(buffers == 1 && batch.is_empty());
    }
}
