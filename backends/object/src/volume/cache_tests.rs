//! Reads of what is in the bucket, and how often the store is asked for it.

use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use sheave_conformance::{Engine as _, PlainEngine, ops};
use sheave_core::{Op, Submitted, Tag};
use tempfile::TempDir;

use super::*;
use crate::cipher::WrappingKey;
use crate::clock::SystemClock;
use crate::dir_store::DirStore;
use crate::format::Codec;
use crate::ids::Incarnation;
use crate::life::{self, NewVolume};
use crate::store::{Answer, Created, Listed, Store};
use crate::stored::VolumeStore as _;
use crate::threads::block_on;

/// 16 MiB.
const BLOCKS: u64 = 4096;

/// A directory that notes what is read of log objects, and may hold the answers back.
#[derive(Debug)]
struct NotingStore {
    dir: DirStore,
    gets: Arc<Mutex<Vec<Get>>>,
    holds: Arc<AtomicBool>,
}

/// What is read.
#[derive(Clone, Debug)]
struct Get {
    key: String,
    bytes: Range<u64>,
}

impl Store for NotingStore {
    fn create<'a>(&'a self, key: &'a str, body: Bytes) -> Answer<'a, Created> {
        self.dir.create(key, body)
    }

    fn get<'a>(&'a self, key: &'a str, range: Range<u64>) -> Answer<'a, Bytes> {
        if key.starts_with("log/") {
            self.gets.lock().unwrap().push(Get { key: key.to_owned(), bytes: range.clone() });
        }
        Box::pin(async move {
            while self.holds.load(Relaxed) {
                crate::clock::Clock::sleep(&SystemClock, 1).await;
            }
            self.dir.get(key, range).await
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: &'a str, max: usize) -> Answer<'a, Vec<Listed>> {
        self.dir.list(prefix, after, max)
    }

    fn delete<'a>(&'a self, key: &'a str) -> Answer<'a, ()> {
        self.dir.delete(key)
    }
}

struct Place {
    dir: TempDir,
    gets: Arc<Mutex<Vec<Get>>>,
    holds: Arc<AtomicBool>,
    key: Option<WrappingKey>,
}

/// How volumes are stored.
fn codings() -> [(Codec, Option<WrappingKey>); 4] {
    let key = || Some(WrappingKey::new([3; 32]));
    [(Codec::Plain, None), (Codec::Lz4, None), (Codec::Plain, key()), (Codec::Lz4, key())]
}

impl Place {
    fn new() -> Self {
        Self::stored_as((Codec::Plain, None))
    }

    fn stored_as((codec, key): (Codec, Option<WrappingKey>)) -> Self {
        let (gets, holds) = (Arc::default(), Arc::default());
        let place = Self { dir: ops::disk_dir(), gets, holds, key: key.clone() };
        let mut random = worker::salts().unwrap();
        let new = NewVolume {
            volume: VolumeId(random()),
            incarnation: Incarnation(random()),
            node: "a".to_owned(),
            size: BLOCKS,
            durability: Durability::Local,
            codec,
            key,
        };
        block_on(life::create(&place.requests("store"), &new)).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn requests(&self, store: &str) -> Requests {
        let dir = DirStore::new(&self.path(store));
        dir.make().unwrap();
        let (gets, holds) = (Arc::clone(&self.gets), Arc::clone(&self.holds));
        let store_path = self.path(store).to_string_lossy().into_owned();
        Requests::new(
            Arc::new(NotingStore { dir, gets, holds }),
            Arc::new(SystemClock),
            &store_path,
        )
    }

    fn open(&self, store: &str) -> ObjectVolume {
        let incarnation = Incarnation(worker::salts().unwrap()());
        let key = self.key.clone();
        let request = Request { node: "a".to_owned(), incarnation, take_over: false, key };
        let tuning = Tuning {
            object_bytes: 4 << 20,
            tick: Duration::from_millis(20),
            cache_bytes: 1 << 30,
            ..Tuning::default()
        };
        let (name, journals) =
            (self.path(store).to_string_lossy().into_owned(), self.path("journals"));
        ObjectVolume::open(&name, &self.requests(store), &request, &journals, tuning).unwrap()
    }

    fn close(&self, store: &str, volume: ObjectVolume) {
        drop(volume);
        wait_for_closing(&self.path(store).to_string_lossy()).unwrap();
    }

    /// A volume whose blocks are in the store, and of which nothing is in a cache.
    fn cold(&self) -> ObjectVolume {
        let volume = self.open("store");
        fill(&volume, 1);
        self.close("store", volume);
        let volume = self.open("store");
        self.gets.lock().unwrap().clear();
        volume
    }

    fn gets(&self) -> usize {
        self.gets.lock().unwrap().len()
    }
}

/// What a block has after the round.
fn content(block: u64, round: u64) -> Vec<u8> {
    (block * 31 + round).to_le_bytes().repeat(BLOCK_BYTES as usize / 8)
}

fn fill(volume: &ObjectVolume, round: u64) {
    let mut driver = ops::driver(volume);
    for first in (0..BLOCKS).step_by(64) {
        let data: Vec<_> = (first..first + 64).flat_map(|block| content(block, round)).collect();
        assert!(driver.run_one(ops::write(first * BLOCK_BYTES, &data)).is_ok());
    }
}

fn wait_for_upload(volume: &ObjectVolume) {
    let by = Instant::now() + Duration::from_secs(20);
    while volume.opened.engine.with(|front| front.lag_bytes()) > 0 {
        assert!(Instant::now() < by, "the bucket lacks something");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn read(first: u64, blocks: u64) -> Op {
    ops::read(first * BLOCK_BYTES, blocks * BLOCK_BYTES)
}

fn check_read(volume: &ObjectVolume, (first, blocks): (u64, u64), round: u64) {
    let mut driver = ops::driver(volume);
    let data = ops::bytes(driver.run_one(read(first, blocks)));
    let want: Vec<_> = (first..first + blocks).flat_map(|block| content(block, round)).collect();
    assert!(data == want, "blocks {first} to {}", first + blocks);
}

fn check_all(volume: &ObjectVolume, blocks: u64, round: u64) {
    (0..BLOCKS).step_by(blocks as usize).for_each(|at| check_read(volume, (at, blocks), round));
}

#[test]
fn what_was_uploaded_is_read_without_the_store() {
    for coding in codings() {
        let place = Place::stored_as(coding);
        let volume = place.open("store");
        fill(&volume, 1);
        wait_for_upload(&volume);
        check_all(&volume, 1, 1);
        check_all(&volume, 256, 1);
        assert_eq!(place.gets(), 0);
        assert!(cache_hits(&volume) >= BLOCKS);
    }
}

fn cache_hits(volume: &ObjectVolume) -> u64 {
    let cached = volume.opened.engine.cached.as_ref().unwrap();
    cached.chunks.cache().stats().hits
}

#[test]
fn readings_of_the_same_chunk_wait_for_one_request() {
    let place = Place::new();
    let volume = place.cold();
    place.holds.store(true, Relaxed);
    let mut backend = volume.backend().unwrap();
    let mut engine = PlainEngine::new(64);
    // In no order that is read ahead, and within few chunks.
    let order = [9, 3, 12, 0, 7, 15, 3, 9, 1, 14];
    for (tag, block) in order.iter().enumerate() {
        let submitted = backend.submit(read(1000 + block, 1), Tag(tag as u64), engine.io());
        assert!(matches!(submitted, Submitted::Queued));
    }
    std::thread::sleep(Duration::from_millis(100));
    assert!(place.gets() > 0);
    place.holds.store(false, Relaxed);
    let mut ended = 0;
    while ended < order.len() {
        std::thread::sleep(Duration::from_millis(1));
        while let Some(completion) = backend.reap(engine.io()) {
            let block = 1000 + order[completion.tag.0 as usize];
            assert_eq!(ops::bytes(completion.outcome), content(block, 1));
            ended += 1;
        }
    }
    let gets = place.gets.lock().unwrap();
    for (index, get) in gets.iter().enumerate() {
        let asks_again = |other: &Get| {
            other.key == get.key
                && other.bytes.start < get.bytes.end
                && get.bytes.start < other.bytes.end
        };
        assert!(!gets[..index].iter().any(asks_again), "{gets:?}");
    }
}

#[test]
fn a_sequential_reading_gets_every_chunk_once_and_in_large_pieces() {
    let place = Place::new();
    let volume = place.cold();
    check_all(&volume, 32, 1);
    let gets = place.gets.lock().unwrap().clone();
    let bytes: u64 = gets.iter().map(|get| get.bytes.end - get.bytes.start).sum();
    let stored = BLOCKS * (BLOCK_BYTES + 16);
    let log = std::fs::read_dir(place.path("store/log")).unwrap();
    let of_epoch = |epoch: std::fs::DirEntry| std::fs::read_dir(epoch.path()).unwrap().count();
    let objects: usize = log.map(|epoch| of_epoch(epoch.unwrap())).sum();
    // Each object begins and ends in the midst of a chunk.
    let most = stored + objects as u64 * 2 * (64 << 10);
    assert!(bytes <= most, "{bytes} bytes of {stored} in {objects} objects");
    let most = 20 + 2 * objects;
    assert!(gets.len() <= most, "{} requests for 128 readings, {objects} objects", gets.len());
    let before = place.gets();
    check_all(&volume, 1, 1);
    assert_eq!(place.gets(), before, "all is in the cache");
}

#[test]
fn damage_in_the_cache_is_a_miss() {
    let place = Place::new();
    let volume = place.cold();
    check_all(&volume, 256, 1);
    let before = place.gets();
    let file = volume.opened.engine.cached.as_ref().unwrap().chunks.cache().file();
    let len = file.metadata().unwrap().len();
    for at in (1000..len).step_by(3000) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    }
    check_all(&volume, 16, 1);
    assert!(place.gets() > before);
    // All of it, too: the file is cut off. Soon all is there again.
    file.set_len(0).unwrap();
    let is_there = (0..5).any(|_| {
        let before = place.gets();
        check_all(&volume, 16, 1);
        place.gets() == before
    });
    assert!(is_there);
}

#[test]
fn a_cache_that_gives_way_costs_requests_and_nothing_else() {
    let place = Place::new();
    let volume = place.cold();
    check_all(&volume, 256, 1);
    let cache = Arc::clone(volume.opened.engine.cached.as_ref().unwrap().chunks.cache());
    let len = || cache.file().metadata().unwrap().len();
    let had = len();
    assert!(cache.give_way());
    assert!(len() <= had / 2 + (1 << 20), "{} of {had} bytes", len());
    check_all(&volume, 16, 1);
    for _ in 0..20 {
        cache.give_way();
    }
    assert_eq!(len(), 0);
    assert!(!cache.give_way());
    check_all(&volume, 16, 1);
}

/// A copy has other objects under the same volume, epoch and number.
#[test]
fn a_copied_or_older_bucket_is_not_taken_for_the_one_that_was_known() {
    let place = Place::new();
    std::fs::create_dir(place.path("journals")).unwrap();
    // It keeps the cache while no volume is open.
    let keeper = Cache::in_dir(&place.path("journals"), 1 << 30);
    // One write is one object, of the same form each time.
    let write = |volume: &ObjectVolume, round| {
        let data: Vec<_> = (0..8).flat_map(|block| content(block, round)).collect();
        assert!(ops::driver(volume).run_one(ops::write(0, &data)).is_ok());
        wait_for_upload(volume);
        check_read(volume, (0, 8), round);
    };
    let volume = place.open("store");
    write(&volume, 1);
    place.close("store", volume);
    copy_dir(&place.path("store"), &place.path("copy"));
    let volume = place.open("store");
    check_read(&volume, (0, 8), 1);
    write(&volume, 2);
    place.close("store", volume);
    // The journal of the node knows the other one.
    for entry in std::fs::read_dir(place.path("journals")).unwrap() {
        std::fs::remove_dir_all(entry.unwrap().path()).unwrap();
    }
    let volume = place.open("copy");
    check_read(&volume, (0, 8), 1);
    write(&volume, 3);
    place.close("copy", volume);
    // Opened where it was left, what is in the cache is still right.
    let volume = place.open("copy");
    let heads = place.gets();
    check_read(&volume, (0, 8), 3);
    assert_eq!(place.gets(), heads);
    drop((volume, keeper));
}

fn copy_dir(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-r").arg(from).arg(to).status().unwrap();
    assert!(copied.success());
}
