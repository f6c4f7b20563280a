//! All volumes and their recorders.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sheave_core::Link;

use crate::failures::Failures;
use crate::recorder::Counters;
use crate::{Recorder, VolumeSnapshot};

/// The statistics of all volumes of a process.
#[derive(Default)]
pub struct Registry {
    volumes: Mutex<Vec<Arc<VolumeStats>>>,
}

impl Registry {
    /// A registry without volumes.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The statistics of the volume with this name, which appears in snapshots from now on.
    pub fn volume(&self, name: &str) -> Arc<VolumeStats> {
        let mut volumes = lock(&self.volumes);
        if let Some(volume) = volumes.iter().find(|volume| &*volume.failures.volume() == name) {
            return Arc::clone(volume);
        }
        let volume = Arc::new(VolumeStats {
            counters: Mutex::default(),
            failures: Arc::new(Failures::new(name.into())),
            held_bytes: Mutex::default(),
            link: Mutex::default(),
        });
        volumes.push(Arc::clone(&volume));
        volume
    }

    /// Forgets the volumes whose statistics nothing else holds.
    pub fn forget_unused(&self) {
        lock(&self.volumes).retain(|volume| Arc::strong_count(volume) > 1);
    }

    /// All counts so far, volumes in the order of their registration. Merging takes time but delays
    /// no recorder.
    #[must_use]
    pub fn snapshot(&self) -> Vec<VolumeSnapshot> {
        let volumes = lock(&self.volumes).clone();
        volumes.iter().map(|volume| volume.snapshot()).collect()
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(lock(&self.volumes).iter()).finish()
    }
}

/// The statistics of one volume.
pub struct VolumeStats {
    counters: Mutex<Vec<Arc<Counters>>>,
    failures: Arc<Failures>,
    held_bytes: Mutex<Option<Arc<AtomicU64>>>,
    link: Mutex<Option<Arc<Link>>>,
}

impl VolumeStats {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        self.failures.volume().as_ref().to_owned()
    }

    /// Renames it.
    pub fn rename(&self, name: &str) {
        self.failures.rename(name.into());
    }

    /// Sets the gauge of the volume's memory, see [`Volume::held_bytes`].
    ///
    /// [`Volume::held_bytes`]: sheave_core::Volume::held_bytes
    pub fn show_held_bytes(&self, gauge: Option<Arc<AtomicU64>>) {
        *lock(&self.held_bytes) = gauge;
    }

    /// Sets the state of the volume's connection to its server, see [`Volume::link`].
    ///
    /// [`Volume::link`]: sheave_core::Volume::link
    pub fn show_link(&self, link: Option<Arc<Link>>) {
        *lock(&self.link) = link;
    }

    /// A recorder for one thread. It reuses the counters of a dropped one, if there is any, so that
    /// memory grows with the recorders alive at the same time.
    #[must_use]
    pub fn recorder(&self) -> Recorder {
        let mut counters = lock(&self.counters);
        // `get_mut` synchronises with the drop of the former owner, whose last stores must not
        // be overtaken by ours. Readers hold the list's lock.
        let free = counters.iter_mut().position(|shared| Arc::get_mut(shared).is_some());
        if let Some(free) = free {
            return Recorder::new(Arc::clone(&counters[free]), Arc::clone(&self.failures));
        }
        let new = Arc::<Counters>::default();
        counters.push(Arc::clone(&new));
        Recorder::new(new, Arc::clone(&self.failures))
    }

    /// The counts of all recorders of the volume so far.
    #[must_use]
    pub fn snapshot(&self) -> VolumeSnapshot {
        let mut total = VolumeSnapshot::empty(&self.name());
        for counters in lock(&self.counters).iter() {
            counters.merge_into(&mut total);
        }
        total.drop_unused();
        let held_bytes = lock(&self.held_bytes).as_ref().map(|gauge| gauge.load(Relaxed));
        total.gauges.held_bytes = held_bytes;
        total.gauges.link = lock(&self.link).as_ref().map(|link| link.get());
        (total.failures, total.last_failure) = self.failures.snapshot();
        total
    }
}

