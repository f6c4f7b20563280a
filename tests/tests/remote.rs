//! Exports of NBD servers elsewhere as volumes.

mod engines;

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use sheave_conformance::{Driver, Options};
use sheave_core::{ByteRange, Op, Reply, Volume};
use sheave_emulator::{Emulator, Settings};
use sheave_tests::{
    Bucket, Certificates, Foreign, Run, Scratch, Serve, Wire, both_engines, cmd, eventually, sheave,
};
use sheave_volumes::{OpenOptions, open};

use engines::{CallsEngine, on_both};

/// Neither a multiple of a block, nor of a page, nor of anything.
const SIZE: u64 = 3 * (64 << 10) + 777;
/// Clients that each offer 64 MiB.
const CLIENTS: u64 = 30;
const OPTIONS: Options = Options { cases: 25, unaligned: true };

/// Opens a VOLUME and makes it all zeroes.
fn blank(volume: &str) -> Arc<dyn Volume> {
    let volume = open(volume, &OpenOptions::default()).expect("a volume");
    let mut driver = Driver::new(volume.backend().expect("a backend"), CallsEngine::new());
    let range = ByteRange::within(0, volume.size(), volume.size()).expect("all of it");
    let zero = Op::WriteZeroes { range, fua: false, no_hole: false, fast: false };
    assert!(matches!(driver.run_one(zero), Ok(Reply::Done)));
    drop(driver);
    volume
}

#[test]
fn an_export_of_sheave_is_a_volume() {
    let server = Serve::new(format!("memory:?size={SIZE}")).unix();
    on_both("remote sheave", OPTIONS, || blank(&server.uri()));
}

#[test]
fn an_export_of_an_object_volume_in_a_bucket_is_a_volume() {
    let store = Emulator::start(Settings::default(), "volumes");
    let bucket = Bucket::emulated(&store, "volumes");
    bucket.command("create --size 256K").arg(bucket.volume("vol")).ok();
    let server = bucket.serve("vol", "a").unix();
    on_both("remote object volume", Options { cases: 12, ..OPTIONS }, || blank(&server.uri()));
}

#[test]
fn an_export_of_nbdkit_is_a_volume() {
    let Some(server) =
        Foreign::nbdkit("an_export_of_nbdkit_is_a_volume", &format!("memory {SIZE}"))
    else {
        return;
    };
    on_both("remote nbdkit", OPTIONS, || blank(&server.uri()));
}

#[test]
fn an_export_of_qemu_is_a_volume() {
    let Some(server) = Foreign::qemu_nbd("an_export_of_qemu_is_a_volume", 4 << 20) else {
        return;
    };
    on_both("remote qemu-nbd", Options { cases: 6, ..OPTIONS }, || blank(&server.uri()));
}

/// What `sheave serve` says about a volume that it cannot open: one line.
fn refusal(volume: &str) -> String {
    let run = Run::new(sheave()).args("serve --listen 127.0.0.1:0").arg(volume);
    let said = run.timeout(Duration::from_secs(60)).fails();
    let lines: Vec<_> = said.trim().lines().collect();
    assert_eq!(lines.len(), 1, "one line:\n{said}");
    lines[0].to_owned()
}

#[test]
fn what_cannot_be_reached_is_said_in_one_line() {
    let scratch = Scratch::new();
    let here = scratch.file("nothing");
    let exports = Serve::new("memory:?size=1M").arg("null:?size=1M").unix();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = closed.local_addr().expect("a port").port();
    drop(closed);
    // It accepts, and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent_port = silent.local_addr().expect("a port").port();
    let cases = [
        (format!("nbd+unix:///?socket={here}"), "No such file"),
        (format!("nbd://127.0.0.1:{port}/"), "is the server running?"),
        ("nbd://no-such-host.invalid/".to_owned(), "no-such-host.invalid"),
        (exports.uri_of("c"), "it has no such export"),
        (
            format!("nbd://127.0.0.1:{silent_port}/?connect-timeout=500ms"),
            "does not answer in time",
        ),
        (exports.uri_of("memory").replace("nbd+", "nbds+"), "tls-certificates=DIR"),
        (exports.uri_of("memory") + "&connections=99", "the most is 16"),
        (exports.uri_of("memory") + "&reconnect-timeout=never", "write seconds"),
        (exports.uri_of("memory") + "&conections=2", "unknown parameter"),
    ];
    for (volume, want) in cases {
        let line = refusal(&volume);
        assert!(line.contains(want), "{volume}: {line}");
    }
}

#[test]
fn certificates_that_do_not_fit_are_said_in_one_line() {
    let (ours, theirs) = (Certificates::new(), Certificates::new());
    let anonymous = ours.without_client();
    let server = Serve::new("memory:?size=1M").tls(&ours, true).unix();
    let volume = |dir: &std::path::Path, host: &str| {
        let uri = server.uri().replace("nbd+", "nbds+");
        format!("{uri}&tls-certificates={}&tls-hostname={host}", dir.display())
    };
    let cases = [
        (volume(theirs.dir(), "localhost"), "invalid peer certificate"),
        (volume(ours.dir(), "elsewhere.test"), "elsewhere.test"),
        (volume(anonymous.path(), "localhost"), "put client-cert.pem"),
        (server.uri(), "TLS"),
    ];
    for (volume, want) in cases {
        let line = refusal(&volume);
        assert!(line.contains(want), "{volume}: {line}");
    }
    let right = Serve::new(volume(ours.dir(), "localhost")).unix();
    Run::new("nbdinfo").arg(right.uri()).ok();
}

