//! `sheave bench`: it checks what it reads, and its report stands alone.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use sheave_tests::{
    Certificates, PATIENCE, Run, Scratch, Serve, both_engines, eventually, judge, sheave,
};

both_engines! {
    fn verified_load_on_every_kind_of_connection(engine) {
        let server = Serve::new("memory:?size=32M").engine(engine).unix();
        for args in [
            "--rw mixed --qd 32 --bs 4k",
            "--rw mixed --qd 4 --bs 128k --connections 8 --threads 2 --flush-every 50",
            "--rw mixed --structured --sequential --bs 64k",
            "--rw mixed --extended --bs 1536",
        ] {
            check(load(&server.uri(), args), args);
        }
        let server = Serve::new("memory:?size=32M").engine(engine).tcp();
        check(load(&server.uri(), "--rw mixed"), "over TCP");
    }

    fn verified_load_over_tls(engine) {
        let certificates = Certificates::new();
        let server = Serve::new("memory:?size=32M").engine(engine).tls(&certificates, true).tcp();
        let uri = format!(
            "nbds://localhost:{}/?tls-certificates={}",
            server.port(),
            certificates.dir().display()
        );
        check(load(&uri, "--rw mixed --bs 64k"), "over TLS");
    }

    fn verified_load_on_a_file(engine) {
        let scratch = Scratch::new();
        let server = Serve::new(scratch.sparse("disk.img", 32 << 20)).engine(engine).unix();
        check(load(&server.uri(), "--rw mixed --connections 4 --flush-every 100"), "a file");
    }
}

#[test]
fn wrong_data_is_noticed() {
    let server = Serve::new("memory:?size=16M").unix();
    let uri = server.uri();
    // Another client writes into the same blocks meanwhile.
    let vandal = std::thread::spawn({
        let uri = uri.clone();
        move || bench(&uri, "--rw write --seed 99 --seconds 3 --json").ok()
    });
    let output = bench(&uri, "--rw mixed --verify --seconds 1 --json").output();
    vandal.join().expect("the other one");
    assert_eq!(output.status.code(), Some(1), "{}", output.describe());
    assert!(output.stderr.contains("wrong"), "{}", output.stderr);
}

#[test]
fn errors_are_counted_and_told() {
    let server = Serve::new("memory:?size=16M&fault=read:error=EIO:after=1000:count=5").unix();
    let output = bench(&server.uri(), "--rw read --seconds 1 --json").output();
    let report: Value = serde_json::from_str(&output.stdout).expect("JSON");
    assert_eq!(report["errors"], 5, "{}", output.describe());
}

#[test]
fn other_servers_are_loaded_and_verified_too() {
    let scratch = Scratch::new();
    let socket = scratch.file("s");
    let uri = format!("nbd+unix:///?socket={socket}");
    let command =
        format!("{} bench run '{uri}' --rw mixed --verify --seconds 1", sheave().display());
    Run::new("nbdkit").args("-U").arg(socket).args("memory 32M --run").arg(command).ok();
}

#[test]
fn a_quick_comparison_writes_a_report_that_stands_alone() {
    let scratch = Scratch::new();
    let (report, json) = (scratch.file("report.html"), scratch.file("report.json"));
    let shown = Run::new(sheave())
        .args("bench compare --quick --rows mem-4k-qd32-* --servers sheave,nbdkit,ring,echo")
        .arg("--report")
        .arg(&report)
        .arg("--json")
        .arg(&json)
        .timeout(PATIENCE * 5)
        .ok();
    assert!(shown.contains("nbdkit"), "{shown}");
    let figures: Value =
        serde_json::from_str(&fs::read_to_string(json).expect("JSON")).expect("JSON");
    // Two rows with four targets each.
    assert_eq!(judge(&figures).len(), 8, "{figures:#}");
    let html = fs::read_to_string(report).expect("report");
    assert!(html.contains("<svg") || html.contains("<canvas"), "it has curves");
    for outside in ["src=\"http", "src='http", "href=\"http", "@import", "src=\"/"] {
        assert!(!html.contains(outside), "it needs {outside}");
    }
}

#[test]
fn what_cannot_be_measured_is_refused_before_it_begins() {
    let server = Serve::new("memory:?size=16M").unix();
    let told = bench(&server.uri(), "--rw mixed --verify --span 1G").fails();
    assert!(told.contains("--span") && told.contains("16777216"), "{told}");
    let told = bench(&server.uri(), "--seconds 600 --hgrm /nowhere/x").fails();
    assert!(told.contains("/nowhere/x"), "{told}");
    // Nothing is installed there.
    let compare = Run::new(sheave()).args("bench compare --quick --servers nbdkit,qemu-nbd");
    let output = compare.env("PATH", "/nowhere").output();
    assert_eq!(output.status.code(), Some(1), "{}", output.describe());
    assert!(output.stderr.contains("nbdkit is not installed"), "{}", output.stderr);
}

#[test]
fn an_interrupted_load_tells_what_it_has() {
    let server = Serve::new("memory:?size=16M").unix();
    for (signal, args) in [
        (Signal::INT, "--seconds 60"),
        (Signal::TERM, "--rw mixed --verify --ops 1000000000 --connections 2"),
        (Signal::QUIT, "--seconds 60"),
        (Signal::HUP, "--seconds 60"),
    ] {
        let mut command = Command::new(sheave());
        let command = command.args(["bench", "run", &server.uri()]).args(args.split(' '));
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let child = child.expect("start sheave");
        let served = || server.sheave("stats --json").ok().contains("\"op\":\"read\"");
        assert!(eventually(served), "no read was served");
        // What it has to tell is from after its warm-up.
        std::thread::sleep(Duration::from_secs(2));
        for signal in [Signal::USR1, Signal::USR2, signal] {
            kill_process(Pid::from_child(&child), signal).expect("our own child");
        }
        let output = child.wait_with_output().expect("our own child");
        let [shown, told] = [output.stdout, output.stderr].map(String::from_utf8);
        let (shown, told) = (shown.expect("text"), told.expect("text"));
        assert_eq!(output.status.code(), Some(1), "{shown}{told}");
        assert!(shown.contains("p99") && shown.contains("read"), "{shown}");
        assert!(told.contains("interrupted after"), "{told}");
    }
}

fn bench(uri: &str, args: &str) -> Run {
    Run::new(sheave()).args("bench run").arg(uri).args(args)
}

fn load(uri: &str, args: &str) -> Value {
    let report = bench(uri, args).args("--verify --seconds 0.7 --warmup 0 --json").ok();
    serde_json::from_str(&report).expect("JSON")
}

#[track_caller]
fn check(report: Value, what: &str) {
    assert_eq!(
        (&report["faults"], &report["errors"]),
        (&0.into(), &0.into()),
        "{what}: {report:#}"
    );
    assert!(report["checked"].as_u64().is_some_and(|checked| checked > 50), "{what}: {report:#}");
    assert!(report["read"]["p99_us"].as_f64().is_some_and(|p99| p99 > 0.0), "{what}: {report:#}");
}
