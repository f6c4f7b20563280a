//! What a journal says after its process has ended: its records in order, up to the first that is
//! not whole.
//!
//! A record that is not whole is the torn tail of what was never flushed, or damage of what was.
//! Each record, and each header of a segment, states up to which LSN all was on stable storage when
//! it was written. So a later one can prove that a bad one is damaged; without such a proof the
//! journal ends there (docs/format.md, "Replay").

use std::io;

use crate::cipher::VolumeKey;
use crate::extents::Span;
use crate::format::page::{PAGE_BYTES, Page};
use crate::format::record::{Check, Entry, Record};
use crate::format::segment::{Seed, SegmentHeader};
use crate::ids::{Lsn, VolumeId};

use super::segment::are_whole;

/// The search for later records reads pieces of so many pages.
const SEARCH_PAGES: u32 = 256;

/// The bytes of a segment.
pub(crate) trait Pages {
    /// How many pages it has.
    fn pages(&self) -> u32;

    /// Reads pages from this one on.
    ///
    /// # Errors
    /// What the disk says.
    fn read(&self, page: u32, into: &mut [u8]) -> io::Result<()>;
}

/// A record that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Replayed {
    pub(crate) lsn: Lsn,
    pub(crate) span: Span,
    /// The number of its segment.
    pub(crate) segment: u64,
    /// Its page, if blocks follow it; else the blocks become zeroes.
    pub(crate) record: Option<u32>,
}

/// Why a journal cannot be replayed.
#[derive(Debug)]
pub(crate) enum Unusable {
    /// This record was on stable storage, and is not whole.
    Damaged { lsn: Lsn, segment: u64, page: u32, proof: Lsn },
    /// The journal's disk.
    Unreadable { segment: u64, page: u32, error: io::Error },
}

/// Calls `take` with the records of segments, which are in the order of their numbers, and the
/// what their blocks are checked by, and returns the LSN behind the last one. Records up to
/// `committed` are of no use any more: a segment that has no others is not synced before it is used
/// anew, so they may be torn without being damage. `headless` is what files without a header prove
/// ([`read_headless`]). Without a key, what is encrypted is checked by its checksums only.
///
/// # Errors
/// When the journal has lost what was on stable storage, or cannot be read.
pub(crate) fn replay<P: Pages>(
    segments: &[(SegmentHeader, P)],
    key: Option<&VolumeKey>,
    (committed, headless): (Lsn, Lsn),
    mut take: impl FnMut(Replayed, &[Check]),
) -> Result<Lsn, Unusable> {
    let begins_there = |(header, _): &&(SegmentHeader, P)| header.first <= committed.next();
    let Some((first, _)) = segments.first().filter(begins_there) else {
        // The segments before have never been on stable storage, or are gone.
        let segment = segments.first().map_or(0, |(header, _)| header.number);
        let (lsn, proof) = (committed.next(), proof_of(segments, key)?.max(headless));
        return match proof > committed {
            true => Err(Unusable::Damaged { lsn, segment, page: 0, proof }),
            false => Ok(lsn),
        };
    };
    let mut next = first.first;
    for (index, (header, pages)) in segments.iter().enumerate() {
        let later = &segments[index + 1..];
        // An earlier recovery has ended the segment there.
        let limit = later.first().map(|(header, _)| header.first);
        let mut reader = Reader { header, seed: header.seed(key), pages, page: 1 };
        while limit.is_none_or(|limit| next < limit)
            && let Some((record, checks)) = reader.next(next)?
        {
            take(record, &checks);
            next = next.next();
        }
        if limit == Some(next) {
            continue;
        }
        let proof = reader.proof()?.max(proof_of(later, key)?).max(headless);
        if proof >= next.max(committed.next()) {
            let (segment, page) = (header.number, reader.page);
            return Err(Unusable::Damaged { lsn: next, segment, page, proof });
        }
        break;
    }
    Ok(next)
}

/// Up to where all was on stable storage, by these segments.
fn proof_of<P: Pages>(
    segments: &[(SegmentHeader, P)],
    key: Option<&VolumeKey>,
) -> Result<Lsn, Unusable> {
    segments.iter().try_fold(Lsn(0), |proof, (header, pages)| {
        let reader = Reader { header, seed: header.seed(key), pages, page: 1 };
        Ok(proof.max(header.durable).max(reader.proof()?))
    })
}

