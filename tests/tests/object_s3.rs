//! Object volumes in buckets: stores that cannot have them, bad input, and what openings ask for.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use sheave_emulator::{Access, Conditions, Emulator, Kind, Settings};
use sheave_tests::{Bucket, Output, Wire, cmd, eventually, pattern};

const BUCKET: &str = "volumes";
const CREATE: &str = "create --size 64M";
const MIB: usize = 1 << 20;
/// A command that a person must help does not try for longer, on a busy machine.
const QUICK: Duration = Duration::from_secs(20);

fn store() -> (Emulator, Bucket) {
    let store = Emulator::start(Settings::default(), BUCKET);
    let bucket = Bucket::emulated(&store, BUCKET);
    (store, bucket)
}

/// The one line of a command that fails.
fn one_line(output: &Output) -> String {
    assert!(!output.status.success(), "{}", output.describe());
    let lines: Vec<_> = output.stderr.lines().filter(|line| line.starts_with("sheave: ")).collect();
    assert_eq!(lines.len(), 1, "one line: {}", output.describe());
    lines[0].to_owned()
}

/// Why a node cannot open a volume.
fn open_error(bucket: &Bucket, name: &str, node: &str) -> String {
    let run = bucket.run().args("serve").arg(bucket.on_node(name, node));
    one_line(&run.args("--socket /nowhere/s").output())
}

fn write_and_flush(wire: &mut Wire, at: usize, seed: u64) {
    assert_eq!(wire.write(at as u64, &pattern(MIB, seed)).expect("a reply"), 0);
    wire.request(cmd::FLUSH, 0, 0, 0).expect("send");
    assert_eq!(wire.simple_reply(0).expect("a reply"), 0);
}

/// Makes a volume whose bucket has an object, and closes it.
fn make_written(bucket: &Bucket, name: &str) {
    bucket.command(CREATE).arg(bucket.volume(name)).ok();
    let mut server = bucket.serve(name, "a").unix();
    let mut wire = Wire::ready(&server).expect("a client");
    write_and_flush(&mut wire, 0, 1);
    drop(wire);
    assert!(server.end(Signal::TERM).success(), "{}", server.log());
}

#[test]
fn a_store_that_lets_two_win_is_refused_unless_the_operator_knows_it() {
    let (store, bucket) = store();
    // So long that the check and the effect of a request are apart.
    store.set(|settings| settings.first_byte = Duration::from_millis(5));
    for conditions in [Conditions::Ignored, Conditions::Raced] {
        store.set(|settings| settings.conditions = conditions);
        let told = one_line(&bucket.command(CREATE).arg(bucket.volume("vol")).output());
        assert!(told.contains("cannot keep a second writer out"), "{conditions:?}: {told}");
        assert_eq!(store.objects(BUCKET, ""), [], "{conditions:?}: nothing is left");
    }
    // It was a good one when the volume was made.
    store.set(|settings| settings.conditions = Conditions::Atomic);
    bucket.command(CREATE).arg(bucket.volume("vol")).ok();
    store.set(|settings| settings.conditions = Conditions::Ignored);
    let before = store.objects(BUCKET, "");
    let told = open_error(&bucket, "vol", "b");
    assert!(told.contains("cannot keep a second writer out"), "{told}");
    assert_eq!(store.objects(BUCKET, ""), before, "nothing is claimed");

    let mut server = bucket.serve("vol", "b").args("--fencing none").unix();
    server.wait_for_log("without fencing", 1);
    let mut wire = Wire::ready(&server).expect("a client");
    write_and_flush(&mut wire, 0, 1);
    // Another one that comes later is noticed even so.
    let mut second = bucket.serve("vol", "c").args("--fencing none --take-over").unix();
    let has_failed = || {
        wire.request(cmd::WRITE_ZEROES, 0, 0, 4096).expect("send");
        let written = wire.simple_reply(0).expect("a reply");
        wire.request(cmd::FLUSH, 0, 0, 0).expect("send");
        written != 0 || wire.simple_reply(0).expect("a reply") != 0
    };
    assert!(eventually(has_failed), "the first is fenced:\n{}", server.log());
    server.kill();
    assert!(second.end(Signal::TERM).success(), "{}", second.log());
}

