//! Ops that change the volume: each becomes records of the journal.

use sheave_core::{
    Buf, Destination, Error, Io, IoRequest, Op, Outcome, Payload, Reply, Result, Segment as Piece,
    Tag,
};

use super::{Job, ObjectBackend, Request, Work, span_of};
use crate::BLOCK_BYTES;
use crate::extents::Span;
use crate::format::page::{PAGE_BYTES, Page};
use crate::format::record::{Check, Entry, Record, SEALED_BLOCKS_MAX, WRITE_BLOCKS_MAX};
use crate::ids::Lsn;
use crate::journal::Reserved;

/// A change in progress.
pub(super) struct Change {
    op: &'static str,
    span: Span,
    /// The bytes of a write.
    pub(super) data: Option<Payload>,
    /// Blocks for which the journal has given places.
    begun: u64,
    /// Records that are not, in order, written.
    in_flight: usize,
    /// The last record.
    last: Lsn,
    fua: bool,
    error: Option<Error>,
}

impl Change {
    /// Whether all its records are written.
    pub(super) fn is_written(&self) -> bool {
        self.begun == self.span.blocks && self.in_flight == 0
    }
}

impl ObjectBackend {
    pub(super) fn begin_change(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Option<Outcome> {
        let name = op.kind().name();
        if self.opened.engine.info.read_only {
            return Some(Err(op.read_only_error()));
        }
        let (range, data, fua) = match op {
            Op::Write { range, data, fua } => (range, Some(data), fua),
            Op::Trim { range, fua } | Op::WriteZeroes { range, fua, .. } => (range, None, fua),
            _ => return None,
        };
        let change = Change {
            op: name,
            span: span_of(range),
            data,
            begun: 0,
            in_flight: 0,
            last: Lsn(0),
            fua,
            error: None,
        };
        let key = self.jobs.insert(Job { tag, work: Work::Change(change) });
        if !self.waiting.is_empty() || !self.append(key, io) {
            self.waiting.push_back(key);
        }
        None
    }

    /// Goes on with changes that wait for room in the journal.
    pub(super) fn go_on(&mut self, io: &mut dyn Io) {
        while let Some(&key) = self.waiting.front() {
            if !self.append(key, io) {
                return;
            }
            self.waiting.pop_front();
        }
    }

    /// Writes the rest of a change to the journal. False: there is no room.
    fn append(&mut self, key: usize, io: &mut dyn Io) -> bool {
        let is_sealed = self.opened.engine.is_encrypted;
        loop {
            let Some(Job { work: Work::Change(change), .. }) = self.jobs.get_mut(key) else {
                return true;
            };
            if change.begun == change.span.blocks || change.error.is_some() {
                return true;
            }
            match next_record(change, is_sealed, io) {
                Ok(record) => {
                    let Some(count) = self.append_one(key, record, io) else { return false };
                    let Some(Job { work: Work::Change(change), .. }) = self.jobs.get_mut(key)
                    else {
                        return true;
                    };
                    change.begun += count;
                }
                Err(error) => {
                    self.give_up(key, error, io);
                    return true;
                }
            }
        }
    }

    /// Writes a record, and returns its number of blocks; `None` without room.
    fn append_one(&mut self, key: usize, record: NewRecord, io: &mut dyn Io) -> Option<u64> {
        let NewRecord { mut entry, data, to_seal, page } = record;
        let Some(Job { work: Work::Change(change), .. }) = self.jobs.get(key) else { return None };
        let (op, owner) = (change.op, (self.user, key));
        let reserved = self.with(io, |front| {
            let is_syncing = front.is_syncing();
            front.append(op, owner, &entry).map(|reserved| Some((reserved?, is_syncing)))
        });
        let (reserved, is_syncing) = match reserved {
            Ok(reserved) => reserved?,
            Err(error) => {
                self.give_up(key, error, io);
                return Some(0);
            }
        };
        let (lsn, blocks) = (reserved.lsn, entry.span().blocks);
        if let Entry::Write { checks, .. } = &mut entry {
            if let Some(Sealed { data, into }) = to_seal {
                *checks = seal(&reserved, &data, &into);
            }
            reserved.segment.note_checks(reserved.page, checks);
        }
        if let Some(Job { work: Work::Change(change), .. }) = self.jobs.get_mut(key) {
            change.in_flight += 1;
            change.last = lsn;
        }
        let request = to_request(&reserved, entry, data, &page);
        // While a sync goes on, a write to the page cache may wait for it.
        let to = if is_syncing { Destination::BusyMemory } else { Destination::Memory };
        self.request_at(request, Request::Append(lsn), to, io);
        Some(blocks)
    }

    /// A record of a change is written, or never will be.
    pub(super) fn record_ended(&mut self, key: usize, outcome: Result<()>, io: &mut dyn Io) {
        let Some(Job { work: Work::Change(change), .. }) = self.jobs.get_mut(key) else {
            debug_assert!(false, "a change has one answer for each of its records");
            return;
        };
        change.in_flight -= 1;
        if let Err(error) = outcome {
            change.error.get_or_insert(error);
        }
        self.settle(key, io);
    }

    /// No more records of this change.
    fn give_up(&mut self, key: usize, error: Error, io: &mut dyn Io) {
        if let Some(Job { work: Work::Change(change), .. }) = self.jobs.get_mut(key) {
            change.error.get_or_insert(error);
            self.settle(key, io);
        }
    }

    /// Completes a change if nothing of it is in flight any more.
    fn settle(&mut self, key: usize, io: &mut dyn Io) {
        let Some(Job { work: Work::Change(change), .. }) = self.jobs.get_mut(key) else { return };
        if change.in_flight > 0 || (change.error.is_none() && !change.is_written()) {
            return;
        }
        let (op, last, fua) = (change.op, change.last, change.fua);
        if let Some(error) = change.error.take() {
            return self.complete(key, Err(error), io);
        }
        match fua {
            false => self.complete(key, Ok(Reply::Done), io),
            true => match self.join_flush(op, key, Some(last), io) {
                Ok(false) => {}
                outcome => self.complete(key, outcome.map(|_| Reply::Done), io),
            },
        }
    }
}

/// A record that has no place yet.
struct NewRecord {
    entry: Entry,
    data: Option<Payload>,
    /// What becomes the data when it has its place, if it is to be encrypted.
    to_seal: Option<Sealed>,
    /// Room for its first page, and for the header of a segment in front of it.
    page: Buf,
}

/// Blocks that are to be encrypted into a buffer.
struct Sealed {
    data: Payload,
    into: Buf,
}

/// The next record of a change.
fn next_record(change: &Change, is_sealed: bool, io: &mut dyn Io) -> Result<NewRecord> {
    let page = io.buffer(2 * PAGE_BYTES)?;
    let left = change.span.blocks - change.begun;
    let start = change.span.start + change.begun;
    let Some(data) = &change.data else {
        let entry = Entry::Zero { span: Span { start, blocks: left } };
        return Ok(NewRecord { entry, data: None, to_seal: None, page });
    };
    let most = if is_sealed { SEALED_BLOCKS_MAX } else { WRITE_BLOCKS_MAX };
    let span = Span { start, blocks: left.min(most) };
    let skip = (change.begun * BLOCK_BYTES) as usize;
    let data = data.slice(skip, span.bytes() as usize);
    if let [Piece::Zero(_)] = data.segments() {
        return Ok(NewRecord { entry: Entry::Zero { span }, data: None, to_seal: None, page });
    }
    if is_sealed {
        let into = io.buffer(span.bytes() as usize)?;
        let entry = Entry::Write { span, checks: Vec::new() };
        let to_seal = Some(Sealed { data, into: into.clone() });
        return Ok(NewRecord { entry, data: Some(Payload::from(into)), to_seal, page });
    }
    let data = storable(data)?;
    let mut block: Page = [0; PAGE_BYTES];
    let check_of = |index: u64| {
        data.slice((index * BLOCK_BYTES) as usize, PAGE_BYTES).copy_out(&mut block);
        Check { crc: crc32fast::hash(&block), ..Check::default() }
    };
    let checks = (0..span.blocks).map(check_of).collect();
    Ok(NewRecord { entry: Entry::Write { span, checks }, data: Some(data), to_seal: None, page })
}

/// Encrypts the blocks of a record that has its place. Returns what they are checked by.
fn seal(reserved: &Reserved, data: &Payload, into: &Buf) -> Vec<Check> {
    let mut block: Page = [0; PAGE_BYTES];
    let pages = reserved.page + 1..;
    let seal_one = |(at, page)| {
        data.slice(at, PAGE_BYTES).copy_out(&mut block);
        let check = reserved.segment.seal(page, &mut block);
        into.copy_in(at, &block);
        check
    };
    (0..into.len()).step_by(PAGE_BYTES).zip(pages).map(seal_one).collect()
}

/// The same bytes without zero segments.
fn storable(data: Payload) -> Result<Payload> {
    if !data.segments().iter().any(|piece| matches!(piece, Piece::Zero(_))) {
        return Ok(data);
    }
    let mut out = Payload::new();
    for piece in data.into_segments() {
        out.push(match piece {
            Piece::Zero(len) => Piece::Data(Buf::try_zeroed(len)?),
            Piece::Data(buf) => Piece::Data(buf),
        });
    }
    Ok(out)
}

/// Writes a record to its place, and the header of its segment if it is the first one.
fn to_request(reserved: &Reserved, entry: Entry, data: Option<Payload>, pages: &Buf) -> IoRequest {
    let record = Record { lsn: reserved.lsn, durable: reserved.durable, entry };
    let segment = &reserved.segment;
    pages.copy_in(PAGE_BYTES, &record.encode(&segment.seed, reserved.page));
    let skip = match reserved.is_first {
        true => {
            pages.copy_in(0, &segment.header.encode());
            0
        }
        false => PAGE_BYTES,
    };
    let mut from = Payload::from(pages.slice(skip, 2 * PAGE_BYTES - skip));
    for piece in data.into_iter().flat_map(Payload::into_segments) {
        from.push(piece);
    }
    let at = u64::from(reserved.first_page()) * BLOCK_BYTES;
    IoRequest::Write { file: segment.file.file.clone(), at, from, dsync: false }
}
