//! What this node does with a volume: one file each, on stable storage before it is done, so that a
//! killed process knows on return what to finish or to undo.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sheave_core::{ErrorKind, printable};
use sheave_durable as durable;

use crate::force::uptime_s;
use crate::mountinfo::Number;
use crate::{Error, Kind, Result};

/// What this program writes and reads.
const FORMAT: u32 = 1;
/// A file's name is no longer (NAME_MAX is 255), with what is added to it.
const NAME_MAX: usize = 180;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// How far a volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// It is being staged, or that has failed in the middle.
    Staging,
    Staged,
    /// It is being unstaged, or that has failed in the middle.
    Unstaging,
}

/// A volume on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    format: u32,
    pub(crate) volume: String,
    pub(crate) phase: Phase,
    pub(crate) staging: PathBuf,
    /// The filesystem's type; none for a raw block volume.
    pub(crate) fs: Option<String>,
    /// Fingerprint of the mount options, which may be secret themselves.
    pub(crate) options: u32,
    pub(crate) read_only: bool,
    /// Of the publication to this node.
    pub(crate) epoch: Option<u64>,
    /// From which its staging path is mounted; none before it was attached.
    pub(crate) device: Option<StagedDevice>,
    /// Where it is published.
    pub(crate) targets: Vec<Target>,
    /// Seconds of unstaging after which the device of hanging storage is ended by force; never by
    /// default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) force_after_s: Option<u64>,
    /// When unstaging has begun, in seconds since the node was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unstaging_since_s: Option<u64>,
    /// What uses it; empty if that is not known.
    #[serde(default)]
    pub(crate) user: String,
    /// Which start of the node this is from (proc_sys_kernel(5)): mounts do not outlive it.
    boot: String,
}

/// A device, as it was when a volume was staged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StagedDevice {
    pub(crate) path: PathBuf,
    pub(crate) number: Number,
}

/// A place where a volume is published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Target {
    pub(crate) path: PathBuf,
    /// Fingerprint of the arguments; none if the state that had it was lost.
    pub(crate) arguments: Option<u32>,
}

/// The directory of all states.
#[derive(Clone, Debug)]
pub(crate) struct States {
    dir: PathBuf,
}

impl State {
    /// A volume that is about to be staged.
    pub(crate) fn staging(volume: &str, staging: PathBuf) -> Self {
        Self {
            format: FORMAT,
            volume: volume.to_owned(),
            phase: Phase::Staging,
            staging,
            fs: None,
            options: 0,
            read_only: false,
            epoch: None,
            device: None,
            targets: Vec::new(),
            force_after_s: None,
            unstaging_since_s: None,
            user: String::new(),
            boot: boot_id(),
        }
    }

    /// How long unstaging still waits for hanging storage; for ever if it is `None`.
    pub(crate) fn patience(&self) -> Option<Duration> {
        let since = self.unstaging_since_s?;
        let end = since.saturating_add(self.force_after_s?);
        Some(Duration::from_secs(end.saturating_sub(uptime_s())))
    }

    /// Whether calls of this user were staging or unstaging it, and no pod has it.
    pub(crate) fn is_unfinished_of(&self, user: &str) -> bool {
        self.user == user && self.phase != Phase::Staged && self.targets.is_empty()
    }

    /// Whether the node was started anew since it was written.
    pub(crate) fn is_stale(&self) -> bool {
        self.boot != boot_id()
    }
}

impl States {
    /// Opens the directory, and makes it if it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn open(dir: PathBuf) -> Result<Self> {
        let states = Self { dir };
        states.make()?;
        Ok(states)
    }

    /// Makes the directory, if it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn make(&self) -> Result<()> {
        let what = || format!("node state {}", printable(&self.dir));
        fs::create_dir_all(&self.dir).map_err(|error| Error::of_io(what(), &error))
    }

    /// Where the lock of a volume is.
    pub(crate) fn lock_path(&self, volume: &str) -> PathBuf {
        self.dir.join(format!("{}.lock", file_name(volume)))
    }

    /// Reads the state of a volume.
    ///
    /// # Errors
    /// When it cannot be read, or is not one of ours.
    pub(crate) fn load(&self, volume: &str) -> Result<Option<State>> {
        let path = self.path(volume);
        // What is mounted is not known, so neither is the outcome of any call.
        let wrong = |why: String| {
            Error::new(Kind::Unavailable, format!("{why}; or move it away to go on without"))
        };
        let state: State = match durable::read_unsealed(&path) {
            Ok(Some(state)) => state,
            Ok(None) => return Ok(None),
            Err(error) => return Err(wrong(error.to_string())),
        };
        if state.format != FORMAT || state.volume != volume {
            let (path, State { format, volume, .. }) = (printable(&path), state);
            return Err(wrong(format!("{path} has format {format} and is of volume {volume}")));
        }
        Ok(Some(state))
    }

    /// Reads all states. What cannot be read is left out, and is the second value.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub(crate) fn all(&self) -> Result<(Vec<State>, Option<Error>)> {
        let fail = |error| Error::of_io(printable(&self.dir), &error);
        let (mut found, mut unread) = (Vec::new(), None);
        for entry in fs::read_dir(&self.dir).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            if path.extension().is_none_or(|kind| kind != "json") {
                continue;
            }
            match durable::read_unsealed::<State>(&path) {
                Ok(Some(state)) if state.format == FORMAT => found.push(state),
                // Another process has removed it meanwhile.
                Ok(None) => {}
                Ok(Some(_)) => {
                    let why = format!("{}: its format is unknown", printable(&path));
                    unread = Some(Error::new(Kind::Unavailable, why));
                }
                Err(error) => unread = Some(of_durable(&error)),
            }
        }
        Ok((found, unread))
    }

    /// Writes the state of a volume, on stable storage when this returns.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn save(&self, state: &State) -> Result<()> {
        durable::replace(&self.path(&state.volume), state).map_err(|error| of_durable(&error))
    }

    /// The same of a volume that is being taken away, which is not in vain where there is no room:
    /// it goes on from what is mounted. On a full disk pods could not be ended otherwise.
    ///
    /// # Errors
    /// When it cannot be written for another reason.
    pub(crate) fn save_if_room(&self, state: &State) -> Result<()> {
        match self.save(state) {
            Err(error) if error.kind() == Kind::Exhausted => {
                tracing::warn!("{error}; the volume is taken away without");
                Ok(())
            }
            saved => saved,
        }
    }

    /// Forgets a volume.
    ///
    /// # Errors
    /// When its file cannot be removed.
    pub(crate) fn remove(&self, volume: &str) -> Result<()> {
        durable::remove(&self.path(volume)).map_err(|error| of_durable(&error))
    }

    fn path(&self, volume: &str) -> PathBuf {
        self.dir.join(format!("{}.json", file_name(volume)))
    }
}

