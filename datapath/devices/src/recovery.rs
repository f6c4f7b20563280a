//! The devices of a daemon that has died: found by their records, served again.
//!
//! That the predecessor is dead is known: its lock of the records is released only when its
//! threads, and all I/O that they had in flight, are gone.

use std::sync::{Arc, Weak};

use sheave_core::{Error, ErrorKind, Result, Volume};

use crate::block::BlockDevice;
use crate::front::{Device, Served};
use crate::records::Record;
use crate::{Devices, Entry, Live, lock};

impl Devices {
    /// Finds the devices of a predecessor and serves them again. Answers how many it could not
    /// serve yet; their I/O waits, and [`Devices::retry`] tries again.
    pub fn recover(&self) -> usize {
        for record in self.records.load() {
            let found = match record.is_stale() {
                true => Ok(None),
                false => Device::find(&record),
            };
            match found {
                Ok(Some(device)) => {
                    let why = "not tried yet".to_owned();
                    let name = record.volume.clone();
                    let entry = Arc::clone(self.entries().entry(name).or_default());
                    *lock(&entry) = Entry::Waiting { device, record, why };
                }
                Ok(None) => {
                    tracing::info!(volume = record.volume, "its device is gone; forgotten");
                    self.records.remove(&record);
                }
                // Whether there is a device is not known, so the record stays.
                Err(error) => tracing::error!(volume = record.volume, %error, "not recovered"),
            }
        }
        self.retry()
    }

    /// Serves the devices again that wait, as far as their volumes can be opened by now. Answers
    /// how many still wait.
    pub fn retry(&self) -> usize {
        let mut left = 0;
        for (name, entry) in self.snapshot() {
            let mut entry = lock(&entry);
            let resumed = self.resume(&mut entry);
            if let (Err(error), Entry::Waiting { .. }) = (resumed, &*entry) {
                left += 1;
                tracing::warn!(volume = name, %error, "its I/O waits");
            }
        }
        left
    }

    /// Serves a device that waits.
    pub(crate) fn resume(&self, entry: &mut Entry) -> Result<()> {
        let Entry::Waiting { device, record, why } = entry else { return Ok(()) };
        match self.serve_again(*device, record) {
            Ok(volume) => {
                let (device, record) = (*device, record.clone());
                tracing::info!(volume = record.volume, %device, "recovered");
                *entry = Entry::Attached(Live { device, record, volume });
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                let (device, record) = (*device, record.clone());
                tracing::error!(volume = record.volume, %device, %error, "ended");
                device.end(None)?;
                self.records.remove(&record);
                *entry = Entry::Free;
                Err(error)
            }
            Err(error) => {
                *why = error.to_string();
                Err(error)
            }
        }
    }

    fn serve_again(&self, device: Device, record: &Record) -> Result<Weak<dyn Volume>> {
        let volume = (self.open)(&record.volume, record.read_only)?;
        let info = volume.info();
        if info.volatile {
            // Zeroes in place of what was written would be worse than errors.
            let what = format!("{device}: what was in memory died with the daemon");
            return Err(Error::new(ErrorKind::Corrupt, "recover", what));
        }
        if info.size < record.size {
            let what = format!("{} bytes, and the device has {}", info.size, record.size);
            return Err(Error::new(ErrorKind::Invalid, "recover", what));
        }
        let stats = self.registry.volume(&record.volume);
        let served = Served { engine: &self.engine, volume: &volume, stats: &stats };
        served.recover(device, record)?;
        BlockDevice::new(device.name()).wait_ready(record.size)?;
        Ok(Arc::downgrade(&volume))
    }
}
