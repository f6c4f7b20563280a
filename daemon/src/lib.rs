//! The daemon that owns the block devices of a node: it keeps which volume is which device, also
//! after a crash, hands over to a successor, and protects a process that is a disk.
#![forbid(unsafe_code)]

mod block;
mod detach;
mod handover;
mod helper;
mod kernel;
mod limits;
mod packets;
mod protect;
mod records;
mod recovery;
mod resize;
mod slot;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sheave_core::{Error, ErrorKind, Result, Volume, printable};
use sheave_layers::Limits;
use sheave_shard::{Engine, Quiesced, Served};
use sheave_telemetry::Registry;
use sheave_volumes::{OpenOptions, VolumeSpec, check_memory};

use crate::block::check_blocks;
use crate::kernel::{Device, Kernels, Server};
use crate::records::{Record, Records};
use crate::slot::{Entry, Held, Live, Slot, lock};

pub use crate::handover::{HandOver, Taken};
pub use crate::helper::{HELPER, probe_ublk, run_task};
pub use crate::kernel::{Choice, DeviceKey, FakeAnswer, FakeRequest, Front};
pub use crate::limits::NewLimits;
pub use crate::packets::{receive, send};
pub use crate::protect::protect;
pub use crate::slot::Attached;
pub use sheave_knbd::DeadLinks;

/// The configuration of a daemon's devices.
pub struct DevicesConfig {
    /// The engine that serves them.
    pub engine: Engine,
    /// The directory of records, which survive a crash.
    pub records: PathBuf,
    /// Connections that a predecessor handed over.
    pub left: Vec<Quiesced>,
    /// The directory of a stand-in for a kernel, for tests; devices are made by it then, unless
    /// another front is asked for.
    pub fake: Option<PathBuf>,
    /// Whether a volume that a predecessor had as a device, and that is open again, may be written.
    pub may_write: Box<MayWrite>,
}

/// Answers for a volume's text, and what it is in its pool; an error says why not.
pub type MayWrite = dyn Fn(&str, Option<&PoolVolume>) -> Result<()> + Send + Sync;

/// What has to be done before a volume is a device.
pub type Begin<'a> = dyn Fn() -> Result<()> + 'a;

/// How a volume is attached.
#[derive(Clone, Debug)]
pub struct AttachOptions {
    /// The kernel does not write to it.
    pub read_only: bool,
    /// An object volume is opened although another node has it open. It is not recorded: a recovery
    /// takes nothing from another node.
    pub take_over: bool,
    /// How the device is made.
    pub front: Choice,
    /// For a publication, by an orchestrator: only [`Devices::detach`] ends the device.
    pub published: bool,
    /// Of a volume of a pool.
    pub pool: Option<PoolVolume>,
}

/// What a volume is in its pool. It is recorded with the device: later configurations may lack the
/// pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolVolume {
    /// POOL/UUID.
    pub id: String,
    /// Whether other nodes use the pool, too, and its records say which of them writes.
    pub shared: bool,
    /// The node of the publication that it was attached by first; empty if there is none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node: String,
}

/// The devices of one daemon. All calls may wait for the kernel.
pub struct Devices {
    engine: Engine,
    registry: Arc<Registry>,
    records: Records,
    kernels: Kernels,
    may_write: Box<MayWrite>,
    /// By volume.
    entries: Mutex<BTreeMap<String, Arc<Slot>>>,
    ending: AtomicBool,
    /// Another process is about to take over.
    leaving: AtomicBool,
    /// Quiesced connections of another daemon, until they are served.
    left: Mutex<Vec<Quiesced>>,
}

impl Devices {
    /// Finds the devices of a predecessor, which is dead when this returns, so that none of their
    /// volumes can become another one. [`Devices::look_after`] serves them.
    ///
    /// # Errors
    /// When another daemon keeps the records, or they cannot be read.
    pub fn start(config: DevicesConfig, registry: Arc<Registry>) -> Result<Self> {
        let DevicesConfig { engine, records, left, fake, may_write } = config;
        let devices = Self {
            engine,
            registry,
            records: Records::open(records)?,
            kernels: Kernels::new(fake),
            may_write,
            entries: Mutex::default(),
            ending: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            left: Mutex::new(left),
        };
        devices.find_left()?;
        Ok(devices)
    }

