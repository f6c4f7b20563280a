//! The counters of one shard and volume.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use hdrhistogram::Histogram;
use sheave_core::{Error, Nanos, OpKind, memory};

use crate::failures::Failures;
use crate::layout::{BLOCK_LEN, BLOCKS, index_of, lowest_value_at};
use crate::{Notice, OpSnapshot, Stage, VolumeGauges, VolumeSnapshot};

/// The only writer of one shard's counters for one volume; made by
/// [`VolumeStats::recorder`](crate::VolumeStats::recorder).
///
/// Recording never locks. It allocates when a stage of a kind of op first takes that long, by
/// powers of two: 8 KiB at a time, at most 19 times, mostly two or three times; without memory for
/// them those latencies are not counted. A recorder can move to another thread but cannot be
/// shared: counting is a load and a store, which needs a single writer. Its counts remain after it
/// is dropped.
///
/// ```compile_fail,E0277
/// fn share(recorder: sheave_telemetry::Recorder) -> impl Sync { recorder }
/// ```
pub struct Recorder {
    counters: Arc<Counters>,
    failures: Arc<Failures>,
    not_sync: PhantomData<Cell<()>>,
}

impl Recorder {
    pub(crate) fn new(counters: Arc<Counters>, failures: Arc<Failures>) -> Self {
        Self { counters, failures, not_sync: PhantomData }
    }

    /// The volume's name.
    #[must_use]
    pub fn volume(&self) -> Arc<str> {
        self.failures.volume()
    }

    /// Counts that `stage` of an op took `ns` nanoseconds. [`Stage::Total`] counts the op itself,
    /// whether it failed or not.
    #[inline]
    pub fn record(&self, kind: OpKind, stage: Stage, ns: u64) {
        self.record_n(kind, stage, ns, 1);
    }

    /// Counts that `stage` of `count` ops took `ns` nanoseconds each.
    #[inline]
    pub fn record_n(&self, kind: OpKind, stage: Stage, ns: u64, count: u64) {
        let index = index_of(ns);
        let place = &self.op(kind).stages[stage as usize].blocks[index / BLOCK_LEN];
        if let Some(block) = place.get().or_else(|| new_block(place)) {
            add(&block[index % BLOCK_LEN], count);
        }
    }

    /// Counts the time of each stage of `count` ops that arrived, were submitted and completed at
    /// the same times, in nanoseconds.
    #[inline]
    pub fn record_op(
        &self,
        kind: OpKind,
        arrived: u64,
        submitted: u64,
        completed: u64,
        count: u64,
    ) {
        self.record_n(kind, Stage::Total, completed.saturating_sub(arrived), count);
        self.record_n(kind, Stage::Backend, completed.saturating_sub(submitted), count);
        self.record_n(kind, Stage::Queue, submitted.saturating_sub(arrived), count);
    }

    /// Counts bytes that ops of this kind moved.
    #[inline]
    pub fn add_bytes(&self, kind: OpKind, bytes: u64) {
        add(&self.op(kind).bytes, bytes);
    }

    /// Counts an op that failed.
    #[inline]
    pub fn add_error(&self, kind: OpKind) {
        add(&self.op(kind).errors, 1);
    }

    /// Notes that the storage failed an op, at `now` of the engine and `unix_s` seconds after 1970,
    /// and returns what to log. Takes a lock.
    pub fn note_failure(&self, kind: OpKind, error: &Error, now: Nanos, unix_s: u64) -> Notice {
        self.failures.note(kind, error, now, unix_s)
    }

    /// Adds the counts of another process.
    pub fn add_snapshot(&self, snapshot: &VolumeSnapshot) {
        self.failures.add(&snapshot.failures, snapshot.last_failure.as_ref());
        for op in &snapshot.ops {
            self.add_bytes(op.kind, op.bytes);
            add(&self.op(op.kind).errors, op.errors);
            for (stage, histogram) in op.stages() {
                for bucket in histogram.iter_recorded() {
                    let ns = bucket.value_iterated_to();
                    self.record_n(op.kind, stage, ns, bucket.count_at_value());
                }
            }
        }
    }

    /// Changes the number of connections served now.
    #[inline]
    pub fn add_connections(&self, change: i64) {
        add_signed(&self.counters.connections, change);
    }

    /// Changes the number of bytes that requests in flight hold.
    #[inline]
    pub fn add_bytes_in_flight(&self, change: i64) {
        add_signed(&self.counters.bytes_in_flight, change);
    }

