//! Devices of the ublk driver.

use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

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
    probes: Probes,
}

/// Probes, of which many calls at once need one: it takes a process and a device, and may take
/// until its deadline.
#[derive(Default)]
struct Probes {
    /// Calls so far.
    calls: AtomicU64,
    /// Held while a call probes: how many calls had come when the last probe ended, and its answer.
    last: Mutex<Option<(u64, Result<()>)>>,
}

impl Probes {
    /// The answer of a probe that has ended since this call began.
    fn answer(&self, probe: impl FnOnce() -> Result<()>) -> Result<()> {
        let call = self.calls.fetch_add(1, Relaxed) + 1;
        let mut last = lock(&self.last);
        match &*last {
            Some((calls, answer)) if call <= *calls => answer.clone(),
            _ => {
                let answer = probe();
                *last = Some((self.calls.load(Relaxed), answer.clone()));
                answer
            }
        }
    }
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
        self.probes.answer(probe_ublk).inspect(|()| self.works.store(true, Relaxed))
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

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn calls_that_wait_for_a_probe_have_its_answer() {
        const CALLS: u64 = 20;
        let probes = Probes::default();
        let runs = AtomicU64::new(0);
        let late = |probes: &Probes| {
            runs.fetch_add(1, Relaxed);
            while probes.calls.load(Relaxed) < CALLS {
                thread::yield_now();
            }
            Err(Error::new(ErrorKind::TimedOut, "probe", "late"))
        };
        thread::scope(|scope| {
            let call = || probes.answer(|| late(&probes)).unwrap_err().kind();
            let calls = Vec::from_iter((0..CALLS).map(|_| scope.spawn(call)));
            for call in calls {
                assert_eq!(call.join().unwrap(), ErrorKind::TimedOut);
            }
        });
        assert_eq!(runs.load(Relaxed), 1);
        probes.answer(|| Ok(())).unwrap();
    }
}