    /// Makes a device of a volume; returns its device if it already has one. The name may start a
    /// program, so the caller must have refused names that a request may not use
    /// ([`VolumeSpec::of_operator`]).
    ///
    /// # Errors
    /// Errors of the volume and of the kernel; [`ErrorKind::Busy`] when the volume has a device
    /// that differs from the request; [`ErrorKind::Unsupported`] when no front works here;
    /// [`ErrorKind::Shutdown`] after [`Self::wind_down`].
    pub fn attach(&self, name: &str, options: AttachOptions) -> Result<Attached> {
        self.attach_after(name, options, &|| Ok(()))
    }

    /// The same. Once the volume is open, and before it can be used as a device, `begin` is called;
    /// without a device, if that fails.
    ///
    /// # Errors
    /// Those of [`Devices::attach`], and those of `begin`.
    pub fn attach_after(
        &self,
        name: &str,
        options: AttachOptions,
        begin: &Begin<'_>,
    ) -> Result<Attached> {
        let slot = Arc::clone(self.entries().entry(name.to_owned()).or_default());
        let attached = self.attach_in(&slot, name, &options, begin);
        if attached.is_err() {
            self.clear(name, &slot);
        }
        attached
    }

    fn attach_in(
        &self,
        slot: &Slot,
        name: &str,
        options: &AttachOptions,
        begin: &Begin<'_>,
    ) -> Result<Attached> {
        let mut entry = slot.hold_or_busy("attach", name)?;
        if self.leaving.load(Relaxed) && matches!(*entry, Entry::Waiting { .. }) {
            let why = "another daemon takes over; try again";
            return Err(Error::new(ErrorKind::Shutdown, "attach", why));
        }
        self.notice_loss(&mut entry);
        self.resume(&mut entry)?;
        match &mut *entry {
            Entry::Attached(live) => {
                check_same(&live.record, options)?;
                begin()?;
                let record = live.record.attached_as(options);
                if record != live.record {
                    self.records.save(&record)?;
                    live.record = record;
                }
            }
            _ if self.ending.load(Relaxed) => {
                let why = "this daemon is ending, and serves only what is in use";
                return Err(Error::new(ErrorKind::Shutdown, "attach", why));
            }
            _ => self.make(name, options, &mut entry, begin)?,
        }
        let none = || Error::new(ErrorKind::NotFound, "attach", format!("{name} is ended already"));
        entry.attached().ok_or_else(none)
    }

    /// All devices, by volume.
    #[must_use]
    pub fn list(&self) -> Vec<Attached> {
        let all = self.snapshot();
        // One that was ended by other means may have left its number to another program's device.
        let seen = all.iter().filter_map(|(_, slot)| {
            let is_served = slot.is_served();
            let seen = lock(&slot.seen).clone();
            seen.filter(|seen| self.has(&seen.record, is_served))
        });
        seen.collect()
    }

    /// Whether the kernel still has the device of this record, which is `served` or not. True while
    /// its number is not known.
    pub(crate) fn has(&self, record: &Record, served: bool) -> bool {
        let device = self.kernels.known(record);
        device.is_none_or(|Device { kernel, id }| kernel.has(id, record.key, served))
    }

    /// Checks that the engine answers in time.
    ///
    /// # Errors
    /// Names the shards that do not.
    pub fn check(&self, within: Duration) -> Result<()> {
        self.engine.check(within)
    }

