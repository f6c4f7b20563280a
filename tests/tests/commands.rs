//! The commands beside `serve`, as a user runs them.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use serde_json::Value;
use sheave_tests::{
    Bystander, Run, Scratch, Serve, Server, Wire, both_engines, cmd, compare, errno, eventually,
    sheave,
};

const MIB: u64 = 1 << 20;

both_engines! {
    fn stats_count_what_was_done(engine) {
        let server = Serve::new(VOLUME).args("--name disk").engine(engine).unix();
        do_some_work(&server);
        let stats = stats_when_idle(&server);
        let volume = &stats[0]["volumes"][0];
        assert_eq!(volume["name"], "disk");
        assert_eq!(op(volume, "read")["bytes"], 100 * 4096);
        assert_eq!(op(volume, "read")["errors"], 1);
        assert_eq!(op(volume, "write")["bytes"], 50 * 1000);
        let total = &op(volume, "read")["stages"][0];
        assert_eq!((&total["stage"], &total["count"]), (&"total".into(), &101.into()));
        let sum: u64 = total["counts"].as_array().expect("buckets").iter()
            .map(|bucket| bucket[1].as_u64().expect("a count")).sum();
        assert_eq!(sum, 101, "the histogram has every request");
        let text = server.sheave("stats disk").ok();
        for word in ["disk", "read", "write", "flush", "p99.9"] {
            assert!(text.contains(word), "no {word:?} in\n{text}");
        }
    }
}

/// The last read of [`do_some_work`] fails.
const VOLUME: &str = "memory:?size=8M&fault=read:error=EIO:range=7M-8M";

/// 100 reads, one failed read, 50 writes, one flush.
fn do_some_work(server: &Server) {
    let mut wire = Wire::ready(server).expect("a client");
    for block in 0..100 {
        wire.read(block * 4096, 4096).expect("a reply").expect("data");
    }
    assert_eq!(wire.read(7 * MIB, 4096).expect("a reply"), Err(errno::EIO));
    for block in 0..50 {
        assert_eq!(wire.write(block * 1000, &[7; 1000]).expect("a reply"), 0);
    }
    wire.request(cmd::FLUSH, 1, 0, 0).expect("send");
    assert_eq!(wire.simple_reply(1).expect("a reply"), 0);
    wire.request(cmd::DISC, 2, 0, 0).expect("send");
    assert!(wire.is_closed());
}

/// The statistics once the server has noticed that its last client is gone.
fn stats_when_idle(server: &Server) -> Value {
    let mut stats = Value::Null;
    let idle = eventually(|| {
        stats = serde_json::from_str(&server.sheave("stats --json").ok()).expect("JSON");
        stats[0]["volumes"][0]["connections"] == 0
    });
    assert!(idle, "{stats:#}");
    stats
}

fn op<'a>(volume: &'a Value, name: &str) -> &'a Value {
    let ops = volume["ops"].as_array().expect("ops");
    ops.iter().find(|op| op["op"] == name).unwrap_or_else(|| panic!("no {name} in {volume:#}"))
}

#[test]
fn stats_write_histogram_files() {
    let server = Serve::new(VOLUME).args("--name disk").unix();
    do_some_work(&server);
    let path = server.scratch().file("out.hgrm");
    server.sheave("stats --hgrm").arg(&path).ok();
    let read = fs::read_to_string(path.replace("out.", "out.disk.read.")).expect("the file");
    assert!(read.contains("Percentile TotalCount 1/(1-Percentile)"), "{read}");
    assert!(read.contains("#[Mean"), "the footer that plotters want:\n{read}");
    let last = read.lines().rfind(|line| !line.starts_with('#')).expect("a line");
    assert_eq!(last.split_whitespace().nth(2), Some("101"), "the last line counts all:\n{read}");
}

#[test]
fn stats_without_a_server_say_so() {
    let scratch = Scratch::new();
    let stats = |args| Run::new(sheave()).args(args).env("SHEAVE_RUNTIME_DIR", scratch.path());
    let output = stats("stats").output();
    assert_eq!(output.status.code(), Some(1), "{}", output.describe());
    assert_eq!(output.stderr.lines().count(), 1, "{}", output.stderr);
    let server = Serve::new("memory:?size=8M").args("--name disk").unix();
    let error = server.sheave("stats no-such-volume").fails();
    assert!(error.contains("no-such-volume"), "{error}");
}

#[test]
fn top_prints_lines_for_programs() {
    let server = Serve::new(VOLUME).args("--name disk").unix();
    do_some_work(&server);
    let lines = server.sheave("top --count 2 --interval 0.2").ok();
    assert!(lines.contains("disk"), "{lines}");
}

