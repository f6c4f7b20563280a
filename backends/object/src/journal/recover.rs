//! What an opening takes over from the journal of an earlier one.

use std::sync::Arc;

use sheave_core::{Error, ErrorKind, Result, printable};

use super::replay::{Replayed, Unusable, read_headless, replay};
use super::{JournalDir, Segment, SegmentFile};
use crate::cipher::VolumeKey;
use crate::format::record::Check;
use crate::ids::{Lsn, VolumeId};

/// The journal of earlier openings, all of it on stable storage.
#[derive(Debug)]
pub(crate) struct Recovered {
    /// Segments with writes that are not in the bucket, oldest first, with their last LSNs.
    pub(crate) held: Vec<(Arc<Segment>, Lsn)>,
    /// Files for new segments.
    pub(crate) free: Vec<SegmentFile>,
    /// The writes that are not in the bucket, in order.
    pub(crate) records: Vec<Replayed>,
    /// The LSN of the next write.
    pub(crate) next: Lsn,
    /// The number of the next segment.
    pub(crate) number_next: u64,
}

impl JournalDir {
    /// Reads what the journal has beyond the last committed LSN of the bucket.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when it has lost what was flushed, or when the bucket has lost what
    /// the journal knows to be committed; and errors of the disk.
    pub(crate) fn recover(
        &self,
        (volume, key): (VolumeId, Option<&VolumeKey>),
        committed: Lsn,
    ) -> Result<Recovered> {
        let refused = |why: String| {
            let why = format!("{}: {why}", printable(&self.path));
            Error::new(ErrorKind::Corrupt, "open", why)
        };
        let super::Segments { mut chain, headless, mut free } = self.segments()?;
        if chain.iter().any(|(header, _)| header.volume != volume) {
            return Err(refused("this journal is of another volume; move it away".to_owned()));
        }
        if chain.windows(2).any(|pair| pair[0].0.number == pair[1].0.number) {
            return Err(refused("two segments have one number; restore it".to_owned()));
        }
        let number_next = chain.last().map_or(1, |(header, _)| header.number + 1);
        if let Some(known) = chain.iter().map(|(header, _)| header.committed).max()
            && known > committed
        {
            let why = format!(
                "the journal knows of writes up to LSN {known} in the bucket, which has them up \
                 to {committed} only: it has been rolled back; restore it"
            );
            return Err(refused(why));
        }
        // Those that the bucket has altogether.
        let needed = chain.iter().rposition(|(header, _)| header.first <= committed.next());
        let mut done: Vec<_> = chain.drain(..needed.unwrap_or(0)).map(|(_, file)| file).collect();
        let mut records = Vec::new();
        let proof = self.proof_of(&headless, volume)?;
        done.extend(headless);
        // Whatever a killed process has written and not flushed, is flushed now: a sync of later
        // segments will not reach it. Then the disk is read and not memory, which may have what a
        // write-back that failed has not brought to the disk.
        for (_, file) in &chain {
            file.sync().and_then(|()| file.forget()).map_err(|error| {
                Error::from_io("flush", printable(&self.path).to_string(), error)
            })?;
        }
        // What their blocks are checked by, one after another.
        let mut checks = Vec::new();
        let replayed = replay(&chain, key, (committed, proof), |record, of_blocks| {
            records.push(record);
            checks.extend(of_blocks);
        });
        let next = replayed.map_err(|unusable| self.unusable(&unusable))?;
        let last_of = |number| {
            let of = records.iter().filter(move |record: &&Replayed| record.segment == number);
            of.map(|record| record.lsn).max()
        };
        let mut held = Vec::new();
        for (header, file) in chain {
            match last_of(header.number).filter(|last| *last > committed) {
                Some(last) => held.push((Segment::new(file, header, key), last)),
                None => done.push(file),
            }
        }
        note_checks(&held, &records, &checks);
        // Records behind the end of this journal must never count, whatever becomes of the segments
        // that are begun now: LSNs go on where the journal ends.
        for file in done {
            file.clear().map_err(|error| {
                Error::from_io("clear", printable(&self.path).to_string(), error)
            })?;
            free.push(file);
        }
        records.retain(|record| record.lsn > committed);
        let next = next.max(committed.next());
        Ok(Recovered { held, free, records, next, number_next })
    }

    /// Up to where all was on stable storage, by files whose header is damaged.
    fn proof_of(&self, headless: &[SegmentFile], volume: VolumeId) -> Result<Lsn> {
        headless.iter().try_fold(Lsn(0), |proof, file| {
            let found = read_headless(file, volume).map_err(|error| {
                Error::from_io("read", printable(&self.path).to_string(), error)
            })?;
            Ok(proof.max(found.proof))
        })
    }

    fn unusable(&self, why: &Unusable) -> Error {
        let dir = printable(&self.path);
        match why {
            Unusable::Damaged { lsn, segment, page, proof } => {
                let why = format!(
                    "{dir}: LSN {lsn} (journal segment {segment}, page {page}) is damaged or \
                     missing, and all up to LSN {proof} was flushed; restore the journal, or move \
                     it away to open the volume without what its store lacks"
                );
                Error::new(ErrorKind::Corrupt, "open", why)
            }
            Unusable::Unreadable { segment, page, error } => {
                let why = format!("{dir}: journal segment {segment}, page {page}");
                let error = std::io::Error::new(error.kind(), error.to_string());
                Error::from_io("read", why, error)
            }
        }
    }
}

/// Has segments know by what their blocks are checked, which is in the order of the records.
fn note_checks(held: &[(Arc<Segment>, Lsn)], records: &[Replayed], checks: &[Check]) {
    let mut rest = checks;
    for record in records {
        let Some(page) = record.record else { continue };
        let (of_record, behind) = rest.split_at(record.span.blocks as usize);
        rest = behind;
        let mut held = held.iter().map(|(segment, _)| segment);
        if let Some(segment) = held.find(|segment| segment.header.number == record.segment) {
            segment.note_checks(page, of_record);
        }
    }
}
