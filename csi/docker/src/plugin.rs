//! What the calls do.

mod mounts;
mod volumes;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sheave_client::{Daemon, DaemonVolumes};
use sheave_core::printable;
use sheave_node::{Error, Kind, Node, Result, Tools, boot_id, make_dir};

use crate::Caller;
use crate::answering::Call;
use crate::options::Given;
use crate::record::{Record, Records, check_name};

/// How long a call waits for its work. Docker waits two minutes.
const ANSWER_WITHIN: Duration = Duration::from_secs(100);

/// On which nodes Docker takes volumes for the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// A volume is of its node.
    Local,
    /// A volume of a pool that nodes share is the same on all of them, and on one at a time.
    Global,
}

/// What differs between plugins.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This node, as volumes are published to it.
    pub node_id: String,
    /// The states of the node engine.
    pub state_dir: PathBuf,
    /// The records of this plugin.
    pub records_dir: PathBuf,
    /// Mount points are in it.
    pub mounts_dir: PathBuf,
    /// On which nodes a volume is the same.
    pub scope: Scope,
}

/// The plugin of this node. Calls block.
pub struct Plugin {
    daemon: Daemon,
    engine: Node,
    records: Records,
    settings: Settings,
    names: Names,
    opened: Instant,
    /// References that await the answer of a call before this one are from a plugin of before.
    first_call: u64,
    next_call: AtomicU64,
    /// Calls that are not answered yet.
    pub(crate) calls: AtomicUsize,
}

/// One lock a name.
#[derive(Default)]
struct Names(Mutex<HashMap<String, Arc<Mutex<()>>>>);

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct CreateRequest {
    name: String,
    #[serde(default)]
    opts: Option<Given>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NameRequest {
    name: String,
}

#[derive(Deserialize)]
struct MountRequest {
    #[serde(rename = "Name")]
    name: String,
    #[serde(rename = "ID")]
    id: String,
}

impl Plugin {
    /// A plugin with these settings. References of containers that did not outlive the last start
    /// of the node are forgotten.
    ///
    /// # Errors
    /// When a directory cannot be made or read, or another plugin has the records.
    pub fn open(daemon: Daemon, mut settings: Settings) -> Result<Self> {
        let records = Records::open(settings.records_dir.clone())?;
        make_dir(&settings.mounts_dir)?;
        let resolved = settings.mounts_dir.canonicalize();
        let fail = |error| Error::of_io(printable(&settings.mounts_dir), &error);
        settings.mounts_dir = resolved.map_err(fail)?;
        let node_id = settings.node_id.clone();
        let volumes = Arc::new(DaemonVolumes { daemon: daemon.clone(), node_id });
        let engine = Node::open(settings.state_dir.clone(), volumes, Tools::from_env())?;
        let engine = engine.answering_within(ANSWER_WITHIN);
        let all = records.all()?;
        let references = all.iter().flat_map(|record| record.references.values());
        let last_call = references.filter_map(|reference| reference.unanswered).max();
        let first_call = last_call.map_or(0, |last| last.saturating_add(1));
        let (names, next_call, opened) = (Names::default(), first_call.into(), Instant::now());
        let calls = AtomicUsize::new(0);
        let plugin =
            Self { daemon, engine, records, settings, names, opened, first_call, next_call, calls };
        for mut record in all.into_iter().filter(|of| !of.references.is_empty()) {
            // One that is damaged keeps no other from being served.
            if let Err(error) = plugin.forget_the_past(&mut record) {
                tracing::warn!(
                    name = record.name,
                    "which containers have it is not known: {error}"
                );
            }
        }
        Ok(plugin)
    }

    fn forget_the_past(&self, record: &mut Record) -> Result<()> {
        if record.boot == boot_id() {
            return Ok(());
        }
        tracing::info!(name = record.name, "no container has it since the node's start");
        record.references.clear();
        self.records.save(record)
    }

    /// How many calls are not answered yet.
    pub(crate) fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }

    /// A call of this process.
    pub(crate) fn begin(&self, caller: Caller) -> Call {
        Call::new(caller, self.next_call.fetch_add(1, Ordering::Relaxed))
    }

    /// Does a call with this path and body, and returns its answer but for `Err`.
    ///
    /// # Errors
    /// One line for a person.
    pub(crate) fn call(&self, call: &Call, path: &str, body: &[u8]) -> Result<Value> {
        match path {
            "/Plugin.Activate" => Ok(json!({ "Implements": ["VolumeDriver"] })),
            "/VolumeDriver.Capabilities" => {
                let scope = match self.settings.scope {
                    Scope::Local => "local",
                    Scope::Global => "global",
                };
                Ok(json!({ "Capabilities": { "Scope": scope } }))
            }
            "/VolumeDriver.Create" => {
                let CreateRequest { name, opts } = parse(body)?;
                self.locked(&name, || self.create(&name, opts.unwrap_or_default()))
            }
            "/VolumeDriver.Remove" => self.named(body, |name| self.remove(name)),
            "/VolumeDriver.Path" => self.named(body, |name| {
                Ok(json!({ "Mountpoint": self.mountpoint(&self.record(name)?) }))
            }),
            "/VolumeDriver.Get" => self.named(body, |name| self.get(name)),
            "/VolumeDriver.List" => self.list(),
            "/VolumeDriver.Mount" => {
                let MountRequest { name, id } = parse(body)?;
                self.locked(&name, || self.mount(&name, id, call))
            }
            "/VolumeDriver.Unmount" => {
                let MountRequest { name, id } = parse(body)?;
                self.locked(&name, || self.unmount(&name, &id))
            }
            _ => {
                let why = format!("{} is no call of a volume plugin", printable(path));
                Err(Error::new(Kind::NotFound, why))
            }
        }
    }

    fn named(&self, body: &[u8], call: impl FnOnce(&str) -> Result<Value>) -> Result<Value> {
        let NameRequest { name } = parse(body)?;
        self.locked(&name, || call(&name))
    }

    fn locked<T>(&self, name: &str, call: impl FnOnce() -> Result<T>) -> Result<T> {
        check_name(name)?;
        let held = self.names.of(name);
        let _held = lock(&held);
        call()
    }

    fn staging(&self, name: &str) -> PathBuf {
        self.settings.mounts_dir.join(name)
    }

    /// Where a volume is mounted; empty if it is not.
    fn mountpoint(&self, record: &Record) -> String {
        match record.references.is_empty() {
            true => String::new(),
            false => text(&self.staging(&record.name)),
        }
    }
}

impl Names {
    fn of(&self, name: &str) -> Arc<Mutex<()>> {
        let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that no call has.
        names.retain(|_, lock| Arc::strong_count(lock) > 1);
        Arc::clone(names.entry(name.to_owned()).or_default())
    }
}

fn lock(mutex: &Mutex<()>) -> MutexGuard<'_, ()> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    serde_json::from_slice(body).map_err(|error| {
        let why = format!(
            "the request is not the JSON object that is wanted (line {}, column {})",
            error.line(),
            error.column()
        );
        Error::new(Kind::Invalid, why)
    })
}

/// That of a volume that is published for Docker, by its name there.
fn claim(name: &str) -> String {
    format!("docker:{name}")
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
