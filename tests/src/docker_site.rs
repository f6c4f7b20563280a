//! A node of which Docker gets volumes.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Daemon, DockerPlugin, Mounts, PoolNode};

/// A node with a daemon and the plugin.
pub struct DockerSite {
    /// What is mounted.
    pub mounts: Mounts,
    /// The plugin.
    pub plugin: DockerPlugin,
    /// The daemon.
    pub daemon: Daemon,
    /// The node.
    pub node: PoolNode,
}

impl Default for DockerSite {
    fn default() -> Self {
        Self::new()
    }
}

impl DockerSite {
    /// A node without volumes, which is called `n1`.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new() -> Self {
        let node = PoolNode::with_block_devices();
        let daemon = node.daemon();
        let plugin = DockerPlugin::start(node.dir(), &["--node-id", "n1"]);
        Self { mounts: Mounts::below(node.dir()), plugin, daemon, node }
    }

    /// The same with a global scope, and the plugin of a node `n2` that has the same pools.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn with_another_node() -> (Self, DockerPlugin) {
        let mut site = Self::new();
        let args = |id| ["--scope", "global", "--node-id", id];
        site.plugin.kill();
        site.plugin = DockerPlugin::start(site.dir(), &args("n1"));
        let other = DockerPlugin::start_on_another_node(site.dir(), &args("n2"));
        (site, other)
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.node.dir()
    }

    /// To how many nodes a volume is published.
    ///
    /// # Panics
    /// When there is no such volume.
    #[must_use]
    pub fn publications(&self, volume: &str) -> usize {
        self.daemon.volume(volume)["publications"].as_array().expect("publications").len()
    }

    /// Checks that nothing is mounted or staged.
    ///
    /// # Panics
    /// When something is.
    #[track_caller]
    pub fn check_unmounted(&self) {
        assert_eq!(self.mounts.targets(), [] as [PathBuf; 0]);
        assert_eq!(self.node.node.kernel.devices(), [] as [PathBuf; 0]);
        for dir in ["node", "docker/mounts"] {
            let left: Vec<_> = fs::read_dir(self.dir().join(dir)).expect("a directory").collect();
            assert!(left.is_empty(), "{dir}: {left:?}");
        }
    }
}
