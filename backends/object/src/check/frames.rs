//! Reads the frames that the map refers to, those of an object together.

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::Bytes;
use sheave_core::{ErrorKind, Result};

use super::faults::{Faults, fault_of};
use super::{Options, Progress, READS_MAX};
use crate::extents::Span;
use crate::fetch::Fetcher;
use crate::format::{ObjectId, RunPart, keys};
use crate::ids::{Blocks, Lba, Seq};
use crate::retry::Requests;
use crate::together::{boxed, each};

/// References that are collected before they are read: 40 MiB.
const COLLECTED_MAX: usize = 1 << 20;
/// Blocks of a reference that are read by one request.
const PART_BLOCKS_MAX: u32 = 1024;
/// Bytes of a request, about, and those of no use that it may have between two references.
const READ_BYTES_MAX: u64 = 4 << 20;
const GAP_BYTES_MAX: u64 = 64 << 10;

/// Blocks that follow one another in an object.
#[derive(Clone, Copy, Debug)]
struct Reference {
    object: ObjectId,
    lba: Lba,
    part: RunPart,
}

/// A request, and what it is for.
#[derive(Debug)]
struct Reading {
    object: ObjectId,
    bytes: Range<u64>,
    parts: Vec<(Lba, RunPart)>,
}

/// What became of it.
struct Outcome {
    object: ObjectId,
    bytes: u64,
    /// The blocks that cannot be read, and why.
    bad: Vec<(Span, String)>,
}

/// Verifies frames.
pub(super) struct Frames<'a> {
    requests: &'a Requests,
    options: &'a Options<'a>,
    /// Only these objects are read, if there is such a list.
    suspects: Option<&'a BTreeSet<Seq>>,
    collected: Vec<Reference>,
    /// Bytes that were read.
    pub(super) read_bytes: u64,
    /// Bytes that may have to be read.
    pub(super) bytes_max: u64,
}

impl<'a> Frames<'a> {
    pub(super) fn new(
        requests: &'a Requests,
        options: &'a Options<'a>,
        suspects: Option<&'a BTreeSet<Seq>>,
    ) -> Self {
        let collected = Vec::new();
        Self { requests, options, suspects, collected, read_bytes: 0, bytes_max: 0 }
    }

    /// Takes blocks to be verified. When there are many, they are.
    ///
    /// # Errors
    /// Those of the store.
    pub(super) async fn take(
        &mut self,
        fetcher: &Fetcher,
        (object, part): (ObjectId, RunPart),
        lba: Lba,
        faults: &mut Faults,
    ) -> Result<()> {
        let is_wanted = self.suspects.is_none_or(|suspects| suspects.contains(&object.seq));
        if !self.options.reads_data || !is_wanted {
            return Ok(());
        }
        self.collected.push(Reference { object, lba, part });
        match self.collected.len() < COLLECTED_MAX {
            true => Ok(()),
            false => self.verify(fetcher, faults).await,
        }
    }

    /// Verifies what was taken.
    ///
    /// # Errors
    /// Those of the store.
    pub(super) async fn verify(&mut self, fetcher: &Fetcher, faults: &mut Faults) -> Result<()> {
        let mut readings = readings(std::mem::take(&mut self.collected)).into_iter();
        let requests = self.requests;
        let next = || {
            let reading = readings.next()?;
            Some(boxed(async move { read(requests, fetcher, reading).await }))
        };
        each(READS_MAX, next, |outcome: Result<Outcome>| {
            let Outcome { object, bytes, bad } = outcome?;
            for (span, why) in bad {
                faults.add_blocks(object, why, span);
            }
            self.read_bytes += bytes;
            let all_bytes = self.bytes_max.max(self.read_bytes);
            (self.options.progress)(Progress { read_bytes: self.read_bytes, all_bytes });
            Ok(())
        })
        .await
    }
}

