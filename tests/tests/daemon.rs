//! `sheave daemon` without devices, which needs no more than a user.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use sheave_tests::{Run, Scratch, sheave, uring_or_skip};

/// Longer than a daemon takes to start or end on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

#[test]
fn the_command_line_comes_before_the_file() {
    if !uring_or_skip("the_command_line_comes_before_the_file") {
        return;
    }
    let scratch = Scratch::new();
    let file = scratch.file("daemon.toml");
    fs::write(&file, "shards = 3\npoll_us = 0\n").expect("a file");
    for (args, shards) in [(&[][..], 3), (&["--shards", "2"], 2)] {
        let mut daemon = Daemon::start(&scratch, |command| {
            command.arg(sheave()).args(["daemon", "--config", &file]).args(args);
        });
        daemon.wait_for_log("ready");
        assert_eq!(daemon.shards(), shards, "{}", daemon.log());
        daemon.signal("TERM");
        daemon.ends_well();
    }
}

#[test]
fn a_wrong_configuration_is_told_with_its_place_and_code_2() {
    let scratch = Scratch::new();
    let file = scratch.file("daemon.toml");
    let wrong = [
        ("poll_us = 1\nshards = 65\n", ":2: shards = 65: expected a number from 1 to 64"),
        ("poll = 1\n", ":1: poll = 1: unknown field `poll`, expected `shards` or `poll_us`"),
        ("shards\n", ":1: shards: "),
    ];
    for (text, said) in wrong {
        fs::write(&file, text).expect("a file");
        let output = daemon(&scratch).args("--config").arg(&file).output();
        assert_eq!(output.status.code(), Some(2), "{}", output.describe());
        assert_eq!(output.stderr.lines().count(), 1, "{}", output.stderr);
        assert!(output.stderr.contains(&format!("{file}{said}")), "{}", output.stderr);
    }
    let output = daemon(&scratch).args("--config").arg(scratch.file("none.toml")).output();
    assert_eq!(output.status.code(), Some(2), "{}", output.describe());
    assert!(output.stderr.contains("none.toml: No such file"), "{}", output.stderr);
}

#[test]
fn a_second_daemon_does_not_start() {
    let scratch = Scratch::new();
    let mut first = Daemon::start(&scratch, |command| {
        command.arg(sheave()).arg("daemon");
    });
    first.wait_for_log("ready");
    let error = daemon(&scratch).fails();
    assert!(error.contains("another daemon listens there"), "{error}");
    assert_eq!(first.sheave("ls").ok(), "no devices\n", "the first is not disturbed");
    first.signal("TERM");
    first.ends_well();
}

/// A daemon with its own directory. However the test ends, it ends with it.
struct Daemon {
    child: Child,
    dir: PathBuf,
}

impl Daemon {
    fn start(scratch: &Scratch, prepare: impl FnOnce(&mut Command)) -> Self {
        let dir = scratch.path().to_owned();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]);
        command.env("SHEAVE_RUNTIME_DIR", &dir).stdin(Stdio::null());
        command.stderr(File::create(dir.join("log")).expect("log file"));
        prepare(&mut command);
        Self { child: command.spawn().expect("setpriv (util-linux)"), dir }
    }

    /// A command that finds this daemon.
    fn sheave(&self, command: &str) -> Run {
        Run::new(sheave()).args(command).env("SHEAVE_RUNTIME_DIR", &self.dir)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).expect("log file")
    }

    #[track_caller]
    fn wait_for_log(&self, text: &str) {
        let begun = Instant::now();
        while !self.log().contains(text) {
            assert!(begun.elapsed() < PATIENCE, "no {text:?} in:\n{}", self.log());
            sleep(POLL);
        }
    }

    fn shards(&self) -> usize {
        let tasks = format!("/proc/{}/task", self.child.id());
        let tasks = fs::read_dir(tasks).expect("it runs").flatten();
        let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
        names.filter(|name| name.starts_with("shard-")).count()
    }

    fn signal(&self, signal: &str) {
        Run::new("kill").args(&format!("-{signal} {}", self.child.id())).ok();
    }

    #[track_caller]
    fn ends_well(&mut self) {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                break status;
            }
            assert!(begun.elapsed() < PATIENCE, "it does not end:\n{}", self.log());
            sleep(POLL);
        };
        assert!(status.success(), "{status}\n{}", self.log());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// One that is expected to end by itself.
fn daemon(scratch: &Scratch) -> Run {
    Run::new(sheave()).arg("daemon").env("SHEAVE_RUNTIME_DIR", scratch.path()).timeout(PATIENCE)
}
