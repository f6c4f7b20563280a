//! Staging: a volume becomes a device of this node, and its filesystem is mounted.

use std::path::{Path, PathBuf};

use sheave_core::printable;

use crate::disk::Disk;
use crate::error::refused;
use crate::force::{ended_by_force, uptime_s};
use crate::fs::Fs;
use crate::lock::VolumeLock;
use crate::lost::places;
use crate::mountinfo::Mounts;
use crate::mounts::{Unmount, check_empty, mount, resolve, unmount_while};
use crate::options::Options;
use crate::plan::{Plan, plan};
use crate::probe::FsInfo;
use crate::state::{Phase, StagedDevice, State};
use crate::volumes::{Format, RAW};
use crate::{Access, Engine, Error, Kind, Problem, Result, StageRequest};

impl StageRequest {
    /// The state of the volume while it is being staged at this path.
    pub(crate) fn state(&self, staging: PathBuf, options: &Options) -> State {
        let mut state = State::staging(&self.volume, staging);
        state.fs = self.access.fs().map(|fs| fs.name().to_owned());
        state.options = options.fingerprint();
        state.read_only = self.attach.read_only;
        state.epoch = self.attach.epoch;
        state.force_after_s = self.force_unstage_after.map(|after| after.as_secs());
        self.user.clone_into(&mut state.user);
        state
    }
}

impl Engine {
    /// Stages a volume. Nothing is left of it after a final error.
    pub(crate) fn stage(&self, request: &StageRequest) -> Result<()> {
        let options = match &request.access {
            Access::Mount { fs, options } => {
                let options = Options::parse(options)?;
                options.check(*fs)?;
                options
            }
            Access::Block => Options::parse(&[])?,
        };
        let lock = self.lock(&request.volume)?;
        let staging = self.staging_dir(&request.staging)?;
        let mut state = request.state(staging, &options);
        match self.states.load(&request.volume)? {
            Some(before) if self.is_staged_equally(&before, &state, request)? => return Ok(()),
            Some(before) => self.clear(&before)?,
            None if self.adopt(request, &state)?.is_some() => return Ok(()),
            None => {}
        }
        check_free(&request.volume, &state.staging)?;
        if request.access.fs().is_some() {
            check_empty(&state.staging).map_err(|error| error.of(&request.volume))?;
        }
        self.states.save(&state)?;
        match self.stage_fresh(request, options, &mut state, &lock) {
            Ok(()) => {
                self.problems.clear(&request.volume);
                Ok(())
            }
            Err(error) if error.kind().is_final() => Err(self.undo(&state, error)),
            // Ended by the next call, in either direction.
            Err(error) => {
                if error.kind() == Kind::TimedOut {
                    self.problems.set(&request.volume, Problem::hangs(&error.to_string()));
                }
                Err(error)
            }
        }
    }

    fn staging_dir(&self, path: &Path) -> Result<PathBuf> {
        let missing = || {
            let why = "it is no directory; the orchestrator makes it before it calls";
            refused(format!("staging path {}: {why}", printable(path)))
        };
        let resolved = resolve(path)?.ok_or_else(missing)?;
        // Of a link, no mount point has the name.
        let metadata = std::fs::symlink_metadata(&resolved).map_err(|_| missing())?;
        if metadata.is_dir() { Ok(resolved) } else { Err(missing()) }
    }

