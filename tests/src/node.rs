//! A node with a stand-in for a kernel, and what tests of its devices share.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{Daemon, FakeKernel, Output, Wire, eventually, pattern, sheave};

/// A kernel, and a volume of a file with known content.
pub struct Node {
    /// The kernel, whose directory is also that of its daemons.
    pub kernel: FakeKernel,
    /// The file.
    pub image: String,
}

impl Default for Node {
    fn default() -> Self {
        Self::new()
    }
}

impl Node {
    /// Bytes of the volume.
    pub const SIZE: u64 = 1 << 20;

    /// A node without devices.
    #[must_use]
    pub fn new() -> Self {
        let kernel = FakeKernel::new();
        let image = kernel.scratch().filled("disk.img", Self::SIZE as usize);
        Self { kernel, image }
    }

    /// A path in its directory.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.kernel.scratch().path().join(name)
    }

    /// Starts a daemon with these arguments, and does not wait for it.
    #[must_use]
    pub fn start(&self, args: &[&str]) -> Daemon {
        Daemon::start(self.kernel.scratch(), |command| {
            let kernel = self.kernel.scratch().path();
            command.arg(sheave()).args(args).env("SHEAVE_FAKE_KERNEL", kernel);
        })
    }

    /// Starts a daemon, and waits until it answers.
    #[must_use]
    pub fn daemon(&self) -> Daemon {
        let daemon = self.start(&["daemon"]);
        daemon.wait_for_log(" ready ");
        daemon
    }

    /// How many records of devices there are.
    #[must_use]
    pub fn records(&self) -> usize {
        let entries = fs::read_dir(self.file("devices")).expect("the records").flatten();
        entries.filter(|entry| entry.path().extension().is_some_and(|kind| kind == "json")).count()
    }

    /// Checks that the only device has the image's content and can be written.
    ///
    /// # Panics
    /// When it has not, or cannot.
    #[track_caller]
    pub fn check_served(&self, device: &Path) {
        assert_eq!(self.kernel.devices(), [device]);
        let content = fs::read(&self.image).expect("the image");
        let mut wire = Wire::unix(device).expect("the device");
        let mut read = || wire.read(4096, 8192).expect("a reply").expect("data");
        assert_eq!(read(), content[4096..][..8192]);
        let mut wire = Wire::unix(device).expect("the device");
        assert_eq!(wire.write(512, &[7; 512]).expect("a reply"), 0);
        assert_eq!(wire.read(512, 512).expect("a reply").expect("data"), [7; 512]);
        assert_eq!(wire.write(512, &content[512..1024]).expect("a reply"), 0);
    }

    /// Checks that nothing is left of any device.
    ///
    /// # Panics
    /// When something is.
    #[track_caller]
    pub fn check_bare(&self, daemon: &Daemon) {
        assert_eq!(self.kernel.devices(), [] as [PathBuf; 0]);
        assert!(eventually(|| self.records() == 0), "a record is left:\n{}", daemon.log());
        assert!(!self.file("fake0").exists());
        assert_eq!(daemon.sheave("ls").ok(), "no devices\n");
    }
}

impl Daemon {
    /// Attaches a volume, and returns the path of its device.
    ///
    /// # Panics
    /// When it is refused.
    #[track_caller]
    pub fn attach(&self, volume: &str) -> PathBuf {
        PathBuf::from(self.sheave("attach").arg(volume).ok().trim_end())
    }

    /// What it says of its only device.
    ///
    /// # Panics
    /// When there are none or more.
    #[track_caller]
    #[must_use]
    pub fn device(&self) -> Value {
        let list: Value = serde_json::from_str(&self.sheave("ls --json").ok()).expect("JSON");
        let list = list.as_array().expect("a list");
        assert_eq!(list.len(), 1, "{list:?}");
        list[0].clone()
    }

    /// Waits until it serves its only device again, which another daemon has left.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn wait_for_recovery(&self) {
        self.wait_for_log("recovered");
        let is_served = || self.device()["waiting"].is_null();
        assert!(eventually(is_served), "it waits:\n{}", self.log());
    }
}

impl Output {
    /// Checks that a command failed with this text in its message.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn check_refused(&self, why: &str) {
        assert_eq!(self.status.code(), Some(1), "{}", self.describe());
        assert!(self.stderr.contains(why), "no {why:?}: {}", self.describe());
    }
}

/// Checks that a call of a plugin or driver failed with this text in its message.
///
/// # Panics
/// When it did not.
#[track_caller]
pub fn check_failed<T: std::fmt::Debug>(result: Result<T, String>, why: &str) {
    let found = result.expect_err("refused");
    assert!(found.contains(why), "no {why:?}: {found}");
}

/// Reads and writes a device without a pause, in its second half of [`Node::SIZE`] bytes, and
/// checks every answer.
pub struct Load {
    ended: Arc<AtomicBool>,
    ops: Arc<AtomicU64>,
    longest_ms: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Load {
    /// Begins.
    ///
    /// # Panics
    /// When the device cannot be opened.
    #[must_use]
    pub fn start(device: &Path) -> Self {
        let mut wire = Wire::unix(device).expect("the device");
        let (ended, ops) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let longest_ms = Arc::<AtomicU64>::default();
        let shared = (Arc::clone(&ended), Arc::clone(&ops), Arc::clone(&longest_ms));
        let thread = thread::spawn(move || {
            let (ended, ops, longest_ms) = shared;
            for round in 0.. {
                if ended.load(Relaxed) {
                    break;
                }
                let (at, data) = (Node::SIZE / 2 + round % 64 * 4096, pattern(4096, round));
                let begun = Instant::now();
                assert_eq!(wire.write(at, &data).expect("a reply"), 0);
                assert_eq!(wire.read(at, 4096).expect("a reply").expect("data"), data);
                longest_ms.fetch_max(begun.elapsed().as_millis() as u64, Relaxed);
                ops.fetch_add(1, Relaxed);
            }
        });
        let load = Self { ended, ops, longest_ms, thread };
        load.check_running();
        load
    }

    /// Checks that it goes on.
    ///
    /// # Panics
    /// When it stands still.
    #[track_caller]
    pub fn check_running(&self) {
        let before = self.ops.load(Relaxed);
        assert!(eventually(|| self.ops.load(Relaxed) > before + 10), "it stands still");
    }

    /// Ends it, and returns how long its longest round took.
    ///
    /// # Panics
    /// When an answer was wrong.
    #[must_use]
    pub fn end(self) -> Duration {
        self.ended.store(true, Relaxed);
        self.thread.join().expect("every answer is right");
        Duration::from_millis(self.longest_ms.load(Relaxed))
    }
}
