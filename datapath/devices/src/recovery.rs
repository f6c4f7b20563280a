//! The devices of another daemon: found by their records, served again.
//!
//! It may have died, or left ([`Devices::hand_over`]): then the kernel's NBD clients keep their
//! connections, at rest between two requests, and nothing has to be sent again.
//!
//! That the predecessor is dead is known: its lock of the records is released only when its
//! threads, and all I/O that they had in flight, are gone.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use sheave_core::{Error, ErrorKind, Result, Volume};
use sheave_shard::{Released, Served};

use crate::block::BlockDevice;
use crate::front::{Device, Server};
use crate::records::Record;
use crate::{Devices, Entry, Live, Slot, lock};

/// Devices that are recovered at once: one whose volume is slow holds up no others.
const RECOVERING_MAX: usize = 16;

impl Devices {
    /// Finds the devices of a predecessor. [`Devices::recover`] serves them.
    pub(crate) fn find_left(&self) {
        for record in self.records.load() {
            let found = match record.is_stale() {
                true => Ok(None),
                false => Device::find(&record),
            };
            match found {
                Ok(Some(device)) => {
                    let why = "not tried yet".to_owned();
                    let name = record.volume.clone();
                    let slot = Arc::clone(self.entries().entry(name).or_default());
                    *slot.hold() = Entry::Waiting { device, record, why };
                }
                Ok(None) => self.forget(&record),
                // Whether there is a device is not known, so the record stays.
                Err(error) => tracing::error!(volume = record.volume, %error, "not recovered"),
            }
        }
    }

    /// Brings the connections of devices to rest and gives back those that were within this time.
    /// The process is to end then, since it attaches no more; or to take them back.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when there is a volume that is gone with this process.
    pub fn hand_over(&self, within: Duration) -> Result<Vec<Released>> {
        if self.ending.swap(true, Relaxed) {
            return Err(Error::new(ErrorKind::Busy, "hand over", "this daemon is ending"));
        }
        self.leaving.store(true, Relaxed);
        for (name, slot) in self.snapshot() {
            let Entry::Attached(live) = &*slot.hold() else { continue };
            if live.volume.upgrade().is_some_and(|volume| volume.info().volatile) {
                self.leaving.store(false, Relaxed);
                self.ending.store(false, Relaxed);
                let why = format!("{name} would be gone with this daemon; detach it first");
                return Err(Error::new(ErrorKind::Busy, "hand over", why));
            }
        }
        Ok(self.engine.release(None, within))
    }

    /// Serves on, since nobody took what was handed over.
    pub fn take_back(&self, left: Vec<Released>) {
        self.engine.stay(None);
        *lock(&self.left) = left;
        for (name, slot) in self.snapshot() {
            let mut entry = slot.hold();
            let Entry::Attached(live) = &*entry else { continue };
            if !lock(&self.left).iter().any(|left| left.name == live.record.mark) {
                continue;
            }
            let (device, record) = (live.device, live.record.clone());
            *entry = Entry::Waiting { device, record, why: "not taken over".to_owned() };
            if let Err(error) = self.resume(&mut entry) {
                tracing::error!(volume = name, %error, "its I/O waits");
            }
        }
        self.leaving.store(false, Relaxed);
        self.ending.store(false, Relaxed);
    }

