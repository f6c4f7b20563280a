//! Checks of healthy and of damaged volumes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use bytes::Bytes;

use super::*;
use crate::checkpoint::Cadence;
use crate::format::{
    Author, Coding, Entry, FrameReader, HEADER_BYTES, Header, ObjectBuilder, ObjectId, Reach,
    State, decode_directory,
};
use crate::ids::{BLOCK_BYTES, Epoch, Incarnation, Lba, Lsn};
use crate::memory_store::{MemoryStore, Random, TurnClock};
use crate::open::Opened;
use crate::open::tests::{Bucket, FakeJournal, SIZE, commit, new_volume};
use crate::store::{Answer, Created, Listed, Store};
use crate::threads::block_on;

fn all() -> Options<'static> {
    Options { reads_data: true, repairs: false, key: None, progress: &|_: Progress| {} }
}

fn fast() -> Options<'static> {
    Options { reads_data: false, ..all() }
}

fn repair() -> Options<'static> {
    Options { repairs: true, ..all() }
}

/// A volume with an opening that was closed, one that was killed, with an object of it that came
/// too late, and the present one.
struct Volume {
    bucket: Bucket,
    late: String,
    journal: FakeJournal,
}

impl Volume {
    fn new(is_closed: bool) -> Self {
        let (bucket, journal) = (Bucket::new(), FakeJournal::default());
        let opened = bucket.open(journal.clone(), false).unwrap();
        let upload = opened.upload.with_cadence(Cadence::of_bytes(0));
        let batches: [&[_]; 3] = [&[(0, 20, 1), (100, 5, 2)], &[(5, 3, 3)], &[(0, 20, 4)]];
        commit(Opened { upload, ..opened }, &batches, true).unwrap();
        bucket.write(&journal, &[&[(7, 2, 5), (300, 9, 6)]], false);
        // The checkpoint has number 4.
        let killed = Epoch(2);
        let author = Author {
            volume: new_volume().volume,
            reach: Reach { epoch: killed, first: Seq(5) },
            previous: Some(Reach { epoch: Epoch(1), first: Seq(1) }),
            incarnation: Incarnation([3; 16]),
            coding: Coding::default(),
        };
        bucket.write(&journal, &[&[(400, 3, 7), (104, 1, 0)]], is_closed);
        let late = Seq(7);
        let mut builder = ObjectBuilder::new(&author, late, 1, 4096);
        builder.write(Lba(1), &[9; BLOCK_BYTES as usize]);
        let late = keys::log(killed, late);
        bucket.store.put(&late, Some(builder.finish(Lsn(7), Lsn(7)).body));
        Self { bucket, late, journal }
    }

    fn check(&self, options: &Options<'_>) -> Report {
        block_on(check(&self.bucket.requests, options)).unwrap()
    }

    fn faults(&self) -> Vec<Fault> {
        self.check(&all()).faults
    }

    /// The log objects that are not fences, in their order.
    fn objects(&self) -> Vec<String> {
        let is_object = |key: &String| {
            let body = self.bucket.store.object(key).unwrap();
            key.starts_with(keys::LOGS) && *key != self.late && entries(&body) != [Entry::Fence]
        };
        self.bucket.store.keys().into_iter().filter(is_object).collect()
    }

    /// The object of a number.
    fn object(&self, seq: u64) -> String {
        let is_it = |key: &String| keys::log_place(key).is_some_and(|(_, of)| of == Seq(seq));
        self.objects().into_iter().find(is_it).unwrap()
    }

    fn fence(&self) -> String {
        let is_fence = |key: &String| {
            let body = self.bucket.store.object(key).unwrap();
            key.starts_with(keys::LOGS) && entries(&body) == [Entry::Fence]
        };
        self.bucket.store.keys().into_iter().find(is_fence).unwrap()
    }

