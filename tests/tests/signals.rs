//! Signals to commands that run long: those that end a command do so in order, others do nothing.

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use sheave_tests::{Scratch, Serve, Server, Wire, cmd, eventually, python, sheave};

const SLOW: &str = "memory:?size=1M&fault=read:delay=2s";
const END: [(Signal, &str); 4] = [
    (Signal::TERM, "SIGTERM"),
    (Signal::INT, "SIGINT"),
    (Signal::QUIT, "SIGQUIT"),
    (Signal::HUP, "SIGHUP"),
];

#[test]
fn a_server_ends_in_order() {
    for (signal, name) in END {
        let mut server = Serve::new(SLOW).unix();
        let mut wire = with_a_read_in_flight(&server);
        server.signal(signal);
        assert_eq!(wire.simple_reply(1).expect("a reply"), 0, "{name}");
        assert!(server.ended().success(), "{name}\n{}", server.log());
        assert!(!fs::exists(server.socket()).expect("stat"), "{name}: its socket is gone");
        assert!(server.log().contains(&format!("ending: {name}")), "{}", server.log());
    }
}

#[test]
fn signals_without_a_meaning_are_logged_and_ignored() {
    let mut server = Serve::new(SLOW).unix();
    for (signal, name) in [(Signal::USR1, "SIGUSR1"), (Signal::USR2, "SIGUSR2")] {
        server.signal(signal);
        wait_for_log(&server, &format!("{name} has no meaning"));
    }
    assert!(server.is_alive());
    Wire::ready(&server).expect("a client");
}

#[test]
fn a_server_that_nohup_started_outlives_its_terminal() {
    let mut server = Serve::new(SLOW).through(&["nohup"]).unix();
    server.signal(Signal::HUP);
    // Signals are looked at in the order of their arrival, or this one later.
    server.signal(Signal::USR1);
    wait_for_log(&server, "SIGUSR1 has no meaning");
    Wire::ready(&server).expect("a client");
    assert!(server.is_alive() && !server.log().contains("ending"), "{}", server.log());
}

#[test]
fn hang_up_behind_another_signal_does_not_cut_connections() {
    for (signal, name) in [(Signal::TERM, "SIGTERM"), (Signal::HUP, "SIGHUP")] {
        let mut server = Serve::new(SLOW).unix();
        let mut wire = with_a_read_in_flight(&server);
        server.signal(signal);
        wait_for_log(&server, &format!("ending: {name}"));
        server.signal(Signal::HUP);
        assert_eq!(wire.simple_reply(1).expect("a reply"), 0, "{name}");
        assert!(server.ended().success(), "{name}\n{}", server.log());
    }
}

#[test]
fn a_signal_during_the_start_leaves_no_socket() {
    for (signal, name) in END {
        for delay_ms in (0..400).step_by(40) {
            let scratch = Scratch::new();
            let mut server = Command::new(sheave())
                .args(["serve", "memory:?size=1M", "--socket", "s"])
                .env("SHEAVE_RUNTIME_DIR", scratch.path())
                .current_dir(scratch.path())
                .stderr(Stdio::null())
                .spawn()
                .expect("start sheave");
            sleep(Duration::from_millis(delay_ms));
            kill_process(Pid::from_child(&server), signal).expect("our own child");
            let status = server.wait().expect("our own child");
            let left: Vec<_> = fs::read_dir(scratch.path()).expect("a directory").collect();
            assert!(left.is_empty(), "{name} after {delay_ms} ms: {status}, {left:?}");
        }
    }
}

#[test]
fn top_ends_in_order() {
    let server = Serve::new(SLOW).unix();
    for (signal, name) in END {
        // Elsewhere than on a terminal, with a whole block of lines.
        let mut command = Command::new(sheave());
        command.args(["top", "--interval", "0.1"]).stdout(Stdio::piped());
        let child = command.env("SHEAVE_RUNTIME_DIR", server.scratch().path()).spawn();
        let mut child = child.expect("start sheave");
        let mut first = [0; 1];
        let mut stdout = child.stdout.take().expect("piped");
        std::io::Read::read_exact(&mut stdout, &mut first).expect("a block of lines");
        for signal in [Signal::USR1, Signal::USR2, signal] {
            kill_process(Pid::from_child(&child), signal).expect("our own child");
        }
        let rest = std::io::read_to_string(stdout).expect("text");
        assert!(child.wait().expect("our own child").success(), "{name}");
        assert!(rest.ends_with("\n\n"), "{name}: {rest}");
    }
    for how in ["TERM", "INT", "QUIT", "HUP", "closed"] {
        let run = python("terminal.py").arg(how).arg(sheave()).arg("top");
        run.env("SHEAVE_RUNTIME_DIR", server.scratch().path()).ok();
    }
}

#[test]
fn a_comparison_leaves_nothing_behind() {
    for signal in [Signal::QUIT, Signal::HUP] {
        let scratch = Scratch::new();
        let mut command = Command::new(sheave());
        command.args(["bench", "compare", "--servers=sheave", "--rows=mem-4k-qd1-*"]);
        command.args(["--seconds=60", "--dir"]).arg(scratch.path());
        let mut child =
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start sheave");
        let is_empty = || fs::read_dir(scratch.path()).expect("a directory").next().is_none();
        assert!(eventually(|| !is_empty()), "it has begun");
        for signal in [Signal::USR1, Signal::USR2, signal] {
            kill_process(Pid::from_child(&child), signal).expect("our own child");
        }
        let status = child.wait().expect("our own child");
        assert_eq!(status.code(), Some(128 + signal.as_raw()), "{signal:?}: {status}");
        assert!(is_empty(), "{signal:?}");
    }
}

fn with_a_read_in_flight(server: &Server) -> Wire {
    let mut wire = Wire::ready(server).expect("a client");
    wire.request(cmd::READ, 1, 0, 512).expect("send");
    // Once this is answered, the read before it is in flight.
    wire.request(cmd::FLUSH, 2, 0, 0).expect("send");
    assert_eq!(wire.simple_reply(2).expect("a reply"), 0);
    wire
}

#[track_caller]
fn wait_for_log(server: &Server, text: &str) {
    assert!(eventually(|| server.log().contains(text)), "no {text:?} in:\n{}", server.log());
}
