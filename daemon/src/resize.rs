//! Grows a device while it is open and busy.
//!
//! The order makes it safe: first the volume has the new size, then its server serves it, then the
//! record has it, and the kernel gets it last.

use std::sync::atomic::Ordering::Relaxed;

use sheave_core::{Error, ErrorKind, Result};

use crate::Devices;
use crate::block::check_blocks;
use crate::kernel::Device;
use crate::records::Record;
use crate::slot::{Attached, Entry};

impl Devices {
    /// Extends a volume to `size` bytes, and its device with it; without a size, sets the device to
    /// the size that the volume has grown to by other means. I/O goes on meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such device, [`ErrorKind::Invalid`] when the size
    /// is less than it is, [`ErrorKind::Unsupported`] when this volume or kernel cannot,
    /// [`ErrorKind::Busy`] when the device waits for its volume, [`ErrorKind::Shutdown`] after
    /// [`Self::wind_down`], and errors of the volume and of the kernel.
    pub fn resize(&self, target: &str, size: Option<u64>) -> Result<Attached> {
        let (name, slot) = self.find("resize", target)?;
        let mut entry = slot.hold_or_busy("resize", &name)?;
        let Entry::Attached(live) = &mut *entry else {
            let why = format!("{target} waits for its volume, or is ended; see: sheave ls");
            return Err(Error::new(ErrorKind::Busy, "resize", why));
        };
        if self.ending.load(Relaxed) {
            return Err(Error::new(ErrorKind::Shutdown, "resize", "this daemon is ending"));
        }
        live.device.kernel.check_resize()?;
        if let Some(size) = size {
            check_size(&live.record, size)?;
            live.volume.extend(size)?;
        }
        let size = live.volume.grow()?;
        check_size(&live.record, size)?;
        let grown = live.record.grown(size);
        self.records.save(&grown)?;
        live.record = grown;
        self.announce_size("resize", &live.device, &mut live.record)?;
        entry.attached().ok_or_else(|| Error::new(ErrorKind::NotFound, "resize", name))
    }

    /// Sets the device's size to that of its record. If the kernel refuses, the record gets the
    /// size that the device still has, so that the next call tries again.
    pub(crate) fn announce_size(
        &self,
        op: &'static str,
        device: &Device,
        record: &mut Record,
    ) -> Result<()> {
        device.announce_size(op, record).inspect_err(|_| {
            let has = device.kernel.size(device.id);
            let Some(size) = has.filter(|size| (1..record.size).contains(size)) else { return };
            let kept = record.grown(size);
            match self.records.save(&kept) {
                Ok(()) => *record = kept,
                Err(error) => tracing::warn!(volume = record.volume, %error, "its record is old"),
            }
        })
    }
}

/// Whether a device can have `size` bytes.
fn check_size(device: &Record, size: u64) -> Result<()> {
    let (name, from) = (&device.volume, device.size);
    if size < from {
        let why = format!("{name} has {from} bytes; to make it {size} would cut data off");
        return Err(Error::new(ErrorKind::Invalid, "resize", why));
    }
    check_blocks("resize", name, device.block, size)
}