impl fmt::Debug for VolumeStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeStats({})", self.name())
    }
}

/// The lists are consistent at any time, so a poisoned lock is harmless.
fn lock<T>(list: &Mutex<T>) -> MutexGuard<'_, T> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    use std::thread;

    use sheave_core::OpKind;

    use super::*;
    use crate::Stage;

    #[test]
    fn one_name_is_one_volume() {
        let registry = Registry::new();
        let (first, again) = (registry.volume("a"), registry.volume("a"));
        assert!(Arc::ptr_eq(&first, &again));
        registry.volume("b");
        let names: Vec<_> = registry.snapshot().into_iter().map(|volume| volume.name).collect();
        assert_eq!(names, ["a", "b"]);
    }

    #[test]
    fn snapshot_sums_all_recorders() {
        let volume = Registry::new().volume("a");
        let (one, two) = (volume.recorder(), volume.recorder());
        for (recorder, ns) in [(&one, 10_000), (&two, 20_000), (&two, 30_000)] {
            recorder.record(OpKind::Read, Stage::Total, ns);
            recorder.add_bytes(OpKind::Read, 4096);
            recorder.add_connections(1);
            recorder.add_bytes_in_flight(512);
        }
        two.record_n(OpKind::Flush, Stage::Backend, 1_000_000, 7);
        two.add_error(OpKind::Flush);
        one.add_bytes_in_flight(-500);

        let snapshot = volume.snapshot();
        assert_eq!((snapshot.gauges.connections, snapshot.gauges.bytes_in_flight), (3, 1036));
        assert_eq!(snapshot.ops.len(), 2);
        let read = snapshot.op(OpKind::Read).unwrap();
        assert_eq!((read.count(), read.bytes, read.errors), (3, 3 * 4096, 0));
        let total = read.stage(Stage::Total).unwrap();
        assert!(total.equivalent(total.value_at_quantile(0.5), 20_000));
        assert!(total.equivalent(total.max(), 30_000));
        let flush = snapshot.op(OpKind::Flush).unwrap();
        assert_eq!((flush.count(), flush.errors), (0, 1));
        let stages: Vec<_> = flush.stages().map(|(stage, h)| (stage, h.len())).collect();
        assert_eq!(stages, [(Stage::Backend, 7)]);
    }

    #[test]
    fn a_dropped_recorder_leaves_its_sums_but_not_its_connections() {
        let volume = Registry::new().volume("a");
        for _ in 0..1000 {
            let recorder = volume.recorder();
            recorder.add_connections(1);
            recorder.add_bytes_in_flight(4096);
            recorder.record(OpKind::Write, Stage::Total, 5_000);
        }
        let snapshot = volume.snapshot();
        assert_eq!(snapshot.gauges, crate::VolumeGauges::default());
        assert_eq!(snapshot.op(OpKind::Write).map(crate::OpSnapshot::count), Some(1000));
        assert_eq!(lock(&volume.counters).len(), 1, "counters are used again");
        let (_one, _two) = (volume.recorder(), volume.recorder());
        assert_eq!(lock(&volume.counters).len(), 2, "never by two at once");
    }

    #[test]
    fn reading_beside_writers_sees_counts_grow_and_loses_none() {
        const EACH: u64 = 200_000;
        let volume = Registry::new().volume("a");
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let writers = [volume.recorder(), volume.recorder()].map(|recorder| {
                scope.spawn(move || {
                    (0..EACH).for_each(|n| recorder.record(OpKind::Read, Stage::Total, n * 10));
                })
            });
            scope.spawn(|| {
                let mut seen = 0;
                while !done.load(Relaxed) {
                    let now = volume.snapshot().op(OpKind::Read).map_or(0, |op| op.count());
                    assert!(now >= seen, "{now} after {seen}");
                    seen = now;
                }
            });
            let ended = writers.map(thread::ScopedJoinHandle::join);
            done.store(true, Relaxed);
            assert!(ended.iter().all(Result::is_ok));
        });
        assert_eq!(volume.snapshot().op(OpKind::Read).map(|op| op.count()), Some(2 * EACH));
    }
}
