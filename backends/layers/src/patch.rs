//! The replacement of bytes that do not fill their blocks: read the blocks, patch, write them.

use sheave_core::{Buf, ByteRange, Io, Op, PAGE_SIZE, Payload, Reply, Result, Segment};

/// One read-modify-write. The caller keeps other writers away from its blocks.
pub(super) struct Patch {
    range: ByteRange,
    data: Payload,
    fua: bool,
    /// The whole blocks around `range`, cut at the end of the volume.
    wide: ByteRange,
    /// Content of `wide`, once its first part has been read.
    whole: Option<Payload>,
    /// The blocks that are read now, and those to be read after them.
    reading: ByteRange,
    then: Option<ByteRange>,
}

impl Patch {
    /// A patch of `range`, which leaves a part of its blocks as it is, in blocks of `block` bytes.
    pub(super) fn new(range: ByteRange, data: Payload, fua: bool, block: u64, size: u64) -> Self {
        debug_assert_eq!(range.len(), data.len() as u64);
        let wide = range.widened(block, size);
        let last = (range.end() & !(block - 1)).saturating_sub(wide.start());
        let (has_head, has_tail) = (range.start() > wide.start(), range.end() < wide.end());
        let head = || wide.part(0, block);
        let tail = || wide.part(last, wide.len() - last);
        let (reading, then) = match (has_head, has_tail) {
            // One read of two blocks is cheaper than two.
            _ if wide.len() <= 2 * block => (wide, None),
            (true, true) => (head(), Some(tail())),
            (false, true) => (tail(), None),
            (true, false) | (false, false) => (head(), None),
        };
        Self { range, data, fua, wide, whole: None, reading, then }
    }

    /// The first op to run; later, the next read.
    pub(super) fn start(&self) -> Op {
        Op::Read { range: self.reading, into: None }
    }

    /// Takes the completion of an op; returns the next one, if it was not the last.
    ///
    /// # Errors
    /// When there is no memory for the blocks.
    pub(super) fn completed(
        &mut self,
        reply: &Reply,
        write_buffer: impl FnOnce(ByteRange, &mut dyn Io) -> Result<Payload>,
        io: &mut dyn Io,
    ) -> Result<Option<Op>> {
        // Only reads return data; one write follows them, which is the last op.
        let Reply::Data(bytes) = reply else { return Ok(None) };
        let whole = match &mut self.whole {
            Some(whole) => whole,
            none => none.insert(write_buffer(self.wide, io)?),
        };
        copy(whole, (self.reading.start() - self.wide.start()) as usize, bytes);
        if let Some(next) = self.then.take() {
            self.reading = next;
            return Ok(Some(self.start()));
        }
        copy(whole, (self.range.start() - self.wide.start()) as usize, &self.data);
        io.recycle(std::mem::take(&mut self.data));
        let data = self.whole.take();
        Ok(data.map(|data| Op::Write { range: self.wide, data, fua: self.fua }))
    }
}

/// Copies all of `from` to byte `at` of `to`.
fn copy(to: &Payload, mut at: usize, from: &Payload) {
    const ZEROES: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
    for segment in from.segments() {
        let mut done = 0;
        while done < segment.len() {
            let len = PAGE_SIZE.min(segment.len() - done);
            match segment {
                Segment::Zero(_) => to.copy_in(at, &ZEROES[..len]),
                Segment::Data(buf) => copy_page(to, at, buf, done, len),
            }
            done += len;
            at += len;
        }
    }
}

fn copy_page(to: &Payload, at: usize, from: &Buf, skip: usize, len: usize) {
    let mut bounce = [0; PAGE_SIZE];
    from.copy_out(skip, &mut bounce[..len]);
    to.copy_in(at, &bounce[..len]);
}
