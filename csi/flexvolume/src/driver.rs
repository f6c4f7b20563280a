//! What the calls do.

use std::fs;
use std::io::{self, BufRead as _, BufReader, ErrorKind};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use sheave_client::{Daemon, DaemonVolumes, Volume, check_mountable};
use sheave_core::printable;
use sheave_node::{
    Attach, Error, Kind, Known, Node, PublishRequest, Result, StageRequest, Tools, make_dir,
};

use crate::device::Device;
use crate::options::Options;
use crate::{Answer, Call};

/// How long a call waits for its work. Kubernetes waits for most calls as long as they take; what
/// goes on after this is a mkfs or fsck, which holds its volume's lock.
const ANSWER_WITHIN: Duration = Duration::from_secs(100);
/// How long a call waits for volumes that it tidies up beside its own.
const TIDY_WITHIN: Duration = Duration::from_secs(2);
/// The same for one that has none, since it may repeat a call that was killed.
const TIDY_ALONE_WITHIN: Duration = Duration::from_secs(10);
/// How many volumes a call tidies up at most.
const TIDIED_MAX: usize = 16;

/// What uses the volumes that are staged by this driver.
const USER: &str = "flexvolume";

/// The claim of volumes that are published by a mount: no name of Kubernetes.
const CLAIM: &str = "flexvolume:mount";

/// The driver, in one call.
#[derive(Clone)]
pub struct Driver {
    daemon: Daemon,
    node_id: String,
    /// Whether kubelet stages volumes at directories of its own.
    attach: bool,
    state_dir: PathBuf,
    own_dir: PathBuf,
    tidier: Tidier,
}

/// Makes a command that does [`Call::Tidy`] with the same configuration.
pub type Tidier = Arc<dyn Fn() -> Command + Send + Sync>;

impl Driver {
    /// A driver of this node, with or without attach, whose node engine has its states in
    /// `state_dir`. Below `own_dir` it stages volumes for which Kubernetes names no directory.
    ///
    /// # Errors
    /// When that cannot be made. With attach it is not needed: controller-manager's host may have
    /// none.
    pub fn open(
        daemon: Daemon,
        node_id: String,
        attach: bool,
        state_dir: PathBuf,
        own_dir: &Path,
        tidier: Tidier,
    ) -> Result<Self> {
        if !attach {
            make_dir(own_dir)?;
        }
        let own_dir = match own_dir.canonicalize() {
            Err(error) if error.kind() == ErrorKind::NotFound => own_dir.to_owned(),
            resolved => resolved.map_err(|error| Error::of_io(printable(own_dir), &error))?,
        };
        Ok(Self { daemon, node_id, attach, state_dir, own_dir, tidier })
    }

    /// Does a call.
    ///
    /// # Errors
    /// One line for a person.
    pub fn call(&self, call: &Call) -> Result<Answer> {
        match call {
            Call::Init => Ok(Answer::initialized(self.attach)),
            Call::Attach { options, node } => self.attach(&Options::parse(options)?, node),
            Call::Detach { claim, node } => self.detach(claim, node),
            Call::IsAttached { options, node } => self.is_attached(&Options::parse(options)?, node),
            Call::WaitForAttach { device, options } => {
                let (device, _) = self.published(device, &Options::parse(options)?)?;
                Ok(Answer::device(device.to_string()))
            }
            Call::MountDevice { dir, device, options } => {
                self.mount_device(dir, device, Options::parse(options)?)
            }
            Call::UnmountDevice { dir } => self.unmount_device(dir),
            Call::Mount { dir, options } => self.mount(dir, &Options::parse(options)?),
            Call::Unmount { dir } => self.unmount(dir),
            Call::ExpandVolume { options, bytes } => {
                let volume = self.daemon.find(&Options::parse(options)?.volume)?;
                Ok(Answer::size(self.daemon.grow(&volume.id, *bytes)?))
            }
            Call::ExpandFs { options, bytes } => self.expand(&Options::parse(options)?, *bytes),
            Call::Tidy => self.tidy_here().map(|()| Answer::success()),
        }
    }

