//! Wakers of volumes: a backend whose work is done in another thread wakes its shard by them.

use std::sync::atomic::{AtomicBool, Ordering::AcqRel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Wake, Waker};

use crate::doorbell::Doorbell;

/// The volumes of a shard that were woken and not visited yet.
pub(crate) struct Woken {
    bell: Arc<Doorbell>,
    /// At most one entry for each volume; see [`VolumeWaker::listed`].
    volumes: Mutex<Vec<u32>>,
}

impl Woken {
    pub(crate) fn new(bell: Arc<Doorbell>) -> Self {
        Self { bell, volumes: Mutex::default() }
    }

    /// Moves the keys of woken volumes to `into`.
    pub(crate) fn take(&self, into: &mut Vec<u32>) {
        // Entries are added and removed whole, so a poisoned lock is harmless.
        into.append(&mut self.volumes.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Wakes the shard on behalf of one volume.
pub(crate) struct VolumeWaker {
    woken: Arc<Woken>,
    volume: u32,
    /// The volume is in the list. Set by the first wake-up, cleared before the shard visits the
    /// volume, so that a wake-up during the visit is not lost.
    listed: AtomicBool,
}

impl VolumeWaker {
    pub(crate) fn new(woken: &Arc<Woken>, volume: u32) -> Arc<Self> {
        Arc::new(Self { woken: Arc::clone(woken), volume, listed: AtomicBool::new(false) })
    }

    /// The shard is about to visit the volume. An exchange, so that the shard sees the work of a
    /// waker that found the volume listed.
    pub(crate) fn visited(&self) {
        self.listed.swap(false, AcqRel);
    }
}

impl Wake for VolumeWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.listed.swap(true, AcqRel) {
            let volumes = &self.woken.volumes;
            volumes.lock().unwrap_or_else(PoisonError::into_inner).push(self.volume);
        }
        self.woken.bell.ring();
    }
}

/// The waker of a thread's only backend; the thread waits for this bell.
pub(crate) struct BellWaker(pub(crate) Arc<Doorbell>);

impl Wake for BellWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.ring();
    }
}

/// A waker that rings this bell.
pub(crate) fn of_bell(bell: &Arc<Doorbell>) -> Waker {
    Arc::new(BellWaker(Arc::clone(bell))).into()
}
