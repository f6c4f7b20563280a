//! Many replies in one send.

use sheave_core::{Buf, Payload, Result, Segment, memory};

use crate::iovec::{IoVecs, ZEROES};

/// Replies of one connection, gathered for one `sendmsg`. Reused, so that a busy connection
/// allocates nothing.
#[derive(Default)]
pub struct SendBatch {
    /// All headers, one after the other; [`Part::Head`] counts bytes of it.
    head: Vec<u8>,
    parts: Vec<Part>,
    /// Buffers that are not sent from any more, kept for [`SendBatch::clear`].
    retired: Vec<Buf>,
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

impl Part {
    fn len(&self) -> usize {
        match self {
            Self::Head(len) | Self::Zero(len) => *len,
            Self::Data(buf) => buf.len(),
        }
    }
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

    /// Makes room for so many more header bytes, and so many runs of header bytes or segments.
    ///
    /// # Errors
    /// [`ErrorKind::NoMemory`](sheave_core::ErrorKind::NoMemory) when there is no memory for them.
    pub fn try_reserve(&mut self, head_bytes: usize, parts: usize) -> Result<()> {
        if head_bytes <= SHORT_HEAD_MAX && parts <= SHORT_PARTS_MAX {
            memory::insist(|| self.head.try_reserve(head_bytes))?;
            return memory::insist(|| self.parts.try_reserve(parts));
        }
        memory::attempt(|| self.head.try_reserve(head_bytes))?;
        memory::attempt(|| self.parts.try_reserve(parts))
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

    /// Appends `len` bytes of a payload that begin `skip` bytes in.
    ///
    /// # Panics
    /// When they are not inside the payload: a bug of the caller.
    pub fn part(&mut self, payload: &Payload, skip: usize, len: usize) {
        let (mut skip, mut left) = (skip, len);
        for segment in payload.segments() {
            let from = skip.min(segment.len());
            let take = left.min(segment.len() - from);
            skip -= from;
            left -= take;
            match segment {
                _ if take == 0 => {}
                Segment::Zero(_) => self.segment(Segment::Zero(take)),
                Segment::Data(buf) => self.segment(Segment::Data(buf.slice(from, take))),
            }
        }
        assert!(skip == 0 && left == 0, "a part of the payload");
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
        self.retired.drain(..).for_each(recycle);
        self.head.clear();
        (self.len, self.sent) = (0, 0);
    }

    /// Frees the memory of a burst: for an empty batch of a connection that has become idle.
    pub fn shrink(&mut self) {
        if self.is_empty() && self.head.capacity() > HEAD_CAPACITY_KEPT {
            *self = Self::default();
        }
    }

    /// Takes the next bytes off the front, at most `max`, and calls `each` with them in short runs:
    /// how TLS takes a batch. Payload that is done with goes to `spent`, to be recycled with it.
    pub fn drain(
        &mut self,
        max: usize,
        bounce: &mut Vec<u8>,
        spent: &mut Self,
        mut each: impl FnMut(&[u8]),
    ) {
        let (mut skip, mut left) = (self.sent, max.min(self.unsent()));
        let (mut whole_parts, mut whole_bytes, mut head_at) = (0, 0, 0);
        self.sent += left;
        for part in &self.parts {
            let len = part.len();
            let from = skip.min(len);
            let take = left.min(len - from);
            skip -= from;
            left -= take;
            match part {
                Part::Head(_) => each(&self.head[head_at + from..head_at + from + take]),
                Part::Zero(_) => zero_runs(take, &mut each),
                Part::Data(buf) => copied_runs(&buf.slice(from, take), bounce, &mut each),
            }
            if from + take < len {
                break;
            }
            if let Part::Head(_) = part {
                head_at += len;
            }
            whole_parts += 1;
            whole_bytes += len;
        }
        // Without memory for the list they are freed instead.
        let keeps = memory::attempt(|| spent.retired.try_reserve(whole_parts)).is_ok();
        for part in self.parts.drain(..whole_parts) {
            if let Part::Data(buf) = part
                && keeps
            {
                spent.retired.push(buf);
            }
        }
        self.head.drain(..head_at);
        self.len -= whole_bytes;
        self.sent -= whole_bytes;
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
            let len = part.len();
            let from = skip.min(len);
            skip -= from;
            let has_room = match part {
                Part::Head(_) => {
                    let (now, later) = head.split_at(len);
                    head = later;
                    self.iov.push_bytes(&now[from..])
                }
                Part::Zero(_) => self.iov.push_zeroes(len - from),
                Part::Data(buf) => self.iov.push_buf(buf, from),
            };
            if !has_room {
                break;
            }
        }
        let header = MsgHeader(self.iov.header());
        &raw const self.header.insert(header).0
    }
}

fn zero_runs(len: usize, each: &mut impl FnMut(&[u8])) {
    for at in (0..len).step_by(ZEROES.len()) {
        each(&ZEROES[..ZEROES.len().min(len - at)]);
    }
}

fn copied_runs(buf: &Buf, bounce: &mut Vec<u8>, each: &mut impl FnMut(&[u8])) {
    bounce.clear();
    let has_room = memory::attempt(|| bounce.try_reserve(BOUNCE_LEN.min(buf.len()))).is_ok();
    let run_len = if has_room { BOUNCE_LEN } else { SMALL_BOUNCE_LEN };
    for at in (0..buf.len()).step_by(run_len) {
        let run = buf.slice(at, run_len.min(buf.len() - at));
        bounce.resize(run.len(), 0);
        crate::copy::load(&run, bounce);
        each(bounce);
    }
}

/// A reply that is no longer may use memory that is set aside: without it its connection ends.
const SHORT_HEAD_MAX: usize = 8 << 10;
const SHORT_PARTS_MAX: usize = 8;
const HEAD_CAPACITY_KEPT: usize = 16 << 10;
/// Bytes of a payload that are copied at once: four of the longest TLS records.
const BOUNCE_LEN: usize = 64 << 10;
/// The same when there is no memory for so much.
const SMALL_BOUNCE_LEN: usize = 4 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn gathered(batch: &mut SendBatch) -> Vec<u8> {
        batch.prepare();
        // SAFETY: `prepare` just made the vectors from memory that the batch holds.
        // JUSTIFICATION: only what the vectors point at tells what would be sent.
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
