//! Where the next record goes, and which records are written, durable and committed. No I/O.

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;

use crate::cipher::VolumeKey;
use crate::format::record::Entry;
use crate::format::segment::SegmentHeader;
use crate::ids::{Lsn, Opening, VolumeId};

use super::recover::Recovered;
use super::{Segment, SegmentFile};

/// Makes the salt of a segment.
pub(crate) type Salts = Box<dyn FnMut() -> [u8; 16] + Send>;

/// The appending end of a journal. `T` is what the owner remembers of a record until it is written.
pub(crate) struct Log<T> {
    volume: VolumeId,
    /// The key of the volume, if it is encrypted.
    key: Option<VolumeKey>,
    opening: Opening,
    salts: Salts,
    /// Segments with records that are not committed, oldest first. The last one is written if
    /// `is_current`.
    held: VecDeque<Held>,
    is_current: bool,
    /// The next page of the current segment.
    page: u32,
    /// Segments that no record needs, but perhaps a read in flight.
    freed: Vec<Arc<Segment>>,
    free: Vec<SegmentFile>,
    number_next: u64,
    /// Records that are reserved but not, in order, written: those behind `written`.
    slots: VecDeque<Slot<T>>,
    written: Lsn,
    durable: Lsn,
    /// The durable LSN that the last record states.
    stated: Lsn,
    /// The last record that changes blocks.
    last_change: Lsn,
    committed: Lsn,
}

struct Held {
    segment: Arc<Segment>,
    /// The LSN of the last record in it.
    last: Lsn,
}

struct Slot<T> {
    of: T,
    is_written: bool,
}

/// A place for a record.
#[derive(Debug)]
pub(crate) struct Reserved {
    pub(crate) lsn: Lsn,
    /// For the record to state.
    pub(crate) durable: Lsn,
    pub(crate) segment: Arc<Segment>,
    /// The page of the record.
    pub(crate) page: u32,
    /// It is the first record, and the header of the segment is to be written in front of it.
    pub(crate) is_first: bool,
}

impl<T> Log<T> {
    /// Goes on behind what was recovered, in a new segment.
    pub(crate) fn new(
        (volume, key): (VolumeId, Option<VolumeKey>),
        opening: Opening,
        committed: Lsn,
        recovered: Recovered,
        salts: Salts,
    ) -> Self {
        let Recovered { held, free, next, number_next, .. } = recovered;
        let is_empty = held.is_empty();
        let held = held.into_iter().map(|(segment, last)| Held { segment, last }).collect();
        let written = Lsn(next.0 - 1);
        Self {
            volume,
            key,
            opening,
            salts,
            held,
            is_current: false,
            page: 0,
            freed: Vec::new(),
            free,
            number_next,
            slots: VecDeque::new(),
            written,
            durable: written,
            stated: Lsn(0),
            last_change: if is_empty { Lsn(0) } else { written },
            committed,
        }
    }

    /// All records up to this one are written.
    pub(crate) fn written(&self) -> Lsn {
        self.written
    }

    /// All records up to this one are on stable storage.
    pub(crate) fn durable(&self) -> Lsn {
        self.durable
    }

    /// All records up to this one are in the bucket.
    pub(crate) fn committed(&self) -> Lsn {
        self.committed
    }

    /// Whether the last change is durable and no record states so yet.
    pub(crate) fn has_unstated(&self) -> bool {
        self.stated < self.last_change && self.last_change <= self.durable
    }

    /// The number of segments, used or not.
    pub(crate) fn segments(&self) -> usize {
        self.held.len() + self.freed.len() + self.free.len()
    }

    /// The number of those that records need, and the one that is written.
    pub(crate) fn segments_held(&self) -> usize {
        self.held.len()
    }

    /// Whether a segment is ready for when the current one is full.
    pub(crate) fn has_spare(&self) -> bool {
        !self.free.is_empty() || !self.freed.is_empty()
    }

    /// Adds a file for a segment.
    pub(crate) fn add(&mut self, file: SegmentFile) {
        self.free.push(file);
    }

    /// The segment of this number.
    pub(crate) fn segment(&self, number: u64) -> Option<&Arc<Segment>> {
        let mut held = self.held.iter().map(|held| &held.segment);
        held.find(|segment| segment.header.number == number)
    }