    /// Flips a bit of a byte, and puts back what was there when that is dropped.
    fn damage(&self, key: &str, at: usize) -> Damage<'_> {
        let body = self.bucket.store.object(key).unwrap();
        let mut changed = body.to_vec();
        changed[at] ^= 4;
        self.bucket.store.put(key, Some(changed.into()));
        Damage { store: &self.bucket.store, key: key.to_owned(), body }
    }

    fn delete(&self, key: &str) -> Damage<'_> {
        let body = self.bucket.store.object(key).unwrap();
        self.bucket.store.put(key, None);
        Damage { store: &self.bucket.store, key: key.to_owned(), body }
    }
}

struct Damage<'a> {
    store: &'a MemoryStore,
    key: String,
    body: Bytes,
}

impl Drop for Damage<'_> {
    fn drop(&mut self) {
        self.store.put(&self.key, Some(self.body.clone()));
    }
}

fn entries(body: &Bytes) -> Vec<Entry> {
    let header = Header::decode(body).unwrap();
    header.decode_index(&body[HEADER_BYTES..header.index_end()]).unwrap()
}

/// Checks that there is one fault, of that object, which affects these blocks.
#[track_caller]
fn expect_one(faults: &[Fault], key: &str, why: &str, spans: &[(u64, u64)]) {
    let [fault] = faults else { panic!("{faults:?}") };
    assert!(fault.key == key && fault.why.contains(why), "{fault:?}");
    let found: Vec<_> = fault.spans.iter().map(|span| (span.start, span.blocks)).collect();
    assert_eq!(found, spans, "{fault:?}");
}

#[test]
fn a_healthy_volume_has_no_faults_whatever_its_state() {
    for is_closed in [true, false] {
        let volume = Volume::new(is_closed);
        let report = volume.check(&all());
        assert!(report.faults.is_empty(), "{:?}", report.faults);
        assert_eq!(report.root.unwrap().last.is_closed, is_closed);
        assert_eq!(report.live_bytes, (20 + 4 + 9 + 3) * BLOCK_BYTES);
        assert!(report.read_bytes > report.live_bytes, "{}", report.read_bytes);
        assert_eq!((report.late.objects, report.removed), (1, 0));
        assert_eq!(report.dead.objects, 0, "{:?}", report.dead);
        // The second one is overwritten, and was deleted. It is made again, by a late request.
        let body = volume.bucket.store.object(&volume.object(3));
        volume.bucket.store.put(&keys::log(Epoch(1), Seq(2)), body);
        let before = volume.bucket.store.keys();
        assert_eq!(volume.check(&all()).dead.objects, 1);
        volume.bucket.store.take_counts();
        let fast = volume.check(&fast());
        assert_eq!((fast.faults.len(), fast.read_bytes, fast.needed), (0, 0, report.needed));
        assert_eq!(volume.bucket.store.keys(), before, "nothing is made or deleted");
        let counts = volume.bucket.store.take_counts();
        assert!(counts.gets < 100, "{counts:?}");
    }
}

#[test]
fn damage_of_each_kind_is_named() {
    let volume = Volume::new(true);
    let data = &volume.object(3);
    let frame = |at: usize| HEADER_BYTES + 24 + at * 4112 + 20;
    // Blocks 7 and 8 of that object are overwritten later.
    {
        let _damage = volume.damage(data, frame(3));
        expect_one(&volume.faults(), data, "the checksum of a frame is wrong", &[(3, 1)]);
        assert!(volume.check(&fast()).faults.is_empty(), "no data are read");
    }
    {
        let _damage = volume.damage(data, frame(7));
        assert_eq!(volume.faults(), [], "it is needed no more");
    }
    {
        let _damage = volume.damage(data, 70);
        expect_one(&volume.faults(), data, "the checksum of its header is wrong", &[]);
    }
    {
        let _damage = volume.damage(data, HEADER_BYTES + 9);
        expect_one(&volume.faults(), data, "the checksum of its index is wrong", &[]);
    }
    {
        let _damage = volume.delete(data);
        for options in [all(), fast()] {
            let faults = volume.check(&options).faults;
            expect_one(&faults, data, "missing", &[(0, 7), (9, 11)]);
        }
    }
    let fence = volume.fence();
    {
        let _damage = volume.damage(&fence, 30);
        expect_one(&volume.faults(), &fence, "the checksum of its header", &[]);
    }
    let _damage = volume.delete(&fence);
    expect_one(&volume.faults(), &fence, "the fence is missing", &[]);
}

