//! The counts up to a moment, or between two.

use std::fmt;

use hdrhistogram::Histogram;
use sheave_core::{LinkGauges, OpKind, memory};

use crate::layout::LEN;
use crate::{FailureCount, LastFailure, Stage, new_histogram};

/// The state of a volume's counters. Serialises to the form described in the module `json`.
#[derive(Clone, Debug, PartialEq)]
pub struct VolumeSnapshot {
    /// The volume's name.
    pub name: String,
    /// The present values of gauges.
    pub gauges: VolumeGauges,
    /// The kinds of ops that occurred, in the order of [`OpKind::ALL`].
    pub ops: Vec<OpSnapshot>,
    /// Storage errors of each op and kind that occurred, without errors of clients.
    pub failures: Vec<FailureCount>,
    /// The last of them.
    pub last_failure: Option<LastFailure>,
}

/// Values that go up and down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeGauges {
    /// Connections served.
    pub connections: i64,
    /// Bytes that requests in flight hold.
    pub bytes_in_flight: i64,
    /// Bytes of memory that its data takes, if it is kept in memory.
    pub held_bytes: Option<u64>,
    /// The state of the connection to its server, if it is a remote volume.
    pub link: Option<LinkGauges>,
}

/// The counters of one kind of op.
#[derive(Clone, PartialEq)]
pub struct OpSnapshot {
    /// The kind.
    pub kind: OpKind,
    /// Bytes moved.
    pub bytes: u64,
    /// Ops that failed.
    pub errors: u64,
    pub(crate) stages: [Option<Histogram<u64>>; Stage::ALL.len()],
}

impl VolumeSnapshot {
    /// With an entry for each kind; [`Self::drop_unused`] removes empty ones.
    pub(crate) fn empty(name: &str) -> Self {
        let ops = OpKind::ALL.into_iter().map(OpSnapshot::empty).collect();
        let (name, gauges) = (name.to_owned(), VolumeGauges::default());
        Self { name, gauges, ops, failures: Vec::new(), last_failure: None }
    }

    /// The counters of a kind of op, if any such op occurred.
    #[must_use]
    pub fn op(&self, kind: OpKind) -> Option<&OpSnapshot> {
        self.ops.iter().find(|op| op.kind == kind)
    }

    /// The counts since `earlier`; gauges and storage errors have their present values. Where
    /// `earlier` has a higher count, it was another process, and the difference is zero.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let ops = self.ops.iter().map(|op| match earlier.op(op.kind) {
            Some(before) => op.since(before),
            None => op.clone(),
        });
        let mut difference = Self { ops: ops.collect(), ..self.clone() };
        difference.drop_unused();
        difference
    }

    pub(crate) fn op_mut(&mut self, kind: OpKind) -> &mut OpSnapshot {
        self.ops.iter_mut().find(|op| op.kind == kind).expect("an empty snapshot has every kind")
    }

    pub(crate) fn drop_unused(&mut self) {
        self.ops
            .retain(|op| op.bytes > 0 || op.errors > 0 || op.stages.iter().any(Option::is_some));
    }
}

impl OpSnapshot {
    pub(crate) fn empty(kind: OpKind) -> Self {
        Self { kind, bytes: 0, errors: 0, stages: [const { None }; Stage::ALL.len()] }
    }

    /// The number of completed ops.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.stage(Stage::Total).map_or(0, Histogram::len)
    }

    /// The latencies of a stage in nanoseconds, if any was recorded.
    #[must_use]
    pub fn stage(&self, stage: Stage) -> Option<&Histogram<u64>> {
        self.stages[stage as usize].as_ref()
    }

    /// The stages that were recorded, with their latencies in nanoseconds.
    pub fn stages(&self) -> impl Iterator<Item = (Stage, &Histogram<u64>)> {
        Stage::ALL.into_iter().filter_map(|stage| Some((stage, self.stage(stage)?)))
    }

    /// `None` if there is no memory for it: statistics must not end the process.
    pub(crate) fn stage_mut(&mut self, stage: Stage) -> Option<&mut Histogram<u64>> {
        let place = &mut self.stages[stage as usize];
        if place.is_none() {
            memory::check_room(2 * LEN * size_of::<u64>()).ok()?;
        }
        Some(place.get_or_insert_with(new_histogram))
    }

    fn since(&self, earlier: &Self) -> Self {
        let mut difference = Self::empty(self.kind);
        difference.bytes = self.bytes.saturating_sub(earlier.bytes);
        difference.errors = self.errors.saturating_sub(earlier.errors);
        for (stage, now) in self.stages() {
            difference.stages[stage as usize] = match earlier.stage(stage) {
                Some(before) => histogram_since(now, before),
                None => Some(now.clone()),
            };
        }
        difference
    }
}

impl fmt::Debug for OpSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A histogram's own form lists thousands of zeroes.
        let Self { kind, bytes, errors, .. } = self;
        write!(f, "{} {bytes} bytes, {errors} errors", kind.name())?;
        self.stages().try_for_each(|(stage, histogram)| {
            write!(f, ", {} {} up to {} ns", stage.name(), histogram.len(), histogram.max())
        })
    }
}

fn histogram_since(now: &Histogram<u64>, before: &Histogram<u64>) -> Option<Histogram<u64>> {
    let mut difference = new_histogram();
    for step in now.iter_recorded() {
        let value = step.value_iterated_to();
        let count = step.count_at_value().saturating_sub(before.count_at(value));
        if count > 0 {
            difference.saturating_record_n(now.lowest_equivalent(value), count);
        }
    }
    (!difference.is_empty()).then_some(difference)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Registry;

    #[test]
    fn difference_is_what_came_between() {
        let volume = Registry::new().volume("a");
        let recorder = volume.recorder();
        recorder.record_n(OpKind::Read, Stage::Total, 10_000, 5);
        recorder.record(OpKind::Flush, Stage::Total, 10_000);
        recorder.add_bytes(OpKind::Read, 100);
        let earlier = volume.snapshot();
        recorder.record_n(OpKind::Read, Stage::Total, 90_000, 3);
        recorder.record_n(OpKind::Read, Stage::Backend, 1_000, 3);
        recorder.add_bytes(OpKind::Read, 11);
        recorder.add_error(OpKind::Trim);
        recorder.add_connections(2);

        let between = volume.snapshot().since(&earlier);
        assert_eq!(between.gauges.connections, 2);
        let kinds: Vec<_> = between.ops.iter().map(|op| op.kind).collect();
        assert_eq!(kinds, [OpKind::Read, OpKind::Trim], "no flush came between");
        let read = between.op(OpKind::Read).unwrap();
        assert_eq!((read.count(), read.bytes), (3, 11));
        let total = read.stage(Stage::Total).unwrap();
        assert!(total.equivalent(total.min(), 90_000), "{} ns is from before", total.min());
        assert_eq!(read.stage(Stage::Backend).map(Histogram::len), Some(3));
    }

    #[test]
    fn difference_to_a_process_that_counted_more_is_nothing() {
        let (old, new) = (Registry::new().volume("a"), Registry::new().volume("a"));
        let (before, after) = (old.recorder(), new.recorder());
        before.record_n(OpKind::Read, Stage::Total, 10_000, 9);
        before.add_bytes(OpKind::Read, 9);
        after.record_n(OpKind::Read, Stage::Total, 10_000, 2);
        after.add_bytes(OpKind::Read, 2);
        assert_eq!(new.snapshot().since(&old.snapshot()).ops, []);
    }
}
