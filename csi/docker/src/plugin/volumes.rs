//! The volumes that Docker knows.

use std::collections::HashMap;

use serde_json::{Value, json};
use sheave_client::{CreateVolumeRequest, Volume, check_mountable};
use sheave_node::{Error, Format, Kind, Record as VolumeRecord, Result, Wanted};

use super::{Plugin, Scope, claim};
use crate::options::{Given, Options};
use crate::record::{Record, now};

/// Parameter of a volume that was made for Docker: the node that made it.
const MADE_BY: &str = "docker.node";
/// And when, as in RFC 3339.
const CREATED: &str = "docker.created";
/// Before the name of an option, in the parameters of such a volume.
const OPTION: &str = "docker.option.";

/// The volume that a name is to have.
struct Found {
    volume: Volume,
    /// Docker has not made it.
    adopted: bool,
    /// This call has made it.
    is_new: bool,
}

impl Plugin {
    /// The record of a volume that Docker knows on this node or, if volumes are the same on all
    /// nodes, on any.
    pub(super) fn record(&self, name: &str) -> Result<Record> {
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

    /// What nodes have made for Docker, where volumes are the same on all of them. One that has
    /// moved to another user is Docker's no more.
    fn shared(&self) -> Result<Vec<Record>> {
        if self.settings.scope == Scope::Local {
            return Ok(Vec::new());
        }
        let made = self.daemon.list()?.into_iter();
        let is_ours = |volume: &Volume| {
            volume.parameters.contains_key(MADE_BY) && self.is_only_of(volume, &volume.name)
        };
        let made = made.filter(is_ours);
        let record = |volume: Volume| {
            let (options, created) = (options_of(&volume), created(&volume));
            let mut record = Record::new(&volume.name, volume.id, false, options);
            record.created = created;
            record
        };
        Ok(made.map(record).collect())
    }

    pub(super) fn create(&self, name: &str, given: Given) -> Result<Value> {
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
        let Found { volume, adopted, is_new } = self.volume(name, &options, &given)?;
        if !adopted && options_of(&volume) != given {
            return other();
        }
        check_mountable(&volume, &options.access(), options.may_format, options.read_only)?;
        if adopted && (options.limit_bps, options.limit_iops) != (0, 0) {
            let why = format!(
                "volume {} exists, and has its own limits; change them: sheave volume set",
                volume.id
            );
            return Err(Error::new(Kind::Exists, why));
        }
        if options.size.is_some_and(|size| size > volume.size_bytes) {
            let why = format!(
                "volume {} exists with {} bytes; make it longer first: sheave volume resize",
                volume.id, volume.size_bytes
            );
            return Err(Error::new(Kind::Exists, why));
        }
        let mut record = Record::new(name, volume.id.clone(), adopted, given);
        if !adopted {
            record.created = created(&volume);
        }
        self.records.save(&record).inspect_err(|_| {
            // Docker does not know it, and nothing was ever on it.
            if is_new {
                let _ = self.daemon.delete(&volume.id, Some(&volume));
            }
        })?;
        tracing::info!(name, volume = volume.id, adopted, "created");
        Ok(json!({}))
    }

    /// The volume of a pool that is meant. It is made unless it exists.
    fn volume(&self, name: &str, options: &Options, given: &Given) -> Result<Found> {
        if let Some(volume) = &options.volume {
            return Ok(Found { volume: self.daemon.find(volume)?, adopted: true, is_new: false });
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
                let is_own = is_own && self.is_only_of(&volume, name);
                return Ok(Found { volume, adopted: !is_own, is_new: false });
            }
        }
        self.check_new(&format!("{pool}/{name}"), &pool, options)?;
        let mut parameters: HashMap<_, _> =
            given.iter().map(|(key, value)| (format!("{OPTION}{key}"), value.clone())).collect();
        parameters.insert(MADE_BY.to_owned(), self.settings.node_id.clone());
        parameters.insert(CREATED.to_owned(), now());
        let wanted = CreateVolumeRequest {
            pool,
            name: name.to_owned(),
            required_bytes: options.size.unwrap_or_default(),
            limit_bytes: 0,
            limit_bytes_per_second: options.limit_bps,
            limit_ops_per_second: options.limit_iops,
            parameters,
        };
        Ok(Found { volume: self.daemon.create(wanted)?, adopted: false, is_new: true })
    }

    /// Refuses to make what could never be mounted.
    fn check_new(&self, called: &str, pool: &str, options: &Options) -> Result<()> {
        let size = options.size.map_or_else(|| self.daemon.default_size(pool), Ok)?;
        // The pool says why there can be none.
        if size == 0 {
            return Ok(());
        }
        let record = VolumeRecord { format: Format::Never, never_format: false };
        let wanted = Wanted {
            access: &options.access(),
            may_format: options.may_format,
            read_only: options.read_only,
            record: &record,
            size,
            is_new: true,
        };
        wanted.check().map_err(|error| error.of(called))
    }