    fn engine(&self) -> Result<Node> {
        let (daemon, node_id) = (self.daemon.clone(), self.node_id.clone());
        let volumes = Arc::new(DaemonVolumes { daemon, node_id });
        let engine = Node::open(self.state_dir.clone(), volumes, Tools::from_env())?;
        Ok(engine.answering_within(ANSWER_WITHIN))
    }

    fn attach(&self, options: &Options, node: &str) -> Result<Answer> {
        if options.claim.is_empty() {
            let why = "the options have no kubernetes.io/pvOrVolumeName, by which it is detached";
            return Err(Error::new(Kind::Invalid, why));
        }
        check_claim(&options.claim)?;
        let volume = self.daemon.find(&options.volume)?;
        let epoch = self.daemon.publish(&volume, node, options.read_only, &options.claim)?;
        let device = Device { volume: volume.id, epoch, node: node.to_owned() };
        Ok(Answer::device(device.to_string()))
    }

    /// What this driver has not published is left as it is.
    fn detach(&self, claim: &str, node: &str) -> Result<Answer> {
        check_claim(claim)?;
        let (found, unknown) = self.daemon.published_as(claim, node)?;
        // A pool that cannot be asked holds up no volume of another one.
        if let Some(unknown) = unknown.filter(|_| found.is_empty()) {
            return Err(unknown);
        }
        for id in found {
            if node == self.node_id {
                self.finish(&id)?;
            }
            self.daemon.unpublish_as(&id, node, claim)?;
        }
        Ok(Answer::success())
    }

    /// Takes away a volume of this node that calls which were killed have left: kubelet does not
    /// repeat them once nothing is mounted.
    fn finish(&self, volume: &str) -> Result<()> {
        let engine = self.engine()?;
        match engine.unfinished(USER)?.iter().any(|known| known.volume == volume) {
            true => engine.unstage_unfinished(volume, USER),
            false => Ok(()),
        }
    }

    fn is_attached(&self, options: &Options, node: &str) -> Result<Answer> {
        let attached = match self.daemon.find(&options.volume) {
            Ok(volume) => is_published(&volume, node, None),
            Err(error) if error.kind() == Kind::NotFound => false,
            Err(error) => return Err(error),
        };
        Ok(Answer::attached(attached))
    }

    /// The publication that a device stands for, and its volume.
    fn published(&self, text: &str, options: &Options) -> Result<(Device, Volume)> {
        let refused = |why: String| Err(Error::new(Kind::Refused, why));
        let shown = printable(text);
        let Some(device) = Device::parse(text) else {
            return refused(format!("device {shown}: it is none of this driver's attach"));
        };
        let volume = self.daemon.find(&options.volume)?;
        if volume.id != device.volume {
            let why = format!("it is of another volume than {}, {}", volume.name, volume.id);
            return refused(format!("device {shown}: {why}"));
        }
        if !is_published(&volume, &device.node, Some(device.epoch)) {
            let why = "its volume is not attached to the node, or was attached anew since";
            return refused(format!("device {shown}: {why}"));
        }
        if device.node != self.node_id {
            let why =
                format!("it is attached to node {}, and this is {}", device.node, self.node_id);
            let advice = "set node in flexvolume.toml if that is wrong";
            return refused(format!("device {shown}: {why}; {advice}"));
        }
        Ok((device, volume))
    }

    fn mount_device(&self, dir: &Path, device: &str, options: Options) -> Result<Answer> {
        let (Device { volume, epoch, .. }, found) = self.published(device, &options)?;
        check_mountable(&found, &options.access, true, options.read_only)?;
        let engine = self.engine()?;
        engine.stage(stage(volume, dir.to_owned(), options.read_only, epoch, &options))?;
        Ok(Answer::success())
    }

