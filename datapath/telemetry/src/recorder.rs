//! The counters of one shard and volume.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use sheave_core::OpKind;

use crate::layout::{LEN, index_of};
use crate::{OpSnapshot, Stage, VolumeGauges, VolumeSnapshot, layout};

/// The only writer of one shard's counters for one volume; made by
/// [`VolumeStats::recorder`](crate::VolumeStats::recorder).
///
/// Recording never locks and, after the first record of a kind and stage, never allocates. It can
/// move to another thread but not be shared: a counter is a load and a store, which is only right
/// with a single writer. What it counted stays counted after it is dropped.
///
/// ```compile_fail,E0277
/// fn share(recorder: sheave_telemetry::Recorder) -> impl Sync { recorder }
/// ```
pub struct Recorder {
    counters: Arc<Counters>,
    not_sync: PhantomData<Cell<()>>,
}

impl Recorder {
    pub(crate) fn new(counters: Arc<Counters>) -> Self {
        Self { counters, not_sync: PhantomData }
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
        let histogram = self.op(kind).stages[stage as usize].get_or_init(zeroed_histogram);
        add(&histogram[index_of(ns)], count);
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

/// What a [`Recorder`] writes and anybody may read. Aligned so that no two shards write to one
/// cache line, nor to a pair of lines that is prefetched together.
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
    stages: [OnceLock<Box<Counts>>; Stage::ALL.len()],
}

type Counts = [AtomicU64; LEN];

impl Counters {
    /// Adds what has been counted so far to `total`.
    pub(crate) fn merge_into(&self, total: &mut VolumeSnapshot) {
        for (kind, op) in OpKind::ALL.into_iter().zip(&self.ops) {
            op.merge_into(total.op_mut(kind));
        }
        let VolumeGauges { connections, bytes_in_flight } = &mut total.gauges;
        *connections += self.connections.load(Relaxed);
        *bytes_in_flight += self.bytes_in_flight.load(Relaxed);
    }
}

impl OpCounters {
    fn merge_into(&self, total: &mut OpSnapshot) {
        total.bytes += self.bytes.load(Relaxed);
        total.errors += self.errors.load(Relaxed);
        for (stage, counts) in Stage::ALL.into_iter().zip(&self.stages) {
            let Some(counts) = counts.get() else { continue };
            let histogram = total.stage_mut(stage);
            for (index, count) in counts.iter().enumerate() {
                let count = count.load(Relaxed);
                if count > 0 {
                    histogram.saturating_record_n(layout::lowest_value_at(index), count);
                }
            }
        }
    }
}

/// A histogram whose pages the kernel provides as they are first written: `vec!` asks for zeroed
/// memory, and the optimiser turns the collecting in place into nothing.
#[cold]
fn zeroed_histogram() -> Box<Counts> {
    let counts: Box<[AtomicU64]> = vec![0_u64; LEN].into_iter().map(AtomicU64::new).collect();
    counts.try_into().expect("it has LEN counters")
}

/// Adds to a counter that nobody else writes.
#[inline]
fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(count), Relaxed);
}

/// Adds to a gauge that nobody else writes.
#[inline]
fn add_signed(gauge: &AtomicI64, change: i64) {
    gauge.store(gauge.load(Relaxed).wrapping_add(change), Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn can_move<T: Send>() {}
    const _: () = can_move::<Recorder>();

    /// Pages of this process that are in memory.
    fn resident_pages() -> u64 {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap()
    }

    #[test]
    #[cfg_attr(debug_assertions, ignore = "collecting in place costs nothing only when optimised")]
    fn memory_is_taken_only_where_latencies_are() {
        const RECORDERS: u64 = 100;
        let before = resident_pages();
        let recorders: Vec<_> = (0..RECORDERS)
            .map(|_| {
                let recorder = Recorder::new(Arc::default());
                recorder.record(OpKind::Read, Stage::Total, 50_000);
                recorder
            })
            .collect();
        let each = (resident_pages() - before) / RECORDERS;
        assert!(each <= 4, "{each} pages for one latency");
        drop(recorders);
    }
}
