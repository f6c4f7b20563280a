//! Snapshots of volumes that are open, closed, and written on.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use sheave_conformance::ops;
use sheave_core::{ErrorKind, Op, Volume as _};
use sheave_object::check::{Options, Progress};
use sheave_object::format::Pin;
use sheave_object::store::{Answer, Created, Listed, Store, StoreError, StoreErrorKind};
use sheave_object::{
    BLOCK_BYTES, Codec, DirStore, Durability, Fencing, KeySource, StoredVolume, Tuning, VolumeId,
    VolumeStore, finish_closing,
};
use tempfile::TempDir;

const BLOCKS: u64 = 96;

fn place(dir: &TempDir, name: &str) -> StoredVolume {
    StoredVolume {
        name: format!("dir://{}/{name}", dir.path().display()),
        store: Arc::new(DirStore::new(&dir.path().join(name))),
        journals: dir.path().join("journals"),
        key: None,
        snapshot: None,
    }
}

fn at(volume: &StoredVolume, snapshot: &str) -> StoredVolume {
    let name = format!("{}@{snapshot}", volume.name);
    StoredVolume { name, snapshot: Some(snapshot.to_owned()), ..volume.clone() }
}

/// Small objects, so that there are many.
fn tuning() -> Tuning {
    Tuning { object_bytes: 32 << 10, tick: Duration::from_secs(600), ..Tuning::default() }
}

/// Fills every block with a number of its round.
fn fill(volume: &dyn sheave_core::Volume, round: u8) {
    let mut driver = ops::driver(volume);
    for block in 0..BLOCKS {
        let data = vec![byte(round, block); BLOCK_BYTES as usize];
        driver.run_one(ops::write(block * BLOCK_BYTES, &data)).expect("a write");
    }
}

fn byte(round: u8, block: u64) -> u8 {
    round.wrapping_mul(29).wrapping_add(block as u8) | 1
}

fn check(volume: &dyn sheave_core::Volume, round: u8) {
    let mut driver = ops::driver(volume);
    for block in 0..BLOCKS {
        let data = ops::bytes(driver.run_one(ops::read(block * BLOCK_BYTES, BLOCK_BYTES)));
        let want = if round == 0 { 0 } else { byte(round, block) };
        assert!(data.iter().all(|byte| *byte == want), "block {block} of round {round}");
    }
}

fn check_snapshot(volume: &StoredVolume, snapshot: &str, round: u8) {
    check(&at(volume, snapshot).open_snapshot(tuning()).expect("a snapshot"), round);
}

#[test]
fn a_snapshot_stays_while_the_volume_is_written() {
    let dir = ops::disk_dir();
    let volume = place(&dir, "v");
    volume.create(BLOCKS * BLOCK_BYTES, Codec::Lz4, Durability::Local).unwrap();
    at(&volume, "empty").make_snapshot().unwrap();
    let open = volume.open_tuned(false, tuning()).unwrap();
    // Through the door, as another process asks.
    fill(&open, 1);
    at(&volume, "one").make_snapshot().unwrap();
    at(&volume, "also-one").make_snapshot().unwrap();
    fill(&open, 2);
    at(&volume, "two").make_snapshot().unwrap();
    fill(&open, 3);
    let error = at(&volume, "one").make_snapshot().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists, "{error}");
    let check_all = || {
        for (name, round) in [("empty", 0), ("one", 1), ("also-one", 1), ("two", 2)] {
            check_snapshot(&volume, name, round);
        }
    };
    check_all();
    drop(open);
    assert!(finish_closing(Duration::from_secs(60)).is_empty());
    at(&volume, "three").make_snapshot().unwrap();
    let error = at(&volume, "three").make_snapshot().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists, "{error}");
    check_snapshot(&volume, "three", 3);
    check_all();
    let error = at(&volume, "four").open_snapshot(tuning()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(error.to_string().contains("it has empty, one, also-one, two, three"), "{error}");
}

