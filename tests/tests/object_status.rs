//! What commands say of object volumes that are open.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use rustix::process::Signal;
use serde_json::Value;
use sheave_tests::{Run, Scratch, Serve, Server, Wire, cmd, eventually, request_header, sheave};

/// A volume in a scratch directory.
fn created(scratch: &Scratch) -> String {
    let place = format!("dir://{}", scratch.file("vol"));
    Run::new(sheave()).args("volume create").arg(&place).args("--size 64M").ok();
    place
}

fn info(server: &Server, place: &str) -> Value {
    let text = server.sheave("volume info --json").arg(place).ok();
    serde_json::from_str(&text).expect("JSON")
}

fn write(wire: &mut Wire, count: u64) {
    for index in 0..count {
        wire.send(&request_header(0, cmd::WRITE, 7, index << 20, 1 << 20)).expect("send");
        wire.send(&vec![index as u8 + 1; 1 << 20]).expect("send");
        assert_eq!(wire.any_simple_reply().expect("a reply").0, 0);
    }
}

/// What the server's metrics endpoint says.
fn metrics(server: &Server) -> String {
    server.wait_for_log("metrics at http://", 1);
    let log = server.log();
    let (_, behind) = log.split_once("metrics at http://").expect("an address");
    let (address, _) = behind.split_once('/').expect("a path");
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").expect("send");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    text
}

#[test]
fn an_open_volume_says_what_its_store_lacks_and_waits_for() {
    let scratch = Scratch::on_disk();
    let place = created(&scratch);
    let text = format!("{place}?cache-dir={}", scratch.file("cache"));
    let mut server = Serve::new(text).args("--metrics 127.0.0.1:0").unix();
    let mut wire = Wire::ready(&server).expect("a client");
    write(&mut wire, 4);
    let open = info(&server, &place);
    assert_eq!(open["state"], "open");
    assert_eq!((&open["lag_bytes"], &open["lag_writes"]), (&(4 << 20).into(), &4.into()), "{open}");
    assert!(open["lag_seconds"].as_f64().is_some_and(|seconds| seconds < 60.0), "{open}");
    assert!(open["requests"]["create"]["answered"].as_u64() >= Some(2), "{open}");
    assert_eq!(open["waits_for"], Value::Null);
    let metrics = metrics(&server);
    let labels = format!("{{volume=\"{place}\"}}");
    for line in [
        format!("sheave_object_lag_bytes{labels} 4194304"),
        format!("sheave_object_waits{labels} 0"),
        format!("sheave_object_requests_total{{volume=\"{place}\",kind=\"delete\"}} 0"),
    ] {
        assert!(metrics.lines().any(|have| have == line), "no {line} in\n{metrics}");
    }
    // A process of another user, or on another node, cannot be asked.
    let elsewhere = Run::new(sheave()).args("volume info --json").arg(&place);
    let elsewhere = elsewhere.env("SHEAVE_RUNTIME_DIR", scratch.file("none")).ok();
    assert!(elsewhere.contains("\"lag_bytes\":null"), "{elsewhere}");

    // The file system of the store goes away.
    fs::rename(scratch.file("vol"), scratch.file("gone")).expect("rename");
    let is_away = || {
        let stats = server.sheave("stats").ok();
        stats.contains("the store is away") && stats.contains("the store lacks 4194304 bytes")
    };
    assert!(eventually(is_away), "{}", server.sheave("stats").ok());
    let top = server.sheave("top --interval 0.1 --count 1").ok();
    assert!(top.contains(&format!("{place}: the store is away")), "{top}");
    fs::rename(scratch.file("gone"), scratch.file("vol")).expect("rename");
    assert!(eventually(|| info(&server, &place)["lag_bytes"] == 0));
    assert_eq!(info(&server, &place)["waits_for"], Value::Null);
    drop(wire);
    assert!(server.end(Signal::TERM).success());
    let closed = info(&server, &place);
    assert_eq!((&closed["state"], &closed["lag_bytes"]), (&"closed".into(), &0.into()));
}