    /// Serves the devices again whose server is gone: a predecessor's, as far as their volumes can be
    /// opened by now, and those whose connection has died. Devices that somebody else has ended are
    /// forgotten. Answers how many still wait, and their I/O with them.
    pub fn recover(&self) -> usize {
        let slots = self.snapshot();
        let threads = slots.iter().filter(|(_, slot)| slot.needs_care()).count();
        if threads == 0 {
            return 0;
        }
        let (queue, left) = (Mutex::new(slots), AtomicUsize::new(0));
        let work = || {
            loop {
                let Some((name, slot)) = lock(&queue).pop() else { return };
                // Whoever changes it looks after it.
                let Some(mut entry) = slot.try_hold() else { continue };
                if self.leaving.load(Relaxed) {
                    return;
                }
                self.notice_loss(&mut entry);
                let resumed = self.resume(&mut entry);
                if let (Err(error), Entry::Waiting { .. }) = (resumed, &*entry) {
                    left.fetch_add(1, Relaxed);
                    tracing::warn!(volume = name, %error, "its I/O waits");
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..threads.min(RECOVERING_MAX) {
                scope.spawn(work);
            }
        });
        left.into_inner()
    }

    fn notice_loss(&self, entry: &mut Entry) {
        let Entry::Attached(live) = &*entry else { return };
        if !live.is_lost() {
            return;
        }
        let (device, record) = (live.device, live.record.clone());
        tracing::warn!(volume = record.volume, %device, "its connection died");
        *entry = match Device::find(&record) {
            Ok(None) => {
                self.forget(&record);
                Entry::Free
            }
            _ => Entry::Waiting { device, record, why: "its connection died".to_owned() },
        };
    }

    /// Serves a device that waits; forgets it if it is gone by now.
    pub(crate) fn resume(&self, entry: &mut Entry) -> Result<()> {
        let Entry::Waiting { device, record, why } = entry else { return Ok(()) };
        match self.serve_again(*device, record) {
            Ok(Some(volume)) => {
                let (device, record) = (*device, record.clone());
                tracing::info!(volume = record.volume, %device, "recovered");
                *entry = Entry::Attached(Live { device, record, volume });
                Ok(())
            }
            Ok(None) => {
                // Zeroes in place of what was written would be worse than errors.
                let (device, record) = (*device, record.clone());
                tracing::error!(volume = record.volume, %device, "ended: its memory is gone");
                device.end(record.mark, None)?;
                self.records.remove(&record);
                *entry = Entry::Free;
                Ok(())
            }
            Err(error) => {
                *why = error.to_string();
                if let Ok(None) = Device::find(record) {
                    // Its predecessor was about to end it.
                    self.forget(record);
                    *entry = Entry::Free;
                    return Ok(());
                }
                Err(error)
            }
        }
    }

    fn forget(&self, record: &Record) {
        tracing::info!(volume = record.volume, "its device is gone; forgotten");
        self.records.remove(record);
    }

    /// `None` if the volume's content died with its last process.
    fn serve_again(&self, device: Device, record: &Record) -> Result<Option<Weak<dyn Volume>>> {
        let volume = (self.open)(&record.volume, record.read_only)?;
        let info = volume.info();
        if info.volatile {
            return Ok(None);
        }
        if info.size < record.size {
            let what = format!("{} bytes, and the device has {}", info.size, record.size);
            return Err(Error::new(ErrorKind::Invalid, "recover", what));
        }
        let served = Served { stats: self.registry.volume(&record.volume), volume };
        let server = Server { engine: &self.engine, served: &served };
        let left = {
            let mut left = lock(&self.left);
            let found = left.iter().position(|left| left.name == record.mark);
            found.map(|index| left.swap_remove(index).socket)
        };
        server.recover(device, record, left)?;
        let block_device = BlockDevice::new(device.name());
        if block_device.size().is_some_and(|size| size < record.size) {
            // The last thing that a resize does, perhaps of a daemon that died.
            device.resize(record)?;
        }
        block_device.wait_ready(record.size)?;
        // Its predecessor may have died before.
        block_device.tune();
        Ok(Some(Arc::downgrade(&served.volume)))
    }
}

impl Slot {
    /// Whether its device is not served; false also while somebody changes it.
    fn needs_care(&self) -> bool {
        self.try_hold().is_some_and(|entry| match &*entry {
            Entry::Free => false,
            Entry::Attached(live) => live.is_lost(),
            Entry::Waiting { .. } => true,
        })
    }
}

impl Live {
    /// Whether the engine has let go of it, though nobody asked it to.
    fn is_lost(&self) -> bool {
        self.volume.strong_count() == 0
    }
}
