//! The node engine: volumes become mounted filesystems and raw block volumes of this node.
//!
//! It probes, formats once, checks, mounts, binds and grows, for every orchestrator alike. It knows
//! no protocol of any of them; the daemon and its pools are behind [`Volumes`].
//!
//! - A volume is formatted only if its record says that it never was, and all that is probed of its
//!   device is zero (`plan.rs`, `probe.rs`).
//! - What is done is on stable storage before it is done (`state.rs`); each call can be repeated
//!   after a crash at any point.
//! - There is one lock a volume, which a mkfs or fsck also has that outlives this process
//!   (`lock.rs`). Every call answers in time, while its work may go on (`jobs.rs`).
//! - Nothing is deleted but one empty mount point at a time (`mounts.rs`).
#![forbid(unsafe_code)]

mod disk;
mod error;
mod expand;
mod find;
mod force;
mod fs;
mod group;
mod health;
mod jobs;
mod lock;
mod lost;
mod mountable;
mod mountinfo;
mod mounts;
mod options;
mod plan;
mod probe;
mod publish;
mod stage;
mod state;
mod stats;
mod tools;
mod volumes;

use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use error::{Error, Kind, Result};
pub use find::Known;
pub use fs::Fs;
pub use health::{Problem, Severity};
pub use mountable::Wanted;
pub use mounts::{make_dir, remove_dir};
pub use state::boot_id;
pub use stats::{FilesystemStats, Stats};
pub use tools::Tools;
pub use volumes::{Attach, Device, Format, Front, RAW, Record, Volumes};

use error::invalid;
use health::Problems;
use jobs::Jobs;
use lock::VolumeLock;
use state::{Phase, State, States, fingerprint, is_plain_path};

/// How long a call waits for its work: orchestrators want an answer within 10 s.
const ANSWER_WITHIN: Duration = Duration::from_secs(8);

/// The least and the most seconds of [`StageRequest::force_unstage_after`].
const FORCE_UNSTAGE_AFTER_S: RangeInclusive<u64> = 10..=86400;
/// How they are written, for messages.
pub const FORCE_UNSTAGE_AFTER_FORM: &str = "seconds, from 10 to 86400";

/// Reads [`StageRequest::force_unstage_after`]; `None` for anything but
/// [`FORCE_UNSTAGE_AFTER_FORM`].
#[must_use]
pub fn parse_force_unstage_after(text: &str) -> Option<Duration> {
    let seconds = sheave_core::parse_digits(text)?;
    FORCE_UNSTAGE_AFTER_S.contains(&seconds).then(|| Duration::from_secs(seconds))
}

/// How a volume is used. Its `Debug` leaves the options out, so that they do not get into a log.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Access {
    /// As a filesystem, with options as mount(8) has them, which may be secret.
    Mount {
        /// Its type.
        fs: Fs,
        /// Each may hold several, separated by commas.
        options: Vec<String>,
    },
    /// As a raw block device.
    Block,
}

/// Make a volume ready for use on this node.
#[derive(Clone, Debug)]
pub struct StageRequest {
    /// Its id.
    pub volume: String,
    /// A directory that is there.
    pub staging: PathBuf,
    /// How it is used.
    pub access: Access,
    /// Whether a filesystem may be made on it, if it never had one and is empty.
    pub may_format: bool,
    /// How its device is made.
    pub attach: Attach,
    /// How long unstaging waits for storage that hangs, in whole seconds. After it the device is
    /// ended by force, and what was not flushed may be lost. For ever by default.
    pub force_unstage_after: Option<Duration>,
    /// What uses it, such as `csi`.
    pub user: &'static str,
}

/// Show a staged volume at a place.
#[derive(Clone, Debug)]
pub struct PublishRequest {
    /// Its id.
    pub volume: String,
    /// Where it is staged.
    pub staging: PathBuf,
    /// The place, which is made. Its directory is there.
    pub target: PathBuf,
    /// How it is used.
    pub access: Access,
    /// Whether this place refuses writes.
    pub read_only: bool,
    /// Whether it may be at several places.
    pub is_shared: bool,
    /// More arguments, which are the same for an equal call.
    pub mode: String,
    /// Of the publication to this node, if the caller knows it.
    pub epoch: Option<u64>,
    /// As of its [`StageRequest`], should its state be lost.
    pub force_unstage_after: Option<Duration>,
}

/// The volumes of this node.
pub struct Node {
    engine: Arc<Engine>,
    jobs: Jobs,
    answer_within: Duration,
}

/// What all work needs.
struct Engine {
    volumes: Arc<dyn Volumes>,
    states: States,
    tools: Tools,
    problems: Problems,
}

impl Engine {
    fn lock(&self, volume: &str) -> Result<VolumeLock> {
        // It may have been removed since this process was started.
        self.states.make()?;
        VolumeLock::take(self.states.lock_path(volume), volume)
    }
}

