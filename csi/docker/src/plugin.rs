//! What the calls do.

use std::collections::HashMap;
use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sheave_client::{CreateVolumeRequest, Daemon, DaemonVolumes, Volume};
use sheave_core::printable;
use sheave_node::{Access, Attach, Error, Kind, Node, Result, StageRequest, Tools};

use crate::options::{Given, Options};
use crate::record::{Record, Records, check_name};

/// How long a call waits for its work. Docker waits two minutes.
const ANSWER_WITHIN: Duration = Duration::from_secs(100);
/// How often a volume is looked at that another process works on.
const PENDING_POLL: Duration = Duration::from_millis(100);
/// Parameter of a volume that was made for Docker: the node that made it.
const MADE_BY: &str = "docker.node";
/// Before the name of an option, in the parameters of such a volume.
const OPTION: &str = "docker.option.";

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
    /// When a directory cannot be made, or a state cannot be read.
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
        for mut record in records.all()?.into_iter().filter(|of| !of.references.is_empty()) {
            if engine.known(&record.volume)?.is_none_or(|known| !known.is_staged) {
                tracing::info!(name = record.name, "no container has it since the node's start");
                record.references.clear();
                records.save(&record)?;
            }
        }
        Ok(Self { daemon, engine, records, settings, names: Names::default() })
    }

    /// Does the call with this path and body, and returns its answer but for `Err`.
    ///
    /// # Errors
    /// One line for a person.
    pub fn call(&self, path: &str, body: &[u8]) -> Result<Value> {
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
                self.locked(&name, || self.mount(&name, id))
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

    fn locked(&self, name: &str, call: impl FnOnce() -> Result<Value>) -> Result<Value> {
        check_name(name)?;
        let held = self.names.of(name);
        let _held = lock(&held);
        call()
    }

    /// The record of a volume that Docker knows on this node or, if volumes are the same on all
    /// nodes, on any.
    fn record(&self, name: &str) -> Result<Record> {
        if let Some(record) = self.own_record(name)? {
            return Ok(record);
        }
        let mut shared = self.shared()?.into_iter();
        shared.find(|record| record.name == name).ok_or_else(|| {
            let why = format!("no volume is called {name}; docker volume create makes one");
            Error::new(Kind::NotFound, why)
        })
    }

    /// The record of this node. Where volumes are the same on all nodes, another one may have
    /// removed the volume.
    fn own_record(&self, name: &str) -> Result<Option<Record>> {
        let record = self.records.load(name)?;
        if let Some(record) = &record
            && self.settings.scope == Scope::Global
            && record.references.is_empty()
            && let Err(error) = self.daemon.volume(&record.volume)
            && error.kind() == Kind::NotFound
        {
            self.records.remove(name)?;
            return Ok(None);
        }
        Ok(record)
    }

    /// What nodes have made for Docker, where volumes are the same on all of them.
    fn shared(&self) -> Result<Vec<Record>> {
        if self.settings.scope == Scope::Local {
            return Ok(Vec::new());
        }
        let made = self.daemon.list()?.into_iter();
        let made = made.filter(|volume| volume.parameters.contains_key(MADE_BY));
        let record = |volume: Volume| {
            let options = options_of(&volume);
            Record::new(&volume.name, volume.id, false, options)
        };
        Ok(made.map(record).collect())
    }

    fn create(&self, name: &str, given: Given) -> Result<Value> {
        let options = Options::parse(&given)?;
        let other = || {
            let why = format!("volume {name} exists with other options; remove it first");
            Err(Error::new(Kind::Exists, why))
        };
        if let Some(record) = self.own_record(name)? {
            if record.options != given {
                return other();
            }
            match self.daemon.volume(&record.volume) {
                // Its removal was killed in the middle. It is made anew.
                Err(error) if error.kind() == Kind::NotFound && record.references.is_empty() => {}
                found => return found.map(|_| json!({})),
            }
        }
        let (volume, adopted) = self.volume(name, &options, &given)?;
        if !adopted && options_of(&volume) != given {
            return other();
        }
        if options.size.is_some_and(|size| size > volume.size_bytes) {
            let why = format!(
                "volume {} exists with {} bytes; make it longer first: sheave volume resize",
                volume.id, volume.size_bytes
            );
            return Err(Error::new(Kind::Exists, why));
        }
        tracing::info!(name, volume = volume.id, adopted, "created");
        self.records.save(&Record::new(name, volume.id, adopted, given))?;
        Ok(json!({}))
    }

    /// The volume of a pool that is meant, and whether it was there before. It is made unless it
    /// exists.
    fn volume(&self, name: &str, options: &Options, given: &Given) -> Result<(Volume, bool)> {
        if let Some(volume) = &options.volume {
            return Ok((self.daemon.find(volume)?, true));
        }
        let pool = match &options.pool {
            Some(pool) => pool.clone(),
            None => self.daemon.only_pool()?,
        };
        match self.daemon.find(&format!("{pool}/{name}")) {
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) => return Err(error),
            Ok(volume) => {
                // By a call that was killed before its record was written, or on another node.
                let made_by = volume.parameters.get(MADE_BY);
                let is_own = made_by.is_some_and(|node| {
                    *node == self.settings.node_id || self.settings.scope == Scope::Global
                });
                return Ok((volume, !is_own));
            }
        }
        let mut parameters: HashMap<_, _> =
            given.iter().map(|(key, value)| (format!("{OPTION}{key}"), value.clone())).collect();
        parameters.insert(MADE_BY.to_owned(), self.settings.node_id.clone());
        let wanted = CreateVolumeRequest {
            pool,
            name: name.to_owned(),
            required_bytes: options.size.unwrap_or_default(),
            limit_bytes: 0,
            limit_bytes_per_second: options.limit_bps,
            limit_ops_per_second: options.limit_iops,
            parameters,
        };
        Ok((self.daemon.create(wanted)?, false))
    }

    fn remove(&self, name: &str) -> Result<Value> {
        let record = self.record(name)?;
        if !record.references.is_empty() {
            let why = format!(
                "volume {name} is in use by {} containers; remove them first",
                record.references.len()
            );
            return Err(Error::new(Kind::Refused, why));
        }
        self.release(&record)?;
        if !record.adopted {
            self.daemon.delete(&record.volume)?;
        }
        self.records.remove(name)?;
        tracing::info!(name, volume = record.volume, deleted = !record.adopted, "removed");
        Ok(json!({}))
    }

    fn mount(&self, name: &str, id: String) -> Result<Value> {
        let mut record = self.record(name)?;
        let staging = self.staging(name);
        self.stage(&record, &staging)?;
        if record.references.insert(id) {
            self.records.save(&record)?;
        }
        Ok(json!({ "Mountpoint": text(&staging) }))
    }

    /// Publishes a volume to this node and stages it, unless that is done.
    fn stage(&self, record: &Record, staging: &Path) -> Result<()> {
        let options = Options::parse(&record.options)?;
        let volume = self.daemon.volume(&record.volume)?;
        let read_only = options.read_only;
        // Before it is published, so that a plugin that is killed leaves a trace.
        make_dir(staging)?;
        let (node, claim) = (&self.settings.node_id, claim(record));
        let published = self.daemon.publish_here(&volume, node, read_only, &claim);
        let epoch = published.inspect_err(|_| {
            // It is empty, unless the volume is mounted there.
            let _ = fs::remove_dir(staging);
        })?;
        let request = StageRequest {
            volume: volume.id,
            staging: staging.to_owned(),
            access: Access::Mount { fs: options.fs, options: options.mount_options },
            may_format: options.may_format,
            attach: Attach { read_only, epoch: Some(epoch), front: options.front },
            force_unstage_after: options.force_unstage_after.map(Duration::from_secs),
        };
        let staged = patiently(|| self.engine.stage(request.clone()));
        staged.or_else(|error| {
            let known = self.engine.known(&record.volume)?;
            // What is being staged is left to the next call.
            if record.references.is_empty() && known.is_none_or(|known| known.staging != staging) {
                self.release(record)?;
            }
            Err(error)
        })
    }

    fn unmount(&self, name: &str, id: &str) -> Result<Value> {
        let mut record = self.record(name)?;
        if record.references.remove(id) {
            self.records.save(&record)?;
        }
        if record.references.is_empty() {
            self.release(&record)?;
        }
        Ok(json!({}))
    }

    /// Undoes [`Self::stage`]. Done if there is nothing.
    fn release(&self, record: &Record) -> Result<()> {
        let staging = self.staging(&record.name);
        let known = self.engine.known(&record.volume)?;
        // A volume that is staged elsewhere is in use by other means than Docker. One without a
        // state may be mounted there all the same, or a call that was killed has left its lock.
        if known.map_or_else(|| staging.exists(), |known| known.staging == staging) {
            patiently(|| self.engine.unstage(&record.volume, &staging))?;
        }
        self.daemon.unpublish_here(&record.volume, &self.settings.node_id, &claim(record))?;
        match fs::remove_dir(&staging) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::of_io(format!("remove {}", printable(&staging)), &error))
            }
            _ => Ok(()),
        }
    }

    /// Releases volumes without references that are staged all the same, such as by a call that was
    /// killed in the middle.
    pub fn tidy(&self) {
        for record in self.records.all().unwrap_or_default() {
            let tidied = self.locked(&record.name, || {
                let record = self.records.load(&record.name)?;
                if let Some(record) = record.filter(|record| record.references.is_empty())
                    && self.staging(&record.name).exists()
                {
                    self.release(&record)?;
                }
                Ok(Value::Null)
            });
            if let Err(error) = tidied {
                tracing::warn!(name = record.name, "it is still staged: {error}");
            }
        }
    }

    fn get(&self, name: &str) -> Result<Value> {
        let record = self.record(name)?;
        let mut status = json!({
            "volume": record.volume,
            "adopted": record.adopted,
            "references": record.references.len(),
            "options": record.options,
        });
        match self.daemon.volume(&record.volume) {
            Ok(volume) => {
                status["size"] = volume.size_bytes.into();
                status["filesystem"] = volume.formatted.into();
                status["device"] = volume.device.into();
                status["trouble"] = volume.trouble.into();
            }
            Err(error) => status["trouble"] = error.to_string().into(),
        }
        let mountpoint = self.mountpoint(&record);
        Ok(json!({
            "Volume": { "Name": record.name, "Mountpoint": mountpoint, "Status": status }
        }))
    }

    fn list(&self) -> Result<Value> {
        let mut records = self.records.all()?;
        if self.settings.scope == Scope::Global {
            let shared = self.shared()?;
            // Others may have been removed by another node.
            records.retain(|record| record.adopted || !record.references.is_empty());
            for record in shared {
                if records.iter().all(|own| own.name != record.name) {
                    records.push(record);
                }
            }
        }
        let volume =
            |record: &Record| json!({ "Name": record.name, "Mountpoint": self.mountpoint(record) });
        let volumes: Vec<_> = records.iter().map(volume).collect();
        Ok(json!({ "Volumes": volumes }))
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

/// Those by which a volume was made for Docker.
fn options_of(volume: &Volume) -> Given {
    let all = volume.parameters.iter();
    let options = all.filter_map(|(key, value)| Some((key.strip_prefix(OPTION)?, value)));
    options.map(|(key, value)| (key.to_owned(), value.clone())).collect()
}

/// Of a volume that is published for Docker.
fn claim(record: &Record) -> String {
    format!("docker:{}", record.name)
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

/// Waits for another process that works on the volume, such as a mkfs that a killed plugin has
/// left: Docker does not ask again.
fn patiently(work: impl Fn() -> Result<()>) -> Result<()> {
    let begun = Instant::now();
    loop {
        match work() {
            Err(error) if error.kind() == Kind::Pending && begun.elapsed() < ANSWER_WITHIN => {
                thread::sleep(PENDING_POLL);
            }
            done => return done,
        }
    }
}

fn make_dir(dir: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| Error::of_io(format!("make {}", printable(dir)), &error))
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
