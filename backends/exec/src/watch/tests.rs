//! Real servers, up to the first bytes that they send. Where `nbdkit` and `qemu-nbd` are missing
//! these tests fail and say so.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::program::{Program, ProgramOptions};
use crate::start::{Start, script};

/// Longest wait for anything that must come, on a slow machine with other work.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts a program without the executable that has the helper.
fn launch(start: Start) -> io::Result<Child> {
    let Start { command, directory, socket, output } = start;
    let script = format!("export LISTEN_FDS=1 LISTEN_PID=$$\n{}", script(&command));
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", &script]).process_group(0).stdin(Stdio::from(socket));
    shell.stdout(Stdio::from(output.try_clone()?)).stderr(Stdio::from(output));
    shell.current_dir(directory.unwrap_or_else(|| "/".into())).spawn()
}

fn program(command: &str) -> Program {
    Program::new(ProgramOptions { launch, ..ProgramOptions::new(command) }).unwrap()
}

/// Connects, and returns whether a server greets (proto.md, "Newstyle negotiation").
fn greets(program: &Program) -> bool {
    let mut stream = UnixStream::connect(program.socket_path()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut greeting = [0; 16];
    stream.read_exact(&mut greeting).is_ok() && &greeting == b"NBDMAGICIHAVEOPT"
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The process that a command has written its number to.
fn pid(file: &Path) -> Pid {
    let mut pid = None;
    wait_until("the command runs", || {
        pid = fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok());
        pid.is_some()
    });
    Pid::from_raw(pid.unwrap()).unwrap()
}

/// A command that writes its number to a file.
fn noting(file: &Path, command: &str) -> String {
    format!("sh -c 'echo $$ >{}; exec {command}'", file.display())
}

fn is_gone(pid: Pid) -> bool {
    test_kill_process(pid).is_err()
}

#[test]
fn a_killed_program_is_started_again_for_the_next_connection() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pid");
    let program = program(&noting(&file, "nbdkit null 1M"));
    assert!(!file.exists(), "nothing runs that is not needed");
    let mut before = None;
    for _ in 0..4 {
        // A connection that waited while the program ended may be closed; its owner connects again.
        wait_until("it greets", || greets(&program));
        let now = pid(&file);
        assert_ne!(Some(now), before);
        before = Some(now);
        kill_process(now, Signal::KILL).unwrap();
        // Reaped, so that no zombie is left.
        wait_until("it is gone", || is_gone(now));
    }
    assert!(program.last_words().unwrap().contains("SIGKILL"), "{:?}", program.last_words());
}

#[test]
fn a_program_ends_with_its_volume() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pid");
    let program = program(&noting(&file, "nbdkit null 1M"));
    wait_until("it greets", || greets(&program));
    let pid = pid(&file);
    drop(program);
    wait_until("it is gone", || is_gone(pid));
}

#[test]
fn a_program_that_does_not_end_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pid");
    let command = "sh -c 'trap \"\" TERM; echo $$ >FILE; while :; do sleep 0.1; done'";
    let program = program(&command.replace("FILE", file.to_str().unwrap()));
    let waiting = UnixStream::connect(program.socket_path()).unwrap();
    let pid = pid(&file);
    drop(program);
    wait_until("it is gone", || is_gone(pid));
    drop(waiting);
}

#[test]
fn what_a_program_leaves_behind_ends_too() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pid");
    let program =
        program(&format!("sh -c 'sleep 1000 & echo $! >{}; sleep 0.1; exit 3'", file.display()));
    assert!(!greets(&program));
    let left = pid(&file);
    wait_until("it is gone", || is_gone(left));
    assert_eq!(program.last_words().unwrap(), "exit status: 3");
}

#[test]
fn a_server_that_ends_with_its_client_serves_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&image)
        .arg("1M")
        .status()
        .expect("this test needs qemu-img installed");
    assert!(made.success());
    // Without --persistent it ends after its first client.
    let program = program(&format!("qemu-nbd -f qcow2 {}", image.display()));
    for _ in 0..3 {
        wait_until("it greets", || greets(&program));
    }
}

#[test]
fn why_a_program_does_not_start_is_known_when_the_connection_ends() {
    let missing = program("qemu-nbd -f qcow2 /no/such.qcow2");
    assert!(!greets(&missing));
    let words = missing.last_words().unwrap();
    assert!(words.contains("/no/such.qcow2") && words.contains("No such file"), "{words}");
    assert!(words.ends_with("(exit status: 1)"), "{words}");
    let unknown = program("no-such-program --option");
    assert!(!greets(&unknown));
    let words = unknown.last_words().unwrap();
    assert!(words.contains("no-such-program: not found"), "{words}");
}

#[test]
fn failures_in_a_row_are_further_and_further_apart() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("starts");
    let program = program(&format!("sh -c 'echo >>{}; exit 1'", file.display()));
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2) {
        assert!(!greets(&program));
    }
    // Starts at 0, 0, 100, 300, 700 and 1500 ms, if nothing else takes time.
    let starts = fs::read_to_string(&file).unwrap().len();
    assert!((2..=7).contains(&starts), "{starts} starts");
}

#[test]
fn commands_that_cannot_be_run_are_refused() {
    for command in ["", " ", "a\0b"] {
        let error = Program::new(ProgramOptions::new(command)).err().unwrap();
        assert_eq!(error.kind(), sheave_core::ErrorKind::Invalid);
    }
}
