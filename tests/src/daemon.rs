//! A running `sheave daemon`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::{Run, Scratch, eventually, sheave};

/// A daemon with its own directory. However the test ends, it ends with it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    dir: PathBuf,
}

impl Daemon {
    /// Starts a daemon whose files are in this directory; `prepare` says how.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(scratch: &Scratch, prepare: impl FnOnce(&mut Command)) -> Self {
        Self::start_in(scratch.path(), prepare)
    }

    /// The same in any directory.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start_in(dir: &Path, prepare: impl FnOnce(&mut Command)) -> Self {
        let dir = dir.to_owned();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]);
        command.env("SHEAVE_RUNTIME_DIR", &dir).env("SHEAVE_STATE_DIR", &dir);
        command.stdin(Stdio::null());
        command.stderr(File::create(dir.join("log")).expect("log file"));
        prepare(&mut command);
        Self { child: command.spawn().expect("setpriv (util-linux)"), dir }
    }

    /// A command that finds this daemon.
    #[must_use]
    pub fn sheave(&self, command: &str) -> Run {
        Run::new(sheave()).args(command).env("SHEAVE_RUNTIME_DIR", &self.dir)
    }

    /// Its control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its process ID.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged.
    ///
    /// # Panics
    /// When its log cannot be read.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).expect("log file")
    }

    /// Waits until it has logged this text.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) {
        assert!(eventually(|| self.log().contains(text)), "no {text:?} in:\n{}", self.log());
    }

    /// Sends it a signal, such as `TERM`.
    pub fn signal(&self, signal: &str) {
        Run::new("kill").args(&format!("-{signal} {}", self.pid())).ok();
    }

    /// Kills it, and waits until it is gone.
    ///
    /// # Panics
    /// When it cannot be waited for.
    pub fn kill(&mut self) {
        drop(self.child.kill());
        self.child.wait().expect("our own child");
    }

    /// Whether it has ended.
    ///
    /// # Panics
    /// When it cannot be looked for.
    #[must_use]
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("our own child").is_some()
    }

    /// Waits until it has ended by itself, without an error.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn ends_well(&mut self) {
        let mut ended = None;
        let in_time = eventually(|| {
            ended = self.child.try_wait().expect("our own child");
            ended.is_some()
        });
        assert!(in_time, "it does not end:\n{}", self.log());
        let status = ended.expect("its status");
        assert!(status.success(), "{status}\n{}", self.log());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