#[test]
fn damage_of_roots_is_named() {
    let volume = Volume::new(true);
    let roots: Vec<_> =
        volume.bucket.store.keys().into_iter().filter(|key| key.starts_with("root/")).collect();
    for (at, key) in roots.iter().enumerate() {
        {
            let _damage = volume.damage(key, 60);
            let report = volume.check(&all());
            let is_it = |fault: &Fault| fault.why.contains("its checksum is wrong");
            assert!(report.faults.iter().any(is_it), "{key}: {:?}", report.faults);
            assert_eq!(report.root.is_none(), at == 0, "{key}");
        }
        let root = Root::decode(&volume.bucket.store.object(key).unwrap()).unwrap();
        let _damage = volume.delete(key);
        let report = volume.check(&all());
        let is_claim = root.state == State::Claimed;
        // Without its newest root the volume is what it was before, and has objects that it cannot
        // have; other roots that are no claims may go.
        assert_eq!(!report.faults.is_empty(), is_claim, "{key}: {:?}", report.faults);
    }
}

#[test]
fn damage_of_the_map_is_named() {
    let volume = Volume::new(true);
    let newest = block_on(find(&volume.bucket.requests)).unwrap();
    let place = newest.directory.unwrap();
    let key = volume.objects().pop().unwrap();
    let (epoch, seq) = keys::log_place(&key).unwrap();
    assert_eq!(place.seq, seq, "the last object is the checkpoint");
    let body = volume.bucket.store.object(&key).unwrap();
    let frame = &body[place.at as usize..(place.at + place.bytes) as usize];
    let id = ObjectId { epoch, seq };
    let reader = FrameReader::new(new_volume().volume, id, None);
    let (directory, _) = decode_directory(reader, place.at, frame).unwrap();
    {
        let _damage = volume.damage(&key, place.at as usize + 30);
        let report = volume.check(&all());
        // Which objects are needed is not known then; each is read by itself.
        let root = keys::root(newest.number);
        expect_one(&report.faults, &root, "the checksum of a frame is wrong", &[]);
        assert!(report.read_bytes > 30 * BLOCK_BYTES);
        let data = &volume.object(3);
        let _damage = volume.damage(data, HEADER_BYTES + 24 + 20);
        assert!(volume.faults().iter().any(|fault| fault.key == *data && fault.blocks() == 1));
    }
    let leaf = directory.leaves[0];
    let key = volume.object(leaf.place.seq.0);
    let _damage = volume.damage(&key, leaf.place.at as usize + 20);
    let faults = volume.faults();
    assert!(faults[0].key == key && faults[0].blocks() > 500, "{faults:?}");
    assert!(faults[0].why.contains("it has a part of the map"), "{faults:?}");
}

#[test]
fn only_what_came_too_late_is_removed() {
    let volume = Volume::new(true);
    let before = volume.bucket.store.keys();
    {
        let _damage = volume.delete(&volume.fence());
        let report = volume.check(&repair());
        assert_eq!((report.removed, report.faults.len()), (0, 1), "not beside faults");
    }
    let report = volume.check(&repair());
    assert_eq!((report.removed, report.late.objects), (1, 1));
    let want: Vec<_> = before.into_iter().filter(|key| *key != volume.late).collect();
    assert_eq!(volume.bucket.store.keys(), want);
    assert_eq!(volume.check(&repair()).late, Sum::default());
    volume.bucket.open(volume.journal.clone(), false).unwrap();
}

#[test]
fn an_object_behind_all_roots_is_a_fault() {
    let volume = Volume::new(true);
    let newest = block_on(find(&volume.bucket.requests)).unwrap();
    let body = volume.bucket.store.object(&volume.late).unwrap();
    let key = keys::log(newest.last.opening.epoch, newest.committed.seq.next());
    volume.bucket.store.put(&key, Some(body));
    expect_one(&volume.faults(), &key, "the store has lost newer roots", &[]);
}