    fn unmount_device(&self, dir: &Path) -> Result<Answer> {
        let engine = self.engine()?;
        if let Some(known) = own_at(&engine, dir)? {
            engine.unstage(&known.volume, dir)?;
        }
        let _ = self.tidy(TIDY_WITHIN);
        Ok(Answer::success())
    }

    fn mount(&self, dir: &Path, options: &Options) -> Result<Answer> {
        let volume = self.daemon.find(&options.volume)?;
        let engine = self.engine()?;
        let known = engine.known(&volume.id)?.filter(|known| known.is_staged);
        let own = self.own_staging(&volume.id);
        let staged = match known {
            Some(known) if known.staging != own && self.attach && is_own(&known.user) => known,
            Some(known) if known.staging != own => {
                let why = format!(
                    "volume {} is in use on this node by CSI or Docker, at {}; end that first",
                    volume.id,
                    printable(&known.staging)
                );
                return Err(Error::new(Kind::Refused, why));
            }
            known => self.stage_here(&engine, &volume, own, known, options)?,
        };
        let shown = self.show(&engine, dir, &staged, options);
        if shown.as_ref().is_err_and(|error| error.kind().is_final()) {
            // A pod that is not begun again is not unmounted.
            self.release(&engine, &volume.id)?;
        }
        shown.map(|()| Answer::success())
    }

    fn show(&self, engine: &Node, dir: &Path, staged: &Known, options: &Options) -> Result<()> {
        if staged.read_only && !options.read_only {
            let why = format!(
                "volume {} is in use read-only on this node, and this pod wants to write; end the \
                 pods that read it first",
                staged.volume
            );
            return Err(Error::new(Kind::Refused, why));
        }
        engine.publish(PublishRequest {
            volume: staged.volume.clone(),
            staging: staged.staging.clone(),
            target: dir.to_owned(),
            access: options.access.clone(),
            read_only: options.read_only,
            is_shared: true,
            mode: String::new(),
            epoch: staged.epoch,
            force_unstage_after: options.force_unstage_after,
        })
    }

    /// Publishes a volume to this node and stages it, unless that is done.
    fn stage_here(
        &self,
        engine: &Node,
        volume: &Volume,
        staging: PathBuf,
        known: Option<Known>,
        options: &Options,
    ) -> Result<Known> {
        let is_staged = known.is_some();
        let read_only = known.map_or(options.read_only, |known| known.read_only);
        if !is_staged {
            check_mountable(volume, &options.access, true, read_only)?;
        }
        let node = &self.node_id;
        let epoch = self.daemon.publish_at(&staging, volume, node, read_only, CLAIM)?;
        let id = volume.id.clone();
        let staged = engine.stage(stage(id, staging.clone(), read_only, epoch, options));
        if let Err(error) = staged {
            // Kubernetes does not unmount what was not mounted. What is being staged is left to
            // the next call.
            if engine.known(&volume.id)?.is_none_or(|known| known.staging != staging) {
                self.daemon.unpublish_at(&staging, &volume.id, &self.node_id, CLAIM)?;
            }
            return Err(error);
        }
        let (volume, user) = (volume.id.clone(), USER.to_owned());
        let (epoch, targets) = (Some(epoch), Vec::new());
        Ok(Known { volume, user, is_staged: true, staging, targets, epoch, read_only })
    }

    fn unmount(&self, dir: &Path) -> Result<Answer> {
        let engine = self.engine()?;
        match own_at(&engine, dir)? {
            Some(known) => {
                engine.unpublish(&known.volume, dir)?;
                if let Err(error) = self.release(&engine, &known.volume) {
                    // Kubelet calls again only while the directory is there. Without it the next
                    // call about any volume releases this one.
                    let _ = make_dir(dir);
                    return Err(error);
                }
                // That of others is not this pod's.
                let _ = self.tidy(TIDY_WITHIN);
            }
            // Done before, perhaps by a call that was killed in the middle.
            None => self.tidy(TIDY_ALONE_WITHIN)?,
        }
        Ok(Answer::success())
    }