    /// Whether a volume is staged as asked for already.
    ///
    /// # Errors
    /// When it is staged otherwise.
    fn is_staged_equally(
        &self,
        before: &State,
        wanted: &State,
        request: &StageRequest,
    ) -> Result<bool> {
        if before.phase != Phase::Staged || before.is_stale() {
            return Ok(false);
        }
        let volume = &before.volume;
        let same = (&before.staging, &before.fs, before.options, before.read_only)
            == (&wanted.staging, &wanted.fs, wanted.options, wanted.read_only);
        let Some(device) = self.volumes.device(volume)? else {
            // Its device was ended by other means.
            return self.check_unpublished(before).map(|()| false);
        };
        let disk = Disk::of(&device)?;
        let top = Mounts::read()?.top(&before.staging).cloned();
        let is_there = match (&before.fs, top) {
            (None, _) => true,
            (Some(_), Some(top)) => top.is_of(disk.number),
            (Some(_), None) => false,
        };
        if !is_there {
            return self.check_unpublished(before).map(|()| false);
        }
        if !same {
            let why = format!(
                "volume {volume} is staged at {} with another type, other options or another \
                 mode; unstage it first",
                printable(&before.staging)
            );
            return Err(Error::new(Kind::Exists, why));
        }
        if before.epoch != wanted.epoch {
            // Published once more to this node: the device has to be that of the new epoch.
            self.volumes.attach(volume, &request.attach)?;
        }
        let mut again = before.clone();
        (again.epoch, again.force_after_s) = (wanted.epoch, wanted.force_after_s);
        if again != *before {
            self.states.save(&again)?;
        }
        Ok(true)
    }

    /// Refuses to replace a device that pods still have mounted.
    fn check_unpublished(&self, before: &State) -> Result<()> {
        let mounts = Mounts::read()?;
        let Some(target) = before.targets.iter().find(|target| mounts.top(&target.path).is_some())
        else {
            return Ok(());
        };
        let why = format!(
            "volume {}: its device was ended while it is published at {}; delete the pods that \
             use it",
            before.volume,
            printable(&target.path)
        );
        Err(refused(why))
    }

    /// Takes away what an earlier staging has left, which was not finished or is outdated.
    fn clear(&self, before: &State) -> Result<()> {
        self.take_down(before).map(drop).map_err(|error| {
            let why =
                format!("volume {}: an earlier staging is in the way: {error}", before.volume);
            Error::new(if error.kind().is_final() { Kind::Unavailable } else { error.kind() }, why)
        })
    }

    fn stage_fresh(
        &self,
        request: &StageRequest,
        options: Options,
        state: &mut State,
        lock: &VolumeLock,
    ) -> Result<()> {
        let volume = &request.volume;
        let of_volume = |error: Error| error.of(volume);
        let device = self.volumes.attach(volume, &request.attach)?;
        let disk = Disk::of(&device).map_err(of_volume)?;
        // A device that is open is not ended, so its number becomes no other device's.
        let _held = disk.hold().map_err(of_volume)?;
        if self.volumes.device(volume)?.is_none_or(|now| now.path != device.path) {
            let why = format!("volume {volume}: its device was ended meanwhile; try again");
            return Err(Error::new(Kind::Unavailable, why));
        }
        state.device = Some(StagedDevice { path: disk.path.clone(), number: disk.number });
        self.states.save(state)?;
        let ready = match request.access.fs() {
            None => self.mark_raw(request),
            Some(fs) => self.stage_filesystem(request, fs, options, &disk, &state.staging, lock),
        };
        ready.map_err(of_volume)?;
        state.phase = Phase::Staged;
        self.states.save(state)
    }

    /// A program may write anything to it, so it is never formatted from here on.
    pub(crate) fn mark_raw(&self, request: &StageRequest) -> Result<()> {
        let record = self.volumes.record(&request.volume)?;
        if record.never_format
            || request.attach.read_only
            || matches!(record.format, Format::Done(_))
        {
            return Ok(());
        }
        let raw = Format::Done(RAW.to_owned());
        self.volumes.mark(&request.volume, &raw, request.attach.epoch)
    }

    fn stage_filesystem(
        &self,
        request: &StageRequest,
        fs: Fs,
        mut options: Options,
        disk: &Disk,
        staging: &Path,
        lock: &VolumeLock,
    ) -> Result<()> {
        let read_only = request.attach.read_only || disk.read_only;
        let found = self.prepare(request, fs, read_only || options.is_read_only(), disk, lock)?;
        if read_only {
            options = options.read_only().with(fs.read_only_options());
        }
        mount(disk, fs, &options, staging)?;
        let is_ours = Mounts::read()?.top(staging).is_some_and(|top| top.is_of(disk.number));
        if !is_ours {
            let why = format!("{}: another device is mounted there", printable(staging));
            return Err(Error::new(Kind::Unavailable, why));
        }
        let has_room = found.is_some_and(|found| found.size + found.block <= disk.size);
        if has_room && !options.is_read_only() {
            // A clone may be longer than what it was made from, and no other call grows it.
            fs.grow(&self.tools, &disk.path, staging, lock)?;
        }
        Ok(())
    }

