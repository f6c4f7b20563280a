//! Object volumes whose store is gone, or fails at random: no request of a client fails.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use sheave_emulator::{Effect, Emulator, Fault, Kind, Outage, Record, Settings};
use sheave_tests::{Bucket, Server, Wire, eventually, pattern};

const BUCKET: &str = "volumes";
const VOLUME: &str = "vol";
const MIB: u64 = 1 << 20;
/// Of the volume.
const BYTES: u64 = 256 * MIB;
const WRITE_BYTES: u64 = 256 << 10;
const PLACES: u64 = BYTES / WRITE_BYTES;
/// The journal's limit, and what the engine holds of it in memory.
const JOURNAL_BYTES: u64 = 1024 * MIB;
const RSS_KIB_MAX: u64 = 768 << 10;
const SERVERS_MAX: usize = 20;
/// PUTs that a volume has in flight at most.
const CONNECTIONS: u64 = 8;
const BANDWIDTH: u64 = 8_000_000;
/// A write that waits for the journal waits for the outage's end.
const WRITE_TIMEOUT: Duration = Duration::from_secs(1800);
/// Reads of what the node has do not wait for the store.
const READ_MAX: Duration = Duration::from_secs(5);

/// What each place of the volume has: the number of its last write.
struct Model(Vec<AtomicU64>);

impl Model {
    fn new() -> Self {
        Self((0..PLACES).map(|_| AtomicU64::new(0)).collect())
    }

    /// Writes the next number at a place.
    fn write(&self, wire: &mut Wire, place: u64, number: u64) {
        let bytes = pattern(WRITE_BYTES as usize, number);
        let error = wire.write(place * WRITE_BYTES, &bytes).expect("an answer");
        assert_eq!(error, 0, "write {number}");
        self.0[place as usize].store(number, Ordering::Release);
    }

    /// Reads a place that is not being written, and compares.
    fn verify(&self, wire: &mut Wire, place: u64) {
        let number = self.0[place as usize].load(Ordering::Acquire);
        let read = wire.read(place * WRITE_BYTES, WRITE_BYTES as u32).expect("an answer");
        let read = read.unwrap_or_else(|error| panic!("place {place}: error {error}"));
        let is_right = match number {
            0 => read.iter().all(|byte| *byte == 0),
            _ => read == pattern(WRITE_BYTES as usize, number),
        };
        assert!(is_right, "place {place} has write {number}");
    }

    fn verify_all(&self, server: &Server) {
        let mut wire = Wire::ready(server).expect("a client");
        (0..PLACES).for_each(|place| self.verify(&mut wire, place));
    }
}

fn make(settings: Settings) -> (Emulator, Bucket) {
    let store = Emulator::start(settings, BUCKET);
    let bucket = Bucket::emulated(&store, BUCKET);
    bucket.command("create --size 256M").arg(bucket.volume(VOLUME)).ok();
    (store, bucket)
}

/// Ends the server of node a. It waits for the store for half a minute; what has no time stays in
/// the journal for the next server.
fn close(bucket: &Bucket, server: &mut Server) {
    assert!(server.end(Signal::TERM).success(), "{}", server.log());
    for _ in 0..SERVERS_MAX {
        let info = bucket.command("info").arg(bucket.volume(VOLUME)).ok();
        if info.contains("state: closed") {
            return;
        }
        drop(bucket.serve(VOLUME, "a").unix());
    }
    panic!("{SERVERS_MAX} servers have not uploaded the journal");
}

/// Writes until it is stopped, at one place after the other.
fn write_on(model: &Model, server: &Server, stop: &AtomicBool, written: &AtomicU64) {
    let mut wire = Wire::ready(server).expect("a client");
    wire.set_timeout(WRITE_TIMEOUT);
    while !stop.load(Ordering::Relaxed) {
        let number = written.load(Ordering::Relaxed) + 1;
        model.write(&mut wire, number % PLACES, number);
        written.store(number, Ordering::Release);
    }
}

/// The time that the outage lasts at least, and the part of eight connections' limit that the
/// drain reaches at least. In a short run, beside others, the load of the machine decides it.
fn demands() -> (Duration, f64) {
    match std::env::var("SHEAVE_OUTAGE_S").map(|seconds| seconds.parse()) {
        Ok(seconds) => (Duration::from_secs(seconds.expect("seconds")), 0.9),
        Err(_) => (Duration::from_secs(30), 0.0),
    }
}