#[test]
fn snapshots_asked_for_at_the_same_time_are_all_made() {
    let dir = ops::disk_dir();
    let volume = place(&dir, "v");
    volume.create(BLOCKS * BLOCK_BYTES, Codec::Lz4, Durability::Local).unwrap();
    let open = volume.open_tuned(false, tuning()).unwrap();
    fill(&open, 1);
    std::thread::scope(|scope| {
        for index in 0..12 {
            let volume = &volume;
            scope.spawn(move || at(volume, &format!("s{index}")).make_snapshot().unwrap());
        }
    });
    fill(&open, 2);
    // So many that a root has no room for all.
    for index in 12..40 {
        at(&volume, &format!("s{index}-{}", "x".repeat(100))).make_snapshot().unwrap();
    }
    drop(open);
    assert!(finish_closing(Duration::from_secs(60)).is_empty());
    for index in 40..70 {
        at(&volume, &format!("s{index}-{}", "x".repeat(100))).make_snapshot().unwrap();
    }
    (0..12).for_each(|index| check_snapshot(&volume, &format!("s{index}"), 1));
    for index in [12, 39, 40, 69] {
        check_snapshot(&volume, &format!("s{index}-{}", "x".repeat(100)), 2);
    }
}

#[test]
fn a_snapshot_is_only_read() {
    let dir = ops::disk_dir();
    let volume = place(&dir, "v");
    volume.create(BLOCKS * BLOCK_BYTES, Codec::Lz4, Durability::Local).unwrap();
    at(&volume, "one").make_snapshot().unwrap();
    let snapshot = at(&volume, "one");
    let [first, second] = [(); 2].map(|()| snapshot.open_snapshot(tuning()).unwrap());
    assert!(first.info().read_only);
    assert_eq!(first.info().identity, Some(snapshot.identity().unwrap()));
    let error = ops::driver(&first).run_one(ops::write(0, &[1; 4096])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
    ops::driver(&second).run_one(Op::Flush).unwrap();
    check(&second, 0);
}

#[test]
fn a_clone_goes_on_from_a_snapshot_and_leaves_it_as_it_is() {
    let dir = ops::disk_dir();
    let volume = place(&dir, "v");
    volume.create(BLOCKS * BLOCK_BYTES, Codec::Lz4, Durability::Local).unwrap();
    let open = volume.open_tuned(false, tuning()).unwrap();
    fill(&open, 1);
    at(&volume, "one").make_snapshot().unwrap();
    fill(&open, 2);
    // While the volume is in use.
    let [clone, grandchild, empty] =
        ["clone", "grand child", "empty"].map(|name| place(&dir, name));
    at(&volume, "one").make_clone(&clone, None).unwrap();
    let error = at(&volume, "one").make_clone(&clone, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists, "{error}");
    // A clone of a clone that nothing was written to.
    at(&clone, "same").make_snapshot().unwrap();
    at(&clone, "same").make_clone(&grandchild, Some(2 * BLOCKS * BLOCK_BYTES)).unwrap();
    fill(&open, 3);
    drop(open);
    let opened = clone.open_tuned(false, tuning()).unwrap();
    check(&opened, 1);
    // Half of it is still the ancestor's.
    let mut driver = ops::driver(&opened);
    let half: Vec<u8> =
        (0..BLOCKS / 2).flat_map(|block| [byte(4, block); BLOCK_BYTES as usize]).collect();
    driver.run_one(ops::write(0, &half)).unwrap();
    drop((driver, opened));
    assert!(finish_closing(Duration::from_secs(60)).is_empty());
    let mixed = |volume: &dyn sheave_core::Volume| {
        let mut driver = ops::driver(volume);
        for block in 0..BLOCKS {
            let data = ops::bytes(driver.run_one(ops::read(block * BLOCK_BYTES, BLOCK_BYTES)));
            let round = if block < BLOCKS / 2 { 4 } else { 1 };
            assert!(data.iter().all(|found| *found == byte(round, block)), "block {block}");
        }
    };
    mixed(&clone.open_tuned(false, tuning()).unwrap());
    assert!(finish_closing(Duration::from_secs(60)).is_empty());
    at(&clone, "mixed").make_snapshot().unwrap();
    at(&clone, "mixed").make_clone(&empty, None).unwrap();
    mixed(&empty.open_tuned(false, tuning()).unwrap());
    let opened = grandchild.open_tuned(false, tuning()).unwrap();
    assert_eq!(opened.size(), 2 * BLOCKS * BLOCK_BYTES);
    check(&opened, 1);
    drop(opened);
    assert!(finish_closing(Duration::from_secs(60)).is_empty());
    check_snapshot(&volume, "one", 1);
    check_snapshot(&clone, "same", 1);
}

#[test]
fn a_snapshot_with_a_clone_is_not_deleted() {
    let dir = ops::disk_dir();
    let volume = place(&dir, "v");
    volume.create(BLOCKS * BLOCK_BYTES, Codec::Lz4, Durability::Local).unwrap();
    let open = volume.open_tuned(false, tuning()).unwrap();
    fill(&open, 1);
    for name in ["one", "two"] {
        at(&volume, name).make_snapshot().unwrap();
    }
    let clone = place(&dir, "clone");
    at(&volume, "one").make_clone(&clone, None).unwrap();
    let is_refused = |volume: &StoredVolume, why: &str| {
        let error = volume.delete(false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        assert!(error.to_string().contains(why), "{error}");
    };
    // By the process that has it open, and without one.
    is_refused(&at(&volume, "one"), "it has clones: clone");
    at(&volume, "two").delete(false).unwrap();
    assert_eq!(at(&volume, "two").delete(false).unwrap_err().kind(), ErrorKind::NotFound);
    drop(open);
    assert!(finish_closing(Duration::from_secs(60)).is_empty());
    is_refused(&at(&volume, "one"), "it has clones: clone");
    is_refused(&volume, "it has a snapshot");
    check(&clone.open_tuned(false, tuning()).unwrap(), 1);
    assert!(finish_closing(Duration::from_secs(60)).is_empty());
    clone.delete(false).unwrap();
    at(&volume, "one").delete(false).unwrap();
    let error = at(&volume, "one").make_clone(&clone, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    volume.delete(false).unwrap();
}

#[test]
fn a_clone_is_made_beside_its_volume_only() {
    let (dir, other) = (ops::disk_dir(), ops::disk_dir());
    let volume = place(&dir, "v");
    volume.create(BLOCKS * BLOCK_BYTES, Codec::Lz4, Durability::Local).unwrap();
    at(&volume, "one").make_snapshot().unwrap();
    let is_refused = |clone: &StoredVolume, size: Option<u64>, why: &str| {
        let error = at(&volume, "one").make_clone(clone, size).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(why), "{error}");
    };
    is_refused(&place(&other, "clone"), None, "in the same directory or prefix");
    is_refused(&place(&dir, "clone"), Some(BLOCK_BYTES), "cannot be shorter");
    is_refused(&place(&dir, "clone"), Some(4097), "a multiple of 4096");
    assert_eq!(place(&dir, "clone").open(false).err().unwrap().kind(), ErrorKind::NotFound);
    // A process that was killed before the clone was there leaves a pin that nothing needs.
    let pins = dir.path().join("v/pin/0000000000000001");
    std::fs::create_dir_all(&pins).unwrap();
    let clone = VolumeId([7; 16]);
    let pin = Pin { clone, name: "clone".to_owned() }.encode();
    std::fs::write(pins.join("07".repeat(16)), pin).unwrap();
    at(&volume, "one").delete(false).unwrap();
    // It would come too late.
    assert!(dir.path().join("clone/root/ffffffffffffffff").exists());
}

#[test]
fn a_clone_of_an_encrypted_volume_has_its_key() {
    let dir = ops::disk_dir();
    let file = dir.path().join("key");
    std::fs::write(&file, "5a".repeat(32)).unwrap();
    let with_key =
        |name| StoredVolume { key: Some(KeySource::File(file.clone())), ..place(&dir, name) };
    let (volume, clone) = (with_key("v"), with_key("clone"));
    volume.create(BLOCKS * BLOCK_BYTES, Codec::Lz4, Durability::Local).unwrap();
    let open = volume.open_tuned(false, tuning()).unwrap();
    fill(&open, 1);
    at(&volume, "one").make_snapshot().unwrap();
    fill(&open, 2);
    drop(open);
    assert!(finish_closing(Duration::from_secs(60)).is_empty());
    // Its checkpoint has the list now, which is encrypted too.
    at(&volume, "two").make_snapshot().unwrap();
    at(&volume, "one").make_clone(&clone, None).unwrap();
    check(&clone.open_tuned(false, tuning()).unwrap(), 1);
    assert!(finish_closing(Duration::from_secs(60)).is_empty());
    check_snapshot(&volume, "two", 2);
    assert_eq!(volume.describe().unwrap().snapshots.unwrap().len(), 2);
    let without = StoredVolume { key: None, ..volume };
    assert_eq!(without.describe().unwrap().snapshots, None);
    assert!(at(&without, "two").open_snapshot(tuning()).is_err());
}

/// Closes what is open here.
fn close() {
    assert!(finish_closing(Duration::from_secs(60)).is_empty());
}

/// A closed volume that was filled three times, with a snapshot after each of two.
fn with_snapshots(volume: &StoredVolume) {
    let created = volume.create(BLOCKS * BLOCK_BYTES, Codec::Lz4, Durability::Local);
    created.expect("a new volume");
    at(volume, "empty").make_snapshot().expect("a snapshot");
    let open = volume.open_tuned(false, tuning()).expect("it opens");
    for (round, name) in [(1, "one"), (2, "two")] {
        fill(&open, round);
        at(volume, name).make_snapshot().expect("a snapshot");
    }
    fill(&open, 3);
    drop(open);
    close();
}

#[test]
fn a_volume_is_brought_back_to_any_of_its_snapshots() {
    let dir = ops::disk_dir();
    let volume = place(&dir, "v");
    with_snapshots(&volume);
    for (name, round) in [("one", 1), ("two", 2), ("empty", 0), ("one", 1), ("two", 2)] {
        at(&volume, name).restore().unwrap();
        let open = volume.open_tuned(false, tuning()).unwrap();
        check(&open, round);
        // It goes on from there, and its journal counts.
        fill(&open, 4 + round);
        let error = at(&volume, "one").restore().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        assert!(error.to_string().contains("it is open on node"), "{error}");
        drop(open);
        close();
        let open = volume.open_tuned(false, tuning()).unwrap();
        check(&open, 4 + round);
        drop(open);
        close();
        for (name, round) in [("empty", 0), ("one", 1), ("two", 2)] {
            check_snapshot(&volume, name, round);
        }
        at(&volume, name).restore().unwrap();
        check_stored(&volume);
    }
    // Twice, with nothing between, and a snapshot and a clone of what came of it.
    at(&volume, "two").restore().unwrap();
    at(&volume, "one").restore().unwrap();
    at(&volume, "again").make_snapshot().unwrap();
    let clone = place(&dir, "clone");
    at(&volume, "again").make_clone(&clone, None).unwrap();
    at(&volume, "empty").restore().unwrap();
    check_snapshot(&volume, "again", 1);
    let open = clone.open_tuned(false, tuning()).unwrap();
    check(&open, 1);
    fill(&open, 9);
    at(&clone, "nine").make_snapshot().unwrap();
    drop(open);
    close();
    at(&clone, "nine").restore().unwrap();
    check(&clone.open_tuned(false, tuning()).unwrap(), 9);
    close();
    let error = at(&volume, "never").restore().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    check(&volume.open_tuned(false, tuning()).unwrap(), 0);
    close();
    // What only the snapshots have kept is deleted with them, and nothing else.
    for name in ["empty", "two"] {
        at(&volume, name).delete(false).unwrap();
    }
    at(&volume, "one").restore().unwrap();
    let open = volume.open_tuned(false, tuning()).unwrap();
    for round in [7, 8] {
        fill(&open, round);
        at(&volume, &format!("s{round}")).make_snapshot().unwrap();
    }
    drop(open);
    close();
    check_stored(&volume);
    for (name, round) in [("one", 1), ("again", 1), ("s7", 7), ("s8", 8)] {
        check_snapshot(&volume, name, round);
        at(&volume, name).restore().unwrap();
        check(&volume.open_tuned(false, tuning()).unwrap(), round);
        close();
    }
    check_stored(&volume);
}

#[test]
fn a_restored_volume_has_the_size_that_it_had() {
    let dir = ops::disk_dir();
    let volume = place(&dir, "v");
    with_snapshots(&volume);
    volume.resize(2 * BLOCKS * BLOCK_BYTES).unwrap();
    at(&volume, "one").restore().unwrap();
    let open = volume.open_tuned(false, tuning()).unwrap();
    assert_eq!(open.size(), 2 * BLOCKS * BLOCK_BYTES);
    check(&open, 1);
    let data = ops::bytes(ops::driver(&open).run_one(ops::read(BLOCKS * BLOCK_BYTES, 4096)));
    assert!(data.iter().all(|byte| *byte == 0));
}

/// What is stored is right.
fn check_stored(volume: &StoredVolume) {
    let progress = |_: Progress| {};
    let options = Options { reads_data: true, repairs: false, key: None, progress: &progress };
    let report = volume.check(options).expect("it is read");
    assert!(report.faults.is_empty(), "{:?}", report.faults);
}

/// A directory whose creations fail from one on, before or after they are done.
#[derive(Debug)]
struct Failing {
    store: DirStore,
    creations: AtomicU64,
    are_done: bool,
}

impl Store for Failing {
    fn create<'a>(&'a self, key: &'a str, body: Bytes) -> Answer<'a, Created> {
        let is_left = |left: u64| left.checked_sub(1);
        if self.creations.fetch_update(Relaxed, Relaxed, is_left).is_ok() {
            return self.store.create(key, body);
        }
        Box::pin(async move {
            if self.are_done {
                self.store.create(key, body).await?;
            }
            Err(StoreError::new(StoreErrorKind::Broken, "it fails"))
        })
    }

    fn get<'a>(&'a self, key: &'a str, range: Range<u64>) -> Answer<'a, Bytes> {
        self.store.get(key, range)
    }

    fn list<'a>(&'a self, prefix: &'a str, after: &'a str, max: usize) -> Answer<'a, Vec<Listed>> {
        self.store.list(prefix, after, max)
    }

    fn delete<'a>(&'a self, key: &'a str) -> Answer<'a, ()> {
        self.store.delete(key)
    }
}