    /// Makes sure that a device has a filesystem that can be mounted, and returns what is known of
    /// one that was there.
    fn prepare(
        &self,
        request: &StageRequest,
        fs: Fs,
        read_only: bool,
        disk: &Disk,
        lock: &VolumeLock,
    ) -> Result<Option<FsInfo>> {
        let mut record = self.volumes.record(&request.volume)?;
        record.never_format |= !request.may_format;
        let content = disk.probe()?;
        let planned = plan(fs, read_only, &record, &content).map_err(|refusal| {
            if refusal.lost {
                self.problems.set(&request.volume, Problem::data_loss(&refusal.why));
            }
            Error::from(refusal)
        })?;
        let done = Format::Done(fs.name().to_owned());
        let found = match planned {
            Plan::Mount(found) => found,
            Plan::MarkAndMount(found) => {
                self.volumes.mark(&request.volume, &done, request.attach.epoch)?;
                found
            }
            Plan::FinishFormat(_) if fs.is_whole(&self.tools, &disk.path, lock)? => {
                disk.sync()?;
                self.volumes.mark(&request.volume, &done, request.attach.epoch)?;
                return Ok(None);
            }
            Plan::FinishFormat(found) if found.was_mounted => {
                let why = "its first formatting was interrupted, and it was mounted since, not by \
                           this program, and is damaged; repair it by hand (e2fsck)";
                return Err(refused(why));
            }
            Plan::Format | Plan::FinishFormat(_) => {
                self.format(request, fs, disk, lock)?;
                return Ok(None);
            }
        };
        if !read_only && !found.clean {
            fs.check(&self.tools, &disk.path, lock).inspect_err(|error| {
                if error.kind() == Kind::Refused {
                    self.problems.set(&request.volume, Problem::data_loss(&error.to_string()));
                }
            })?;
        }
        Ok(Some(found))
    }

    /// Makes a filesystem. The record says so before the first byte is written, and says that it is
    /// whole before it is mounted: what lies between can be repeated.
    fn format(&self, request: &StageRequest, fs: Fs, disk: &Disk, lock: &VolumeLock) -> Result<()> {
        let (volume, name) = (&request.volume, fs.name().to_owned());
        fs.check_size(disk.size)?;
        fs.check_tools(&self.tools)?;
        self.volumes.mark(volume, &Format::Begun(name.clone()), request.attach.epoch)?;
        tracing::info!(volume = %printable(volume), fs = fs.name(), "formatting");
        fs.make(&self.tools, disk, lock)?;
        disk.sync()?;
        self.volumes.mark(volume, &Format::Done(name), request.attach.epoch)
    }

    /// Undoes a staging that has failed for good.
    fn undo(&self, state: &State, error: Error) -> Error {
        match self.take_down(state) {
            Ok(_) => error,
            Err(left) => {
                let kind = if left.kind().is_final() { Kind::Unavailable } else { left.kind() };
                error.and(format!("and it could not be undone: {left}")).with_kind(kind)
            }
        }
    }

    /// Unmounts, ends the device and forgets the volume. Can be repeated after any failure. Returns
    /// what was lost, if hanging storage was ended by force.
    pub(crate) fn take_down(&self, state: &State) -> Result<Option<Problem>> {
        let mut unstaging = state.clone();
        unstaging.phase = Phase::Unstaging;
        unstaging.unstaging_since_s.get_or_insert_with(uptime_s);
        self.states.save_if_room(&unstaging)?;
        let lost = self.patiently(&unstaging, |is_dead| {
            if let Some(device) = state.device.as_ref().filter(|_| !state.is_stale()) {
                let how = if is_dead { Unmount::Lazily } else { Unmount::Whole };
                unmount_while(&state.staging, how, |mount| mount.was_of(device))?;
            }
            self.volumes.detach(&state.volume)
        })?;
        self.states.remove(&state.volume)?;
        Ok(lost)
    }

