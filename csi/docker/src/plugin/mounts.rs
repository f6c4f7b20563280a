//! Volumes become mount points of Docker, and are released.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sheave_core::printable;
use sheave_node::{Access, Attach, Error, Kind, Result, StageRequest};

use super::{ANSWER_WITHIN, Plugin, claim, make_dir, text};
use crate::Caller;
use crate::options::Options;
use crate::record::{Record, check_id};

/// What uses the volumes that are staged by this plugin.
const USER: &str = "docker";
/// How often a volume is looked at that another process works on.
const PENDING_POLL: Duration = Duration::from_millis(100);

impl Plugin {
    pub(super) fn mount(&self, name: &str, id: String, caller: Caller) -> Result<Value> {
        check_id(&id)?;
        let mut record = self.record(name)?;
        let staging = self.staging(name);
        self.stage(&record, &staging)?;
        if record.references.insert(id, caller) != Some(caller) {
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
        let (node, claim) = (&self.settings.node_id, claim(&record.name));
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
            user: USER,
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

    pub(super) fn unmount(&self, name: &str, id: &str) -> Result<Value> {
        let mut record = self.record(name)?;
        if record.references.remove(id).is_some() {
            self.records.save(&record)?;
        }
        if record.references.is_empty() {
            self.release(&record)?;
        }
        Ok(json!({}))
    }

    /// Undoes [`Self::stage`]. Done if there is nothing.
    pub(super) fn release(&self, record: &Record) -> Result<()> {
        let staging = self.staging(&record.name);
        let known = self.engine.known(&record.volume)?;
        // A volume that is staged elsewhere is in use by other means than Docker. One without a
        // state may be mounted there all the same, or a call that was killed has left its lock.
        if known.map_or_else(|| staging.exists(), |known| known.staging == staging) {
            patiently(|| self.engine.unstage(&record.volume, &staging))?;
        }
        self.daemon.unpublish_here(&record.volume, &self.settings.node_id, &claim(&record.name))?;
        match fs::remove_dir(&staging) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::of_io(format!("remove {}", printable(&staging)), &error))
            }
            _ => Ok(()),
        }
    }

    /// Forgets the references of a volume that no container has any more: the processes of Docker
    /// that took them have ended, and it is mounted nowhere else. Docker forgets what it was doing
    /// when it was killed.
    pub(super) fn reconcile(&self, record: &mut Record) -> Result<()> {
        let references = &record.references;
        if references.is_empty()
            || references.values().any(|caller| !caller.has_ended())
            || self.engine.is_mounted_elsewhere(&record.volume)?
        {
            return Ok(());
        }
        tracing::warn!(
            name = record.name,
            references = references.len(),
            "no container has it any more; Docker was ended before it has unmounted it"
        );
        record.references.clear();
        self.records.save(record)
    }

    /// Releases volumes without references that are staged all the same, such as by a call that was
    /// killed in the middle.
    pub fn tidy(&self) {
        for record in self.records.all().unwrap_or_default() {
            let tidied = self.locked(&record.name, || {
                if let Some(mut record) = self.records.load(&record.name)? {
                    self.reconcile(&mut record)?;
                    if record.references.is_empty() && self.staging(&record.name).exists() {
                        self.release(&record)?;
                    }
                }
                Ok(Value::Null)
            });
            if let Err(error) = tidied {
                tracing::warn!(name = record.name, "it is still staged: {error}");
            }
        }
    }
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