impl Node {
    /// An engine whose state is in this directory.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open(state_dir: PathBuf, volumes: Arc<dyn Volumes>, tools: Tools) -> Result<Self> {
        let states = States::open(state_dir)?;
        let engine = Engine { volumes, states, tools, problems: Problems::default() };
        Ok(Self { engine: Arc::new(engine), jobs: Jobs::default(), answer_within: ANSWER_WITHIN })
    }

    /// The same with another time in which calls answer.
    #[must_use]
    pub fn answering_within(self, answer_within: Duration) -> Self {
        Self { answer_within, ..self }
    }

    /// Whether this user has volumes staged that no pod uses, so that the orchestrator is about to
    /// have them unstaged.
    ///
    /// # Errors
    /// When the directory of states cannot be read.
    pub fn is_giving_back(&self, user: &str) -> Result<bool> {
        let idle = |state: &State| {
            // States of before had no user.
            let is_own = state.user == user || state.user.is_empty();
            let is_idle = state.targets.is_empty() && state.phase != Phase::Staging;
            is_own && is_idle && !state.is_stale()
        };
        Ok(self.engine.states.all()?.0.iter().any(idle))
    }

    /// Makes a volume ready for use: attached, and mounted unless it is a raw block volume.
    ///
    /// # Errors
    /// [`Kind::Refused`] when it must not be mounted or formatted, [`Kind::Exists`] when it is
    /// staged otherwise, and what the daemon says.
    pub fn stage(&self, request: StageRequest) -> Result<()> {
        check_paths(&[&request.staging])?;
        let call = format!("{request:?} {}", request.access.fingerprint());
        let volume = request.volume.clone();
        self.run(&volume, "staging", call, move |engine| engine.stage(&request))
    }

    /// Undoes [`Node::stage`]: when this returns, the device is gone. Done if it is not staged.
    ///
    /// # Errors
    /// [`Kind::Refused`] while it is published or mounted by other means.
    pub fn unstage(&self, volume: &str, staging: &Path) -> Result<()> {
        check_paths(&[staging])?;
        let (id, staging) = (volume.to_owned(), staging.to_owned());
        self.run(volume, "unstaging", format!("unstage {staging:?}"), move |engine| {
            engine.unstage(&id, &staging)
        })
    }

    /// The same for a volume of [`Node::unfinished`], if it still is one.
    ///
    /// # Errors
    /// As for [`Node::unstage`].
    pub fn unstage_unfinished(&self, volume: &str, user: &'static str) -> Result<()> {
        let id = volume.to_owned();
        self.run(volume, "unstaging", format!("unstage unfinished of {user}"), move |engine| {
            engine.unstage_unfinished(&id, user)
        })
    }

    /// Shows a staged volume at a place.
    ///
    /// # Errors
    /// [`Kind::Refused`] when it is not staged from its own device, or is elsewhere and not shared;
    /// [`Kind::Exists`] when it is there with other arguments.
    pub fn publish(&self, request: PublishRequest) -> Result<()> {
        check_paths(&[&request.staging, &request.target])?;
        let call = format!("{request:?} {}", request.access.fingerprint());
        let volume = request.volume.clone();
        self.run(&volume, "publishing", call, move |engine| engine.publish(&request))
    }

    /// Undoes [`Node::publish`] and removes the place. Done if there is nothing.
    ///
    /// # Errors
    /// [`Kind::Refused`] when something else is there, which is left.
    pub fn unpublish(&self, volume: &str, target: &Path) -> Result<()> {
        check_paths(&[target])?;
        let (id, target) = (volume.to_owned(), target.to_owned());
        self.run(volume, "unpublishing", format!("unpublish {target:?}"), move |engine| {
            engine.unpublish(&id, &target)
        })
    }

    /// Makes device and filesystem as long as the volume is by now, and returns its bytes. `path`
    /// is where it is staged or published.
    ///
    /// # Errors
    /// [`Kind::OutOfRange`] when the volume is shorter than required.
    pub fn expand(&self, volume: &str, path: &Path, required: Option<u64>) -> Result<u64> {
        check_paths(&[path])?;
        let (id, path) = (volume.to_owned(), path.to_owned());
        let call = format!("expand {path:?} {required:?}");
        self.run(volume, "growing", call, move |engine| engine.expand(&id, &path, required))
    }

    /// How full a volume is. `path` is where it is staged or published.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when it is not there.
    pub fn stats(&self, volume: &str, path: &Path) -> Result<Stats> {
        check_paths(&[path])?;
        let (id, path) = (volume.to_owned(), path.to_owned());
        // Beside other work on the volume, which may take long.
        let job = format!("statistics of {volume}");
        self.run(&job, "reading statistics", format!("{path:?}"), move |engine| {
            engine.stats(&id, &path)
        })
    }

    /// What is wrong with a volume that is staged, or that was to be.
    ///
    /// # Errors
    /// When that cannot be found out.
    pub fn health(&self, volume: &str) -> Result<Vec<Problem>> {
        let id = volume.to_owned();
        let job = format!("health of {volume}");
        self.run(&job, "reading health", String::new(), move |engine| engine.health(&id))
    }

    fn run<T: Send + 'static>(
        &self,
        job: &str,
        verb: &'static str,
        call: String,
        work: impl FnOnce(&Engine) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let engine = Arc::clone(&self.engine);
        self.jobs.run(job, verb, call, self.answer_within, move || work(&engine))
    }
}

fn check_paths(paths: &[&Path]) -> Result<()> {
    match paths.iter().find(|path| !is_plain_path(path)) {
        None => Ok(()),
        Some(path) => {
            let path = sheave_core::printable(path);
            Err(invalid(format!("{path}: a path must be absolute and without ..")))
        }
    }
}

impl Access {
    /// A number that differs for different options.
    fn fingerprint(&self) -> u32 {
        match self {
            Self::Mount { options, .. } => fingerprint(options.join("\0").as_bytes()),
            Self::Block => 0,
        }
    }

    fn fs(&self) -> Option<Fs> {
        match self {
            Self::Mount { fs, .. } => Some(*fs),
            Self::Block => None,
        }
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount { fs, .. } => {
                f.debug_struct("Mount").field("fs", fs).finish_non_exhaustive()
            }
            Self::Block => f.write_str("Block"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_14_options_are_not_printed_and_still_told_apart() {
        let access =
            |option: &str| Access::Mount { fs: Fs::Ext4, options: vec![option.to_owned()] };
        let secret = access("password=hunter2");
        assert!(!format!("{secret:?}").contains("hunter2"), "{secret:?}");
        assert_ne!(secret.fingerprint(), access("noatime").fingerprint());
    }
}
