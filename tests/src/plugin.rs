//! A running `sheave csi`.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::{eventually, sheave};

/// A plugin of the Container Storage Interface. However the test ends, it ends with it.
#[derive(Debug)]
pub struct Plugin {
    child: Child,
    log: PathBuf,
    socket: PathBuf,
}

impl Plugin {
    /// Starts a plugin whose daemon, if it needs one, is in this directory; waits until it answers.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    #[track_caller]
    pub fn start(dir: &Path, args: &[&str]) -> Self {
        Self::start_as("csi", dir, args, |_| {})
    }

    /// The same with other names for its socket and log; `prepare` says what is different.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    #[track_caller]
    pub fn start_as(
        name: &str,
        dir: &Path,
        args: &[&str],
        prepare: impl FnOnce(&mut Command),
    ) -> Self {
        let [socket, log] = ["sock", "log"].map(|end| dir.join(format!("{name}.{end}")));
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(sheave()).arg("csi").args(args);
        command.arg("--endpoint").arg(format!("unix://{}", socket.display()));
        command.env("SHEAVE_RUNTIME_DIR", dir).env("SHEAVE_STATE_DIR", dir);
        command.env("SHEAVE_LOG", "trace").stdin(Stdio::null());
        command.stderr(File::create(&log).expect("log file"));
        prepare(&mut command);
        let child = command.spawn().expect("setpriv (util-linux)");
        let mut plugin = Self { child, log, socket };
        let mut is_ready = false;
        let answered = eventually(|| {
            is_ready = UnixStream::connect(&plugin.socket).is_ok();
            is_ready || matches!(plugin.child.try_wait(), Ok(Some(_)))
        });
        assert!(answered && is_ready, "it does not start:\n{}", plugin.log());
        plugin
    }

    /// Its process ID.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What it has logged, everything.
    ///
    /// # Panics
    /// When its log cannot be read.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).expect("log file")
    }

    /// Whether it has ended.
    ///
    /// # Panics
    /// When it cannot be looked for.
    #[must_use]
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("our own child").is_some()
    }

    /// Kills it, and waits until it is gone.
    ///
    /// # Panics
    /// When it cannot be waited for.
    pub fn kill(&mut self) {
        drop(self.child.kill());
        self.child.wait().expect("our own child");
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