#[test]
fn what_a_person_must_mend_ends_a_command_at_once_with_what_to_do() {
    let (store, bucket) = store();
    make_written(&bucket, "vol");
    let access = store.settings().access.expect("signatures are checked");
    let other = |key: &str, secret: &str| {
        Bucket::emulated(&store, BUCKET).used_by(Access { key: key.into(), secret: secret.into() })
    };
    let cases = [
        (other("unknown", "x"), "check AWS_ACCESS_KEY_ID"),
        (other(&access.key, "wrong"), "check AWS_ACCESS_KEY_ID"),
        (other("", ""), "there are no credentials; set AWS_ACCESS_KEY_ID"),
        (Bucket::emulated(&store, BUCKET).in_region("eu-west-1"), "add ?region=us-east-1"),
        (Bucket::new(&store.endpoint(), "missing", access), "there is no bucket missing; make it"),
    ];
    let check = |bucket: &Bucket, want: &str| {
        for told in [
            one_line(&bucket.command("info").arg(bucket.volume("vol")).output()),
            one_line(&bucket.command(CREATE).arg(bucket.volume("new")).output()),
            open_error(bucket, "vol", "b"),
        ] {
            assert!(told.contains(want), "{want}: {told}");
        }
    };
    for (bucket, want) in &cases {
        let begun = Instant::now();
        check(bucket, want);
        assert!(begun.elapsed() < 3 * QUICK, "{want}: {:?}", begun.elapsed());
    }
    store.set(|settings| settings.clock_ahead_s = 3600);
    check(&bucket, "the clock of this node");
}

#[test]
fn objects_that_were_removed_or_damaged_are_named_and_never_zeroes() {
    let (store, bucket) = store();
    make_written(&bucket, "vol");
    let logs = store.objects(BUCKET, "volumes/vol/log/");
    // As a lifecycle rule does.
    let kept: Vec<_> = logs.iter().map(|(key, _)| (key, store.object(BUCKET, key))).collect();
    logs.iter().for_each(|(key, _)| assert!(store.remove(BUCKET, key)));
    let told = open_error(&bucket, "vol", "b");
    assert!(told.contains("log/") && told.contains("missing"), "{told}");
    for (key, body) in kept {
        store.replace(BUCKET, key, body.expect("an object"));
    }
    // What is opened again has all of it.
    let server = bucket.serve("vol", "b").unix();
    let mut wire = Wire::ready(&server).expect("a client");
    let read = wire.read(0, MIB as u32).expect("a reply").expect("data");
    assert!(read == pattern(MIB, 1));
    drop((wire, server));

    let roots = store.objects(BUCKET, "volumes/vol/root/");
    let (newest, _) = roots.first().expect("roots");
    store.replace(BUCKET, newest, "this is no root");
    let told = open_error(&bucket, "vol", "b");
    assert!(told.contains("root/"), "{told}");
}

#[test]
fn a_bucket_that_was_rolled_back_is_refused_where_the_journal_is_newer() {
    let (store, bucket) = store();
    make_written(&bucket, "vol");
    let before = store.objects(BUCKET, "volumes/vol/");
    let mut server = bucket.serve("vol", "a").unix();
    let mut wire = Wire::ready(&server).expect("a client");
    write_and_flush(&mut wire, 2 * MIB, 2);
    let objects = || store.objects(BUCKET, "volumes/vol/log/").len();
    let first = before.iter().filter(|(key, _)| key.contains("/log/")).count();
    assert!(eventually(|| objects() > first), "it gets there:\n{}", server.log());
    write_and_flush(&mut wire, 4 * MIB, 3);
    server.kill();
    for (key, _) in store.objects(BUCKET, "volumes/vol/") {
        if !before.iter().any(|(old, _)| *old == key) {
            assert!(store.remove(BUCKET, &key));
        }
    }
    let told = open_error(&bucket, "vol", "a");
    assert!(told.contains("journal"), "{told}");
    assert_eq!(store.objects(BUCKET, "volumes/vol/"), before, "nothing is claimed");
}

#[test]
fn an_opening_asks_for_little_and_an_idle_volume_for_nothing() {
    let (store, bucket) = store();
    bucket.command(CREATE).arg(bucket.volume("other")).ok();
    let created = store.counts();
    // Eight races of 32, eight that must lose, and the root.
    assert_eq!(created.of(Kind::Put).requests, 8 * 33 + 1, "{created:?}");
    assert!(created.requests() <= 320, "{created:?}");
    make_written(&bucket, "vol");
    store.clear_log();
    let mut server = bucket.serve("vol", "a").unix();
    let opened = store.counts();
    assert!(opened.requests() <= 6, "{opened:?}");
    assert_eq!(opened.of(Kind::List).requests, 2, "{opened:?}");
    store.clear_log();
    std::thread::sleep(Duration::from_secs(15));
    assert_eq!(store.counts().requests(), 0, "an idle volume: {:?}", store.log());
    assert!(server.end(Signal::TERM).success());
    // Its end makes a root.
    assert!(store.counts().requests() <= 2, "{:?}", store.log());
}
