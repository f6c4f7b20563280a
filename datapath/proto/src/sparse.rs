//! Cuts a read's payload into the chunks of its reply.

use sheave_core::{ByteRange, Payload, Segment};

use crate::reply::{ReplyTo, data_chunk, hole_chunk, simple};
use crate::wire::ReplyStyle;

/// A run of zeroes shorter than this, in bytes, is sent as data: a chunk costs the receiver more.
pub const HOLE_LEN_MIN: u64 = 4096;

/// A part of a successful read's reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadChunk {
    /// Its offset in the volume.
    pub at: u64,
    /// Its offset in the read's payload.
    pub skip: usize,
    /// Its length in bytes; not zero.
    pub len: u32,
    /// It is sent as a hole: no payload follows its header.
    pub hole: bool,
    /// It ends the reply.
    pub done: bool,
}

impl ReadChunk {
    /// Appends its header; unless it is a hole, its bytes follow. For a simple reply the header is
    /// that of the whole reply.
    pub fn encode(&self, out: &mut Vec<u8>, to: ReplyTo) {
        match to.style {
            ReplyStyle::Simple => simple(out, to.cookie, None),
            _ if self.hole => hole_chunk(out, to, self.at, self.len, self.done),
            _ => data_chunk(out, to, self.at, self.len, self.done),
        }
    }
}

/// Cuts the payload of a read into as few chunks as show its large holes. Simple replies and reads
/// with the DF flag have one chunk. Boundaries between chunks are multiples of [`HOLE_LEN_MIN`] in
/// the volume.
///
/// # Panics
/// When the payload is not as long as the range, or its length does not fit into 32 bits.
pub fn read_chunks(
    style: ReplyStyle,
    df: bool,
    range: ByteRange,
    payload: &Payload,
) -> impl Iterator<Item = ReadChunk> {
    let total = payload.len();
    assert_eq!(total as u64, range.len(), "the payload of a read is as long as its range");
    assert!(u32::try_from(total).is_ok(), "reads are bounded by the maximum payload");
    let is_sparse = style != ReplyStyle::Simple && !df;
    let mut holes = is_sparse.then_some(Holes { payload, range, index: 0, start: 0 });
    let mut hole = holes.as_mut().and_then(Iterator::next);
    let mut skip = 0;
    std::iter::from_fn(move || {
        if skip == total {
            return None;
        }
        let (is_hole, end) = match hole {
            Some((start, end)) if start == skip => {
                hole = holes.as_mut().and_then(Iterator::next);
                (true, end)
            }
            Some((start, _)) => (false, start),
            None => (false, total),
        };
        let at = range.start() + skip as u64;
        let len = u32::try_from(end - skip).expect("a part is shorter than the whole");
        let chunk = ReadChunk { at, skip, len, hole: is_hole, done: end == total };
        skip = end;
        Some(chunk)
    })
}

/// The runs of zeroes that are worth a chunk, as offsets into the payload. A run is one segment,
/// since payloads fold adjacent zeroes.
struct Holes<'a> {
    payload: &'a Payload,
    range: ByteRange,
    /// The next segment.
    index: usize,
    /// Its offset in the payload.
    start: usize,
}

impl Iterator for Holes<'_> {
    type Item = (usize, usize);

    fn next(&mut self) -> Option<Self::Item> {
        while let Some(segment) = self.payload.segments().get(self.index) {
            let (start, end) = (self.start, self.start + segment.len());
            self.index += 1;
            self.start = end;
            if matches!(segment, Segment::Zero(_)) {
                let hole = self.aligned(start, end);
                if hole.is_some() {
                    return hole;
                }
            }
        }
        None
    }
}

impl Holes<'_> {
    /// The part of a run that begins and ends at a multiple of [`HOLE_LEN_MIN`] in the volume or
    /// at an end of the read, unless it is too short.
    fn aligned(&self, start: usize, end: usize) -> Option<(usize, usize)> {
        let base = self.range.start();
        let first = match start {
            0 => 0,
            _ => (base + start as u64).next_multiple_of(HOLE_LEN_MIN) - base,
        };
        let last = match end as u64 {
            end if end == self.range.len() => end,
            end => ((base + end) / HOLE_LEN_MIN * HOLE_LEN_MIN).saturating_sub(base),
        };
        let as_index = |at| usize::try_from(at).expect("inside the payload");
        (last >= first + HOLE_LEN_MIN).then(|| (as_index(first), as_index(last)))
    }
}
