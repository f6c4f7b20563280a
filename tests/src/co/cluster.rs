//! A node with all its processes: a daemon on devices of a stand-in, and plugins.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Process, Processes, Setup, Use};
use crate::{Daemon, Plugin, PoolNode, note, unmount_below};

/// The node's id.
const NODE: &str = "node-1";
/// Lines of each log that a failure shows.
const LOG_LINES: usize = 40;

/// A node. All its mounts are in the namespace of the test.
pub struct Cluster {
    /// Its pools and its devices.
    pub node: PoolNode,
    /// Its daemon.
    pub daemon: Daemon,
    /// The plugin that serves Node, and Controller if there is no other.
    pub plugin: Plugin,
    /// The plugin that serves Controller.
    pub controller: Option<Plugin>,
    mortal: Vec<Process>,
}

impl Cluster {
    /// A node whose plugin serves all, or Node only beside a controller that has the pools itself.
    #[must_use]
    pub fn start(has_controller: bool) -> Self {
        let node = PoolNode::with_block_devices();
        node.node.kernel.refuse_resizes();
        fs::create_dir(node.node.file("kubelet")).expect("a directory");
        let daemon = node.daemon();
        let controller = has_controller.then(|| start_controller(&node));
        let plugin = start_plugin(&node, has_controller);
        let mut mortal = vec![Process::Node, Process::Daemon];
        mortal.extend(has_controller.then_some(Process::Controller));
        Self { node, daemon, plugin, controller, mortal }
    }

    /// What the simulator is to do with it.
    #[must_use]
    pub fn setup(&self, uses: &[(Use, i64)], seed: u64, steps: u64) -> Setup {
        let controller = self.controller.as_ref().unwrap_or(&self.plugin);
        Setup {
            controller: controller.socket().to_owned(),
            node: self.plugin.socket().to_owned(),
            control: self.daemon.socket(),
            node_id: NODE.to_owned(),
            dir: self.kubelet(),
            parameters: HashMap::from([("pool".to_owned(), "fast".to_owned())]),
            uses: uses.to_vec(),
            grows_later: true,
            slowness: 1,
            seed,
            steps,
        }
    }

    /// The ID of a process.
    ///
    /// # Panics
    /// When there is no such process.
    #[must_use]
    pub fn pid(&self, process: Process) -> u32 {
        match process {
            Process::Node => self.plugin.pid(),
            Process::Controller => self.controller.as_ref().expect("a controller").pid(),
            Process::Daemon => self.daemon.pid(),
        }
    }

    /// Whether a process has ended.
    ///
    /// # Panics
    /// When there is no such process.
    #[must_use]
    pub fn has_ended(&mut self, process: Process) -> bool {
        match process {
            Process::Node => self.plugin.has_ended(),
            Process::Controller => self.controller.as_mut().expect("a controller").has_ended(),
            Process::Daemon => self.daemon.has_ended(),
        }
    }

    /// kubelet's directory.
    #[must_use]
    pub fn kubelet(&self) -> PathBuf {
        self.node.node.file("kubelet")
    }

    /// Checks that no device, mount, state or volume is left.
    ///
    /// # Panics
    /// When something is.
    #[track_caller]
    pub fn check_bare(&self) {
        self.node.node.check_bare(&self.daemon);
        assert_eq!(self.node.files("fast"), [] as [&str; 0], "something is left of a volume");
        let states = fs::read_dir(self.node.node.file("node")).expect("the states").flatten();
        let states: Vec<_> = states.map(|entry| entry.file_name()).collect();
        assert!(states.is_empty(), "{states:?}");
    }
}

/// What a failure shows of the processes whose logs are in a directory.
pub(super) fn show_logs(dir: &Path) {
    for log in ["log", "csi.log", "controller.log"] {
        let text = fs::read_to_string(dir.join(log)).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let last = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
        note(&format!("{log}:\n{last}\n"));
    }
}

fn start_plugin(node: &PoolNode, has_controller: bool) -> Plugin {
    let mode = if has_controller { "node" } else { "all" };
    let dir = node.node.kernel.scratch().path();
    Plugin::start_as("csi", dir, &["--mode", mode, "--node-id", NODE], |command| {
        command.env("SHEAVE_LOG", "info,sheave=debug");
    })
}

fn start_controller(node: &PoolNode) -> Plugin {
    let dir = node.node.kernel.scratch().path();
    let config = node.config();
    let config = config.to_str().expect("UTF-8");
    let args = ["--mode", "controller", "--node-id", NODE, "--config", config];
    Plugin::start_as("controller", dir, &args, |command| {
        command.env("SHEAVE_LOG", "info,sheave=debug");
    })
}

impl Processes for Cluster {
    fn mortal(&self) -> &[Process] {
        &self.mortal
    }

    fn kill_and_start(&mut self, process: Process) {
        match process {
            Process::Node => {
                self.plugin.kill();
                self.plugin = start_plugin(&self.node, self.controller.is_some());
            }
            Process::Controller => {
                if let Some(controller) = &mut self.controller {
                    controller.kill();
                    *controller = start_controller(&self.node);
                }
            }
            Process::Daemon => {
                self.daemon.kill();
                self.daemon = self.node.daemon();
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show_logs(self.node.node.kernel.scratch().path());
        }
        unmount_below(&self.kubelet());
    }
}
