//! Recovery: finds the devices of another daemon, and those whose connection has died, and serves
//! them again.
//!
//! A predecessor has died, or has handed over ([`Devices::hand_over`]). After a hand-over the
//! kernel's NBD clients keep their connections, and send nothing again.
//!
//! The predecessor is known to be dead: its lock of the records is released only when its threads
//! are gone. Opening the volume waits for the predecessor's I/O in flight.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::sync_channel;
use std::thread::Builder;
use std::time::Duration;

use sheave_core::{Error, ErrorKind, Result, Volume, printable};
use sheave_layers::Limits;
use sheave_shard::{Quiesced, Served};
use sheave_volumes::VolumeSpec;

use crate::kernel::{Device, DeviceKey, Server};
use crate::records::Record;
use crate::slot::{Entry, Live, Slot, lock};
use crate::{Devices, open_volume};

/// How long to wait for another call that changes a device.
const HOLD_TIMEOUT: Duration = Duration::from_secs(2);

/// What became of a device that was to be served again.
enum Again {
    Served(Arc<dyn Volume>),
    /// The volume's content died with its last process.
    Volatile,
    /// The kernel has ended the device, and shows it since it is open.
    Ended,
}

impl Devices {
    /// Finds the devices of a predecessor. [`Devices::look_after`] serves them.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub(crate) fn find_left(&self) -> Result<()> {
        for mut record in self.records.load()? {
            record.find_path(&self.kernels);
            let found = match record.is_stale() {
                true => Ok(None),
                false => self.kernels.find(&record),
            };
            let why = match found {
                Ok(Some(device)) => {
                    record.set_id(device.id, &self.kernels);
                    "not tried yet".to_owned()
                }
                Ok(None) => {
                    self.forget_gone(&record);
                    continue;
                }
                // Tried again until that is known. Until then its volume gets no other device.
                Err(error) => error.to_string(),
            };
            let slot = Arc::clone(self.entries().entry(record.volume.clone()).or_default());
            let mut entry = slot.hold();
            match &*entry {
                Entry::Free => *entry = Entry::Waiting { record, why },
                _ => tracing::error!(
                    volume = record.volume,
                    device = %printable(&record.path()),
                    "its second device is ignored: end it by hand"
                ),
            }
        }
        let keys: Vec<DeviceKey> = self.list().iter().map(|attached| attached.record.key).collect();
        for device in self.kernels.unrecorded(&keys) {
            tracing::warn!(
                device = %printable(&device),
                "ignored: it is another daemon's, or its record is lost; if no daemon has it, \
                 end it by hand: nbd-client -d"
            );
        }
        Ok(())
    }

    /// Quiesces the connections of devices, and returns those that are quiescent within this time.
    /// From then on no volumes are attached: end the process, or call [`Devices::take_back`].
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when another process would not find one of the volumes.
    pub fn hand_over(self: &Arc<Self>, within: Duration) -> Result<Vec<Quiesced>> {
        if self.ending.swap(true, Relaxed) {
            return Err(Error::new(ErrorKind::Busy, "hand over", "this daemon is ending"));
        }
        self.leaving.store(true, Relaxed);
        if let Some(why) = self.snapshot().iter().find_map(|(name, slot)| why_not(name, slot)) {
            self.go_on();
            return Err(Error::new(ErrorKind::Busy, "hand over", why));
        }
        let mut quiesced = self.engine.quiesce(within);
        // Connections of its own predecessor whose volumes are not open yet.
        quiesced.append(&mut lock(&self.left));
        Ok(quiesced)
    }

    /// Resumes the devices after [`Devices::hand_over`], since the successor did not take over.
    pub fn take_back(&self, left: Vec<Quiesced>) {
        self.engine.resume();
        lock(&self.left).extend(left);
        for (name, slot) in self.snapshot() {
            // The call that holds it takes the connection, or look_after() does.
            let Some(entry) = slot.hold_within(HOLD_TIMEOUT) else { continue };
            let Entry::Attached(live) = &*entry else { continue };
            if !lock(&self.left).iter().any(|left| left.key == live.record.key.0) {
                continue;
            }
            // One that was ended is forgotten by look_after().
            if let Err(error) = self.serve(&live.device, &live.record, Arc::clone(&live.volume)) {
                tracing::error!(volume = name, %error, "I/O is suspended");
            }
        }
        self.go_on();
    }

    /// Allows volumes to be attached again.
    fn go_on(&self) {
        self.leaving.store(false, Relaxed);
        self.ending.store(false, Relaxed);
    }

    /// Begins to serve devices again whose server is gone: those of a predecessor whose volumes can
    /// be opened, and those whose connection has died. Devices that were ended by other means are
    /// removed. Call it periodically; a volume that does not answer holds up no others.
    pub fn look_after(self: &Arc<Self>) {
        for (name, slot) in self.snapshot() {
            if !slot.needs_care() {
                continue;
            }
            let devices = Arc::clone(self);
            let work = move || devices.serve_if_lost(&name, &slot);
            if let Err(error) = Builder::new().name("recovery".to_owned()).spawn(work) {
                return tracing::warn!(%error, "no thread to serve devices again");
            }
        }
    }

    fn serve_if_lost(&self, name: &str, slot: &Arc<Slot>) {
        // The call that holds it looks after it.
        let Some(mut entry) = slot.try_hold() else { return };
        if self.leaving.load(Relaxed) {
            return;
        }
        self.notice_loss(&mut entry);
        let known = match &*entry {
            Entry::Waiting { why, .. } => why.clone(),
            _ => String::new(),
        };
        if let Err(error) = self.resume(&mut entry) {
            match &*entry {
                // Tried again and again, logged once.
                Entry::Waiting { why, .. } if *why == known => {}
                Entry::Waiting { .. } => tracing::warn!(volume = name, %error, "I/O is suspended"),
                _ => tracing::warn!(volume = name, %error, "recovered; device setup incomplete"),
            }
        }
        drop(entry);
        self.clear(name, slot);
    }

    /// Serves a device again whose connection has died.
    pub(crate) fn notice_loss(&self, entry: &mut Entry) {
        let Entry::Attached(live) = &*entry else { return };
        let Live { device, record, volume, .. } = live;
        let is_lost = live.is_lost();
        let has = self.has(record, !is_lost);
        if (!is_lost && has) || self.leaving.load(Relaxed) {
            return;
        }
        tracing::warn!(volume = record.volume, %device, "the daemon does not serve it any more");
        if !has || matches!(self.kernels.find(record), Ok(None)) {
            self.forget_gone(record);
            live.wait_closed();
            *entry = Entry::Free;
            return;
        }
        match self.serve(device, record, Arc::clone(volume)) {
            Ok(true) => tracing::info!(volume = record.volume, %device, "recovered"),
            Ok(false) => {
                self.forget_ended(record);
                *entry = Entry::Free;
            }
            Err(error) => tracing::warn!(volume = record.volume, %error, "I/O is suspended"),
        }
    }

    /// Serves a device that waits for its volume; removes the device if it is gone.
    pub(crate) fn resume(&self, entry: &mut Entry) -> Result<()> {
        let Entry::Waiting { record, why } = entry else { return Ok(()) };
        let served = self.kernels.find(record).and_then(|found| {
            let Some(device) = found else { return Ok(None) };
            record.set_id(device.id, &self.kernels);
            let limits = Arc::new(Limits::new(record.limits()));
            let served = self.serve_again(&device, record, &limits);
            served.map(|volume| Some((device, volume, limits)))
        });
        let mut record = record.clone();
        match served {
            Ok(Some((device, Again::Served(volume), limits))) => {
                let completed = self.announce_size("recover", &device, &mut record);
                device.kernel.tune(device.id);
                tracing::info!(volume = record.volume, %device, "recovered");
                *entry = Entry::Attached(Live { device, record, volume, limits });
                completed
            }
            // Zeroes in place of written data would be worse than errors.
            Ok(Some((device, Again::Volatile, _))) => {
                tracing::error!(volume = record.volume, %device, "ended: its memory is gone");
                device.end(record.key, None)?;
                self.forget(&record);
                *entry = Entry::Free;
                Ok(())
            }
            Ok(Some((_, Again::Ended, _))) => {
                self.forget_ended(&record);
                *entry = Entry::Free;
                Ok(())
            }
            Ok(None) => {
                self.forget_gone(&record);
                *entry = Entry::Free;
                Ok(())
            }
            Err(error) => {
                *why = error.to_string();
                if let Ok(None) = self.kernels.find(&record) {
                    // The predecessor was about to end it, or it is ended by force.
                    self.forget_gone(&record);
                    *entry = Entry::Free;
                    return Ok(());
                }
                Err(error)
            }
        }
    }

    fn forget_gone(&self, record: &Record) {
        tracing::info!(volume = record.volume, "its device is gone; forgotten");
        self.forget(record);
    }

    /// Its server died while it ended it, or it was ended by other means. Nothing can serve it any
    /// more; programs that have it open get errors.
    fn forget_ended(&self, record: &Record) {
        let device = record.path();
        tracing::error!(
            volume = record.volume,
            device = %printable(&device),
            "it was ended while a program had it open, whose I/O fails; forgotten: end the program \
             and attach the volume again"
        );
        self.forget(record);
    }

    fn serve_again(&self, device: &Device, record: &Record, limits: &Arc<Limits>) -> Result<Again> {
        let volume = open_volume(&record.volume, record.read_only, false, limits)?;
        let info = volume.info();
        if info.volatile {
            return Ok(Again::Volatile);
        }
        record.check_same("recover", info, volume.size())?;
        if !record.read_only {
            // While it is open, so that no other node comes between.
            (self.may_write)(&record.volume, record.pool.as_ref())?;
        }
        match self.serve(device, record, Arc::clone(&volume))? {
            true => Ok(Again::Served(volume)),
            false => Ok(Again::Ended),
        }
    }

    /// False if the kernel has ended the device, see [`crate::kernel::Kernel::recover`].
    fn serve(&self, device: &Device, record: &Record, volume: Arc<dyn Volume>) -> Result<bool> {
        let served = Served::new(volume, self.registry.volume(&record.volume));
        let server = Server { engine: &self.engine, served: &served };
        let left = {
            let mut left = lock(&self.left);
            let found = left.iter().position(|left| left.key == record.key.0);
            found.map(|index| left.swap_remove(index).socket)
        };
        device.kernel.recover(device.id, server, record, left)
    }
}