/// Whatever byte is changed, or whatever object is gone: if the check finds nothing, the volume
/// reads as before.
#[test]
fn damage_that_matters_is_found() {
    let random = Random::new(7);
    let mut seen = [0; 2];
    for is_closed in [true, false] {
        let volume = Volume::new(is_closed);
        let want = content(&volume).unwrap();
        let committed = block_on(find(&volume.bucket.requests)).unwrap().committed.seq;
        let keys = volume.bucket.store.keys();
        for _ in 0..150 {
            let key = &keys[random.below(keys.len() as u64) as usize];
            let len = volume.bucket.store.object(key).unwrap().len();
            // Half of them in the first bytes, where most of the meaning is.
            let most = if random.percent(50) { 400.min(len) } else { len };
            let at = random.below(most as u64) as usize;
            // Of an object that no root has, nothing says that it was there.
            let is_new = keys::log_place(key).is_some_and(|(_, seq)| seq > committed);
            let _damage = match random.percent(10) && (is_closed || !is_new) {
                true => volume.delete(key),
                false => volume.damage(key, at),
            };
            let faults = volume.faults();
            seen[usize::from(faults.is_empty())] += 1;
            if faults.is_empty() {
                assert!(content(&volume).as_ref() == Ok(&want), "{key} at {at}");
            }
        }
    }
    assert!(seen[0] > 50 && seen[1] > 20, "{seen:?}");
}

/// What an opening of a copy of the volume reads.
fn content(volume: &Volume) -> Result<Vec<u8>, String> {
    let copy = Bucket::new();
    let store = &volume.bucket.store;
    copy.store.keys().iter().for_each(|key| copy.store.put(key, None));
    store.keys().iter().for_each(|key| copy.store.put(key, store.object(key)));
    let opened = copy.open(FakeJournal::default(), true).map_err(|error| error.to_string())?;
    copy.read(&opened, 0, SIZE).map_err(|error| error.to_string())
}

/// A store whose volume is written to when an object is read, which is deleted then.
#[derive(Debug)]
struct Deleting {
    store: Arc<MemoryStore>,
    key: String,
    journal: FakeJournal,
    is_done: AtomicBool,
}

impl Deleting {
    fn delete(&self) {
        let store = Arc::clone(&self.store);
        let requests = Requests::new(store.clone(), Arc::new(TurnClock), "dir:///s/v");
        Bucket { store, requests }.write(&self.journal, &[&[(0, 20, 8)]], true);
        self.store.put(&self.key, None);
    }
}

impl Store for Deleting {
    fn create<'a>(&'a self, _: &'a str, _: Bytes) -> Answer<'a, Created> {
        unreachable!("a check makes nothing")
    }

    fn get<'a>(&'a self, key: &'a str, range: std::ops::Range<u64>) -> Answer<'a, Bytes> {
        // The check reads a frame, and knows from the listing that the object is there.
        if key == self.key && range.start > 0 && !self.is_done.swap(true, Relaxed) {
            self.delete();
        }
        self.store.get(key, range)
    }

    fn list<'a>(&'a self, prefix: &'a str, after: &'a str, max: usize) -> Answer<'a, Vec<Listed>> {
        self.store.list(prefix, after, max)
    }

    fn delete<'a>(&'a self, _: &'a str) -> Answer<'a, ()> {
        unreachable!("a check deletes nothing")
    }
}

#[test]
fn an_open_volume_that_deletes_meanwhile_has_no_faults() {
    let volume = Volume::new(false);
    let (store, journal) = (Arc::clone(&volume.bucket.store), volume.journal.clone());
    let key = volume.object(3);
    let deleting = Deleting { store, key: key.clone(), journal, is_done: AtomicBool::new(false) };
    let requests = Requests::new(Arc::new(deleting), Arc::new(TurnClock), "dir:///s/v");
    let report = block_on(check(&requests, &all())).unwrap();
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    assert!(volume.bucket.store.object(&key).is_none(), "it was deleted");
}
