//! The read cache of object volumes: how often the store is asked, and what a crash, damage and a
//! full disk do to it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use sheave_emulator::{Emulator, Kind, Outage, Settings};
use sheave_tests::{Bucket, Run, Server, Wire, in_namespace, pattern};

const MIB: usize = 1 << 20;
/// Bytes that are written.
const SIZE: usize = 32 * MIB;

fn store() -> (Emulator, Bucket) {
    let store = Emulator::start(Settings::default(), "bucket");
    let bucket = Bucket::emulated(&store, "bucket");
    (store, bucket)
}

/// Requests for log objects, and their bytes.
fn gets(store: &Emulator) -> (usize, u64) {
    let log = store.log();
    let of_log = log.iter().filter(|get| get.kind == Kind::Get && get.key.contains("/log/"));
    of_log.fold((0, 0), |(count, bytes), get| (count + 1, bytes + get.bytes_out))
}

/// Bytes of which no two blocks are alike. They are made faster than those of `pattern` alone.
fn data(bytes: usize, seed: u64) -> Vec<u8> {
    let mut data = pattern(MIB, seed).repeat(bytes / MIB);
    for (index, block) in data.chunks_mut(4096).enumerate() {
        block[..8].copy_from_slice(&(index as u64).to_le_bytes());
    }
    data
}

fn write_all(wire: &mut Wire, data: &[u8]) {
    for (index, part) in data.chunks(MIB).enumerate() {
        assert_eq!(wire.write((index * MIB) as u64, part).expect("a reply"), 0);
    }
}

fn check_all(wire: &mut Wire, data: &[u8], step: usize) {
    for (index, part) in data.chunks(step).enumerate() {
        let at = index * step;
        let read = wire.read(at as u64, part.len() as u32).expect("a reply").expect("no error");
        assert!(read == part, "bytes {at} to {}", at + part.len());
    }
}

/// The file of a server's cache.
fn cache_file(server: &Server) -> File {
    let fds = fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("descriptors");
    let is_cache =
        |path: &Path| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("/cache-"));
    let mut paths = fds.map(|fd| fd.expect("a descriptor").path());
    let path = paths.find(|path| is_cache(path)).expect("a cache");
    OpenOptions::new().read(true).write(true).open(path).expect("its file")
}

#[test]
fn reads_ask_the_bucket_once() {
    let (store, bucket) = store();
    bucket.command("create").arg(bucket.volume("v")).args("--size 64M").ok();
    let data = data(SIZE, 7);
    let mut server = bucket.serve("v", "node").unix();
    let mut wire = Wire::ready(&server).expect("a client");
    write_all(&mut wire, &data);
    drop(wire);
    assert!(server.end(Signal::TERM).success());
    // Cold: all of it comes once, in large pieces.
    let mut server = bucket.serve("v", "node").unix();
    let mut wire = Wire::ready(&server).expect("a client");
    store.clear_log();
    check_all(&mut wire, &data, 128 << 10);
    let (count, bytes) = gets(&store);
    assert!(bytes < SIZE as u64 * 21 / 20, "{bytes} bytes for {SIZE}");
    assert!(count <= 80, "{count} requests for {} readings", SIZE >> 17);
    store.clear_log();
    check_all(&mut wire, &data, 128 << 10);
    check_all(&mut wire, &data, 4 << 10);
    assert_eq!(gets(&store), (0, 0));
    // What is damaged is read from the bucket again.
    let file = cache_file(&server);
    for at in (5000..file.metadata().expect("a file").len()).step_by(1 << 20) {
        file.write_all_at(&[0x55; 64], at).expect("the cache is there");
    }
    check_all(&mut wire, &data, 64 << 10);
    assert!(gets(&store).0 > 0);
    // New data is read as it was written, also when the bucket has it.
    let newer = crate::data(SIZE, 8);
    write_all(&mut wire, &newer);
    check_all(&mut wire, &newer, 128 << 10);
    server.kill();
    let dir = bucket.scratch().file("node");
    let names =
        fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("one").file_name());
    let left: Vec<_> = names.filter(|name| name.to_string_lossy().starts_with("cache")).collect();
    assert!(left.is_empty(), "{left:?}");
    let server = bucket.serve("v", "node").unix();
    check_all(&mut Wire::ready(&server).expect("a client"), &newer, 128 << 10);
}

#[test]
fn on_a_full_disk_the_cache_gives_way_to_the_journal() {
    in_namespace("on_a_full_disk_the_cache_gives_way_to_the_journal", || {
        let (store, bucket) = store();
        let node = bucket.scratch().path().join("node");
        fs::create_dir(&node).expect("a directory");
        Run::new("mount").args("-t tmpfs -o size=600M none").arg(&node).ok();
        bucket.command("create").arg(bucket.volume("v")).args("--size 1G").ok();
        let server = bucket.serve("v", "node").unix();
        let mut wire = Wire::ready(&server).expect("a client");
        wire.set_timeout(Duration::from_secs(60));
        let first = data(160 * MIB, 1);
        write_all(&mut wire, &first);
        // All of it is uploaded and cached when none of it is asked for.
        let is_cached = || {
            let blocks = std::os::unix::fs::MetadataExt::blocks(
                &cache_file(&server).metadata().expect("a file"),
            );
            blocks * 512 >= 120 * MIB as u64
        };
        assert!(sheave_tests::eventually(is_cached));
        // Eight segments of the journal and the cache are more than the disk has.
        store.set(|settings| settings.outage = Some(Outage::Unavailable));
        let second = data(380 * MIB, 2);
        write_all(&mut wire, &second);
        check_all(&mut wire, &second, MIB);
        store.set(|settings| settings.outage = None);
        let third = data(300 * MIB, 3);
        write_all(&mut wire, &third);
        check_all(&mut wire, &third, MIB);
    });
}
