//! Commands that end in time, and whose output is shown when they fail.

use std::ffi::OsStr;
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::PATIENCE;

/// A command to run.
#[derive(Debug)]
pub struct Run {
    command: Command,
    stdin: Vec<u8>,
    timeout: Duration,
}

/// How a command ended and what it said.
#[derive(Debug)]
pub struct Output {
    /// Exit status.
    pub status: ExitStatus,
    /// Standard output, not trimmed.
    pub stdout: String,
    /// Standard error, not trimmed.
    pub stderr: String,
    shown: String,
}

/// The `sheave` binary under test.
#[must_use]
pub fn sheave() -> PathBuf {
    if let Some(path) = std::env::var_os("SHEAVE_BIN") {
        return path.into();
    }
    // target/PROFILE/deps/test-… lies one directory below target/PROFILE/sheave.
    let test = std::env::current_exe().expect("a test has a path");
    let binary = test.parent().and_then(Path::parent).expect("target directory").join("sheave");
    assert!(binary.exists(), "no {}: build it, or set SHEAVE_BIN", binary.display());
    binary
}

/// Whether `program` is on the search path.
#[must_use]
pub fn have(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // nbd-client and mke2fs are in directories that not every user searches.
    std::env::split_paths(&path).any(|dir| dir.join(program).exists())
}

/// A script of `tests/clients`, run by the system's own interpreter, which has libnbd's module.
pub fn python(script: &str) -> Run {
    Run::new("/usr/bin/python3")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("clients").join(script))
}

impl Run {
    /// A command without arguments.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self { command: Command::new(program), stdin: Vec::new(), timeout: PATIENCE }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments, divided at white space.
    #[must_use]
    pub fn args(mut self, args: &str) -> Self {
        self.command.args(args.split_whitespace());
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Works in a directory.
    #[must_use]
    pub fn in_dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Gives it something to read; without this it reads nothing.
    #[must_use]
    pub fn stdin(mut self, bytes: &[u8]) -> Self {
        self.stdin = bytes.to_vec();
        self
    }

    /// Limits it to another time than [`PATIENCE`].
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Runs it, whatever its exit status.
    ///
    /// # Panics
    /// When it cannot be started or does not end in time.
    #[must_use]
    pub fn output(mut self) -> Output {
        let shown = format!("{:?}", self.command);
        let mut child = self.spawn().unwrap_or_else(|error| panic!("{shown}: {error}"));
        let mut stdin = child.stdin.take().expect("piped");
        let input = std::mem::take(&mut self.stdin);
        // A command that does not read its input is not in error.
        let feeder = thread::spawn(move || drop(stdin.write_all(&input)));
        let stdout = reader(child.stdout.take().expect("piped"));
        let stderr = reader(child.stderr.take().expect("piped"));
        let status = wait(&mut child, self.timeout);
        if status.is_none() {
            let pid = Pid::from_child(&child);
            // Its children hold the pipes open, so they must go, too.
            kill_process_group(pid, Signal::KILL).expect("our own process group");
            child.wait().expect("our own child");
        }
        feeder.join().expect("feeder");
        let stdout = stdout.join().expect("reader");
        let stderr = stderr.join().expect("reader");
        match status {
            Some(status) => Output { status, stdout, stderr, shown },
            None => panic!("{shown}\ndid not end within {:?}\n{stdout}\n{stderr}", self.timeout),
        }
    }

    /// Runs it and returns what it printed.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn ok(self) -> String {
        let output = self.output();
        assert!(output.status.success(), "{}", output.describe());
        output.stdout
    }

    /// Runs it and returns what it printed to standard error.
    ///
    /// # Panics
    /// When it succeeds or is killed by a signal.
    #[track_caller]
    pub fn fails(self) -> String {
        let output = self.output();
        assert!(output.status.code().is_some_and(|code| code != 0), "{}", output.describe());
        output.stderr
    }

    fn spawn(&mut self) -> io::Result<Child> {
        use std::os::unix::process::CommandExt as _;
        self.command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
    }
}

impl Output {
    /// Everything about it, for a failed test.
    #[must_use]
    pub fn describe(&self) -> String {
        let Self { status, stdout, stderr, shown } = self;
        format!("{shown}\n{status}\n--- stdout\n{stdout}\n--- stderr\n{stderr}")
    }
}

/// Waits for a child for a limited time.
pub(crate) fn wait(child: &mut Child, timeout: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("our own child") {
            return Some(status);
        }
        if start.elapsed() > timeout {
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn reader(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).expect("read a pipe");
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
