//! Publishing: a staged volume is shown at the places where programs use it.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::mount::MountFlags;
use sheave_core::printable;

use crate::disk::Disk;
use crate::error::{invalid, refused};
use crate::mountinfo::{Mount, Mounts, Number};
use crate::mounts::{add_flags, bind, flags_at, make_target, remove_target, resolve, unmount_all};
use crate::options::Options;
use crate::state::{Phase, StagedDevice, State, Target, fingerprint};
use crate::{Access, Attach, Engine, Error, Kind, PublishRequest, Result, StageRequest};

impl Engine {
    /// Publishes a volume. Nothing is left of it after an error.
    pub(crate) fn publish(&self, request: &PublishRequest) -> Result<()> {
        let volume = &request.volume;
        let options = match &request.access {
            Access::Mount { options, .. } => Options::parse(options)?,
            Access::Block => Options::parse(&[])?,
        };
        let _lock = self.lock(volume)?;
        let mut state = self.staged(request, &options)?;
        let options = if request.read_only { options.read_only() } else { options };
        let disk = self.own_disk(&state)?;
        let target = self.target(request)?;
        if target.starts_with(&state.staging) {
            let why = "the target path is inside of the volume itself; use another path";
            return Err(invalid(format!("volume {volume}: {}: {why}", printable(&target))));
        }
        let arguments = arguments(request);
        let there = what_is_at(&target, &disk)?;
        let known = state.targets.iter().find(|known| known.path == target);
        match (known, there) {
            (Some(known), There::Ours) if !is_same(known, arguments, &options)? => {
                let why = format!(
                    "volume {volume} is published at {} with other arguments; unpublish it first",
                    printable(&target)
                );
                return Err(Error::new(Kind::Exists, why));
            }
            (Some(known), There::Ours) => {
                // An earlier call may have been ended before it had set them.
                add_flags(&target, options.own_flags())?;
                let is_known = known.arguments.is_some();
                return if is_known { Ok(()) } else { self.remember(state, &target, arguments) };
            }
            (_, There::Nothing) => {}
            (_, There::Ours | There::Other) => {
                let why = format!("{}: something is mounted there already", printable(&target));
                return Err(refused(format!("volume {volume}: {why}; unmount it first")));
            }
        }
        self.forget_gone(&mut state, &disk)?;
        state.targets.retain(|known| known.path != target);
        if let Some(other) = state.targets.first().filter(|_| !request.is_shared) {
            let why = format!(
                "volume {volume} is published at {}, and its access mode allows one place",
                printable(&other.path)
            );
            return Err(refused(why));
        }
        state.targets.push(Target { path: target.clone(), arguments: Some(arguments) });
        self.states.save(&state)?;
        self.show(&state, &disk, &target, &options).inspect_err(|_| {
            state.targets.retain(|known| known.path != target);
            // If that fails, the next call notices that the volume is not there.
            let _ = self.states.save(&state);
        })
    }

    /// The state of a volume that is staged as the request says.
    fn staged(&self, request: &PublishRequest, options: &Options) -> Result<State> {
        let volume = &request.volume;
        let not_staged = |why: &str| refused(format!("volume {volume}: {why}; stage it first"));
        let state = match self.states.load(volume)? {
            None => self.adopt_published(request, options)?,
            state => state.filter(|state| !state.is_stale() && state.phase == Phase::Staged),
        };
        let state = state.ok_or_else(|| not_staged("it is not staged on this node"))?;
        if resolve(&request.staging)?.as_ref() != Some(&state.staging) {
            return Err(not_staged("it is staged at another path"));
        }
        if request.access.fs().map(crate::Fs::name) != state.fs.as_deref() {
            return Err(not_staged("it is staged with another type"));
        }
        if request.epoch.is_some() && request.epoch != state.epoch {
            return Err(not_staged("it was published to this node anew since it was staged"));
        }
        Ok(state)
    }

    /// Adopts a volume whose state was lost after it was staged, as far as this request says how.
    fn adopt_published(
        &self,
        request: &PublishRequest,
        options: &Options,
    ) -> Result<Option<State>> {
        let volume = &request.volume;
        let (Some(staging), Some(device)) =
            (resolve(&request.staging)?, self.volumes.device(volume)?)
        else {
            return Ok(None);
        };
        let (read_only, epoch) = (device.read_only, request.epoch);
        let attach = Attach { read_only, epoch, ..Attach::default() };
        let staged = StageRequest {
            volume: volume.clone(),
            staging,
            access: request.access.clone(),
            may_format: false,
            attach,
            force_unstage_after: request.force_unstage_after,
            user: "",
        };
        self.adopt(&staged, &staged.state(staged.staging.clone(), options))
    }

    /// Keeps the arguments of a place whose state was lost.
    fn remember(&self, mut state: State, target: &Path, arguments: u32) -> Result<()> {
        for known in state.targets.iter_mut().filter(|known| known.path == target) {
            known.arguments = Some(arguments);
        }
        self.states.save(&state)
    }

    /// The device of a staged volume, from which alone its staging path may be mounted.
    fn own_disk(&self, state: &State) -> Result<Disk> {
        let volume = &state.volume;
        let gone = || refused(format!("volume {volume}: its device is gone; unstage it first"));
        let device = self.volumes.device(volume)?.ok_or_else(gone)?;
        let disk = Disk::at(&device.path).map_err(|error| error.of(volume))?;
        let disk = Disk { read_only: disk.read_only || device.read_only, ..disk };
        self.check_staged(state, &disk)?;
        Ok(disk)
    }