#[test]
fn metrics_are_served_to_prometheus() {
    let server = Serve::new(VOLUME).args("--name disk --metrics 127.0.0.1:0").unix();
    do_some_work(&server);
    let log = server.log();
    let address = log.split("http://").nth(1).and_then(|rest| rest.split('/').next());
    let mut stream = TcpStream::connect(address.expect("the address is logged")).expect("connect");
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .expect("send");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    for line in [
        "sheave_ops_total{volume=\"disk\",op=\"read\"} 101",
        "sheave_op_errors_total{volume=\"disk\",op=\"read\"} 1",
        "sheave_op_bytes_total{volume=\"disk\",op=\"write\"} 50000",
    ] {
        assert!(answer.lines().any(|found| found == line), "no {line:?} in\n{answer}");
    }
    assert!(answer.trim_end().ends_with("# EOF"), "OpenMetrics ends so:\n{answer}");
}

#[test]
fn copy_keeps_bytes_and_holes() {
    let scratch = Scratch::new();
    let image = scratch.islands("disk.img", 64 * MIB + 4096);
    let server = Serve::new(scratch.sparse("served.img", 64 * MIB + 4096)).unix();
    copy(&[&image, &server.uri()]);
    compare(&image, scratch.file("served.img"));
    copy(&[&server.uri(), &scratch.file("out.img")]);
    compare(&image, scratch.file("out.img"));
    copy(&[&image, &scratch.file("local.img")]);
    compare(&image, scratch.file("local.img"));
    let allocated = |path: &str| fs::metadata(path).expect("file").blocks() * 512;
    for file in ["served.img", "out.img", "local.img"] {
        let (got, want) = (allocated(&scratch.file(file)), allocated(&image));
        assert!(got <= want + want / 4, "{file} takes {got} bytes, its source {want}");
    }
}

#[test]
fn copy_overwrites_what_was_there() {
    let scratch = Scratch::new();
    let image = scratch.islands("disk.img", 8 * MIB);
    let old = scratch.filled("old.img", 8 << 20);
    copy(&[&image, &old]);
    compare(&image, &old);
}

#[test]
fn copy_tells_what_is_wrong_and_spares_the_target() {
    let scratch = Scratch::new();
    let image = scratch.filled("disk.img", 8 << 20);
    let small = scratch.filled("small.img", 1 << 20);
    let missing = scratch.file("missing.img");
    let server = Serve::new("memory:?size=1M").args("--read-only").unix();
    let absent = format!("nbd+unix:///?socket={}", scratch.file("absent"));
    let out = scratch.file("out.img");
    for (from, to) in [
        (missing.as_str(), out.as_str()),
        (&absent, &out),
        (&image, &absent),
        // Too small, and read-only.
        (&image, &server.uri()),
        (&small, &server.uri()),
    ] {
        let output = Run::new(sheave()).args("copy --quiet").arg(from).arg(to).output();
        assert_eq!(output.status.code(), Some(1), "{}", output.describe());
        assert_eq!(output.stderr.lines().count(), 1, "one line: {}", output.stderr);
    }
    assert!(!fs::exists(&out).expect("stat"), "a failed copy made an empty image");
    assert!(fs::read(&small).expect("file") == sheave_tests::pattern(1 << 20, 1));
}

#[test]
fn copy_over_tls() {
    let certificates = sheave_tests::Certificates::new();
    let scratch = Scratch::new();
    let image = scratch.islands("disk.img", 8 * MIB);
    let server = Serve::new("memory:?size=8M").tls(&certificates, true).tcp();
    let uri = format!(
        "nbds://localhost:{}/?tls-certificates={}",
        server.port(),
        certificates.dir().display()
    );
    copy(&[&image, &uri]);
    copy(&[&uri, &scratch.file("out.img")]);
    compare(&image, scratch.file("out.img"));
    let stranger = certificates.stranger();
    let wrong =
        uri.replace(&*certificates.dir().to_string_lossy(), &stranger.dir().to_string_lossy());
    Run::new(sheave()).args("copy --quiet").arg(wrong).arg(scratch.file("none.img")).fails();
}

#[test]
fn several_volumes_are_several_exports() {
    let scratch = Scratch::new();
    let a = scratch.filled("a.img", 1 << 20);
    let b = scratch.islands("b.img", 4 * MIB);
    let server = Serve::new(&a).args(&b).unix();
    let list = Run::new("nbdinfo").args("--list --json").arg(server.uri()).ok();
    let list: Value = serde_json::from_str(&list).expect("JSON");
    let names: Vec<_> =
        list["exports"].as_array().expect("exports").iter().map(|e| &e["export-name"]).collect();
    assert_eq!(names, ["a.img", "b.img"]);
    for (image, name) in [(&a, "a.img"), (&b, "b.img")] {
        Run::new("nbdcopy").arg(server.uri_of(name)).arg(scratch.file("out.img")).ok();
        compare(image, scratch.file("out.img"));
        fs::remove_file(scratch.file("out.img")).expect("remove");
    }
    // Without a name, too: there is no default, so that no client writes to the wrong one.
    for name in ["c.img", ""] {
        Run::new("nbdinfo").arg(server.uri_of(name)).fails();
    }
}

