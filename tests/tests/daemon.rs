//! `sheave daemon` without devices, which need no more than a user: how it is configured, and how
//! it gets on with a service manager. The test plays that.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use sheave_tests::{Daemon, PATIENCE, Run, Scratch, eventually, have, sheave, skip, uring_or_skip};

#[test]
fn a_manager_is_told_of_begin_life_and_end() {
    const WATCHDOG: Duration = Duration::from_secs(8);
    let scratch = Scratch::new();
    let manager = UnixDatagram::bind(scratch.path().join("notify")).expect("a socket");
    manager.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let micros = WATCHDOG.as_micros().to_string();
    let mut daemon = Daemon::start(&scratch, |command| {
        command.arg(sheave()).arg("daemon");
        command.env("NOTIFY_SOCKET", scratch.path().join("notify")).env("WATCHDOG_USEC", micros);
    });
    let first = told(&manager);
    assert!(first.starts_with("READY=1\n"), "{first}");
    // A client that waited for readiness is served at once.
    assert_eq!(daemon.sheave("ls").ok(), "no devices\n");
    let mut last = Instant::now();
    for _ in 0..3 {
        assert_eq!(told(&manager), "WATCHDOG=1");
        assert!(last.elapsed() < WATCHDOG, "too late, after {:?}", last.elapsed());
        last = Instant::now();
    }
    daemon.signal("TERM");
    let end = told_but(&manager, "WATCHDOG=1");
    assert!(end.starts_with("STOPPING=1\n"), "{end}");
    daemon.ends_well();
    assert!(UnixStream::connect(daemon.socket()).is_err(), "nobody listens any more");
}

#[test]
fn a_successor_is_known_to_the_manager_before_its_predecessor_ends() {
    let scratch = Scratch::new();
    fs::write(scratch.file("daemon.toml"), "shards = 2\n").expect("a file");
    let manager = UnixDatagram::bind(scratch.path().join("notify")).expect("a socket");
    manager.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut first = Daemon::start(&scratch, |command| {
        // Where it goes by itself, these names would mean nothing.
        command.args([sheave().to_str().expect("UTF-8 path"), "daemon", "--config=daemon.toml"]);
        command.env("SHEAVE_RUNTIME_DIR", ".").env("SHEAVE_STATE_DIR", ".");
        command.env("NOTIFY_SOCKET", scratch.path().join("notify")).current_dir(scratch.path());
    });
    assert!(told(&manager).starts_with("READY=1\n"));
    first.signal("HUP");
    let reloading = told(&manager);
    assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
    // In this order: a manager that sees its main process end takes it for the end of the service.
    let main = told(&manager);
    let pid = main.strip_prefix("MAINPID=").and_then(|pid| pid.parse::<u32>().ok());
    let successor = Stray(pid.unwrap_or_else(|| panic!("{main}\n{}", first.log())));
    assert_ne!(successor.0, first.pid());
    first.ends_well();
    let ready = told(&manager);
    assert!(ready.starts_with(&format!("READY=1\n{main}\n")), "{ready}");
    assert_eq!(first.sheave("ls").ok(), "no devices\n");
    successor.signal("TERM");
    assert!(told(&manager).starts_with("STOPPING=1\n"));
    assert!(eventually(|| !successor.is_alive()), "it does not end:\n{}", first.log());
}

#[test]
fn a_watchdog_that_is_for_another_process_is_not_fed() {
    let scratch = Scratch::new();
    let manager = UnixDatagram::bind(scratch.path().join("notify")).expect("a socket");
    manager.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut daemon = Daemon::start(&scratch, |command| {
        command.arg(sheave()).arg("daemon").env("NOTIFY_SOCKET", scratch.path().join("notify"));
        command.env("WATCHDOG_USEC", "1000").env("WATCHDOG_PID", "1");
    });
    assert!(told(&manager).starts_with("READY=1\n"));
    // It would be fed hundreds of times until then.
    assert_eq!(daemon.sheave("ls").ok(), "no devices\n");
    daemon.signal("INT");
    let next = told(&manager);
    assert!(next.starts_with("STOPPING=1\n"), "{next}");
    daemon.ends_well();
}

#[test]
fn a_socket_that_is_passed_serves_several_daemons() {
    let scratch = Scratch::new();
    let path = scratch.path().join("control.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    for _ in 0..2 {
        let mut daemon = Daemon::start(&scratch, |command| {
            // The first socket that a manager passes is number 3.
            let pass = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" daemon";
            command.args(["sh", "-c", pass]).arg(sheave());
            command.stdin(OwnedFd::from(listener.try_clone().expect("a descriptor")));
        });
        // Asked before it has begun, too: the socket keeps clients until it is served.
        assert_eq!(daemon.sheave("ls").ok(), "no devices\n");
        daemon.wait_for_log("passed");
        daemon.signal("TERM");
        daemon.ends_well();
        assert!(path.exists(), "the socket is the manager's");
    }
}

