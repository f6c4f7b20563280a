//! Ends devices.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sheave_core::{Error, ErrorKind, Result, printable};

use crate::Devices;
use crate::kernel::{Claim, Device, Front, Kernels};
use crate::records::Record;
use crate::slot::{Attached, Entry, Held, Slot, lock};

/// How long to wait for other calls to release the slot of a device that is ended by force.
const FORCE_TIMEOUT: Duration = Duration::from_secs(15);
/// The most devices that are ended at the same time, each by a process of its own.
const THREADS_MAX: usize = 16;
/// How long write-back of one device may take, when several are ended, before the next round.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How often their I/O is failed again, so that its users go away.
const FORCE_RETRY: Duration = Duration::from_millis(200);

impl Devices {
    /// Ends the device that is at this path or is this volume.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none, [`ErrorKind::Busy`] when something uses it and
    /// `force` is false, and errors of the kernel.
    pub fn detach(&self, target: &str, force: bool) -> Result<()> {
        let (name, slot) = self.find("detach", target)?;
        let ended = match force {
            true => self.end_by_force(&name, &slot),
            false => self.end_unused(&name, &slot),
        };
        self.clear(&name, &slot);
        ended
    }

    /// Removes the slot of a volume that is no device, unless another call is about to use it.
    pub(crate) fn clear(&self, name: &str, slot: &Arc<Slot>) {
        let mut entries = self.entries();
        let is_free = || slot.try_entry().is_some_and(|entry| matches!(*entry, Entry::Free));
        let is_listed = entries.get(name).is_some_and(|listed| Arc::ptr_eq(listed, slot));
        // The table's and the caller's.
        if is_listed && Arc::strong_count(slot) == 2 && is_free() {
            entries.remove(name);
        }
    }

    /// Writes back a device's dirty pages and ends it.
    fn end_unused(&self, name: &str, slot: &Slot) -> Result<()> {
        let Some((device, record)) = self.served(name, slot)? else { return Ok(()) };
        // The slot is not held: this may take long, and the connection may have to be replaced.
        let claim = device.kernel.claim(device.id, None)?;
        self.end_claimed(name, slot, claim, |found| found.key == record.key)
    }

    /// Writes back a device's dirty pages and ends it, if no orchestrator has attached it.
    fn end_or_leave(&self, name: &str, slot: &Slot) -> Result<()> {
        let Some((device, record)) = self.served(name, slot)? else { return Ok(()) };
        if record.published {
            // A pod may open it at any time, so it is not claimed.
            return device.kernel.write_back(device.id, WRITE_TIMEOUT);
        }
        let claim = device.kernel.claim(device.id, Some(WRITE_TIMEOUT))?;
        self.end_claimed(name, slot, claim, |found| found.key == record.key && !found.published)
    }

    /// The device of a slot, which is served, as its write-back needs; `None` if there is none.
    fn served(&self, name: &str, slot: &Slot) -> Result<Option<(Device, Record)>> {
        let mut entry = slot.hold_or_busy("detach", name)?;
        self.notice_loss(&mut entry);
        match &*entry {
            Entry::Free => Ok(None),
            Entry::Attached(live) => Ok(Some((live.device.clone(), live.record.clone()))),
            Entry::Waiting { record, why } => {
                let device = Attached::new(record, None).path;
                let device = printable(&device);
                let why = format!("{device} waits for its volume ({why}); --force fails its I/O");
                Err(Error::new(ErrorKind::Busy, "detach", why))
            }
        }
    }

    /// Ends a device if it is still `meant`: another call may have ended it, or published it.
    fn end_claimed(
        &self,
        name: &str,
        slot: &Slot,
        claim: Claim,
        meant: impl FnOnce(&Record) -> bool,
    ) -> Result<()> {
        let mut entry = slot.hold_or_busy("detach", name)?;
        match entry.record().is_some_and(meant) {
            true => self.end(&mut entry, Some(claim)),
            false => Ok(()),
        }
    }

    fn end_by_force(&self, name: &str, slot: &Slot) -> Result<()> {
        let begun = Instant::now();
        loop {
            // The call that holds the slot may be waiting for the volume.
            let seen = lock(&slot.seen).clone();
            if let Some(seen) = &seen {
                self.abandon(seen)?;
            }
            if let Some(mut entry) = slot.hold_within(FORCE_RETRY) {
                if let Some(record) = entry.record() {
                    // It may be served by now.
                    self.engine.abandon(record.key.0);
                }
                return self.end(&mut entry, None);
            }
            if begun.elapsed() > FORCE_TIMEOUT {
                // The call that holds it will find that the device is gone.
                if let Some(Attached { record, .. }) = seen {
                    end_device(&self.kernels, &record, None)?;
                }
                tracing::warn!(volume = name, "ended; something still waits for its volume");
                return Ok(());
            }
        }
    }

    fn end(&self, entry: &mut Held<'_>, claim: Option<Claim>) -> Result<()> {
        let Some(record) = entry.record() else { return Ok(()) };
        end_device(&self.kernels, record, claim)?;
        self.forget(record);
        if let Entry::Attached(live) = &**entry {
            live.wait_closed();
        }
        let device = Attached::new(record, None).path;
        tracing::info!(volume = record.volume, device = %printable(&device), "detached");
        **entry = Entry::Free;
        Ok(())
    }

    /// Removes a device that is gone, and all state of it.
    pub(crate) fn forget(&self, record: &Record) {
        self.records.remove(record);
        lock(&self.left).retain(|left| left.key != record.key.0);
        self.engine.abandon(record.key.0);
    }

    /// Ends all devices that nothing uses, but for those of publications, which are left to a
    /// successor: a pod may have closed one for a moment. Returns why the others remain; without
    /// such, the process may end. No more volumes are attached from now on.
    pub fn wind_down(&self) -> Vec<Error> {
        self.ending.store(true, Relaxed);
        let devices = self.list();
        let (threads, devices) = (devices.len().min(THREADS_MAX), Mutex::new(devices));
        let left = Mutex::new(Vec::new());
        let work = || {
            loop {
                let Some(Attached { volume, .. }) = lock(&devices).pop() else { break };
                // Another call may have ended it in the meantime.
                let Ok((name, slot)) = self.find("detach", &volume) else { continue };
                match self.end_or_leave(&name, &slot) {
                    Err(error) if self.find("detach", &name).is_ok() => lock(&left).push(error),
                    _ => self.clear(&name, &slot),
                }
            }
        };
        std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
        left.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Completes all I/O of a device with errors, also requests that wait for its volume. The
    /// device must be ended afterwards.
    fn abandon(&self, seen: &Attached) -> Result<()> {
        self.engine.abandon(seen.record.key.0);
        // Only ublk queues keep answering, with errors. The kernel's NBD client would wait for
        // another connection, and so would a device that is not served yet.
        match (seen.front, &seen.waiting) {
            (Front::Ublk, None) => Ok(()),
            _ => end_device(&self.kernels, &seen.record, None),
        }
    }
}

/// Ends the device of this record, if the kernel has it, even if it is in use.
fn end_device(kernels: &Kernels, record: &Record, claim: Option<Claim>) -> Result<()> {
    match kernels.known(record).map_or_else(|| kernels.find(record), |device| Ok(Some(device)))? {
        Some(device) => device.end(record.key, claim),
        None => Ok(()),
    }
}