    fn make(
        &self,
        name: &str,
        options: &AttachOptions,
        entry: &mut Held<'_>,
        begin: &Begin<'_>,
    ) -> Result<()> {
        let AttachOptions { read_only, take_over, front, .. } = *options;
        let seen = entry.seen;
        let limits = Arc::<Limits>::default();
        let volume = open_volume(name, read_only, take_over, &limits)?;
        let info = volume.info();
        let size = volume.size();
        let block = info.block.logical;
        check_blocks("attach", name, block, size)?;
        let front = self.kernels.choose(front, &self.engine)?;
        begin()?;
        let key = DeviceKey::random();
        let record = Record::new(name, read_only, info, size, front, key);
        let mut record = record.attached_as(options);
        self.records.save(&record)?;
        let served = Served::new(volume, self.registry.volume(name));
        let server = Server { engine: &self.engine, served: &served };
        let kernel = self.kernels.of(front);
        let made = kernel.attach(server, &record.clone(), &mut |id| {
            record.set_id(id, &self.kernels);
            self.records.save(&record)?;
            // The kernel reads it before it is ready, and the volume may not answer.
            let waiting = Some("being attached".to_owned());
            *lock(seen) = Some(Attached::new(&record, waiting));
            Ok(())
        });
        let live = made.and_then(|id| {
            let ready = kernel.wait_ready(id, "attach", size);
            // The caller does not know it, so it has to be ended here.
            ready.inspect_err(|_| drop(kernel.end(id, key, None)))?;
            kernel.tune(id);
            Ok(Device { kernel: Arc::clone(&kernel), id })
        });
        match live {
            Ok(device) => {
                tracing::info!(volume = name, %device, "attached");
                **entry = Entry::Attached(Live { device, record, volume: served.volume, limits });
                Ok(())
            }
            Err(error) => {
                match self.kernels.find(&record) {
                    Ok(None) => self.records.remove(&record),
                    // It could not be ended, so its record stays.
                    _ => **entry = Entry::Waiting { record, why: error.to_string() },
                }
                Err(error)
            }
        }
    }

    fn find(&self, op: &'static str, target: &str) -> Result<(String, Arc<Slot>)> {
        let mut known = self.snapshot();
        known.retain(|(_, slot)| lock(&slot.seen).is_some());
        let is_path = |slot: &Slot| {
            lock(&slot.seen).as_ref().is_some_and(|seen| seen.path == Path::new(target))
        };
        let is_target = |(name, slot): &(String, Arc<Slot>)| name == target || is_path(slot);
        // By its name without parameters, if that is unique.
        let is_called = |name: &str| name.split_once('?').is_some_and(|(name, _)| name == target);
        let called = known.iter().filter(|(name, _)| is_called(name)).count();
        let index = known
            .iter()
            .position(is_target)
            .or_else(|| known.iter().position(|(name, _)| is_called(name)).filter(|_| called == 1));
        index.map(|index| known.swap_remove(index)).ok_or_else(|| {
            let why =
                format!("{target}: neither a device nor a volume of this daemon; see: sheave ls");
            Error::new(ErrorKind::NotFound, op, why)
        })
    }

    fn snapshot(&self) -> Vec<(String, Arc<Slot>)> {
        let entries = self.entries();
        entries.iter().map(|(name, slot)| (name.clone(), Arc::clone(slot))).collect()
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Slot>>> {
        lock(&self.entries)
    }
}

/// Opens the volume of a device, with these `limits`. Names that a request may not use have been
/// refused before; records are the daemon's own.
fn open_volume(
    name: &str,
    read_only: bool,
    take_over: bool,
    limits: &Arc<Limits>,
) -> Result<Arc<dyn Volume>> {
    let spec = VolumeSpec::of_operator(name)?;
    check_memory(name, &spec)?;
    spec.open(&OpenOptions {
        read_only,
        take_over,
        limits: Some(Arc::clone(limits)),
        ..OpenOptions::default()
    })
}

/// Checks that an existing device agrees with a request.
fn check_same(have: &Record, options: &AttachOptions) -> Result<()> {
    let AttachOptions { read_only, front, ref pool, .. } = *options;
    let busy = |how: &str| {
        let (volume, device) = (&have.volume, Attached::new(have, None).path);
        let why = format!("{volume} is {} already, {how}; detach it first", printable(&device));
        Err(Error::new(ErrorKind::Busy, "attach", why))
    };
    match front {
        _ if read_only && !have.read_only => busy("for writing"),
        _ if have.asked_read_only && !read_only => busy("read-only"),
        Choice::This(front) if front != have.front => busy("by the other front"),
        _ => match (&have.pool, pool) {
            // Its pool was renamed. Those that have the old id could not end it.
            (Some(had), Some(pool)) if had.id != pool.id => busy(&format!("as {}", had.id)),
            _ => Ok(()),
        },
    }
}