impl VolumeStore for Failing {
    fn fencing(&self) -> Fencing {
        self.store.fencing()
    }

    fn place(&self) -> Option<String> {
        self.store.place()
    }

    fn home(&self) -> Option<(String, String)> {
        self.store.home()
    }

    fn siblings(&self, max: usize) -> Answer<'_, Vec<String>> {
        self.store.siblings(max)
    }
}

#[test]
fn a_restoration_that_is_stopped_has_happened_or_not() {
    let mut outcomes = BTreeSet::new();
    for (creations, are_done) in (0..3).flat_map(|left| [(left, false), (left, true)]) {
        let dir = ops::disk_dir();
        let volume = place(&dir, "v");
        with_snapshots(&volume);
        let (store, creations) = (DirStore::new(&dir.path().join("v")), AtomicU64::new(creations));
        let store = Arc::new(Failing { store, creations, are_done });
        at(&StoredVolume { store, ..volume.clone() }, "one").restore().unwrap_err();
        check_stored(&volume);
        let open = volume.open_tuned(false, tuning()).unwrap();
        let data = ops::bytes(ops::driver(&open).run_one(ops::read(0, BLOCK_BYTES)));
        let round = if data[0] == byte(1, 0) { 1 } else { 3 };
        check(&open, round);
        outcomes.insert(round);
        fill(&open, 4);
        drop(open);
        close();
        at(&volume, "one").restore().unwrap();
        check(&volume.open_tuned(false, tuning()).unwrap(), 1);
        close();
        check_snapshot(&volume, "two", 2);
        check_stored(&volume);
    }
    assert_eq!(outcomes, BTreeSet::from([1, 3]), "both outcomes");
}
