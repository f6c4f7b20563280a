//! Object volumes in buckets of S3 servers: one body of a test for all
//! that keep conditions, and refusals of those that do not.

use std::fs;
use std::path::Path;

use rustix::process::Signal;
use serde_json::Value;
use sheave_emulator::{Conditions, Emulator, Settings};
use sheave_tests::{Bucket, Run, S3Server, Wire, cmd, eventually, pattern};

const BUCKET: &str = "volumes";
const MIB: usize = 1 << 20;
const CREATE: &str = "create --size 64M";

fn nbdcopy(from: impl AsRef<Path>, to: impl AsRef<Path>) {
    Run::new("nbdcopy").arg(from.as_ref()).arg(to.as_ref()).ok();
}

fn state(bucket: &Bucket, name: &str) -> String {
    let info = bucket.command("info --json").arg(bucket.volume(name)).ok();
    let info: Value = serde_json::from_str(&info).expect("JSON");
    info["state"].as_str().expect("a state").to_owned()
}

fn write_and_flush(wire: &mut Wire, at: usize, seed: u64) {
    assert_eq!(wire.write(at as u64, &pattern(MIB, seed)).expect("a reply"), 0);
    wire.request(cmd::FLUSH, 0, 0, 0).expect("send");
    assert_eq!(wire.simple_reply(0).expect("a reply"), 0);
}

fn verify(wire: &mut Wire, at: usize, seed: u64) {
    let read = wire.read(at as u64, MIB as u32).expect("a reply").expect("its data");
    assert!(read == pattern(MIB, seed), "what was written at {at}");
}

/// The life of a volume in a bucket.
fn live(bucket: &Bucket) {
    let place = bucket.volume("vol");
    let printed = bucket.command(CREATE).arg(&place).ok();
    assert!(place.starts_with(printed.trim()), "{printed}");
    let told = bucket.command(CREATE).arg(&place).fails();
    assert!(told.contains("there is a volume already"), "{told}");
    let image = bucket.scratch().ext4("image", "48M");
    let out = |name: &str| bucket.scratch().path().join(name);

    let mut server = bucket.serve("vol", "a").unix();
    nbdcopy(&image, server.uri());
    let mut wire = Wire::ready(&server).expect("a client");
    write_and_flush(&mut wire, 50 * MIB, 1);
    assert_eq!(state(bucket, "vol"), "open");
    server.kill();

    // The same node has its journal.
    let mut first = bucket.serve("vol", "a").unix();
    let mut wire = Wire::ready(&first).expect("a client");
    verify(&mut wire, 50 * MIB, 1);
    write_and_flush(&mut wire, 52 * MIB, 2);

    // Another one takes over what the bucket has, which is a prefix of what was written.
    let mut second = bucket.serve("vol", "b").args("--take-over").unix();
    let mut other = Wire::ready(&second).expect("a client");
    write_and_flush(&mut other, 54 * MIB, 3);
    let has_failed = || {
        wire.request(cmd::FLUSH, 0, 0, 0).expect("send");
        wire.simple_reply(0).expect("a reply") != 0
    };
    assert!(eventually(has_failed), "the first node is fenced:\n{}", first.log());
    first.kill();
    nbdcopy(&image, second.uri());
    verify(&mut other, 54 * MIB, 3);
    drop(other);
    assert!(second.end(Signal::TERM).success());
    assert_eq!(state(bucket, "vol"), "closed");

    // A third one has nothing but the bucket.
    let third = bucket.serve("vol", "c").unix();
    nbdcopy(third.uri(), out("out"));
    let copied = fs::read(out("out")).expect("a copy");
    let image = fs::read(&image).expect("an image");
    assert!(copied[..image.len()] == image, "the image is the same");
    assert!(copied[54 * MIB..55 * MIB] == pattern(MIB, 3), "what was written is the same");
    drop(third);
    bucket.command("delete").arg(&place).ok();
    let told = bucket.command("info").arg(&place).fails();
    assert!(told.contains("the volume is deleted"), "{told}");
    bucket.command(CREATE).arg(&place).ok();
}

#[test]
fn emulator() {
    let store = Emulator::start(Settings::default(), BUCKET);
    let bucket = Bucket::emulated(&store, BUCKET);
    live(&bucket);
    // What is left of a deleted volume is what says so.
    let objects = store.objects(BUCKET, "volumes/vol/log/");
    assert!(objects.is_empty(), "{objects:?}");
    let failed = store.log().into_iter().filter(|record| record.status / 100 == 5);
    assert_eq!(failed.count(), 0, "no request is strange to the store");
}

#[test]
fn versitygw() {
    let Some(server) = S3Server::versitygw("object_servers::versitygw") else { return };
    live(&server.bucket());
}

/// It checks a condition, then acts, so the probe may catch it or not.
#[test]
fn moto() {
    let Some(server) = S3Server::moto("object_servers::moto") else { return };
    live(&server.bucket().without_fencing());
}

/// Whether a volume can be made.
fn is_refused(bucket: &Bucket, name: &str) -> bool {
    let output = bucket.command(CREATE).arg(bucket.volume(name)).output();
    let is_refused = !output.status.success();
    let has_reason = output.stderr.contains("cannot keep a second writer out");
    assert!(!is_refused || has_reason, "{}", output.describe());
    is_refused
}

/// It checks, then acts, too.
#[test]
fn s3s() {
    const TRIES: usize = 10;
    let Some(server) = S3Server::s3s("object_servers::s3s") else { return };
    let bucket = server.bucket();
    let refused = (0..TRIES).filter(|index| is_refused(&bucket, &format!("try{index}"))).count();
    assert!(refused > TRIES / 2, "the probe caught it {refused} times in {TRIES}");
    live(&bucket.without_fencing());
}

#[test]
fn stores_that_race_or_ignore_conditions_are_refused() {
    for conditions in [Conditions::Raced, Conditions::Ignored] {
        let settings = Settings { conditions, ..Settings::default() };
        let store = Emulator::start(settings, BUCKET);
        let bucket = Bucket::emulated(&store, BUCKET);
        assert!(is_refused(&bucket, "vol"), "{conditions:?}");
        let left = store.objects(BUCKET, "");
        assert!(left.is_empty(), "nothing is left of a refused volume: {left:?}");
        let bucket = bucket.without_fencing();
        bucket.command(CREATE).arg(bucket.volume("vol")).ok();
    }
}
