//! The end of processes with object volumes whose stores lack something.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use sheave_emulator::{Emulator, Outage, Settings};
use sheave_tests::{Bucket, Node, Run, Server, Wire, pattern, sheave};

const BUCKET: &str = "volumes";
const MIB: u64 = 1 << 20;
const BANDWIDTH: u64 = 400_000;
/// What the end takes beside the time that it may wait, on a busy machine.
const QUICK: Duration = Duration::from_secs(30);

/// A server that has written so much and ends with that option.
fn written(mib: u64, option: &str) -> (Emulator, Bucket, Server) {
    let store = Emulator::start(Settings::default(), BUCKET);
    let bucket = Bucket::emulated(&store, BUCKET);
    bucket.command("create --size 256M").arg(bucket.volume("vol")).ok();
    let server = bucket.serve("vol", "a").args(option).unix();
    let mut wire = Wire::ready(&server).expect("a client");
    for at in 0..mib {
        assert_eq!(wire.write(at * MIB, &pattern(MIB as usize, at)).expect("a reply"), 0);
    }
    (store, bucket, server)
}

fn state(bucket: &Bucket) -> String {
    let info = bucket.command("info").arg(bucket.volume("vol")).ok();
    let state = info.lines().find_map(|line| line.strip_prefix("state: "));
    state.expect("a state").to_owned()
}

#[test]
fn the_end_waits_as_long_as_it_may_and_says_what_is_left() {
    let (store, bucket, mut server) = written(4, "--drain-timeout 10");
    store.set(|settings| settings.outage = Some(Outage::Unavailable));
    let begun = Instant::now();
    assert!(server.end(Signal::TERM).success(), "{}", server.log());
    assert!(begun.elapsed() < QUICK, "{:?}", begun.elapsed());
    let log = server.log();
    let left = log.lines().find(|line| line.contains("bytes are not in its store yet"));
    let left = left.unwrap_or_else(|| panic!("{log}"));
    assert!(left.contains("the store is away") && left.contains("safe in the journal"), "{left}");
    store.set(|settings| settings.outage = None);
    assert_eq!(state(&bucket), "open");
    // Nothing is lost, and with more time it is all there.
    store.set(|settings| settings.bandwidth = Some(BANDWIDTH));
    let mut server = bucket.serve("vol", "a").args("--drain-timeout 300").unix();
    assert!(server.end(Signal::TERM).success(), "{}", server.log());
    assert_eq!(state(&bucket), "closed");
    let log = server.log();
    assert!(log.contains("bytes are not in the store yet") && log.contains(" B/s"), "{log}");
    store.set(|settings| settings.bandwidth = None);
    let server = bucket.serve("vol", "b").unix();
    let mut wire = Wire::ready(&server).expect("a client");
    for at in 0..4 {
        let read = wire.read(at * MIB, MIB as u32).expect("a reply").expect("data");
        assert!(read == pattern(MIB as usize, at), "{at}");
    }
}

#[test]
fn a_second_signal_ends_the_wait() {
    let (store, bucket, mut server) = written(4, "--drain-timeout 600");
    store.set(|settings| settings.outage = Some(Outage::Hang));
    server.signal(Signal::INT);
    // The first one is dealt with, and the end waits.
    server.wait_for_log("ending", 1);
    std::thread::sleep(Duration::from_secs(1));
    assert!(server.is_alive(), "{}", server.log());
    let begun = Instant::now();
    server.signal(Signal::INT);
    server.ended();
    assert!(begun.elapsed() < QUICK, "{:?}", begun.elapsed());
    assert!(server.log().contains("safe in the journal"), "{}", server.log());
    store.set(|settings| settings.outage = None);
    assert_eq!(state(&bucket), "open");
}

#[test]
fn a_detach_waits_for_the_store() {
    let node = Node::new();
    let place = node.file("objects");
    let volume = format!("dir://{}", place.display());
    Run::new(sheave()).args("volume create --size 64M").arg(&volume).ok();
    let daemon = node.daemon();
    let write = |seed| {
        let device = daemon.attach(&volume);
        let mut wire = Wire::unix(&device).expect("the device");
        assert_eq!(wire.write(0, &pattern(MIB as usize, seed)).expect("a reply"), 0);
    };
    write(1);
    daemon.sheave("detach").arg(&volume).ok();
    let info = Run::new(sheave()).args("volume info").arg(&volume).ok();
    assert!(info.contains("state: closed"), "{info}");
    write(2);
    let away = node.file("away");
    fs::rename(&place, &away).expect("rename");
    let told = daemon.sheave("detach --drain-timeout 1").arg(&volume).output();
    assert!(told.status.success(), "{}", told.describe());
    assert!(told.stderr.contains("bytes are not in its store yet"), "{}", told.describe());
    assert!(told.stderr.contains("the daemon goes on with it"), "{}", told.describe());
    fs::rename(&away, &place).expect("rename");
    let is_closed = || {
        let info = Run::new(sheave()).args("volume info").arg(&volume).ok();
        info.contains("state: closed")
    };
    assert!(sheave_tests::eventually(is_closed), "{}", daemon.log());
}