    /// Unstages a volume. Done if it is not staged.
    pub(crate) fn unstage(&self, volume: &str, staging: &Path) -> Result<()> {
        let _lock = self.lock(volume)?;
        let asked = resolve(staging)?;
        let Some(state) = self.states.load(volume)? else {
            // A call that was killed while it wrote the state has left a file.
            self.states.remove(volume)?;
            return self.unstage_unknown(volume, asked.as_deref());
        };
        if asked.as_ref().is_some_and(|asked| *asked != state.staging) {
            let why = format!(
                "volume {volume} is staged at {}, not at {}",
                printable(&state.staging),
                printable(staging)
            );
            return Err(refused(why));
        }
        self.unstage_known(&state)
    }

    /// Unstages what a call of this user has left in the middle. Another call may have ended since
    /// that was seen, so it is looked at again under the lock.
    pub(crate) fn unstage_unfinished(&self, volume: &str, user: &str) -> Result<()> {
        let _lock = self.lock(volume)?;
        match self.states.load(volume)? {
            Some(state) if state.is_unfinished_of(user) => self.unstage_known(&state),
            _ => Ok(()),
        }
    }

    fn unstage_known(&self, state: &State) -> Result<()> {
        let volume = &state.volume;
        if !state.is_stale() {
            self.check_unused(state)?;
        }
        match self.take_down(state)? {
            None => {
                self.problems.clear(volume);
                Ok(())
            }
            Some(lost) => {
                let error = ended_by_force(volume, &lost);
                self.problems.set(volume, lost);
                Err(error)
            }
        }
    }

    /// Refuses to unstage what is still published, or mounted by other means.
    fn check_unused(&self, state: &State) -> Result<()> {
        let Some(device) = self.volumes.device(&state.volume)? else { return Ok(()) };
        let disk = Disk::at(&device.path)?;
        let mounts = Mounts::read()?;
        let published = state.targets.iter().map(|target| &*target.path);
        let mut used = published.filter(|path| mounts.top(path).is_some());
        let mut other = mounts.of(disk.number).map(|mount| &*mount.target);
        let other = other.find(|at| *at != state.staging);
        // If the device has ended since the daemon was asked, its number may be another volume's.
        let is_there = other.is_some() && self.volumes.device(&state.volume)?.is_some();
        match used.next().or_else(|| other.filter(|_| is_there)) {
            None => Ok(()),
            Some(path) => {
                let why = format!(
                    "volume {} is still mounted at {}; unpublish or unmount it first",
                    state.volume,
                    printable(path)
                );
                Err(refused(why))
            }
        }
    }

    /// Without a state, what is mounted is the volume's only if it is from its device.
    fn unstage_unknown(&self, volume: &str, staging: Option<&Path>) -> Result<()> {
        let Some(device) = self.volumes.device(volume)? else { return Ok(()) };
        let disk = Disk::at(&device.path)?;
        let mut others = places(&Mounts::read()?, &disk).into_iter();
        if let Some(other) = others.find(|place| Some(&**place) != staging)
            && self.volumes.device(volume)?.is_some()
        {
            let why = format!("volume {volume} is still mounted at {}", printable(&other));
            return Err(refused(why).and("unpublish or unmount it first"));
        }
        if let Some(path) = staging {
            unmount_while(path, Unmount::Whole, |mount| mount.is_of(disk.number))?;
        }
        self.volumes.detach(volume)
    }
}

/// Refuses a staging path at which something is mounted.
fn check_free(volume: &str, staging: &Path) -> Result<()> {
    if Mounts::read()?.top(staging).is_none() {
        return Ok(());
    }
    let why = format!("staging path {}: something else is mounted", printable(staging));
    Err(refused(format!("{why} there")).of(volume).and("unmount it first"))
}
