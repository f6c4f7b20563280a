//! What was asked, and what was answered.

use std::collections::BTreeMap;
use std::time::Duration;

/// Records that are kept. Requests after them are counted only.
const RECORDS_MAX: usize = 1 << 20;

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// PutObject.
    Put,
    /// GetObject.
    Get,
    /// HeadObject.
    Head,
    /// ListObjects and ListObjectsV2.
    List,
    /// DeleteObject.
    Delete,
    /// About a bucket.
    Bucket,
    /// All others, which are refused.
    Other,
}

/// A request.
#[derive(Clone, Debug)]
pub struct Record {
    /// When it began, since the store began.
    pub at: Duration,
    /// From its beginning to its answer, without the answer's body.
    pub took: Duration,
    /// Its kind.
    pub kind: Kind,
    /// Its key, or the prefix of a list.
    pub key: String,
    /// Bytes of its body.
    pub bytes_in: u64,
    /// Bytes of its answer's body.
    pub bytes_out: u64,
    /// The answer's status; 0 if there was none.
    pub status: u16,
    /// The number of its connection.
    pub connection: u64,
}

/// All requests of a kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Requests.
    pub requests: u64,
    /// Those without an answer of success.
    pub failed: u64,
    /// Bytes of their bodies.
    pub bytes_in: u64,
    /// Bytes of their answers.
    pub bytes_out: u64,
}

/// Requests by kind.
#[derive(Clone, Debug, Default)]
pub struct Counts(BTreeMap<Kind, Count>);

impl Counts {
    /// Those of a kind.
    #[must_use]
    pub fn of(&self, kind: Kind) -> Count {
        self.0.get(&kind).copied().unwrap_or_default()
    }

    /// All requests.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.0.values().map(|count| count.requests).sum()
    }
}

/// The log.
#[derive(Debug, Default)]
pub(crate) struct Log {
    records: Vec<Record>,
    counts: Counts,
}

impl Log {
    pub(crate) fn add(&mut self, record: Record) {
        let count = self.counts.0.entry(record.kind).or_default();
        count.requests += 1;
        count.failed += u64::from(!(200..300).contains(&record.status));
        count.bytes_in += record.bytes_in;
        count.bytes_out += record.bytes_out;
        if self.records.len() < RECORDS_MAX {
            self.records.push(record);
        }
    }

    pub(crate) fn records(&self) -> Vec<Record> {
        self.records.clone()
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts.clone()
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}