#[test]
fn interrupt_and_terminate_end_a_server_in_use() {
    let mut server = Serve::new("memory:?size=8M").unix();
    let bystander = Bystander::new(&server);
    let socket = server.socket().to_owned();
    let status = server.interrupt();
    assert!(status.success(), "{status}\n{}", server.log());
    assert!(!fs::exists(socket).expect("stat"), "its socket is gone");
    drop(bystander);
    // The other signal is sent when this is dropped.
    let server = Serve::new("memory:?size=8M").unix();
    let _bystander = Bystander::new(&server);
    drop(server);
}

#[test]
fn a_busy_server_says_what_it_waits_for_and_a_second_signal_ends_it() {
    let server = Serve::new("memory:?size=8M&fault=read:delay=600s").unix();
    let mut wire = Wire::ready(&server).expect("a client");
    wire.request(cmd::READ, 1, 0, 4096).expect("send");
    // Once this is answered, the read before it is in flight.
    wire.request(cmd::FLUSH, 2, 0, 0).expect("send");
    assert_eq!(wire.simple_reply(2).expect("a reply"), 0);
    let mut server = server;
    kill(&server, "TERM");
    wait_for_log(&server, "ending: SIGTERM");
    wait_for_log(&server, "waiting up to 5 s for 1 connections");
    let start = Instant::now();
    let status = server.interrupt();
    assert_eq!(status.code(), Some(1), "{}", server.log());
    // Without it, the five seconds would go by.
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert!(server.log().contains("a second signal, SIGINT"), "{}", server.log());
    assert!(!fs::exists(server.socket()).expect("stat"), "its socket is gone");
}

#[test]
fn the_log_names_exports_and_clients() {
    let server = Serve::new("memory:?size=8M").args("--name disk").log_level("debug").tcp();
    drop(Wire::ready(&server).expect("a client"));
    wait_for_log(&server, "connection closed");
    let mut stranger = Wire::connect(&server).expect("a client");
    stranger.handshake().expect("greeting");
    stranger.send(b"GET / HTTP/1.1\r\n\r\n").expect("send");
    wait_for_log(&server, "INFO handshake ended");
    // That is no news.
    Run::new("nbdinfo").arg("--list").arg(server.uri()).ok();
    wait_for_log(&server, "DEBUG handshake ended");
    let log = server.log();
    assert!(!log.contains("handshake failed"), "{log}");
    let line = |what: &str| log.lines().find(|line| line.contains(what)).expect("a line");
    assert!(line("serving").contains("exports=\"disk\""), "{log}");
    assert!(!line("serving").contains("Taskrun"), "{log}");
    for what in ["connection opened", "connection closed"] {
        assert!(line(what).contains("disk") && line(what).contains("127.0.0.1:"), "{log}");
    }
    assert!(line("handshake ended").contains("127.0.0.1:"), "{log}");

    let server = Serve::new("memory:?size=8M").log_level("verbose").unix();
    wait_for_log(&server, "ERROR SHEAVE_LOG=\"verbose\" is not used");
    Wire::ready(&server).expect("a client");
    assert!(!server.log().contains("connection opened"), "{}", server.log());
}

#[test]
fn doctor_looks_and_tells() {
    let findings = Run::new(sheave()).args("doctor --json").output().stdout;
    let findings: Value = serde_json::from_str(&findings).expect("JSON");
    assert!(!findings.as_array().expect("a list").is_empty());
    let text = Run::new(sheave()).args("doctor").output().stdout;
    assert!(text.contains("io_uring"), "{text}");
}

#[test]
fn completions_and_man_pages_are_well_formed() {
    let bash = Run::new(sheave()).args("completions bash").ok();
    Run::new("bash").arg("-n").stdin(bash.as_bytes()).ok();
    for shell in ["zsh", "fish"] {
        assert!(Run::new(sheave()).args("completions").arg(shell).ok().contains("serve"));
    }
    let scratch = Scratch::new();
    Run::new(sheave()).arg("man").arg(scratch.path()).ok();
    let pages: Vec<_> = fs::read_dir(scratch.path()).expect("directory").collect();
    assert!(pages.len() >= 6, "{pages:?}");
    let page = fs::read_to_string(scratch.file("sheave-serve.1")).expect("the page of serve");
    assert!(page.contains(".TH") && page.contains("tls"), "{page}");
}

#[test]
fn every_command_has_help_with_examples() {
    for command in [
        "",
        "serve",
        "daemon",
        "attach",
        "detach",
        "ls",
        "copy",
        "stats",
        "top",
        "bench",
        "doctor",
        "completions",
        "man",
    ] {
        let help = Run::new(sheave()).args(command).arg("--help").ok();
        assert!(help.contains("Usage: sheave") && help.contains("Examples:"), "{help}");
    }
    assert!(Run::new(sheave()).arg("--version").ok().starts_with("sheave "));
}

fn kill(server: &Server, signal: &str) {
    Run::new("kill").args(&format!("-{signal} {}", server.pid())).ok();
}

fn wait_for_log(server: &Server, text: &str) {
    assert!(eventually(|| server.log().contains(text)), "no {text:?} in:\n{}", server.log());
}

fn copy(args: &[&str]) {
    let run = Run::new(sheave()).args("copy --quiet");
    args.iter().fold(run, |run, arg| run.arg(arg)).ok();
}
