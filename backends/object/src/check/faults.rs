//! What a check has found to be wrong.

use std::collections::{BTreeMap, BTreeSet};

use sheave_core::{Error, ErrorKind, Result};

use crate::extents::Span;
use crate::format::{ObjectId, keys};
use crate::ids::{Blocks, Seq};
use crate::retry::Requests;

/// A fault of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The key of the object.
    pub key: String,
    /// What is wrong with it.
    pub why: String,
    /// The blocks that cannot be read because of it, in their order; none if the fault only affects
    /// the volume as a whole, or nothing yet.
    pub spans: Vec<Span>,
}

impl Fault {
    /// How many blocks cannot be read because of it.
    #[must_use]
    pub fn blocks(&self) -> Blocks {
        self.spans.iter().map(|span| span.blocks).sum()
    }
}

/// Faults, by key and kind.
#[derive(Debug, Default)]
pub(super) struct Faults {
    found: BTreeMap<(String, String), Vec<Span>>,
}

impl Faults {
    pub(super) fn add(&mut self, key: &str, why: impl Into<String>) {
        self.found.entry((key.to_owned(), why.into())).or_default();
    }

    /// Adds one that affects blocks.
    pub(super) fn add_blocks(&mut self, object: ObjectId, why: impl Into<String>, span: Span) {
        let key = keys::log(object.epoch, object.seq);
        self.found.entry((key, why.into())).or_default().push(span);
    }

    /// Adds what an error says, if it is about what is stored.
    ///
    /// # Errors
    /// The error, if it is about anything else, such as a store that does not answer.
    pub(super) fn add_error(&mut self, requests: &Requests, key: &str, error: Error) -> Result<()> {
        let why = fault_of(requests, key, error)?;
        self.add(key, why);
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// The numbers of the log objects that have faults.
    pub(super) fn seqs(&self) -> BTreeSet<Seq> {
        let seq = |(key, _): &(String, String)| keys::log_place(key).map(|(_, seq)| seq);
        self.found.keys().filter_map(seq).collect()
    }

    /// All of them. Spans that touch are one.
    pub(super) fn into_vec(self) -> Vec<Fault> {
        let fault = |((key, why), mut found): ((String, String), Vec<Span>)| {
            found.sort_unstable();
            let mut spans = Vec::<Span>::new();
            for span in found {
                match spans.last_mut().filter(|last| span.start <= last.end()) {
                    Some(last) => last.blocks = last.blocks.max(span.end() - last.start),
                    None => spans.push(span),
                }
            }
            Fault { key, why, spans }
        };
        self.found.into_iter().map(fault).collect()
    }
}

/// What an error says of an object, if it is about what is stored.
///
/// # Errors
/// The error, if it is about anything else.
pub(super) fn fault_of(requests: &Requests, key: &str, error: Error) -> Result<String> {
    // A disk that cannot read an object has lost it.
    if !matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Io) {
        return Err(error);
    }
    let text = error.to_string();
    let of_key = format!("{key} of {}: ", requests.name());
    let why = text.split_once(&of_key).map(|(_, why)| why.to_owned());
    Ok(why.unwrap_or(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Epoch;

    #[test]
    fn spans_that_touch_are_one() {
        let mut faults = Faults::default();
        let object = ObjectId { epoch: Epoch(1), seq: Seq(2) };
        for (start, blocks) in [(9, 2), (1, 2), (3, 1), (2, 1), (20, 1)] {
            faults.add_blocks(object, "damaged", Span { start, blocks });
        }
        assert_eq!(faults.seqs(), [Seq(2)].into());
        let faults = faults.into_vec();
        let spans: Vec<_> = faults[0].spans.iter().map(|span| (span.start, span.blocks)).collect();
        assert_eq!((spans, faults[0].blocks()), (vec![(1, 3), (9, 2), (20, 1)], 6));
    }
}
