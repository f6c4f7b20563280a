//! Volumes whose store or disk fails.

mod bounds;
mod deleted;
mod durability;
mod lost;
mod status;

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use sheave_conformance::{Driver, Engine as _, Mishap, Options, PlainEngine, check, ops};
use sheave_core::{Completion, IoRequest, Op, Reply, Submitted, Tag};
use tempfile::TempDir;

use super::*;
use crate::cipher::WrappingKey;
use crate::clock::{Clock as _, SystemClock};
use crate::dir_store::DirStore;
use crate::format::Codec;
use crate::ids::{Blocks, Incarnation, Lba};
use crate::life::{self, NewVolume};
use crate::store::{Answer, Created, Listed, Store, StoreError, StoreErrorKind};
use crate::stored::VolumeStore as _;
use crate::threads::block_on;

const BLOCKS: u64 = 64;

/// A directory that refuses to answer for some time, or does not answer.
#[derive(Debug)]
struct AwayStore {
    dir: DirStore,
    is_away: Arc<AtomicBool>,
    is_hung: Arc<AtomicBool>,
}

impl AwayStore {
    fn check(&self) -> Result<(), StoreError> {
        match self.is_away.load(Relaxed) {
            true => Err(StoreError::new(StoreErrorKind::Busy, "away")),
            false => Ok(()),
        }
    }
}

impl Store for AwayStore {
    fn create<'a>(&'a self, key: &'a str, body: Bytes) -> Answer<'a, Created> {
        Box::pin(async move {
            while self.is_hung.load(Relaxed) {
                SystemClock.sleep(5).await;
            }
            self.check()?;
            self.dir.create(key, body).await
        })
    }

