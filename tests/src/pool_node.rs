//! A node whose daemon has pools.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use serde_json::Value;

use crate::{Daemon, FakeKernel, Node, eventually};

/// A node with a pool `fast`, a directory without a limit, and a pool `small` of 10 MiB.
pub struct PoolNode {
    /// The node.
    pub node: Node,
}

impl Default for PoolNode {
    fn default() -> Self {
        Self::new()
    }
}

impl PoolNode {
    /// A node without volumes.
    ///
    /// # Panics
    /// When its directories cannot be made.
    #[must_use]
    pub fn new() -> Self {
        Self::of(Node::new())
    }

    /// A node whose devices can be mounted, see [`FakeKernel::with_block_devices`].
    ///
    /// # Panics
    /// When its directories cannot be made.
    #[must_use]
    pub fn with_block_devices() -> Self {
        Self::of(Node { kernel: FakeKernel::with_block_devices(), image: String::new() })
    }

    /// A node with more pools: tables of its configuration.
    ///
    /// # Panics
    /// When its directories cannot be made.
    #[must_use]
    pub fn with_pools(tables: &str) -> Self {
        Self::new().and_pools(tables)
    }

    /// This node with more pools, before its daemon starts.
    ///
    /// # Panics
    /// When its configuration cannot be written.
    #[must_use]
    pub fn and_pools(self, tables: &str) -> Self {
        let config = fs::read_to_string(self.config()).expect("a file");
        fs::write(self.config(), config + tables).expect("a file");
        self
    }

    fn of(node: Node) -> Self {
        let mut config = String::new();
        for (name, more) in [("fast", "default_size = \"4M\""), ("small", "capacity = \"10M\"")] {
            let dir = node.file(name);
            fs::create_dir(&dir).expect("a directory");
            config += &format!("[pools.{name}]\nurl = \"file://{}\"\n{more}\n", dir.display());
        }
        fs::write(node.file("pools.toml"), config).expect("a file");
        Self { node }
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.node.kernel.scratch().path()
    }

    /// The file with its pools.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.node.file("pools.toml")
    }

    /// Starts a daemon, and waits until it answers.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn daemon(&self) -> Daemon {
        let config = self.config();
        let daemon = self.node.start(&["daemon", "--config", config.to_str().expect("UTF-8")]);
        daemon.wait_for_log(" ready ");
        daemon
    }

    /// Takes a step. The daemon is killed so long after it has begun, and started again; never if
    /// there is no time.
    ///
    /// # Panics
    /// When the step does.
    pub fn beside_kill(
        &self,
        daemon: &mut Daemon,
        after: Option<Duration>,
        step: impl FnOnce() + Send,
    ) {
        thread::scope(|scope| {
            let step = scope.spawn(step);
            if let Some(after) = after {
                thread::sleep(after);
                daemon.kill();
                *daemon = self.daemon();
            }
            step.join().expect("the step ends");
        });
    }

    /// The file of this kind, `lock` or `json`, that the node engine has for the volume with this
    /// id.
    ///
    /// # Panics
    /// When its directory cannot be made.
    #[must_use]
    pub fn engine_file(&self, id: &str, kind: &str) -> PathBuf {
        let dir = self.dir().join("node");
        fs::create_dir_all(&dir).expect("a directory");
        dir.join(format!("{}.{kind}", id.replace('/', "%2f")))
    }

    /// Takes the lock that all users of the node engine have for the volume with this id. It stands
    /// for a call that hangs, or a mkfs that takes long, until the file is dropped.
    ///
    /// # Panics
    /// When it is taken.
    #[must_use]
    pub fn lock_volume(&self, id: &str) -> File {
        let file = File::options().create(true).append(true).open(self.engine_file(id, "lock"));
        let file = file.expect("a file");
        flock(&file, FlockOperation::NonBlockingLockExclusive).expect("a free lock");
        file
    }

    /// The files of a pool, without those about the pool itself.
    ///
    /// # Panics
    /// When they cannot be listed.
    #[must_use]
    pub fn files(&self, pool: &str) -> Vec<String> {
        let mut found = Vec::new();
        for dir in [self.node.file(pool), self.node.file(pool).join("names")] {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            let files = entries.filter(|entry| entry.file_type().expect("a type").is_file());
            let names = files.map(|entry| entry.file_name().into_string().expect("UTF-8"));
            found.extend(names.filter(|name| !name.starts_with(".sheave")));
        }
        found.sort();
        found
    }
}

impl Daemon {
    /// The id of a volume of a pool.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    #[must_use]
    pub fn volume_id(&self, name: &str) -> String {
        self.volume(name)["id"].as_str().expect("an id").to_owned()
    }

    /// Waits until no volume is a device.
    ///
    /// # Panics
    /// When one stays one.
    #[track_caller]
    pub fn wait_for_no_devices(&self) {
        let is_unused = || self.sheave("ls").ok() == "no devices\n";
        assert!(eventually(is_unused), "{}", self.sheave("ls").ok());
    }

    /// What is known of a volume of a pool.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    #[must_use]
    pub fn volume(&self, name: &str) -> Value {
        let text = self.sheave("volume info --json").arg(name).ok();
        serde_json::from_str(&text).expect("JSON")
    }
}