#[test]
fn writes_wait_for_a_full_journal_and_go_on_when_the_store_is_back() {
    let (outage, drain_min) = demands();
    let settings = Settings { bandwidth: Some(BANDWIDTH), ..Settings::default() };
    let (store, bucket) = make(settings);
    let mut server = bucket.serve(VOLUME, "a").unix();
    let (model, stop, written) = (Model::new(), AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let writer = scope.spawn(|| write_on(&model, &server, &stop, &written));
        assert!(eventually(|| store.counts().of(Kind::Put).bytes_in > 0), "{}", server.log());
        let begun = Instant::now();
        let before = written.load(Ordering::Acquire);
        let mut kinds = [Outage::Reset, Outage::Hang, Outage::Unavailable].into_iter().cycle();
        let mut reader = Wire::ready(&server).expect("a client");
        let (mut last, mut waits_since) = (before, Instant::now());
        // Until the journal is full, and the writer has waited for a while.
        while begun.elapsed() < outage || waits_since.elapsed() < Duration::from_secs(5) {
            assert!(begun.elapsed() < WRITE_TIMEOUT, "the journal becomes full");
            store.set(|settings| settings.outage = kinds.next());
            thread::sleep(Duration::from_millis(200));
            let number = written.load(Ordering::Acquire);
            if number != last {
                (last, waits_since) = (number, Instant::now());
            }
            // Far from the writer.
            let reading = Instant::now();
            model.verify(&mut reader, (number + PLACES / 2) % PLACES);
            assert!(reading.elapsed() < READ_MAX, "a read took {:?}", reading.elapsed());
            let rss_kib = server.rss_kib();
            assert!(rss_kib < RSS_KIB_MAX, "{rss_kib} KiB in memory");
            assert!(!writer.is_finished(), "a writer that goes on");
        }
        let kept = (last - before) * WRITE_BYTES;
        assert!(kept > JOURNAL_BYTES / 2 && kept <= JOURNAL_BYTES, "{kept} bytes in the journal");
        store.clear_log();
        store.set(|settings| settings.outage = None);
        let drained = || store.counts().of(Kind::Put).bytes_in > JOURNAL_BYTES / 2;
        assert!(eventually(drained), "{:?}\n{}", store.counts(), server.log());
        assert!(eventually(|| written.load(Ordering::Acquire) > last), "the writer goes on");
        stop.store(true, Ordering::Relaxed);
        writer.join().expect("no request fails");
        let part = drain_bytes_per_s(&store) / (CONNECTIONS * BANDWIDTH) as f64;
        let puts = puts(&store);
        assert!(part >= drain_min, "the drain had {part:.2} of what 8 connections carry: {puts:?}");
    });
    store.set(|settings| settings.bandwidth = None);
    model.verify_all(&server);
    close(&bucket, &mut server);
    model.verify_all(&bucket.serve(VOLUME, "b").unix());
}

/// When each began and ended, in seconds; its megabytes; its connection.
fn puts(store: &Emulator) -> Vec<(f64, f64, u64, u64)> {
    let put = |record: Record| {
        let (at, ended) = (record.at.as_secs_f64(), (record.at + record.took).as_secs_f64());
        (at, ended, record.bytes_in / MIB, record.connection)
    };
    store.log().into_iter().map(put).collect()
}

/// Over all PUTs since the log was emptied.
fn drain_bytes_per_s(store: &Emulator) -> f64 {
    let puts: Vec<_> = store.log().into_iter().filter(|record| record.status == 200).collect();
    let bytes: u64 = puts.iter().map(|put| put.bytes_in).sum();
    let begun = puts.iter().map(|put| put.at).min().expect("PUTs");
    let ended = puts.iter().map(|put| put.at + put.took).max().expect("PUTs");
    bytes as f64 / (ended - begun).as_secs_f64()
}

/// Two of five requests fail, or are answered late.
fn fail_at_random(store: &Emulator) {
    for effect in [
        Effect::InternalError,
        Effect::SlowDown,
        Effect::Conflict,
        Effect::ResetBefore,
        Effect::ResetAfter,
        Effect::Truncate,
        Effect::Delay(Duration::from_millis(500)),
        Effect::Late(Duration::from_millis(300)),
    ] {
        store.fail(Fault::new(effect).share(0.08));
    }
}

#[test]
fn a_store_that_fails_at_random_loses_and_changes_nothing() {
    const ROUNDS: u64 = 20;
    let (store, bucket) = make(Settings::default());
    let mut server = bucket.serve(VOLUME, "a").unix();
    fail_at_random(&store);
    let model = Model::new();
    let mut wire = Wire::ready(&server).expect("a client");
    wire.set_timeout(WRITE_TIMEOUT);
    let mut random = 1_u64;
    for number in 1..=ROUNDS * 32 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        model.write(&mut wire, (random >> 33) % PLACES, number);
        if number % 32 == 0 {
            (0..4).for_each(|part| model.verify(&mut wire, ((random >> 40) + part * 77) % PLACES));
        }
        if number % 256 == 0 {
            server.kill();
            server = bucket.serve(VOLUME, "a").unix();
            wire = Wire::ready(&server).expect("a client");
            wire.set_timeout(WRITE_TIMEOUT);
        }
    }
    drop(wire);
    store.heal();
    close(&bucket, &mut server);
    let failed: u64 =
        [Kind::Put, Kind::Get, Kind::List].iter().map(|kind| store.counts().of(*kind).failed).sum();
    assert!(failed > 0, "requests have failed: {:?}", store.counts());
    // Another node has the bucket only, and reads a part of it through the same faults. It opens
    // the volume before: the probe of a store has half a minute for its requests.
    let other = bucket.serve(VOLUME, "b").unix();
    fail_at_random(&store);
    let mut wire = Wire::ready(&other).expect("a client");
    (0..PLACES).step_by(32).for_each(|place| model.verify(&mut wire, place));
    store.heal();
    model.verify_all(&other);
}
