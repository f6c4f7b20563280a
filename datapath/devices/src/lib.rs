//! Volumes as block devices of this node: which volume is which device.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sheave_core::{Error, ErrorKind, Result, Volume};
use sheave_knbd::{Device, Timeouts};
use sheave_shard::{Assignment, Clock, Engine, EngineConfig};
use sheave_telemetry::Registry;

/// A server that does not answer for so long is taken for dead. Above the worst stall of a volume,
/// since the kernel sends the request again and the first may still be carried out.
const TIMEOUTS: Timeouts = Timeouts { request_s: 600, dead_connection_s: 600 };

/// The devices of one daemon. All calls may wait for the kernel.
pub struct Devices {
    engine: Engine,
    registry: Arc<Registry>,
    /// By volume. An entry's own lock is held while its device is made or ended, so that others
    /// are not held up.
    entries: Mutex<BTreeMap<String, Arc<Mutex<Option<Attached>>>>>,
    ending: AtomicBool,
}

/// A volume that is a device.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The volume, as it was asked for.
    pub volume: String,
    /// Such as `/dev/nbd0`.
    pub path: PathBuf,
    /// Whether it cannot be written.
    pub read_only: bool,
    /// Bytes.
    pub size: u64,
    device: Device,
}

impl Devices {
    /// Starts the engine.
    ///
    /// # Errors
    /// When the engine cannot be had.
    pub fn start(config: EngineConfig, registry: Arc<Registry>) -> Result<Self> {
        let engine = Engine::start(config, Clock::start())?;
        Ok(Self { engine, registry, entries: Mutex::default(), ending: AtomicBool::new(false) })
    }

    /// Makes a volume a device; the device it already is, if there is one. `open` is called only if
    /// there is none.
    ///
    /// # Errors
    /// What `open` and the kernel say; [`ErrorKind::Busy`] when the volume is a device already that
    /// can be written while this one must not be; [`ErrorKind::Shutdown`] after
    /// [`Self::wind_down`].
    pub fn attach(
        &self,
        name: &str,
        read_only: bool,
        open: impl FnOnce() -> Result<Arc<dyn Volume>>,
    ) -> Result<Attached> {
        let entry = Arc::clone(self.entries().entry(name.to_owned()).or_default());
        let mut attached = lock(&entry);
        if let Some(attached) = &*attached {
            if attached.read_only != read_only && !attached.read_only {
                let path = attached.path.display();
                let why = format!("{name} is {path} already, for writing; detach it first");
                return Err(Error::new(ErrorKind::Busy, "attach", why));
            }
            return Ok(attached.clone());
        }
        if self.ending.load(Relaxed) {
            let why = "this daemon is ending, and serves only what is in use";
            return Err(Error::new(ErrorKind::Shutdown, "attach", why));
        }
        let volume = open()?;
        let info = volume.info().clone();
        let stats = self.registry.volume(name);
        let device = sheave_knbd::attach(&info, 1, TIMEOUTS, name, |socket| {
            self.engine.serve(Assignment {
                socket,
                session: sheave_nbd::kernel_session(&info),
                volume: Arc::clone(&volume),
                stats: Arc::clone(&stats),
            })
        })?;
        tracing::info!(volume = name, %device, "attached");
        let made = Attached {
            volume: name.to_owned(),
            path: device.path(),
            read_only: info.read_only,
            size: info.size,
            device,
        };
        *attached = Some(made.clone());
        Ok(made)
    }

    /// Ends the device that is at this path or is this volume.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none, [`ErrorKind::Busy`] when something uses it and
    /// `force` is not said, and what the kernel says.
    pub fn detach(&self, target: &str, force: bool) -> Result<()> {
        let entry = self.find(target).ok_or_else(|| {
            let why =
                format!("{target}: neither a device nor a volume of this daemon; see: sheave ls");
            Error::new(ErrorKind::NotFound, "detach", why)
        })?;
        let mut attached = lock(&entry);
        let Some(found) = &*attached else { return Ok(()) };
        let users = if force { Vec::new() } else { found.device.users()? };
        if !users.is_empty() {
            let why = format!(
                "{} is in use: {}; unmount it first",
                found.path.display(),
                users.join(", ")
            );
            return Err(Error::new(ErrorKind::Busy, "detach", why));
        }
        found.device.disconnect()?;
        tracing::info!(volume = found.volume, device = %found.device, "detached");
        let name = found.volume.clone();
        *attached = None;
        drop(attached);
        let mut entries = self.entries();
        // Unless somebody attaches it again just now.
        if entries.get(&name).is_some_and(|entry| Arc::strong_count(entry) <= 2) {
            entries.remove(&name);
        }
        Ok(())
    }

    /// All devices, by volume.
    #[must_use]
    pub fn list(&self) -> Vec<Attached> {
        let entries: Vec<_> = self.entries().values().map(Arc::clone).collect();
        entries.iter().filter_map(|entry| lock(entry).clone()).collect()
    }

    /// Ends all devices that nothing uses, and answers why the others are left. No more volumes
    /// are attached from now on.
    pub fn wind_down(&self) -> Vec<Error> {
        self.ending.store(true, Relaxed);
        let ends = self.list().into_iter().map(|attached| self.detach(&attached.volume, false));
        // What somebody else has ended in the meantime is not left.
        ends.filter_map(Result::err).filter(|error| error.kind() != ErrorKind::NotFound).collect()
    }

    /// Whether the engine gives a sign of life in time.
    ///
    /// # Errors
    /// Names what does not.
    pub fn check(&self, within: Duration) -> Result<()> {
        self.engine.check(within)
    }

    fn find(&self, target: &str) -> Option<Arc<Mutex<Option<Attached>>>> {
        if let Some(entry) = self.entries().get(target) {
            return Some(Arc::clone(entry));
        }
        let attached = self.list().into_iter().find(|found| found.path == Path::new(target))?;
        self.entries().get(&attached.volume).map(Arc::clone)
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Mutex<Option<Attached>>>>> {
        lock(&self.entries)
    }
}

/// What is behind these locks is whole between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
