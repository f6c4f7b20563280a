//! A log or an output that cannot be written. The log is best effort: serving goes on without it,
//! and exit codes stay right. Standard output is what was asked for: its failure is one.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, PipeReader};
use std::os::fd::OwnedFd;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use rustix::process::Signal;
use sheave_tests::{
    PATIENCE, Scratch, Serve, Server, Wire, both_engines, errno, eventually, sheave,
};

const VOLUME: &str = "memory:?size=1M";
/// Lines of that many strangers are more than a pipe holds (64 KiB).
const STRANGERS_MANY: usize = 1000;

both_engines! {
    fn a_log_without_a_reader_does_not_end_a_server(engine) {
        let (reader, writer) = io::pipe().expect("a pipe");
        drop(reader);
        serves_on(Serve::new(VOLUME).engine(engine).log_to(writer));
    }

    fn a_log_on_a_full_disk_does_not_end_a_server(engine) {
        serves_on(Serve::new(VOLUME).engine(engine).log_to(full()));
    }
}

#[test]
fn a_log_that_is_not_read_delays_nothing() {
    let (reader, writer) = io::pipe().expect("a pipe");
    let serve = Serve::new(VOLUME).log_level("debug").log_to(writer);
    let mut server = serve.unix();
    // It has the other end of the pipe, which would never be closed.
    drop(serve);
    strangers(&server, STRANGERS_MANY);
    assert!(eventually(|| buffered_bytes(&reader) > 48 << 10), "the pipe is full");
    is_served(&server);
    let begun = Instant::now();
    assert!(server.end(Signal::TERM).success());
    assert!(begun.elapsed() < PATIENCE / 2, "{:?}", begun.elapsed());
    // What was read late is in order and whole, but for the line at which the pipe was full.
    let lines: Vec<_> = BufReader::new(reader).lines().map(|line| line.expect("text")).collect();
    let times: Vec<_> = lines.iter().filter_map(|line| line.split_once(' ')).collect();
    assert!(times.is_sorted_by_key(|(time, _)| *time), "{lines:#?}");
    assert!(lines[0].contains("serving"), "{}", lines[0]);
}

/// The kernel sends SIGXFSZ to a process that writes beyond such a limit.
#[test]
fn a_limit_of_file_sizes_ends_neither_log_nor_server() {
    let scratch = Scratch::new();
    let volume = scratch.sparse("disk.img", 1 << 20);
    let log = scratch.file("limited.log");
    let serve = Serve::new(volume).log_to(File::create(&log).expect("a file")).log_level("debug");
    for engine in ["auto", "threads"] {
        let mut server = serve.clone().engine(engine).through(&["prlimit", "--fsize=4096"]).unix();
        strangers(&server, 50);
        let mut wire = Wire::ready(&server).expect("a client");
        assert_eq!(wire.write(8192, &[1; 512]).expect("a reply"), errno::ENOSPC, "{engine}");
        assert_eq!(wire.write(0, &[1; 512]).expect("a reply"), 0, "{engine}");
        assert!(server.end(Signal::TERM).success(), "{engine}");
        assert_eq!(fs::metadata(&log).expect("the log").len(), 4096, "{engine}");
    }
}

#[test]
fn exit_codes_are_right_without_standard_error() {
    let scratch = Scratch::new();
    let small = scratch.filled("small", 1 << 20);
    let large = scratch.sparse("large", 2 << 20);
    let server = Serve::new(VOLUME).unix();
    let uri = server.uri();
    for (args, want) in [
        (vec!["serve"], 2),
        (vec!["serve", "--name=a", "--name=b", &small], 2),
        (vec!["daemon", "--config=none.toml"], 2),
        (vec!["copy", "--workers=0", &small, &large], 2),
        (vec!["serve", "none.img"], 1),
        (vec!["copy", "none.img", "out.img"], 1),
        (vec!["stats"], 1),
        (vec!["ls"], 1),
        (vec!["bench", "run", &uri, "--ops=1", "--span=1G"], 1),
        // It says that the end stays.
        (vec!["copy", &small, &large], 0),
        (vec!["completions", "bash"], 0),
        (vec!["bench", "run", &uri, "--ops=10"], 0),
    ] {
        for stderr in [full(), without_reader()] {
            let output = run(&scratch, &args, Stdio::piped(), stderr);
            assert_eq!(output.status.code(), Some(want), "{args:?}: {output:?}");
        }
    }
    let output = run(&scratch, &["--help"], full(), full());
    assert_eq!(output.status.code(), Some(1), "both are full: {output:?}");
}

#[test]
fn standard_output_that_cannot_be_written_is_a_failure() {
    let server = Serve::new(VOLUME).unix();
    for args in OUTPUTS {
        let args: Vec<_> = args.split(' ').collect();
        let output = run(server.scratch(), &args, full(), Stdio::piped());
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {told}");
        assert_eq!(told.lines().count(), 1, "{args:?}: {told}");
        assert!(
            told.contains("cannot write to standard output: No space left"),
            "{args:?}: {told}"
        );
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let server = Serve::new(VOLUME).unix();
    for args in OUTPUTS {
        let args: Vec<_> = args.split(' ').collect();
        let output = run(server.scratch(), &args, without_reader(), Stdio::piped());
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &*told), (Some(0), ""), "{args:?}");
    }
}

/// What prints to standard output where a server runs.
const OUTPUTS: &[&str] = &[
    "--help",
    "--version",
    "help serve",
    "copy --help",
    "completions zsh",
    "stats",
    "stats --json",
    "top --count 1 --interval 0.1",
    "bench compare --list",
];

/// Runs a command that finds the servers of that directory.
fn run(
    scratch: &Scratch,
    args: &[&str],
    stdout: impl Into<Stdio>,
    stderr: impl Into<Stdio>,
) -> Output {
    let mut command = Command::new("timeout");
    command
        .arg(PATIENCE.as_secs().to_string())
        .arg(sheave())
        .args(args)
        .current_dir(scratch.path());
    command.env("SHEAVE_RUNTIME_DIR", scratch.path()).env("SHEAVE_STATE_DIR", scratch.path());
    command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
    command.spawn().expect("timeout (coreutils)").wait_with_output().expect("our own child")
}

/// Starts a server whose log fails at every line, and has it write some.
fn serves_on(serve: Serve) {
    let mut server = serve.log_level("debug").unix();
    for _ in 0..3 {
        strangers(&server, 3);
        is_served(&server);
    }
    assert!(server.end(Signal::TERM).success(), "the log is not what matters");
}

/// Connections that are no NBD clients: a line of the log each, at least.
fn strangers(server: &Server, count: usize) {
    for _ in 0..count {
        let mut wire = Wire::connect(server).expect("a connection");
        wire.handshake().expect("greeting");
        wire.send(b"GET / HTTP/1.1\r\n\r\n").expect("send");
        assert!(wire.is_closed());
    }
}

fn is_served(server: &Server) {
    let mut wire = Wire::ready(server).expect("a client");
    assert_eq!(wire.read(0, 4096).expect("a reply"), Ok(vec![0; 4096]));
}

fn buffered_bytes(pipe: &PipeReader) -> u64 {
    rustix::io::ioctl_fionread(pipe).expect("FIONREAD")
}

fn full() -> OwnedFd {
    File::options().write(true).open("/dev/full").expect("/dev/full").into()
}

fn without_reader() -> OwnedFd {
    io::pipe().expect("a pipe").1.into()
}
