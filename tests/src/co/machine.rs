//! A machine whose kernel makes the devices, as a guest of `tests/vm` does: a daemon and a plugin.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::cluster::show_logs;
use super::{Process, Processes, Setup, Use};
use crate::{Daemon, Plugin, sheave};

/// As on any machine, so that the next daemon finds what a failure leaves.
const RUNTIME_DIR: &str = "/run/sheave";
const STATE_DIR: &str = "/var/lib/sheave";
/// Of a guest that is emulated, on a machine with other work.
const SLOWNESS: u32 = 10;

/// A daemon and a plugin that serves all.
pub struct Machine {
    dir: PathBuf,
    node_id: String,
    daemon: Daemon,
    plugin: Plugin,
}

impl Machine {
    /// Starts both in a directory, which has the daemon's configuration: `daemon.toml`.
    ///
    /// # Panics
    /// When they do not start.
    #[must_use]
    pub fn start(dir: &Path, node_id: &str) -> Self {
        let (daemon, plugin) = (start_daemon(dir), start_plugin(dir, node_id));
        Self { dir: dir.to_owned(), node_id: node_id.to_owned(), daemon, plugin }
    }

    /// What the simulator is to do with it, on devices of one front, with kubelet's directories
    /// below `kubelet`.
    #[must_use]
    pub fn setup(&self, kubelet: &Path, front: &str, seed: u64, steps: u64) -> Setup {
        Setup {
            controller: self.plugin.socket().to_owned(),
            node: self.plugin.socket().to_owned(),
            control: Path::new(RUNTIME_DIR).join("control.sock"),
            node_id: self.node_id.clone(),
            dir: kubelet.to_owned(),
            parameters: HashMap::from([("front".to_owned(), front.to_owned())]),
            uses: vec![
                (Use::Filesystem("ext4"), 32),
                (Use::Filesystem("xfs"), 320),
                (Use::Filesystem("btrfs"), 160),
                (Use::Block, 8),
            ],
            // Before Linux 6.16 those of ublk cannot.
            grows_later: true,
            slowness: SLOWNESS,
            seed,
            steps,
        }
    }
}

fn start_daemon(dir: &Path) -> Daemon {
    let daemon = Daemon::start_in(dir, |command| {
        command.env("SHEAVE_RUNTIME_DIR", RUNTIME_DIR).env("SHEAVE_STATE_DIR", STATE_DIR);
        command.arg(sheave()).args(["daemon", "--config"]).arg(dir.join("daemon.toml"));
    });
    daemon.wait_for_log(" ready ");
    daemon
}

fn start_plugin(dir: &Path, node_id: &str) -> Plugin {
    Plugin::start_as("csi", dir, &["--mode", "all", "--node-id", node_id], |command| {
        command.env("SHEAVE_RUNTIME_DIR", RUNTIME_DIR).env("SHEAVE_STATE_DIR", STATE_DIR);
        command.env("SHEAVE_LOG", "info,sheave=debug");
    })
}

impl Processes for Machine {
    fn mortal(&self) -> &[Process] {
        &[Process::Node, Process::Daemon]
    }

    fn kill_and_start(&mut self, process: Process) {
        if process == Process::Daemon {
            self.daemon.kill();
            self.daemon = start_daemon(&self.dir);
        } else {
            self.plugin.kill();
            self.plugin = start_plugin(&self.dir, &self.node_id);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show_logs(&self.dir);
        }
    }
}