    fn op(&self, kind: OpKind) -> &OpCounters {
        &self.counters.ops[kind as usize]
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // Its connections are gone with it; only sums outlive a recorder.
        self.counters.connections.store(0, Relaxed);
        self.counters.bytes_in_flight.store(0, Relaxed);
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Recorder")
    }
}

/// What a [`Recorder`] writes; other threads may read it at any time. Aligned so that no two shards
/// write to one cache line, nor to a pair of lines that is prefetched together.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Counters {
    ops: [OpCounters; OpKind::ALL.len()],
    connections: AtomicI64,
    bytes_in_flight: AtomicI64,
}

#[derive(Default)]
struct OpCounters {
    bytes: AtomicU64,
    errors: AtomicU64,
    stages: [Counts; Stage::ALL.len()],
}

/// A histogram whose parts are allocated when they are used: of 152 KiB, mostly 16 or 24.
#[derive(Default)]
struct Counts {
    blocks: [OnceLock<Block>; BLOCKS],
}

/// [`BLOCK_LEN`] counters.
type Block = Box<[AtomicU64]>;

impl Counters {
    /// Adds the counts so far to `total`.
    pub(crate) fn merge_into(&self, total: &mut VolumeSnapshot) {
        for (kind, op) in OpKind::ALL.into_iter().zip(&self.ops) {
            op.merge_into(total.op_mut(kind));
        }
        let VolumeGauges { connections, bytes_in_flight, .. } = &mut total.gauges;
        *connections += self.connections.load(Relaxed);
        *bytes_in_flight += self.bytes_in_flight.load(Relaxed);
    }
}

impl OpCounters {
    fn merge_into(&self, total: &mut OpSnapshot) {
        total.bytes += self.bytes.load(Relaxed);
        total.errors += self.errors.load(Relaxed);
        for (stage, counts) in Stage::ALL.into_iter().zip(&self.stages) {
            for (number, block) in counts.blocks.iter().enumerate() {
                if let Some(block) = block.get()
                    && let Some(histogram) = total.stage_mut(stage)
                {
                    merge_block(number * BLOCK_LEN, block, histogram);
                }
            }
        }
    }
}

/// Adds the counters from `first_index` on to `histogram`.
fn merge_block(first_index: usize, block: &[AtomicU64], histogram: &mut Histogram<u64>) {
    for (index, count) in (first_index..).zip(block) {
        let count = count.load(Relaxed);
        if count > 0 {
            histogram.saturating_record_n(lowest_value_at(index), count);
        }
    }
}

#[cold]
fn new_block(place: &OnceLock<Block>) -> Option<&Block> {
    let mut block = Vec::new();
    memory::attempt(|| block.try_reserve_exact(BLOCK_LEN)).ok()?;
    block.resize_with(BLOCK_LEN, AtomicU64::default);
    Some(place.get_or_init(|| block.into_boxed_slice()))
}

/// Adds to a counter that has no other writer.
#[inline]
fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(count), Relaxed);
}

/// Adds to a gauge that has no other writer.
#[inline]
fn add_signed(gauge: &AtomicI64, change: i64) {
    gauge.store(gauge.load(Relaxed).wrapping_add(change), Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn can_move<T: Send>() {}
    const _: () = can_move::<Recorder>();

    #[test]
    fn memory_is_taken_only_where_latencies_are() {
        let counters = Arc::<Counters>::default();
        let failures = Arc::new(Failures::new("a".into()));
        let recorder = Recorder::new(Arc::clone(&counters), failures);
        let blocks = || {
            let stages = counters.ops.iter().flat_map(|op| &op.stages);
            let blocks = stages.flat_map(|stage| &stage.blocks);
            blocks.filter(|block| block.get().is_some()).count()
        };
        recorder.add_bytes(OpKind::Read, 4096);
        assert_eq!(blocks(), 0);
        (0..1000).for_each(|n| recorder.record(OpKind::Read, Stage::Total, 20_000 + n * 100));
        assert_eq!(blocks(), 1);
        recorder.record(OpKind::Read, Stage::Total, 3_000_000);
        recorder.record(OpKind::Write, Stage::Total, 20_000);
        recorder.record(OpKind::Write, Stage::Backend, 20_000);
        assert_eq!(blocks(), 4);
        assert!(size_of::<Counters>() <= 16 << 10);
    }
}
