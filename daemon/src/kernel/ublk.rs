//! Devices of the ublk driver.

use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use sheave_core::{Error, ErrorKind, Result};
use sheave_shard::Engine;
use sheave_ublk::Device;

use super::{Claim, DeviceKey, Kernel, Server};
use crate::helper::probe_ublk;
use crate::records::Record;
use crate::slot::lock;

/// The driver.
#[derive(Default)]
pub(crate) struct Ublk {
    /// A probe has succeeded.
    works: AtomicBool,
    /// Held while a call probes.
    probing: Mutex<()>,
}

impl Ublk {
    /// Whether a probe has succeeded, unless the driver has been unloaded since.
    fn works(&self) -> bool {
        self.works.load(Relaxed) && sheave_ublk::check().is_ok()
    }
}

impl Kernel for Ublk {
    fn check(&self, engine: &Engine) -> Result<()> {
        if engine.device_queues() == 0 {
            let what = "needs io_uring, which this daemon does not use";
            return Err(Error::new(ErrorKind::Unsupported, "ublk", what));
        }
        if self.works() {
            return Ok(());
        }
        // A probe takes a process and a device: many calls at once need one.
        let _probing = lock(&self.probing);
        if self.works() {
            return Ok(());
        }
        probe_ublk().inspect(|()| self.works.store(true, Relaxed))
    }

    fn attach(
        &self,
        server: Server<'_>,
        record: &Record,
        made: &mut dyn FnMut(u32) -> Result<()>,
    ) -> Result<u32> {
        let Server { engine, served } = server;
        let made = |device: Device| made(device.id());
        Ok(sheave_ublk::attach(engine, served, record.block, record.key.0, made)?.id())
    }

    fn find(&self, record: &Record) -> Result<Option<u32>> {
        Ok(sheave_ublk::find(record.id(), record.key.0)?.map(Device::id))
    }

    fn has(&self, id: u32, key: DeviceKey, served: bool) -> bool {
        // The driver gives no number away that a server has open.
        served || Device::numbered(id).has_key(key.0)
    }

    fn recover(
        &self,
        id: u32,
        server: Server<'_>,
        record: &Record,
        _: Option<OwnedFd>,
    ) -> Result<bool> {
        // Before the recovery begins, since another process could not begin it again.
        let opened = server.engine.open(server.served)?;
        sheave_ublk::recover(&opened, Device::numbered(id), record.key.0).map(|()| true)
    }

    fn check_resize(&self) -> Result<()> {
        sheave_ublk::check_resize()
    }

    fn resize(&self, id: u32, record: &Record) -> Result<()> {
        Device::numbered(id).resize(record.size)
    }

    fn end(&self, id: u32, key: DeviceKey, claim: Option<Claim>) -> Result<()> {
        Device::numbered(id).detach(key.0, claim)
    }

    fn name(&self, id: u32) -> String {
        Device::numbered(id).name()
    }
}