/// What a file whose header is damaged has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Headless {
    /// Up to here all was on stable storage.
    pub(crate) proof: Lsn,
    /// The first and the last record of its last use; `None` without records.
    pub(crate) records: Option<(Lsn, Lsn)>,
}

/// Looks for records in a file whose header is damaged.
///
/// # Errors
/// What the disk says.
pub(crate) fn read_headless(file: &impl Pages, volume: VolumeId) -> io::Result<Headless> {
    let (mut found, mut newest) = (Headless::default(), 0);
    let decode = |_, page: &Page| Record::decode_any(page, volume);
    let searched = search(file, 1, decode, |(number, Record { lsn, durable, .. })| {
        found.proof = found.proof.max(durable);
        // Earlier uses of the file have left records behind those of the last one.
        let before = found.records.filter(|_| number == newest);
        if number >= newest {
            let (first, last) = before.unwrap_or((lsn, lsn));
            found.records = Some((first.min(lsn), last.max(lsn)));
            newest = number;
        }
    });
    searched.map(|()| found).map_err(|(_, error)| error)
}

/// Calls `take` with what is found in pages from this one on.
fn search<T>(
    pages: &impl Pages,
    from: u32,
    decode: impl Fn(u32, &Page) -> Option<T>,
    take: impl FnMut(T),
) -> Result<(), (u32, io::Error)> {
    let (mut page, mut take) = (from, take);
    let mut piece = vec![0; SEARCH_PAGES as usize * PAGE_BYTES];
    while page < pages.pages() {
        let count = (pages.pages() - page).min(SEARCH_PAGES);
        let piece = &mut piece[..count as usize * PAGE_BYTES];
        pages.read(page, piece).map_err(|error| (page, error))?;
        let (found, _): (&[Page], _) = piece.as_chunks();
        let found = (page..).zip(found).filter_map(|(at, page)| decode(at, page));
        found.for_each(&mut take);
        page += count;
    }
    Ok(())
}

/// Reads the records of a segment in order.
struct Reader<'a, P> {
    header: &'a SegmentHeader,
    seed: Seed,
    pages: &'a P,
    page: u32,
}

impl<P: Pages> Reader<'_, P> {
    /// The next record, if it is whole and has this LSN.
    fn next(&mut self, lsn: Lsn) -> Result<Option<(Replayed, Vec<Check>)>, Unusable> {
        if self.page >= self.pages.pages() {
            return Ok(None);
        }
        let mut first = [0; PAGE_BYTES];
        self.read(self.page, &mut first)?;
        let Some(record) = Record::decode(&first, self.page, &self.seed) else { return Ok(None) };
        let end = u64::from(self.page) + record.entry.pages();
        if record.lsn != lsn || end > u64::from(self.pages.pages()) {
            return Ok(None);
        }
        let span = record.entry.span();
        let (at, checks) = match record.entry {
            Entry::Zero { .. } => (None, Vec::new()),
            Entry::Write { checks, .. } => {
                let mut blocks = vec![0; checks.len() * PAGE_BYTES];
                self.read(self.page + 1, &mut blocks)?;
                if !are_whole(&blocks, &checks) {
                    return Ok(None);
                }
                (Some(self.page), checks)
            }
        };
        self.page = end as u32;
        Ok(Some((Replayed { lsn, span, segment: self.header.number, record: at }, checks)))
    }

    /// Up to where all was on stable storage, by the records behind this point, in whatever state
    /// those between are.
    fn proof(&self) -> Result<Lsn, Unusable> {
        let segment = self.header.number;
        let mut proof = Lsn(0);
        let decode = |at, page: &Page| Record::decode(page, at, &self.seed);
        search(self.pages, self.page, decode, |record| proof = proof.max(record.durable))
            .map_err(|(page, error)| Unusable::Unreadable { segment, page, error })?;
        Ok(proof)
    }

    fn read(&self, page: u32, into: &mut [u8]) -> Result<(), Unusable> {
        let segment = self.header.number;
        self.pages.read(page, into).map_err(|error| Unusable::Unreadable { segment, page, error })
    }
}