    pub(super) fn remove(&self, name: &str) -> Result<Value> {
        let mut record = self.record(name)?;
        self.reconcile_or_log(&mut record);
        if !record.references.is_empty() {
            let why = format!(
                "volume {name} is in use by {} containers; remove them first",
                record.references.len()
            );
            return Err(Error::new(Kind::Refused, why));
        }
        self.release(&record)?;
        let volume = match self.daemon.volume(&record.volume) {
            // What is left of it may have to be removed.
            Err(error) if error.kind() == Kind::NotFound => None,
            found => Some(found?),
        };
        let kept_for = match &volume {
            Some(volume) => self.kept_for(&record, volume)?,
            None => None,
        };
        if kept_for.is_none() {
            self.daemon.delete(&record.volume, volume.as_ref())?;
        }
        self.records.remove(name)?;
        match kept_for {
            None => tracing::info!(name, volume = record.volume, "removed and deleted"),
            Some(why) => tracing::warn!(
                name,
                volume = record.volume,
                "its name is removed and its data kept, since {why}; to delete it: sheave volume \
                 delete"
            ),
        }
        Ok(json!({}))
    }

    /// Why a volume is not deleted with its name: what `docker volume create` has not made by this
    /// name, or something else has had since, may hold data that Docker does not know of.
    fn kept_for(&self, record: &Record, volume: &Volume) -> Result<Option<&'static str>> {
        if record.adopted {
            return Ok(Some("it was there before docker volume create"));
        }
        if !self.is_only_of(volume, &record.name) {
            return Ok(Some("something else than this name has had it"));
        }
        // One that was never mounted by its other name.
        let is_other = |of: &Record| of.volume == record.volume && of.name != record.name;
        Ok(match self.records.read_all()? {
            (all, _) if all.iter().any(is_other) => Some("another name has it, too"),
            (_, true) => None,
            (_, false) => Some("another name may have it, too, whose record cannot be read"),
        })
    }

    /// Whether nothing but Docker, by this name, has ever had a volume. Another node's Docker has
    /// the same names for other volumes, unless volumes are the same on all nodes.
    fn is_only_of(&self, volume: &Volume, name: &str) -> bool {
        let own = claim(name);
        let is_own = |user: &String| {
            let node = user.strip_prefix(&own).and_then(|rest| rest.strip_prefix('@'));
            let is_here = |node| node == self.settings.node_id;
            node.is_some_and(|node| self.settings.scope == Scope::Global || is_here(node))
        };
        let is_known = volume.epoch == 0 || !volume.users.is_empty();
        is_known && volume.users.iter().all(is_own)
    }

    pub(super) fn get(&self, name: &str) -> Result<Value> {
        let record = self.record(name)?;
        let mut status = json!({
            "volume": record.volume,
            "adopted": record.adopted,
            "references": record.references.len(),
            "options": record.options,
        });
        match self.daemon.volume(&record.volume) {
            Ok(volume) => {
                status["deleted_by_rm"] = self.kept_for(&record, &volume)?.is_none().into();
                status["size"] = Some(volume.size_bytes).filter(|bytes| *bytes > 0).into();
                status["filesystem"] = volume.formatted.into();
                status["device"] = volume.device.into();
                status["trouble"] = volume.trouble.into();
            }
            Err(error) => status["trouble"] = error.to_string().into(),
        }
        let mut volume = self.shown(&record);
        volume["Status"] = status;
        Ok(json!({ "Volume": volume }))
    }

    fn shown(&self, record: &Record) -> Value {
        let mut volume = json!({ "Name": record.name, "Mountpoint": self.mountpoint(record) });
        if !record.created.is_empty() {
            volume["CreatedAt"] = record.created.as_str().into();
        }
        volume
    }

    pub(super) fn list(&self) -> Result<Value> {
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
        let volumes: Vec<_> = records.iter().map(|record| self.shown(record)).collect();
        Ok(json!({ "Volumes": volumes }))
    }
}

/// When it was made for Docker; empty if it was not.
fn created(volume: &Volume) -> String {
    volume.parameters.get(CREATED).cloned().unwrap_or_default()
}

/// Those by which a volume was made for Docker.
fn options_of(volume: &Volume) -> Given {
    let all = volume.parameters.iter();
    let options = all.filter_map(|(key, value)| Some((key.strip_prefix(OPTION)?, value)));
    options.map(|(key, value)| (key.to_owned(), value.clone())).collect()
}