    /// Undoes [`Self::stage_here`] for a volume that no pod has any more.
    fn release(&self, engine: &Node, volume: &str) -> Result<()> {
        let own = self.own_staging(volume);
        let is_used = |known: &Known| self.is_used(known);
        match engine.known(volume)? {
            Some(known) if is_used(&known) => return Ok(()),
            None if !own.exists() => {}
            // Without a state it may be mounted there all the same, or a call that was killed has
            // left its lock.
            _ => match engine.unstage(volume, &own) {
                // Another pod may have come meanwhile.
                Err(_) if engine.known(volume)?.is_some_and(|known| is_used(&known)) => {
                    return Ok(());
                }
                unstaged => unstaged?,
            },
        }
        self.daemon.unpublish_at(&own, volume, &self.node_id, CLAIM)
    }

    /// Releases volumes that calls which were killed have left, in bounded time. One that hangs, or
    /// that another process works on, holds up no call: it is left to a later one. That takes a
    /// process of its own, as no process ends that waits in the kernel for storage.
    ///
    /// # Errors
    /// What keeps one of the others from being released.
    fn tidy(&self, within: Duration) -> Result<()> {
        if self.left_behind()?.is_empty() {
            return Ok(());
        }
        let fail = |error| Error::of_io("start a process", &error);
        let mut command = (self.tidier)();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.process_group(0).spawn().map_err(fail)?;
        let (sender, answered) = channel();
        let stdout = child.stdout.take();
        let reader = move || {
            let mut answer = String::new();
            let read = stdout.map(|stdout| BufReader::new(stdout).read_line(&mut answer));
            let _ = sender.send(read.and_then(io::Result::ok).map(|_| answer));
        };
        thread::Builder::new().name("tidy".to_owned()).spawn(reader).map_err(fail)?;
        match answered.recv_timeout(within) {
            Ok(answer) => answer
                .as_deref()
                .and_then(Answer::failed)
                .map_or(Ok(()), |why| Err(Error::new(Kind::Unavailable, why))),
            Err(_) => Ok(()),
        }
    }

    /// The same in this process, all at once.
    fn tidy_here(&self) -> Result<()> {
        let begun = Instant::now();
        let (sender, released) = channel();
        for (volume, staging) in self.left_behind()?.into_iter().take(TIDIED_MAX) {
            let (driver, sender) = (self.clone(), sender.clone());
            let take_away = move || match driver.own_staging(&volume) == staging {
                true => driver.release(&driver.engine()?, &volume),
                false => driver.engine()?.unstage_unfinished(&volume, USER),
            };
            // Without a thread it is left to a later call, too.
            let thread = thread::Builder::new().name("tidy".to_owned());
            let _ = thread.spawn(move || drop(sender.send(take_away())));
        }
        drop(sender);
        let mut failure = None;
        let left = || TIDY_ALONE_WITHIN.saturating_sub(begun.elapsed());
        // It ends when all have, too.
        while let Ok(released) = released.recv_timeout(left()) {
            let left = |error: &Error| matches!(error.kind(), Kind::Pending | Kind::TimedOut);
            failure = failure.or_else(|| released.err().filter(|error| !left(error)));
        }
        failure.map_or(Ok(()), Err)
    }

