//! A device that grows while it is used.
//!
//! It comes to rest: what the kernel asks for waits, and the volume is closed. So the volume can be
//! changed as if it were no device, and the device is served again as after a crash. The kernel is
//! told of the new size last, when its server knows it and the record says it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use sheave_core::{Error, ErrorKind, Op, Result, Volume};
use sheave_shard::Blocking;

use crate::Devices;
use crate::block::check_blocks;
use crate::front::Device;
use crate::records::Record;
use crate::slot::{Attached, Entry, Live, lock};

/// How long requests in flight may take.
const REST_TIMEOUT: Duration = Duration::from_secs(10);

impl Devices {
    /// Makes a volume `size` bytes long and its device with it; without a size, the device as long
    /// as the volume has become. I/O waits meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such device, [`ErrorKind::Invalid`] when the size
    /// is less than it is, [`ErrorKind::Unsupported`] when this volume or kernel cannot,
    /// [`ErrorKind::Busy`] when requests are in flight for too long or the device waits for its
    /// volume, [`ErrorKind::Shutdown`] after [`Self::wind_down`], and what the volume and the
    /// kernel say.
    pub fn resize(&self, target: &str, size: Option<u64>) -> Result<Attached> {
        let (name, slot) = self.find("resize", target)?;
        let mut entry = slot.hold_or_busy("resize", &name)?;
        let Entry::Attached(live) = &*entry else {
            let why = format!("{target} waits for its volume, or is ended; see: sheave ls");
            return Err(Error::new(ErrorKind::Busy, "resize", why));
        };
        if self.ending.load(Relaxed) {
            return Err(Error::new(ErrorKind::Shutdown, "resize", "this daemon is ending"));
        }
        if self.engine.device_queues() == 0 {
            let what = format!("{name}: needs io_uring, which this daemon does not use; detach it");
            return Err(Error::new(ErrorKind::Unsupported, "resize", what));
        }
        live.device.check_resize()?;
        if let Some(size) = size {
            check_size(&live.record, size)?;
        }
        self.volumes.check_resize(&name)?;
        self.bring_to_rest(live)?;
        let mut record = live.record.clone();
        if let Err(error) = flush(&*live.volume) {
            // Only who has it open now hears of what was lost.
            self.serve(live.device, &record, Arc::clone(&live.volume))?;
            return Err(error);
        }
        // Closes the volume.
        *entry = Entry::Free;
        let grown = self.volumes.resize(&name, size).and_then(|size| {
            check_size(&record, size)?;
            let mut grown = record.clone();
            grown.size = size;
            // Before the kernel is told: after a crash it is told again.
            self.records.save(&grown)?;
            record = grown;
            Ok(())
        });
        *entry = Entry::Waiting { record, why: "being resized".to_owned() };
        let resumed = self.resume(&mut entry);
        grown.and(resumed)?;
        entry.attached().ok_or_else(|| Error::new(ErrorKind::NotFound, "resize", name))
    }

    /// Brings a device to rest, or leaves it as it was.
    fn bring_to_rest(&self, live: &Live) -> Result<()> {
        let mark = live.record.mark;
        match live.device {
            Device::Nbd(_) => {
                let released = self.engine.release(Some(mark), REST_TIMEOUT);
                if released.is_empty() {
                    self.engine.stay(Some(mark));
                    let volume = &live.record.volume;
                    let why = format!("{volume}: requests take longer than {REST_TIMEOUT:?}");
                    return Err(Error::new(ErrorKind::Busy, "resize", why));
                }
                lock(&self.left).extend(released);
            }
            Device::Ublk(_) => {
                if let Err(error) = self.engine.rest(mark, REST_TIMEOUT) {
                    self.serve(live.device, &live.record, Arc::clone(&live.volume))?;
                    return Err(error);
                }
            }
        }
        live.wait_closed();
        Ok(())
    }
}

/// What was written is on stable storage, or it is said that it is not.
fn flush(volume: &dyn Volume) -> Result<()> {
    let info = volume.info();
    if info.read_only || !info.can.flush {
        return Ok(());
    }
    Blocking::open(volume)?.run(Op::Flush).map(|_| ())
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
