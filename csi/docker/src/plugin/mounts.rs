//! Volumes become mount points of Docker, and are released.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sheave_node::{Attach, Error, Kind, Result, StageRequest, boot_id};

use super::{ANSWER_WITHIN, Plugin, claim, text};
use crate::answering::{Call, Mounted};
use crate::options::Options;
use crate::record::{Record, Reference};

/// What uses the volumes that are staged by this plugin.
const USER: &str = "docker";
/// How often a volume is looked at that another process works on.
const PENDING_POLL: Duration = Duration::from_millis(100);

impl Plugin {
    pub(super) fn mount(&self, name: &str, id: String, call: &Call) -> Result<Value> {
        let left = || Err(Error::new(Kind::TimedOut, "the caller has left before the answer"));
        // While it waited for other calls about the volume.
        if call.has_left() {
            return left();
        }
        let mut record = self.record(name)?;
        self.reconcile_or_log(&mut record);
        record.check_reference(&id)?;
        let staging = self.staging(name);
        self.stage(&record, &staging)?;
        let undo = |record: &Record| match record.references.is_empty() {
            true => self.release(record),
            false => Ok(()),
        };
        if !call.mounted(name, &id) {
            return undo(&record).and_then(|()| left());
        }
        let before = record.references.get(&id).copied();
        let is_certain = before.is_some_and(|before| before.unanswered.is_none());
        let unanswered = (!is_certain).then_some(call.number);
        let reference = Reference { caller: call.caller, unanswered };
        if before != Some(reference) {
            let had = record.clone();
            record.references.insert(id, reference);
            record.boot = boot_id();
            self.records.save(&record).inspect_err(|_| drop(undo(&had)))?;
        }
        Ok(json!({ "Mountpoint": text(&staging) }))
    }

    /// The end of a call that has mounted a volume: Docker has its answer, or it will never unmount
    /// what it does not know to be mounted.
    pub(crate) fn answered(&self, mounted: &Mounted, is_delivered: bool) {
        let Mounted { name, id, call } = mounted;
        let ended = self.locked(name, || {
            let Some(mut record) = self.records.load(name)? else { return Ok(()) };
            match record.references.get_mut(id) {
                // A later call about the same is not touched.
                Some(reference) if reference.unanswered == Some(*call) && is_delivered => {
                    reference.unanswered = None;
                    self.records.save(&record)?;
                }
                Some(reference) if reference.unanswered == Some(*call) => {
                    tracing::warn!(name, id, "unmounted: its caller has left before the answer");
                    self.dereference(&mut record, id)?;
                }
                _ => {}
            }
            Ok(())
        });
        if let Err(error) = ended {
            tracing::warn!(name, id, "its reference is not settled: {error}");
        }
    }

    /// Publishes a volume to this node and stages it, unless that is done.
    fn stage(&self, record: &Record, staging: &Path) -> Result<()> {
        let options = Options::parse(&record.options)?;
        let volume = self.daemon.volume(&record.volume)?;
        let read_only = options.read_only;
        let (node, claim) = (&self.settings.node_id, claim(&record.name));
        let epoch = self.daemon.publish_at(staging, &volume, node, read_only, &claim)?;
        let request = StageRequest {
            volume: volume.id,
            staging: staging.to_owned(),
            access: options.access(),
            may_format: options.may_format,
            attach: Attach { read_only, epoch: Some(epoch), front: options.front },
            force_unstage_after: options.force_unstage_after,
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
        self.dereference(&mut record, id)?;
        Ok(json!({}))
    }

    fn dereference(&self, record: &mut Record, id: &str) -> Result<()> {
        if record.references.remove(id).is_some() {
            self.records.save(record)?;
        }
        self.reconcile_or_log(record);
        match record.references.is_empty() {
            true => self.release(record),
            false => Ok(()),
        }
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
        let (node, claim) = (&self.settings.node_id, claim(&record.name));
        self.daemon.unpublish_at(&staging, &record.volume, node, &claim)
    }

    /// Forgets references that are of no use any more if no container has the volume: those of
    /// processes of Docker that have ended, which forget what they were doing, and those that
    /// Docker may never have got to know. Where a container has it, its reference may be any.
    fn reconcile(&self, record: &mut Record) -> Result<()> {
        let (first_call, age) = (self.first_call, self.opened.elapsed());
        let is_stale = |reference: &Reference| reference.is_stale(first_call, age);
        if !record.references.values().any(is_stale) {
            return Ok(());
        }
        let before = record.references.clone();
        if self.engine.is_mounted_elsewhere(&record.volume)? {
            let all = record.references.values_mut();
            let doubtful = all.filter(|reference| reference.is_doubtful(first_call));
            doubtful.for_each(|reference| reference.unanswered = None);
        } else {
            record.references.retain(|_, reference| !is_stale(reference));
            tracing::warn!(
                name = record.name,
                references = before.len() - record.references.len(),
                "no container has it any more, and Docker does not unmount it; it was ended before"
            );
        }
        if record.references == before { Ok(()) } else { self.records.save(record) }
    }

    /// What is not known now, a later call finds.
    pub(super) fn reconcile_or_log(&self, record: &mut Record) {
        if let Err(error) = self.reconcile(record) {
            let name = &record.name;
            tracing::warn!(name, "whether a container has it is not known: {error}");
        }
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
                Ok(())
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
    let mut is_waiting = false;
    loop {
        match work() {
            Err(error) if error.kind() == Kind::Pending && begun.elapsed() < ANSWER_WITHIN => {
                if !is_waiting {
                    is_waiting = true;
                    tracing::info!("waiting: {error}");
                }
                thread::sleep(PENDING_POLL);
            }
            done => return done,
        }
    }
}