    /// Refuses a volume whose staging path is not mounted from its own device: what is written
    /// there would be on another disk.
    pub(crate) fn check_staged(&self, state: &State, disk: &Disk) -> Result<()> {
        if state.fs.is_none() {
            return Ok(());
        }
        let mounts = Mounts::read()?;
        if mounts.top(&state.staging).is_some_and(|top| top.is_of(disk.number)) {
            return Ok(());
        }
        Err(refused(format!(
            "volume {}: {} is not mounted from its device {}; stage it first",
            state.volume,
            printable(&state.staging),
            printable(&disk.path)
        )))
    }

    fn target(&self, request: &PublishRequest) -> Result<PathBuf> {
        let missing = || {
            let target = printable(&request.target);
            refused(format!("volume {}: {target}: its directory is missing", request.volume))
        };
        resolve(&request.target)?.ok_or_else(missing)
    }

    /// Forgets places at which the volume is not any more.
    fn forget_gone(&self, state: &mut State, disk: &Disk) -> Result<()> {
        let mut left = Vec::new();
        for target in std::mem::take(&mut state.targets) {
            if is_below(&Mounts::read()?, &target.path, disk) {
                left.push(target);
            }
        }
        state.targets = left;
        Ok(())
    }

    /// Makes the place and shows the volume there. After an error it is as it was.
    fn show(&self, state: &State, disk: &Disk, target: &Path, options: &Options) -> Result<()> {
        let made = make_target(target, state.fs.is_some())?;
        // No mount keeps a program from writing to a raw device. The orchestrator gives its
        // programs the device for reading only (kubelet: by their control group).
        let source = if state.fs.is_some() { &state.staging } else { &disk.path };
        let shown = bind(source, target, options.own_flags());
        // What it was bound from may have been replaced since it was looked at.
        let shown = shown.and_then(|()| match what_is_at(target, disk)? {
            There::Ours => Ok(()),
            There::Nothing | There::Other => {
                unmount_all(target)?;
                let why = format!(
                    "volume {}: {} is not from its device {}; stage it again",
                    state.volume,
                    printable(target),
                    printable(&disk.path)
                );
                Err(refused(why))
            }
        });
        shown.inspect_err(|_| {
            if made {
                let _ = remove_target(target);
            }
        })
    }

    /// Unpublishes a volume, and removes the place.
    pub(crate) fn unpublish(&self, volume: &str, target: &Path) -> Result<()> {
        let _lock = self.lock(volume)?;
        let state = self.states.load(volume)?;
        let Some(target) = resolve(target)? else {
            return self.forget(state, target);
        };
        if state.as_ref().is_some_and(|state| state.staging == target) {
            return Err(refused(format!("volume {volume}: that is where it is staged")));
        }
        if Mounts::read()?.top(&target).is_some() {
            if !self.is_own(volume, state.as_ref(), &target)? {
                let why = format!("something else is mounted at {}", printable(&target));
                return Err(refused(format!("volume {volume}: {why}; it is left as it is")));
            }
            unmount_all(&target)?;
        }
        remove_target(&target)?;
        self.forget(state, &target)
    }

    /// Whether something at a path is from the volume's device, which may be gone by now.
    fn is_own(&self, volume: &str, state: Option<&State>, target: &Path) -> Result<bool> {
        let known = state.filter(|state| !state.is_stale());
        let device = match known.and_then(|state| state.device.clone()) {
            Some(device) => device,
            None => match self.volumes.device(volume)? {
                Some(device) => {
                    StagedDevice { number: Disk::at(&device.path)?.number, path: device.path }
                }
                None => return Ok(false),
            },
        };
        let mounts = Mounts::read()?;
        let is_there = |mount: &&Mount| mount.was_of(&device) || mount.is_file(&device.path);
        let is_mounted = mounts.at(target).iter().any(is_there);
        Ok(is_mounted || is_device(target, device.number))
    }

    fn forget(&self, state: Option<State>, target: &Path) -> Result<()> {
        let Some(mut state) = state else { return Ok(()) };
        let count = state.targets.len();
        state.targets.retain(|known| known.path != target);
        if state.targets.len() == count { Ok(()) } else { self.states.save_if_room(&state) }
    }
}

/// What is mounted at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum There {
    Nothing,
    /// The volume.
    Ours,
    Other,
}

fn what_is_at(target: &Path, disk: &Disk) -> Result<There> {
    let mounts = Mounts::read()?;
    let Some(top) = mounts.top(target) else { return Ok(There::Nothing) };
    let is_ours = top.is_of(disk.number) || is_device(target, disk.number);
    Ok(if is_ours { There::Ours } else { There::Other })
}

/// Whether a volume is at a path, also where something else was mounted over it since.
fn is_below(mounts: &Mounts, target: &Path, disk: &Disk) -> bool {
    let is_there = |mount: &&Mount| mount.is_of(disk.number) || mount.is_file(&disk.path);
    mounts.at(target).iter().any(is_there) || is_device(target, disk.number)
}

/// Whether a path is this device.
pub(crate) fn is_device(path: &Path, number: Number) -> bool {
    let metadata = fs::symlink_metadata(path);
    metadata.is_ok_and(|metadata| {
        metadata.file_type().is_block_device() && Number::of(metadata.rdev()) == number
    })
}

/// Whether a volume was published at a place as it is asked for now, as far as that is known.
fn is_same(known: &Target, arguments: u32, options: &Options) -> Result<bool> {
    if let Some(had) = known.arguments {
        return Ok(had == arguments);
    }
    let has = flags_at(&Mounts::read()?, &known.path);
    Ok(has.contains(MountFlags::RDONLY) == options.is_read_only())
}

fn arguments(request: &PublishRequest) -> u32 {
    let PublishRequest { access, read_only, mode, is_shared, .. } = request;
    let options = access.fingerprint();
    fingerprint(format!("{access:?} {options} {read_only} {mode:?} {is_shared}").as_bytes())
}