#[test]
fn what_is_passed_must_be_the_control_socket() {
    let scratch = Scratch::new();
    for (count, said) in [("2", "passes 2 sockets"), ("1", "passed by the service manager")] {
        let error = Run::new("sh")
            .arg("-c")
            .arg("exec 3</dev/null 4</dev/null; LISTEN_PID=$$ exec \"$0\" daemon")
            .arg(sheave())
            .env("LISTEN_FDS", count)
            .env("SHEAVE_RUNTIME_DIR", scratch.path())
            .fails();
        assert!(error.lines().count() == 1 && error.contains(said), "{error}");
    }
}

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
        assert_eq!(shards_of(&daemon), shards, "{}", daemon.log());
        daemon.signal("TERM");
        daemon.ends_well();
    }
}

/// A predecessor has the address for a while, and a disk does not fail for want of metrics.
#[test]
fn metrics_are_served_once_their_address_is_free() {
    if !uring_or_skip("metrics_are_served_once_their_address_is_free") {
        return;
    }
    let scratch = Scratch::new();
    let other = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = other.local_addr().expect("an address").to_string();
    let daemon = Daemon::start(&scratch, |command| {
        command.arg(sheave()).args(["daemon", "--metrics", &address]);
    });
    daemon.wait_for_log(" ready ");
    daemon.wait_for_log("it is tried again");
    drop(other);
    let scrape = || {
        let mut stream = TcpStream::connect(&address).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").ok()?;
        let mut page = String::new();
        stream.read_to_string(&mut page).ok().map(|_| page)
    };
    let is_served = || scrape().is_some_and(|page| page.contains("sheave_build_info{"));
    assert!(eventually(is_served), "{}", daemon.log());
}

#[test]
fn a_wrong_configuration_is_told_with_its_place_and_code_2() {
    let scratch = Scratch::new();
    let file = scratch.file("daemon.toml");
    let wrong = [
        ("poll_us = 1\nshards = 65\n", ":2: shards = 65: expected a number from 1 to 64"),
        ("poll = 1\n", ":1: poll = 1: unknown field `poll`, expected one of `shards`, `poll_us`, "),
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

#[test]
fn a_daemon_outlives_the_reader_of_its_log() {
    let scratch = Scratch::new();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut daemon = Daemon::start(&scratch, |command| {
        command.arg(sheave()).arg("daemon").stderr(writer);
    });
    let mut lines = BufReader::new(reader).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains(" ready ")), "what was logged before its thread began");
    drop(lines);
    for _ in 0..3 {
        // It logs that.
        daemon.signal("USR1");
        assert_eq!(daemon.sheave("ls").ok(), "no devices\n");
    }
    let full = File::options().write(true).open("/dev/full").expect("/dev/full");
    let mut ls = Command::new(sheave());
    ls.arg("ls").env("SHEAVE_RUNTIME_DIR", daemon.dir()).stdout(full);
    let output = ls.output().expect("start sheave");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.starts_with("sheave: ls: cannot write to standard output: "), "{told}");
    daemon.signal("QUIT");
    daemon.ends_well();
}

#[test]
fn units_are_good() {
    if !have("systemd-analyze") {
        return skip("units_are_good", "systemd-analyze is not installed");
    }
    let scratch = Scratch::new();
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd");
    let mut verify = Run::new("systemd-analyze").arg("verify");
    let mut count = 0;
    for unit in fs::read_dir(units).expect("deploy/systemd") {
        let unit = unit.expect("deploy/systemd").path();
        let text = fs::read_to_string(&unit).expect("a unit");
        // What it starts must be there.
        let text = text.replace("/usr/local/bin/sheave", sheave().to_str().expect("UTF-8 path"));
        let name = unit.file_name().and_then(|name| name.to_str()).expect("UTF-8 path");
        let copy = scratch.file(&name.replace('@', "@disk"));
        fs::write(&copy, text).expect("a unit");
        verify = verify.arg(copy);
        count += 1;
    }
    assert_eq!(count, 6);
    let output = verify.output();
    // Other units of this machine are not our business.
    let about_us = output.stderr.lines().any(|line| line.contains("sheave"));
    assert!(output.status.success() && !about_us, "{}", output.describe());
}

/// Threads that serve devices.
fn shards_of(daemon: &Daemon) -> usize {
    let tasks = format!("/proc/{}/task", daemon.pid());
    let tasks = fs::read_dir(tasks).expect("it runs").flatten();
    let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.starts_with("shard-")).count()
}

/// A daemon that a daemon has started.
struct Stray(u32);

impl Stray {
    fn signal(&self, signal: &str) {
        Run::new("kill").args(&format!("-{signal} {}", self.0)).ok();
    }

    fn is_alive(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0));
        status.is_ok_and(|status| !status.contains("State:\tZ"))
    }
}

impl Drop for Stray {
    fn drop(&mut self) {
        if self.is_alive() {
            self.signal("KILL");
        }
    }
}

/// One that is expected to end by itself.
fn daemon(scratch: &Scratch) -> Run {
    let run = Run::new(sheave()).arg("daemon");
    run.env("SHEAVE_RUNTIME_DIR", scratch.path()).env("SHEAVE_STATE_DIR", scratch.path())
}

fn told(manager: &UnixDatagram) -> String {
    let mut text = [0; 500];
    let count = manager.recv(&mut text).expect("it tells something");
    String::from_utf8(text[..count].to_vec()).expect("UTF-8")
}

/// The next that is something else.
fn told_but(manager: &UnixDatagram, known: &str) -> String {
    const KNOWN_MAX: usize = 10;
    (0..KNOWN_MAX).map(|_| told(manager)).find(|text| text != known).expect("something else")
}
