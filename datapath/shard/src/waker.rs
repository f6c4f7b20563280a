//! Wakers of volumes: a backend whose work ends in another thread has its shard visit it.

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

    /// Moves the numbers of woken volumes to `into`.
    pub(crate) fn take(&self, into: &mut Vec<u32>) {
        // Whole entries come and go, so a panic elsewhere leaves nothing half done.
        into.append(&mut self.volumes.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Wakes the shard on behalf of one volume.
pub(crate) struct VolumeWaker {
    woken: Arc<Woken>,
    volume: u32,
    /// The volume is in the list. Set by the first wake-up, cleared before the shard visits it, so
    /// that one during the visit is not lost.
    listed: AtomicBool,
}

impl VolumeWaker {
    pub(crate) fn new(woken: &Arc<Woken>, volume: u32) -> Arc<Self> {
        Arc::new(Self { woken: Arc::clone(woken), volume, listed: AtomicBool::new(false) })
    }

    /// The shard is about to visit the volume. An exchange, so that the shard sees what a waker
    /// that found the volume listed had left before.
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

/// The waker of the only backend of a thread, which waits at this bell.
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