/// The requests for references, in the order of objects.
fn readings(mut references: Vec<Reference>) -> Vec<Reading> {
    references.sort_unstable_by_key(|reference| {
        (reference.object, reference.part.bytes().start, reference.lba)
    });
    let mut readings = Vec::<Reading>::new();
    for Reference { object, lba, part } in references {
        for begun in (0..part.blocks).step_by(PART_BLOCKS_MAX as usize) {
            let blocks = PART_BLOCKS_MAX.min(part.blocks - begun);
            let lba = Lba(lba.0 + u64::from(begun));
            let part = RunPart { skip: part.skip + begun, blocks, ..part };
            let bytes = part.bytes();
            let fits = |last: &&mut Reading| {
                last.object == object
                    && bytes.start <= last.bytes.end + GAP_BYTES_MAX
                    && bytes.end - last.bytes.start <= READ_BYTES_MAX
            };
            match readings.last_mut().filter(fits) {
                Some(last) => {
                    last.bytes.end = last.bytes.end.max(bytes.end);
                    last.parts.push((lba, part));
                }
                None => readings.push(Reading { object, bytes, parts: vec![(lba, part)] }),
            }
        }
    }
    readings
}

async fn read(requests: &Requests, fetcher: &Fetcher, reading: Reading) -> Result<Outcome> {
    let Reading { object, bytes, parts } = reading;
    let stored = match fetcher.stored(object, bytes.clone()).await {
        Ok(Some(stored)) => stored,
        Ok(None) => {
            let span = |(lba, part): &(Lba, RunPart)| span_of(*lba, part.blocks.into());
            let bad = parts.iter().map(|part| (span(part), super::MISSING.to_owned())).collect();
            return Ok(Outcome { object, bytes: 0, bad });
        }
        // The blocks are read one by one.
        Err(error) if error.kind() == ErrorKind::Io => Bytes::new(),
        Err(error) => return Err(error),
    };
    let mut bad = Vec::new();
    for (lba, part) in parts {
        let of_part = part.bytes();
        let [from, to] = [of_part.start, of_part.end].map(|at| (at - bytes.start) as usize);
        let found = stored.get(from..to);
        if found.is_some_and(|found| fetcher.verify((object, part), lba, found).is_ok()) {
            continue;
        }
        for index in 0..part.blocks {
            let lba = Lba(lba.0 + u64::from(index));
            let part = RunPart { skip: part.skip + index, blocks: 1, ..part };
            if let Some(why) = fault_of_block(requests, fetcher, (object, part), lba).await? {
                bad.push((span_of(lba, 1), why));
            }
        }
    }
    Ok(Outcome { object, bytes: stored.len() as u64, bad })
}

/// Reads a block again, by itself. What is wrong with it, if it is still wrong.
async fn fault_of_block(
    requests: &Requests,
    fetcher: &Fetcher,
    (object, part): (ObjectId, RunPart),
    lba: Lba,
) -> Result<Option<String>> {
    match fetcher.stored(object, part.bytes()).await {
        Ok(Some(stored)) => {
            let wrong = fetcher.verify((object, part), lba, &stored).err();
            Ok(wrong.map(|wrong| wrong.to_string()))
        }
        Ok(None) => Ok(Some(super::MISSING.to_owned())),
        Err(error) => {
            let key = keys::log(object.epoch, object.seq);
            fault_of(requests, &key, error).map(Some)
        }
    }
}

fn span_of(lba: Lba, blocks: Blocks) -> Span {
    Span { start: lba.0, blocks }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Form;
    use crate::ids::Epoch;

    #[test]
    fn references_are_read_together_and_in_parts() {
        let object = |seq| ObjectId { epoch: Epoch(1), seq: Seq(seq) };
        let reference = |seq, frame: u32, lba, blocks| {
            let part = RunPart { frame, form: Form::Plain, run: blocks, skip: 0, blocks };
            Reference { object: object(seq), lba: Lba(lba), part }
        };
        let far = 1000 * 4112_u32;
        let found = readings(vec![
            reference(2, 200, 0, 2500),
            reference(1, far, 7, 1),
            reference(1, 200, 9, 1),
            reference(1, 200 + 4112_u32 * 3, 50, 2),
        ]);
        let found: Vec<_> = found
            .iter()
            .map(|reading| {
                let parts = reading.parts.iter().map(|(lba, part)| (lba.0, part.blocks));
                (reading.object.seq.0, reading.bytes.start, parts.collect::<Vec<_>>())
            })
            .collect();
        let second = |block: u64| 200 + block * 4112;
        let want = [
            (1, 200, vec![(9, 1), (50, 2)]),
            (1, u64::from(far), vec![(7, 1)]),
            (2, 200, vec![(0, 1024)]),
            (2, second(1024), vec![(1024, 1024)]),
            (2, second(2048), vec![(2048, 452)]),
        ];
        assert_eq!(found, want);
    }
}