#[test]
fn an_upstream_whose_certificate_has_expired_harms_no_other_volume() {
    let certificates = Certificates::new();
    let scratch = Scratch::new();
    let start = || {
        let _ = fs::remove_file(scratch.file("upstream"));
        Serve::new("memory:?size=1M").tls(&certificates, true).unix_named(scratch.file("upstream"))
    };
    let mut upstream = start();
    let uri = upstream.uri_of("memory").replace("nbd+", "nbds+");
    let dir = certificates.dir().display();
    let volume = format!("{uri}&tls-certificates={dir}&tls-hostname=localhost");
    let server = Serve::new(&volume).arg("null:?size=1M").unix();
    upstream.kill();
    certificates.expire_server();
    upstream = start();
    let line = refusal(&volume);
    assert!(line.contains("expired") && line.contains("upstream"), "{line}");
    // One that was open before waits, says so once, and holds up no other.
    let mut waiting = Wire::connect(&server).expect("a connection");
    waiting.handshake().expect("a handshake");
    waiting.go("memory").expect("the export is still there");
    waiting.request(cmd::READ, 1, 0, 512).expect("a request");
    server.wait_for_log("expired", 1);
    Run::new("nbdcopy").arg(server.uri_of("null")).arg("null:").ok();
    assert_eq!(server.log().matches("expired").count(), 1, "{}", server.log());
    upstream.kill();
    certificates.renew_server();
    let _upstream = start();
    assert_eq!(waiting.simple_reply(1).expect("a reply"), 0);
}

#[test]
fn a_volume_whose_server_is_away_holds_up_no_other() {
    let mut upstream = Serve::new("memory:?size=1M").unix();
    let server = Serve::new(upstream.uri_of("memory")).arg("null:?size=1M").unix();
    upstream.kill();
    let mut waiting = Wire::connect(&server).expect("a connection");
    waiting.handshake().expect("a handshake");
    waiting.go("memory").expect("the export is still there");
    waiting.request(cmd::READ, 1, 0, 512).expect("a request");
    for _ in 0..5 {
        Run::new("nbdcopy").arg(server.uri_of("null")).arg("null:").ok();
    }
}

both_engines! {
    fn clients_that_come_and_go_while_the_server_is_away_take_bounded_memory(engine) {
        let scratch = Scratch::new();
        let start = || {
            let _ = fs::remove_file(scratch.file("upstream"));
            Serve::new("memory:?size=64M").unix_named(scratch.file("upstream"))
        };
        let mut upstream = start();
        let server = Serve::new(upstream.uri_of("memory")).engine(engine).unix();
        let open = || {
            let mut wire = Wire::connect(&server).expect("a connection");
            wire.handshake().expect("a handshake");
            wire.go("memory").expect("the export");
            wire
        };
        assert_eq!(open().write(0, &[1; 512]).expect("a reply"), 0);
        let fds = server.fds();
        upstream.kill();
        let data = vec![7; 1 << 20];
        for _ in 0..CLIENTS {
            let mut wire = open();
            wire.set_timeout(Duration::from_millis(200));
            for at in 0..64 {
                let sent = wire.request(cmd::WRITE, at, at << 20, 1 << 20);
                if sent.and_then(|()| wire.send(&data)).is_err() {
                    // It is held back.
                    break;
                }
            }
        }
        let rss = server.rss_kib() >> 10;
        assert!(rss < 400, "{rss} MiB of {} that were offered", CLIENTS * 64);
        // The first have requests in the volume, which takes 128 MiB.
        assert!(eventually(|| server.fds() < fds + 16), "the others are noticed to be gone");
        upstream = start();
        assert_eq!(open().write(0, &[2; 512]).expect("a reply"), 0);
        assert_eq!(open().read(0, 512).expect("a reply"), Ok(vec![2; 512]));
        assert!(eventually(|| server.fds() <= fds), "all have ended");
        assert!(upstream.is_alive());
    }

    fn a_connection_is_handed_on_when_the_thread_that_drives_it_has_no_more_clients(engine) {
        let what = "a_connection_is_handed_on";
        let args = "--filter=delay memory 1M rdelay=300ms wdelay=2000ms";
        let Some(upstream) = Foreign::nbdkit(what, args) else { return };
        let server = Serve::new(upstream.uri()).args("--shards 2").engine(engine).unix();
        let open = || {
            let mut wire = Wire::connect(&server).expect("a connection");
            wire.handshake().expect("a handshake");
            wire.go("").expect("the export");
            wire
        };
        let (mut first, mut second) = (open(), open());
        first.request(cmd::READ, 1, 0, 512).expect("a request");
        // By now the thread of the first one drives.
        std::thread::sleep(Duration::from_millis(100));
        second.request(cmd::WRITE, 2, 4096, 512).expect("a request");
        second.send(&[7; 512]).expect("its data");
        assert_eq!(first.simple_reply(1).expect("a reply"), 0);
        first.receive_vec(512).expect("its data");
        drop(first);
        assert_eq!(second.simple_reply(2).expect("a reply"), 0);
        assert_eq!(second.read(4096, 512).expect("a reply"), Ok(vec![7; 512]));
        assert!(!server.log().contains("connection is lost"), "{}", server.log());
    }
}