    fn get<'a>(&'a self, key: &'a str, range: Range<u64>) -> Answer<'a, Bytes> {
        Box::pin(async move {
            self.check()?;
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

/// A volume in a directory of its own.
struct Place {
    dir: TempDir,
    is_away: Arc<AtomicBool>,
    is_hung: Arc<AtomicBool>,
    durability: Durability,
    codec: Codec,
    key: Option<WrappingKey>,
    space_percent: u64,
}

impl Place {
    fn empty() -> Self {
        Self {
            dir: ops::disk_dir(),
            is_away: Arc::default(),
            is_hung: Arc::default(),
            durability: Durability::Local,
            codec: Codec::Plain,
            key: None,
            space_percent: Tuning::default().space_percent,
        }
    }

    fn new() -> Self {
        Self::with_blocks(BLOCKS)
    }

    fn with_blocks(size: Blocks) -> Self {
        Self::empty().with_volume(size)
    }

    fn with_volume(self, size: Blocks) -> Self {
        let place = self;
        let new = NewVolume {
            volume: VolumeId(place.random()),
            incarnation: Incarnation(place.random()),
            node: "a".to_owned(),
            size,
            durability: place.durability,
            codec: place.codec,
            key: place.key.clone(),
        };
        block_on(life::create(&place.requests(), &new)).unwrap();
        place
    }

    fn random(&self) -> [u8; 16] {
        worker::salts().unwrap()()
    }

    fn requests(&self) -> Requests {
        let dir = DirStore::new(&self.dir.path().join("store"));
        dir.make().unwrap();
        let [is_away, is_hung] = [&self.is_away, &self.is_hung].map(Arc::clone);
        let store = AwayStore { dir, is_away, is_hung };
        let name = self.dir.path().display().to_string();
        Requests::new(Arc::new(store), Arc::new(SystemClock), &name)
    }

    fn open(&self, node: &str, take_over: bool) -> ObjectVolume {
        let incarnation = Incarnation(self.random());
        let key = self.key.clone();
        let request = Request { node: node.to_owned(), incarnation, take_over, key };
        let segment_bytes = JournalSize::SEGMENT_BYTES_MIN;
        let tuning = Tuning {
            journal: JournalSize { segment_bytes, segments_max: 3 },
            object_bytes: 32 << 10,
            tick: Duration::from_millis(20),
            // Little, so that leaves come and go.
            map_bytes: 4 << 10,
            space_percent: self.space_percent,
            ..Tuning::default()
        };
        let journals = self.dir.path().join(node);
        let name = self.name(node);
        ObjectVolume::open(&name, &self.requests(), &request, &journals, tuning).unwrap()
    }

    /// Each node has a name of its own for it, and journals of its own.
    fn name(&self, node: &str) -> String {
        format!("{node}:{}", self.dir.path().display())
    }

    /// Waits until a node has closed it.
    fn wait(&self, node: &str) {
        wait_for_closing(&self.name(node)).unwrap();
    }
}

fn write(block: u64, byte: u8) -> Op {
    ops::write(block * BLOCK_BYTES, &[byte; BLOCK_BYTES as usize])
}

fn read(block: u64) -> Op {
    ops::read(block * BLOCK_BYTES, BLOCK_BYTES)
}

fn is_kind(outcome: sheave_core::Outcome, kind: ErrorKind) -> bool {
    outcome.is_err_and(|error| error.kind() == kind)
}

/// Drives a backend without waiting for all of its ops.
struct Steps {
    backend: Box<dyn Backend>,
    engine: PlainEngine,
    ended: Vec<Completion>,
}

impl Steps {
    fn submit(&mut self, op: Op, tag: u64) {
        match self.backend.submit(op, Tag(tag), self.engine.io()) {
            Submitted::Queued => {}
            Submitted::Done(outcome) => self.ended.push(Completion { tag: Tag(tag), outcome }),
            Submitted::Full(op) => panic!("no room for {op:?}"),
        }
    }

    /// Goes on until a condition holds.
    fn until(&mut self, is_so: impl Fn(&[Completion]) -> bool) -> bool {
        let by = Instant::now() + Duration::from_secs(60);
        while !is_so(&self.ended) {
            if Instant::now() > by {
                return false;
            }
            let mut done = Vec::new();
            if self.engine.in_flight() > 0 || self.backend.deadline().is_some() {
                self.engine.wait(self.backend.deadline(), &mut done);
            } else {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            done.into_iter().for_each(|done| self.backend.io_done(done, self.engine.io()));
            while let Some(completion) = self.backend.reap(self.engine.io()) {
                self.ended.push(completion);
            }
        }
        true
    }
}

#[test]
fn without_the_store_writes_wait_when_the_journal_is_full_and_reads_go_on() {
    let place = Place::new();
    let volume = place.open("a", false);
    place.is_away.store(true, Relaxed);
    let engine = PlainEngine::new(64);
    let mut steps = Steps { backend: volume.backend().unwrap(), engine, ended: Vec::new() };
    // Three segments of 24 pages have room for some of these.
    let count = 100;
    for tag in 0..count {
        steps.submit(write(tag % BLOCKS, tag as u8 + 1), tag);
    }
    assert!(steps.until(|ended| ended.len() >= 30), "{} of them", steps.ended.len());
    let begun = Instant::now();
    steps.until(|_| begun.elapsed() > Duration::from_millis(300));
    let written = steps.ended.len();
    assert!(written < 36, "{written} writes in three segments");
    steps.submit(read(3), 1000);
    steps.submit(Op::Flush, 1001);
    assert!(steps.until(|ended| ended.len() == written + 2), "reads and flushes wait for nothing");
    let read_of = |ended: &[Completion], tag| {
        let found = ended.iter().find(|completion| completion.tag == Tag(tag)).unwrap();
        ops::bytes(found.outcome.clone())[0]
    };
    assert_eq!(read_of(&steps.ended, 1000), 4);
    place.is_away.store(false, Relaxed);
    assert!(steps.until(|ended| ended.len() == count as usize + 2), "{}", steps.ended.len());
    assert!(steps.ended.iter().all(|completion| completion.outcome.is_ok()));
    drop((steps, volume));
    place.wait("a");
    let volume = place.open("b", false);
    let mut driver = ops::driver(&volume);
    for block in 0..BLOCKS {
        let last = if block + BLOCKS < count { block + BLOCKS } else { block };
        assert_eq!(ops::bytes(driver.run_one(read(block)))[0], last as u8 + 1, "{block}");
    }
}

#[test]
fn short_and_interrupted_requests_go_on() {
    let places = Mutex::new(Vec::new());
    let make = || -> Arc<dyn Volume> {
        let place = Place::new();
        let volume = place.open("a", false);
        places.lock().unwrap().push(place);
        Arc::new(volume)
    };
    let engine = || {
        let mut count = 0u32;
        PlainEngine::new(8).with_mishaps(move |_| {
            count += 1;
            match count % 5 {
                0 => Mishap::Short(1 + count as usize % 5000),
                1 => Mishap::Errno(nix::libc::EINTR),
                _ => Mishap::None,
            }
        })
    };
    check(Options { cases: 6, unaligned: false }, make, engine);
}

#[test]
fn after_a_sync_that_failed_nothing_is_promised_any_more() {
    let place = Place::new();
    let volume = place.open("a", false);
    let mut syncs = 0;
    let engine = PlainEngine::new(8).with_mishaps(move |request| match request {
        IoRequest::Sync { .. } => {
            syncs += 1;
            if syncs == 2 { Mishap::Errno(nix::libc::EIO) } else { Mishap::None }
        }
        _ => Mishap::None,
    });
    let mut driver = Driver::new(volume.backend().unwrap(), engine);
    assert!(matches!(driver.run_one(write(1, 1)), Ok(Reply::Done)));
    assert!(matches!(driver.run_one(ops::with_fua(write(3, 3))), Ok(Reply::Done)));
    assert!(!volume.has_lost_data_itself());
    assert!(is_kind(driver.run_one(ops::with_fua(write(2, 2))), ErrorKind::Io));
    // The next sync would succeed, without the data.
    assert!(is_kind(driver.run_one(Op::Flush), ErrorKind::Io));
    assert!(is_kind(driver.run_one(write(4, 4)), ErrorKind::Io));
    assert!(volume.has_lost_data_itself());
    assert_eq!(ops::bytes(driver.run_one(read(1)))[0], 1);
}

#[test]
fn a_record_that_cannot_be_written_fails_all_behind_it() {
    let place = Place::new();
    let volume = place.open("a", false);
    let mut writes = 0;
    let engine = PlainEngine::new(1).with_mishaps(move |request| match request {
        IoRequest::Write { .. } => {
            writes += 1;
            if writes == 2 { Mishap::Errno(nix::libc::EIO) } else { Mishap::None }
        }
        _ => Mishap::None,
    });
    let mut driver = Driver::new(volume.backend().unwrap(), engine);
    let outcomes = driver.run((0..4).map(|block| write(block, 9)).collect());
    assert!(outcomes[0].is_ok());
    assert!(outcomes[1..].iter().all(Result::is_err), "{outcomes:?}");
    assert!(volume.has_lost_data_itself());
    assert_eq!(ops::bytes(driver.run_one(read(0)))[0], 9);
    assert_eq!(ops::bytes(driver.run_one(read(2)))[0], 0);
}

#[test]
fn a_writer_that_was_overtaken_serves_nothing_any_more() {
    let place = Place::new();
    let first = place.open("a", false);
    let mut driver = ops::driver(&first);
    driver.run_one(write(1, 1)).unwrap();
    driver.run_one(Op::Flush).unwrap();
    let by = Instant::now() + Duration::from_secs(60);
    while first.opened.engine.with(|front| front.lag_bytes()) > 0 && Instant::now() < by {
        std::thread::sleep(Duration::from_millis(5));
    }
    let second = place.open("b", true);
    let mut other = ops::driver(&second);
    assert_eq!(ops::bytes(other.run_one(read(1)))[0], 1);
    other.run_one(write(1, 2)).unwrap();
    // It learns of that when it writes to the store.
    driver.run_one(write(2, 3)).unwrap();
    while !first.has_lost_data_itself() && Instant::now() < by {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(is_kind(driver.run_one(write(2, 3)), ErrorKind::Fenced));
    assert!(is_kind(driver.run_one(Op::Flush), ErrorKind::Fenced));
    assert!(is_kind(driver.run_one(read(1)), ErrorKind::Fenced));
    assert_eq!(ops::bytes(other.run_one(read(1)))[0], 2);
    // Its journal is kept when it comes back.
    drop((other, second, driver, first));
    place.wait("b");
    let third = place.open("a", false);
    assert_eq!(ops::bytes(ops::driver(&third).run_one(read(1)))[0], 2);
    let id = third.info().identity.clone().unwrap();
    let kept = std::fs::read_dir(place.dir.path().join("a").join(id)).unwrap();
    let is_orphan = |path: PathBuf| path.extension().is_some_and(|found| found == "orphan");
    assert_eq!(kept.filter(|entry| is_orphan(entry.as_ref().unwrap().path())).count(), 1);
}

#[test]
fn what_was_fetched_for_a_backend_that_is_gone_reaches_no_other() {
    let place = Place::new();
    let volume = place.open("a", false);
    let mut driver = ops::driver(&volume);
    driver
        .run(vec![write(1, 1), write(2, 2)])
        .into_iter()
        .for_each(|outcome| drop(outcome.unwrap()));
    drop(driver);
    let by = Instant::now() + Duration::from_secs(60);
    while volume.opened.engine.with(|front| front.lag_bytes()) > 0 && Instant::now() < by {
        std::thread::sleep(Duration::from_millis(5));
    }
    place.is_away.store(true, Relaxed);
    let begin = |block| {
        let (backend, engine) = (volume.backend().unwrap(), PlainEngine::new(64));
        let mut steps = Steps { backend, engine, ended: Vec::new() };
        steps.submit(read(block), block);
        steps
    };
    drop(begin(1));
    let mut steps = begin(2);
    place.is_away.store(false, Relaxed);
    assert!(steps.until(|ended| !ended.is_empty()));
    assert_eq!(ops::bytes(steps.ended.remove(0).outcome)[0], 2);
}

#[test]
fn a_read_of_the_store_does_not_wait_for_the_disk_of_the_journal() {
    let place = Place::new();
    let volume = place.open("a", false);
    let mut driver = ops::driver(&volume);
    driver.run_one(write(1, 1)).unwrap();
    let by = Instant::now() + Duration::from_secs(60);
    while volume.opened.engine.with(|front| front.lag_bytes()) > 0 && Instant::now() < by {
        std::thread::sleep(Duration::from_millis(5));
    }
    // All threads of the journal hang, as they do if its disk does.
    let (release, is_released) = std::sync::mpsc::channel::<()>();
    let is_released = Arc::new(Mutex::new(is_released));
    for _ in 0..8 {
        let is_released = Arc::clone(&is_released);
        let wait = move || drop(is_released.lock().map(|released| released.recv()));
        drop(volume.opened.engine.journal_threads.run(wait));
    }
    driver.run_one(write(2, 2)).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let (backend, engine) = (volume.backend().unwrap(), PlainEngine::new(64));
    let mut steps = Steps { backend, engine, ended: Vec::new() };
    steps.submit(read(1), 1);
    let has_ended = steps.until(|ended| !ended.is_empty());
    drop(release);
    assert!(has_ended);
    assert_eq!(ops::bytes(steps.ended.remove(0).outcome)[0], 1);
}

mod leaves;