fn of_durable(error: &sheave_core::Error) -> Error {
    let kind = match error.kind() {
        ErrorKind::NoMemory | ErrorKind::NoSpace => Kind::Exhausted,
        _ => Kind::Unavailable,
    };
    Error::new(kind, format!("node state: {error}"))
}

/// A name for the files of a volume. Different volumes have different ones but for a collision of
/// long names, which [`States::load`] notices.
fn file_name(volume: &str) -> String {
    let mut name = String::new();
    for byte in volume.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => name.push(byte.into()),
            _ => name.push_str(&format!("%{byte:02x}")),
        }
    }
    if name.len() > NAME_MAX {
        name.truncate(NAME_MAX);
        name.push_str(&format!("%-{:08x}", fingerprint(volume.as_bytes())));
    }
    name
}

/// A number that differs for different arguments.
pub(crate) fn fingerprint(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// Which start of the node this is (proc_sys_kernel(5)); empty if that is not known.
#[must_use]
pub fn boot_id() -> String {
    fs::read_to_string(BOOT_ID).unwrap_or_default().trim().to_owned()
}

/// Whether a directory's name is free of what no path of an orchestrator has.
pub(crate) fn is_plain_path(path: &Path) -> bool {
    let mut parts = path.components();
    path.is_absolute() && parts.all(|part| !matches!(part, std::path::Component::ParentDir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_whole_or_not_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let states = States::open(dir.path().join("node")).expect("a directory");
        assert_eq!(states.load("fast/1").expect("no state"), None);
        let mut state = State::staging("fast/1", "/stage".into());
        state.targets.push(Target { path: "/pod".into(), arguments: Some(7) });
        states.save(&state).expect("saved");
        assert_eq!(states.load("fast/1").expect("a state").as_ref(), Some(&state));
        assert!(!state.is_stale());
        // A process that was killed while it wrote.
        fs::write(dir.path().join("node/fast%2f1.new"), "{").expect("written");
        assert_eq!(states.load("fast/1").expect("a state").as_ref(), Some(&state));
        // What older programs wrote had no checksum.
        let json = serde_json::to_vec(&state).expect("JSON");
        fs::write(dir.path().join("node/fast%2f1.json"), json).expect("written");
        assert_eq!(states.load("fast/1").expect("a state"), Some(state));
        states.remove("fast/1").expect("removed");
        fs::write(dir.path().join("node/fast%2f1.new"), "{").expect("written");
        states.remove("fast/1").expect("gone already");
        assert!(!dir.path().join("node/fast%2f1.new").exists(), "what a killed process has left");
        assert_eq!(states.load("fast/1").expect("no state"), None);
    }

    #[test]
    fn rule_12_a_damaged_state_leaves_the_outcome_open() {
        let dir = tempfile::tempdir().expect("a directory");
        let states = States::open(dir.path().to_owned()).expect("a directory");
        for text in ["", "{}", "\0\0\0\0"] {
            fs::write(dir.path().join("fast%2f1.json"), text).expect("written");
            assert!(!states.load("fast/1").unwrap_err().kind().is_final(), "{text:?}");
        }
    }

    #[test]
    fn rule_15_names_of_any_length_and_characters_have_files_of_their_own() {
        let long = "ü".repeat(64);
        let names = ["a/b", "a%2fb", "a/../b", ".", "", &long, &format!("{long}x")].map(file_name);
        for name in &names {
            assert!(name.len() < 200 && !name.contains(['/', '.']), "{name}");
        }
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
    }
}