    /// A place for a record of so many pages; `None` without room. It must then be written, and
    /// reported to [`Self::wrote`].
    pub(crate) fn reserve(
        &mut self,
        entry: &Entry,
        of: impl FnOnce(&Reserved) -> T,
    ) -> Option<Reserved> {
        let pages = entry.pages();
        let has_room = self.held.back().is_some_and(|held| {
            self.is_current && u64::from(self.page) + pages <= u64::from(held.segment.file.pages)
        });
        let lsn = Lsn(self.written.0 + self.slots.len() as u64 + 1);
        if !has_room {
            self.rotate(lsn)?;
        }
        let held = self.held.back_mut()?;
        held.last = lsn;
        let page = self.page;
        self.page += u32::try_from(pages).ok()?;
        let (durable, segment) = (self.durable, Arc::clone(&held.segment));
        let reserved = Reserved { lsn, durable, segment, page, is_first: page == 1 };
        self.slots.push_back(Slot { of: of(&reserved), is_written: false });
        self.stated = self.durable;
        if !entry.span().is_empty() {
            self.last_change = lsn;
        }
        Some(reserved)
    }

    /// Begins a segment.
    fn rotate(&mut self, first: Lsn) -> Option<()> {
        if !self.has_spare() && self.slots.is_empty() {
            // The only segment follows itself, if the bucket has all of it. One that was recovered
            // is never written again.
            let was_current = mem::take(&mut self.is_current);
            self.release();
            self.is_current = was_current && !self.held.is_empty();
        }
        let file = self.free.pop().or_else(|| {
            let unread = self.freed.iter().position(|segment| Arc::strong_count(segment) == 1)?;
            Arc::into_inner(self.freed.swap_remove(unread)).map(|segment| segment.file)
        })?;
        let header = SegmentHeader {
            volume: self.volume,
            opening: self.opening,
            number: self.number_next,
            salt: (self.salts)(),
            first,
            durable: self.durable,
            committed: self.committed,
        };
        self.number_next += 1;
        let segment = Segment::new(file, header, self.key.as_ref());
        self.held.push_back(Held { segment, last: first });
        (self.is_current, self.page) = (true, 1);
        // A segment without a record that counts is of no more use.
        self.release();
        Some(())
    }

    /// Notes that a record is written. [`Self::next_written`] then returns those that are in order.
    pub(crate) fn wrote(&mut self, lsn: Lsn) {
        let index = (lsn.0 - self.written.0 - 1) as usize;
        self.slots[index].is_written = true;
    }

    /// The next record of which all before it and itself are written.
    pub(crate) fn next_written(&mut self) -> Option<(Lsn, T)> {
        if !self.slots.front()?.is_written {
            return None;
        }
        self.written = self.written.next();
        Some((self.written, self.slots.pop_front()?.of))
    }

    /// What is not written, in order.
    pub(crate) fn unwritten(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().map(|slot| &slot.of)
    }

    /// The files to sync so that all that is written now becomes durable.
    pub(crate) fn unsynced(&self) -> Vec<Arc<Segment>> {
        let (durable, written) = (self.durable, self.written);
        let needs = |held: &&Held| held.last > durable && held.segment.header.first <= written;
        self.held.iter().filter(needs).map(|held| Arc::clone(&held.segment)).collect()
    }

    /// Notes that a sync of [`Self::unsynced`], which began when `written` was so, has succeeded.
    pub(crate) fn synced(&mut self, written: Lsn) {
        self.durable = self.durable.max(written);
    }

    /// Notes that the bucket has all up to this one, and frees segments.
    pub(crate) fn commit(&mut self, lsn: Lsn) {
        self.committed = self.committed.max(lsn);
        self.release();
    }

    /// Closes all files.
    pub(crate) fn shut(&mut self) {
        self.held.clear();
        self.freed.clear();
        self.free.clear();
        self.is_current = false;
    }

    fn release(&mut self) {
        let is_done = |held: &Held| held.last <= self.committed;
        let current = usize::from(self.is_current);
        while self.held.len() > current
            && let Some(held) = self.held.pop_front_if(|held| is_done(held))
        {
            self.freed.push(held.segment);
        }
    }
}

impl Reserved {
    /// The first page to write.
    pub(crate) fn first_page(&self) -> u32 {
        if self.is_first { 0 } else { self.page }
    }
}
