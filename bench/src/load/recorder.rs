//! What one thread of a load counts.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;

use super::pattern::Fault;
use super::session::Kind;

/// The longest latency with a counter of its own, in nanoseconds: 100 s.
const LATENCY_MAX_NS: u64 = 100_000_000_000;
/// Faults kept for display; all are counted.
const FAULTS_KEPT_MAX: usize = 16;

/// Latencies and errors.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// Latencies count only while this is set; errors and faults always do.
    pub(crate) is_measuring: bool,
    /// Latencies of reads in nanoseconds.
    pub(crate) reads: Histogram<u64>,
    /// Latencies of writes in nanoseconds.
    pub(crate) writes: Histogram<u64>,
    /// Latencies of flushes in nanoseconds.
    pub(crate) flushes: Histogram<u64>,
    /// How often the server answered with each error number.
    pub(crate) errors: BTreeMap<u32, u64>,
    /// Reads whose content was checked.
    pub(crate) checked_count: u64,
    /// Reads with wrong content.
    pub(crate) fault_count: u64,
    /// The first of the faults.
    pub(crate) faults: Vec<Fault>,
}

impl Recorder {
    /// One that has recorded nothing.
    pub(crate) fn new() -> Self {
        Self {
            is_measuring: false,
            reads: histogram(),
            writes: histogram(),
            flushes: histogram(),
            errors: BTreeMap::new(),
            checked_count: 0,
            fault_count: 0,
            faults: Vec::new(),
        }
    }

    /// A request has ended.
    pub(crate) fn record(&mut self, kind: Kind, latency_ns: u64) {
        if self.is_measuring {
            let histogram = match kind {
                Kind::Read => &mut self.reads,
                Kind::Write => &mut self.writes,
                Kind::Flush => &mut self.flushes,
            };
            histogram.saturating_record(latency_ns);
        }
    }

    /// It ended with an error.
    pub(crate) fn record_error(&mut self, error: u32) {
        *self.errors.entry(error).or_default() += 1;
    }

    /// The content of a read was checked.
    pub(crate) fn record_check(&mut self, result: Result<(), Fault>) {
        self.checked_count += 1;
        if let Err(fault) = result {
            self.fault_count += 1;
            if self.faults.len() < FAULTS_KEPT_MAX {
                self.faults.push(fault);
            }
        }
    }

    /// Adds what another thread counted.
    pub(crate) fn merge(&mut self, other: &Self) {
        let pairs = [
            (&mut self.reads, &other.reads),
            (&mut self.writes, &other.writes),
            (&mut self.flushes, &other.flushes),
        ];
        for (ours, theirs) in pairs {
            ours.add(theirs).expect("all histograms have the same bounds");
        }
        self.add_checks(other);
    }

    /// Adds only the errors and faults of another.
    pub(crate) fn add_checks(&mut self, other: &Self) {
        for (error, count) in &other.errors {
            *self.errors.entry(*error).or_default() += count;
        }
        self.checked_count += other.checked_count;
        self.fault_count += other.fault_count;
        let room = FAULTS_KEPT_MAX.saturating_sub(self.faults.len());
        self.faults.extend(other.faults.iter().take(room));
    }

    /// Requests that counted.
    pub(crate) fn count(&self) -> u64 {
        self.reads.len() + self.writes.len() + self.flushes.len()
    }

    /// Latencies of all kinds together.
    pub(crate) fn all(&self) -> Histogram<u64> {
        let mut all = self.reads.clone();
        for histogram in [&self.writes, &self.flushes] {
            all.add(histogram).expect("all histograms have the same bounds");
        }
        all
    }
}

/// An empty histogram of latencies in nanoseconds, three digits.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3).expect("the bounds are constants")
}
