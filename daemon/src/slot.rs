//! The state of a volume that is a device, or is to be one.

use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use sheave_core::{Error, ErrorKind, Result, Volume};
use sheave_layers::{Limits, RateLimits};

use crate::PoolVolume;
use crate::kernel::{Device, Front};
use crate::records::Record;

/// The engine closes a volume at once, unless it still has requests in flight that the kernel has
/// given up.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a call waits for another one.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(1);

/// The slot of a volume in the table.
#[derive(Default)]
pub(crate) struct Slot {
    /// Locked while its device is made, changed or ended. Calls that only read do not wait for it.
    entry: Mutex<Entry>,
    /// The state before that, for calls that only read.
    pub(crate) seen: Mutex<Option<Attached>>,
}

/// A slot whose entry is being changed.
pub(crate) struct Held<'a> {
    entry: MutexGuard<'a, Entry>,
    pub(crate) seen: &'a Mutex<Option<Attached>>,
}

/// The state of a volume.
#[derive(Default)]
pub(crate) enum Entry {
    #[default]
    Free,
    Attached(Live),
    /// A device that is not served: its daemon died and its volume cannot be served yet.
    Waiting {
        record: Record,
        why: String,
    },
}

/// A device that is served.
pub(crate) struct Live {
    pub(crate) device: Device,
    pub(crate) record: Record,
    /// Open for as long as it is a device: the volume's state, such as a failed flush, must not be
    /// lost with a connection.
    pub(crate) volume: Arc<dyn Volume>,
    /// The limits of the volume.
    pub(crate) limits: Arc<Limits>,
}

/// A volume that is a device.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The volume, as it was requested.
    pub volume: String,
    /// What it is in its pool, as it was attached.
    pub pool: Option<PoolVolume>,
    /// Such as `/dev/ublkb0`.
    pub path: PathBuf,
    /// Its front.
    pub front: Front,
    /// Whether it cannot be written.
    pub read_only: bool,
    /// Bytes.
    pub size: u64,
    /// Its limits, beside those of its volume's text.
    pub limits: RateLimits,
    /// Why its I/O is suspended: after a crash, or while it is attached.
    pub waiting: Option<String>,
    /// Bytes of memory that its data takes, if it is kept in memory.
    pub held_bytes: Option<u64>,
    pub(crate) record: Record,
}

impl Slot {
    pub(crate) fn hold(&self) -> Held<'_> {
        Held { entry: lock(&self.entry), seen: &self.seen }
    }

    /// Waits for a bounded time: a volume that hangs must not take a thread for each caller.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when another call holds it for longer.
    pub(crate) fn hold_or_busy(&self, op: &'static str, name: &str) -> Result<Held<'_>> {
        self.hold_within(CALL_TIMEOUT).ok_or_else(|| {
            let why = format!("{name} is being attached, resized or detached; try again later");
            Error::new(ErrorKind::Busy, op, why)
        })
    }

    /// `None` if another call holds it for longer.
    pub(crate) fn hold_within(&self, within: Duration) -> Option<Held<'_>> {
        let begun = Instant::now();
        loop {
            let held = self.try_hold();
            if held.is_some() || begun.elapsed() > within {
                return held;
            }
            sleep(POLL);
        }
    }

    /// `None` while another call holds it.
    pub(crate) fn try_hold(&self) -> Option<Held<'_>> {
        Some(Held { entry: self.try_entry()?, seen: &self.seen })
    }

    /// Like [`Self::try_hold`], but [`Self::seen`] does not change.
    pub(crate) fn try_entry(&self) -> Option<MutexGuard<'_, Entry>> {
        match self.entry.try_lock() {
            Ok(entry) => Some(entry),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Whether its device is not served; false also while a call holds it.
    pub(crate) fn needs_care(&self) -> bool {
        self.try_entry().is_some_and(|entry| match &*entry {
            Entry::Free => false,
            Entry::Attached(live) => live.is_lost(),
            Entry::Waiting { .. } => true,
        })
    }

    /// Whether its device is served, also while a call holds it: one that serves a device again may
    /// wait for its volume for long.
    pub(crate) fn is_served(&self) -> bool {
        let waits = lock(&self.seen).as_ref().is_none_or(|seen| seen.waiting.is_some());
        !waits && !self.needs_care()
    }
}

impl Deref for Held<'_> {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        &self.entry
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Entry {
        &mut self.entry
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        *lock(self.seen) = self.entry.attached();
    }
}

impl Entry {
    /// The device, if there is one.
    pub(crate) fn record(&self) -> Option<&Record> {
        match self {
            Self::Free => None,
            Self::Attached(Live { record, .. }) | Self::Waiting { record, .. } => Some(record),
        }
    }

    pub(crate) fn attached(&self) -> Option<Attached> {
        let waiting = match self {
            Self::Waiting { why, .. } => Some(why.clone()),
            _ => None,
        };
        let held_bytes = match self {
            Self::Attached(live) => live.volume.held_bytes().map(|gauge| gauge.load(Relaxed)),
            _ => None,
        };
        self.record().map(|record| Attached { held_bytes, ..Attached::new(record, waiting) })
    }
}

impl Live {
    /// Waits until the engine has closed the volume, so that the file system below it can be
    /// unmounted.
    pub(crate) fn wait_closed(&self) {
        let begun = Instant::now();
        while !self.is_lost() {
            if begun.elapsed() > CLOSE_TIMEOUT {
                return tracing::warn!(volume = self.record.volume, "still has requests in flight");
            }
            sleep(POLL);
        }
    }

    /// Whether the engine has closed it.
    pub(crate) fn is_lost(&self) -> bool {
        Arc::strong_count(&self.volume) == 1
    }
}

impl Attached {
    pub(crate) fn new(record: &Record, waiting: Option<String>) -> Self {
        Self {
            volume: record.volume.clone(),
            pool: record.pool.clone(),
            path: record.path(),
            front: record.front,
            read_only: record.read_only,
            size: record.size,
            limits: record.limits(),
            waiting,
            held_bytes: None,
            record: record.clone(),
        }
    }
}

/// The data behind these locks is consistent between any two statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use crate::records::tests::record;

    use super::*;

    #[test]
    fn rule_28_a_device_that_waits_counts_as_not_served_while_a_call_holds_it() {
        let slot = Slot::default();
        let _held = slot.hold();
        for waiting in [None, Some("its volume hangs".to_owned())] {
            *lock(&slot.seen) = Some(Attached::new(&record(), waiting.clone()));
            assert_eq!(slot.is_served(), waiting.is_none());
        }
    }
}