    /// Volumes that calls which were killed have left, with where they are staged: those of
    /// unfinished work, and those in our own directory that no pod has.
    fn left_behind(&self) -> Result<Vec<(String, PathBuf)>> {
        let engine = self.engine()?;
        let unfinished = engine.unfinished(USER)?.into_iter();
        let mut left: Vec<_> = unfinished.map(|known| (known.volume, known.staging)).collect();
        left.retain(|(volume, staging)| self.own_staging(volume) != *staging);
        let fail = |error| Error::of_io(printable(&self.own_dir), &error);
        let entries = match fs::read_dir(&self.own_dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(left),
            entries => entries.map_err(fail)?,
        };
        for entry in entries {
            let name = entry.map_err(fail)?.file_name();
            let Some(volume) = name.to_str().and_then(of_own_staging) else { continue };
            // One whose state cannot be read is not known to be left.
            if let Ok(known) = engine.known(&volume)
                && !known.is_some_and(|known| self.is_used(&known))
            {
                let staging = self.own_staging(&volume);
                left.push((volume, staging));
            }
        }
        Ok(left)
    }

    /// Whether a pod has a volume, or another caller of the engine.
    fn is_used(&self, known: &Known) -> bool {
        known.staging != self.own_staging(&known.volume) || !known.targets.is_empty()
    }

    fn expand(&self, options: &Options, bytes: u64) -> Result<Answer> {
        let volume = self.daemon.find(&options.volume)?;
        let engine = self.engine()?;
        let known = engine.known(&volume.id)?.filter(|known| known.is_staged).ok_or_else(|| {
            let why = format!("volume {} is not mounted on this node", volume.id);
            Error::new(Kind::NotFound, why)
        })?;
        // Kubernetes takes a FlexVolume for one that only kubelet grows, and calls expandvolume
        // for none (noop_expandable_plugin.go).
        self.daemon.grow(&volume.id, bytes)?;
        Ok(Answer::size(engine.expand(&volume.id, &known.staging, Some(bytes))?))
    }

    /// Where a volume is staged for which Kubernetes names no directory.
    fn own_staging(&self, volume: &str) -> PathBuf {
        self.own_dir.join(volume.replace('/', "_"))
    }
}

/// Refuses what is no name of Kubernetes, and may be the claim of another caller, such as Docker.
fn check_claim(claim: &str) -> Result<()> {
    if !claim.contains(':') {
        return Ok(());
    }
    let why = format!("{} is no name of a volume in Kubernetes", printable(claim));
    Err(Error::new(Kind::Invalid, why))
}

/// Whether a volume that is staged may be this driver's: older states do not say whose they are.
fn is_own(user: &str) -> bool {
    ["", USER].contains(&user)
}

/// The volume that is staged or published at this path by FlexVolume.
fn own_at(engine: &Node, dir: &Path) -> Result<Option<Known>> {
    match engine.known_at(dir)? {
        Some(Known { volume, user, .. }) if !is_own(&user) => {
            let dir = printable(dir);
            let why = format!("{dir}: {user} has volume {volume} there; it is left as it is");
            Err(Error::new(Kind::Refused, why))
        }
        known => Ok(known),
    }
}

/// The volume of such a directory: the name of a pool has no `_`.
fn of_own_staging(name: &str) -> Option<String> {
    let (pool, uuid) = name.split_once('_')?;
    Some(format!("{pool}/{uuid}"))
}

fn stage(
    volume: String,
    staging: PathBuf,
    read_only: bool,
    epoch: u64,
    options: &Options,
) -> StageRequest {
    let attach = Attach { read_only, epoch: Some(epoch), front: options.front };
    let (access, force_unstage_after) = (options.access.clone(), options.force_unstage_after);
    StageRequest {
        volume,
        staging,
        access,
        may_format: true,
        attach,
        force_unstage_after,
        user: USER,
    }
}

/// Whether a node has a volume, by a publication of this epoch if one is given.
fn is_published(volume: &Volume, node: &str, epoch: Option<u64>) -> bool {
    let is_it = |epoch: Option<u64>, has: u64| epoch.is_none_or(|epoch| epoch == has);
    let mut all = volume.publications.iter();
    volume.unrecorded || all.any(|has| has.node == node && is_it(epoch, has.epoch))
}