/// Why a device cannot be handed over; `None` if it can.
fn why_not(name: &str, slot: &Slot) -> Option<String> {
    let Some(entry) = slot.hold_within(HOLD_TIMEOUT) else {
        return Some(format!("{name} is being attached, resized or detached; try again later"));
    };
    let Entry::Attached(live) = &*entry else { return None };
    if live.volume.info().volatile {
        return Some(format!("{name} would be gone with this daemon; detach it first"));
    }
    if live.volume.has_lost_data() {
        let why = "lost data that was written, which only this daemon knows";
        return Some(format!("{name} has {why}; detach it first"));
    }
    let is_lost = live.record.identity.is_some() && !is_there(&live.record);
    is_lost.then(|| {
        let why = "its file was removed or replaced, so only this daemon has it";
        format!("{name}: {why}; detach it first")
    })
}

/// Whether another process would find the volume by its name. Also true if a file server does not
/// answer in time.
fn is_there(record: &Record) -> bool {
    let (answer, answered) = sync_channel(1);
    let name = record.volume.clone();
    let identity = move || VolumeSpec::of_operator(&name)?.identity();
    let ask = move || drop(answer.send(identity().ok().flatten()));
    if Builder::new().name("identity".to_owned()).spawn(ask).is_err() {
        return true;
    }
    answered.recv_timeout(HOLD_TIMEOUT).map_or(true, |found| found == record.identity)
}
