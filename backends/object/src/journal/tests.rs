//! Crashes at every point of short histories, on a disk that loses, tears and reorders what was not
//! synced.

mod damage;
mod tails;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::Duration;

use proptest::prelude::*;
use sheave_conformance::{Driver, Mishap, PlainEngine, ops};
use sheave_core::{IoRequest, Op, Reply};
use tempfile::TempDir;

use super::*;
use crate::backend::ObjectBackend;
use crate::cipher::VolumeKey;
use crate::extents::Span;
use crate::format::Durability;
use crate::format::page::{PAGE_BYTES, Page};
use crate::format::record::{Entry, Record};
use crate::format::segment::Seed;
use crate::front::NextBatch;
use crate::ids::{BLOCK_BYTES, Epoch, Incarnation};
use crate::map::Map;
use crate::volume::{Engine, Opened, Parts, Tuning};

const VOLUME: VolumeId = VolumeId([5; 16]);
const BLOCKS: u64 = 64;
/// Segments of 24 pages, so that even short histories fill them.
const SIZE: JournalSize =
    JournalSize { segment_bytes: JournalSize::SEGMENT_BYTES_MIN, segments_max: 4 };
/// Pages that surely find room in an empty journal.
const ROOM_PAGES: u64 = 40;
/// What a disk writes as a whole.
const SECTOR: usize = 512;

/// What happened, in order.
#[derive(Clone, Debug)]
enum Event {
    /// Bytes went to a file's pages in memory.
    Wrote { file: u64, at: u64, bytes: Vec<u8> },
    /// A file was synced.
    Synced { file: u64 },
    /// All records up to this one are acknowledged.
    Acknowledged(Lsn),
    /// All records up to this one are flushed.
    Flushed(Lsn),
    /// All records up to this one are in the bucket.
    Committed(Lsn),
}

type Trace = Arc<Mutex<Vec<Event>>>;

thread_local! {
    /// Files that this thread has synced.
    static SYNCED: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// Notes that a file is synced.
pub(super) fn note_sync(file: &File) {
    SYNCED.with_borrow_mut(|synced| synced.push(ino(file)));
}

fn ino(file: &File) -> u64 {
    file.metadata().unwrap().ino()
}

fn watch(trace: &Trace) -> impl FnMut(&IoRequest) -> Mishap + Send + 'static {
    let trace = Arc::clone(trace);
    move |request| {
        let event = match request {
            IoRequest::Write { file, at, from, .. } => {
                Event::Wrote { file: ino(file), at: *at, bytes: from.to_vec() }
            }
            IoRequest::Sync { file } => Event::Synced { file: ino(file) },
            _ => return Mishap::None,
        };
        trace.lock().unwrap().push(event);
        Mishap::None
    }
}

/// The disk: files by number, as they are on stable storage, and writes that are not.
#[derive(Clone, Default)]
struct Disk {
    names: BTreeMap<u64, PathBuf>,
    stable: BTreeMap<u64, Vec<u8>>,
    unsynced: Vec<(u64, u64, Vec<u8>)>,
}

impl Disk {
    /// What is in a directory, all of it stable.
    fn of(dir: &Path) -> Self {
        let mut disk = Self::default();
        for entry in fs::read_dir(journal_path(dir)).unwrap() {
            let path = entry.unwrap().path();
            let number = fs::metadata(&path).unwrap().ino();
            disk.stable.insert(number, fs::read(&path).unwrap());
            disk.names.insert(number, path.file_name().unwrap().into());
        }
        disk
    }

    fn apply(&mut self, event: &Event) {
        match event {
            Event::Wrote { file, at, bytes } => self.unsynced.push((*file, *at, bytes.clone())),
            Event::Synced { file } => {
                let unsynced = std::mem::take(&mut self.unsynced);
                for (of, at, bytes) in unsynced {
                    match of == *file {
                        true => self.put(of, at, &bytes),
                        false => self.unsynced.push((of, at, bytes)),
                    }
                }
            }
            _ => {}
        }
    }

    fn put(&mut self, file: u64, at: u64, bytes: &[u8]) {
        let stable = self.stable.get_mut(&file).expect("a file that was there from the begin");
        stable[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    /// The process is killed: all that it has written will be on the disk.
    fn killed(mut self) -> Self {
        for (file, at, bytes) in std::mem::take(&mut self.unsynced) {
            self.put(file, at, &bytes);
        }
        self
    }

    /// The power goes: of what is not synced, each sector may be there or not.
    fn without_power(mut self, seed: u64) -> Self {
        let mut random = seed | 1;
        let mut is_lost = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % 4 < seed % 5
        };
        for (file, at, bytes) in std::mem::take(&mut self.unsynced) {
            let is_whole_lost = is_lost() && is_lost();
            for (index, sector) in bytes.chunks(SECTOR).enumerate() {
                if !is_whole_lost && !is_lost() {
                    self.put(file, at + (index * SECTOR) as u64, sector);
                }
            }
        }
        self
    }

    /// Makes the files in a new directory.
    fn to_dir(&self) -> TempDir {
        let dir = TempDir::new_in(if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" })
            .unwrap();
        make_dir(&journal_path(dir.path())).unwrap();
        for (number, bytes) in &self.stable {
            let path = journal_path(dir.path()).join(&self.names[number]);
            let file = OpenOptions::new().create_new(true).write(true).open(path).unwrap();
            file.set_len(bytes.len() as u64).unwrap();
            for (index, page) in bytes.chunks(PAGE_BYTES).enumerate() {
                if page.iter().any(|byte| *byte != 0) {
                    file.write_all_at(page, (index * PAGE_BYTES) as u64).unwrap();
                }
            }
        }
        dir
    }
}

/// What each record was when it was written: its blocks, and the first byte of each.
type Records = BTreeMap<Lsn, (Span, Vec<u8>)>;

/// The seeds of all segments that a history begins. Requests complete in any order, so a segment's
/// first record may be written after others.
fn seeds(trace: &[Event], key: Option<&VolumeKey>) -> Vec<Seed> {
    let begins = trace.iter().filter_map(|event| match event {
        Event::Wrote { at: 0, bytes, .. } => bytes.first_chunk(),
        _ => None,
    });
    begins.map(|page| SegmentHeader::decode(page).unwrap().seed(key)).collect()
}

/// Adds what a write to the journal says.
fn note(records: &mut Records, seeds: &[Seed], event: &Event) {
    let Event::Wrote { at, bytes, .. } = event else { return };
    let mut first = (*at / BLOCK_BYTES) as u32;
    let (mut pages, _): (&[Page], _) = bytes.as_chunks();
    if first == 0 {
        (first, pages) = (1, &pages[1..]);
    }
    let of =
        |seed: &Seed| Record::decode(&pages[0], first, seed).map(|record| (seed.clone(), record));
    let (seed, record) = seeds.iter().find_map(of).expect("a record");
    let mut blocks = Vec::new();
    if let Entry::Write { checks, .. } = &record.entry {
        for ((page, block), check) in (first + 1..).zip(&pages[1..]).zip(checks) {
            let mut opened = *block;
            seed.open(page, &[], (block, &check.tag), &mut opened).expect("what was encrypted");
            assert_eq!(opened == *block, !seed.is_sealed(), "nothing is stored as it is");
            blocks.push(opened[0]);
        }
    }
    records.insert(record.lsn, (record.entry.span(), blocks));
}

/// Gives a volume a segment whenever a write waits for one, as its worker does.
fn give_when_short(engine: Arc<Engine>, mut files: Vec<SegmentFile>) {
    std::thread::spawn(move || {
        while !files.is_empty() && !engine.with(|front| front.is_closing()) {
            let is_short = engine.with(|front| front.waits_for().is_some());
            if is_short && engine.with(|front| front.begin_segment()) {
                engine.with(|front| front.made_segment(files.pop()));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    });
}

/// A volume without a bucket.
struct Life {
    dir: TempDir,
    trace: Trace,
    driver: Driver<PlainEngine>,
    engine: Arc<Engine>,
    key: Option<VolumeKey>,
    /// Pages of the journal's room that may be in use.
    pages: u64,
    durability: Durability,
    /// Held while a batch is committed.
    bucket: Arc<Mutex<()>>,
}

impl Life {
    /// Opens what a directory has.
    fn open(dir: TempDir, epoch: u64, committed: Lsn) -> (Self, Vec<Replayed>, Disk) {
        Self::open_with(dir, epoch, (committed, None), (false, Durability::Local))
    }

    /// The same; `is_late`: there is no free segment until a write waits for one.
    fn open_with(
        dir: TempDir,
        epoch: u64,
        (committed, key): (Lsn, Option<VolumeKey>),
        (is_late, durability): (bool, Durability),
    ) -> (Self, Vec<Replayed>, Disk) {
        let opening = Opening { epoch: Epoch(epoch), incarnation: Incarnation([epoch as u8; 16]) };
        let segments_max = if is_late { SIZE.segments_max } else { SIZE.segments_max - 1 };
        let journal = JournalDir::open(dir.path(), JournalSize { segments_max, ..SIZE }).unwrap();
        make_dir(&journal_path(dir.path())).unwrap();
        let mut recovered = journal.recover((VOLUME, key.as_ref()), committed).unwrap();
        let records = recovered.records.clone();
        while recovered.held.len() + recovered.free.len() < SIZE.segments_max {
            recovered.free.push(journal.make_segment().unwrap());
        }
        let late = if is_late { std::mem::take(&mut recovered.free) } else { Vec::new() };
        // All but one segment have room for what is written first, also if there was a crash
        // before.
        let pages = if is_late && recovered.held.len() < 2 { 0 } else { ROOM_PAGES };
        let disk = Disk::of(dir.path());
        let tuning = Tuning { journal: SIZE, object_bytes: 32 << 10, ..Tuning::default() };
        let parts = Parts {
            journal: Some(journal),
            recovered,
            map: Map::default(),
            committed,
            traffic: Arc::default(),
            cached: None,
            key: key.clone(),
            tuning,
            durability,
        };
        let bytes = BLOCKS * BLOCK_BYTES;
        let engine =
            Engine::new("test", (VOLUME, opening), (crate::volume::info(VOLUME), bytes), parts)
                .unwrap();
        let opened = Arc::new(Opened { engine: Arc::clone(&engine) });
        give_when_short(Arc::clone(&engine), late);
        let trace = Trace::default();
        let plain = PlainEngine::new(64).with_mishaps(watch(&trace));
        let driver = Driver::new(Box::new(ObjectBackend::new(opened)), plain);
        let bucket = Arc::default();
        if durability == Durability::Remote {
            commit_for_flushes(&engine, &bucket, &trace);
        }
        (Self { dir, trace, driver, engine, key, pages, durability, bucket }, records, disk)
    }

    fn event(&self, event: Event) {
        self.trace.lock().unwrap().push(event);
    }

    fn run(&mut self, steps: &[Step]) {
        let mut pages = self.pages;
        for step in steps {
            match step {
                Step::Ops(ops) => {
                    let blocks = |op: &Op| op.range().map_or(0, |range| range.len() / BLOCK_BYTES);
                    let more: u64 = ops.iter().map(|op| 1 + blocks(op)).sum();
                    if pages + more > ROOM_PAGES {
                        self.engine.with(|front| front.tick(0));
                        while self.commit() {}
                        pages = 0;
                    }
                    pages += more;
                    let outcomes = self.driver.run(ops.clone());
                    assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(Reply::Done))));
                    self.event(Event::Acknowledged(self.engine.with(|front| front.written())));
                }
                Step::Flush => {
                    self.driver.run_one(Op::Flush).unwrap();
                    if self.durability != Durability::Unsafe {
                        self.event(Event::Flushed(self.engine.with(|front| front.written())));
                    }
                }
                Step::Commit => drop(self.commit()),
            }
        }
    }

    /// Puts the next batch into the bucket, if there is one.
    fn commit(&mut self) -> bool {
        commit(&self.engine, &self.bucket, &self.trace)
    }
}

fn commit(engine: &Engine, bucket: &Mutex<()>, trace: &Trace) -> bool {
    let _bucket = bucket.lock().unwrap();
    let next = engine.with(|front| front.next_batch(Waker::noop()));
    let NextBatch::Batch(batch) = next else { return false };
    // The bucket has it before the journal gives it up.
    trace.lock().unwrap().push(Event::Committed(batch.last));
    engine.with(|front| front.committed(batch.last));
    true
}

/// Puts batches into the bucket for flushes that wait for that, as a volume's worker does.
fn commit_for_flushes(engine: &Arc<Engine>, bucket: &Arc<Mutex<()>>, trace: &Trace) {
    let (engine, bucket, trace) = (Arc::clone(engine), Arc::clone(bucket), Arc::clone(trace));
    std::thread::spawn(move || {
        while commit(&engine, &bucket, &trace) || !engine.with(|front| front.is_closing()) {
            std::thread::sleep(Duration::from_micros(50));
        }
    });
}

#[derive(Clone, Debug)]
enum Step {
    Ops(Vec<Op>),
    Flush,
    Commit,
}

fn op() -> impl Strategy<Value = Op> {
    let span = (0..BLOCKS, 1..9u64).prop_map(|(start, count)| (start, count.min(BLOCKS - start)));
    (span, 0..4u8, any::<u8>(), prop::bool::weighted(0.1)).prop_map(
        |((start, count), kind, byte, fua)| {
            let (at, len) = (start * BLOCK_BYTES, count * BLOCK_BYTES);
            let op = match kind {
                0 => ops::zeroes(at, len),
                _ => ops::write(at, &vec![byte; len as usize]),
            };
            if fua { ops::with_fua(op) } else { op }
        },
    )
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        5 => prop::collection::vec(op(), 1..5).prop_map(Step::Ops),
        2 => Just(Step::Flush),
        1 => Just(Step::Commit),
    ];
    prop::collection::vec(step, 1..14)
}

/// What must and what may be found at some point of a history.
#[derive(Clone, Default)]
struct Expected {
    key: Option<VolumeKey>,
    records: Records,
    acknowledged: Lsn,
    flushed: Lsn,
    committed: Lsn,
}

/// Checks what a journal has after a crash, and returns its last LSN.
fn check(dir: &Path, expected: &Expected, least: Lsn) -> Lsn {
    let journal = JournalDir::open(dir, SIZE).unwrap();
    let recovered = journal.recover((VOLUME, expected.key.as_ref()), expected.committed).unwrap();
    // A killed process may have left it in memory only, and later syncs are of other segments.
    let synced = SYNCED.take();
    assert!(recovered.held.iter().all(|(held, _)| synced.contains(&ino(&held.file.file))));
    assert!(recovered.next > least, "up to before {}, not {least}", recovered.next);
    let mut next = expected.committed.next();
    for record in &recovered.records {
        assert_eq!(record.lsn, next, "no gaps");
        next = next.next();
        let (span, blocks) = &expected.records[&record.lsn];
        assert_eq!(record.span, *span);
        let Some(at) = record.record else {
            assert!(blocks.is_empty());
            continue;
        };
        let held = recovered.held.iter().find(|(held, _)| held.header.number == record.segment);
        let segment = &held.expect("the segment is kept").0;
        let mut found = vec![];
        segment.read_blocks(at + 1, span.blocks, &mut found).unwrap();
        assert!(found.chunks(PAGE_BYTES).map(|block| &block[0]).eq(blocks), "{span:?}");
    }
    assert_eq!(next, recovered.next);
    Lsn(recovered.next.0 - 1)
}

/// Runs a history and crashes at each of its points; calls `crashed` with each disk that may be
/// there then, what is expected of it, and up to where it must be whole.
fn crash_everywhere(
    life: &Life,
    mut disk: Disk,
    mut expected: Expected,
    seed: u64,
    mut crashed: impl FnMut(Disk, &Expected, Lsn),
) {
    let trace = life.trace.lock().unwrap().clone();
    let seeds = seeds(&trace, life.key.as_ref());
    for (index, event) in trace.iter().enumerate() {
        disk.apply(event);
        note(&mut expected.records, &seeds, event);
        match *event {
            Event::Acknowledged(lsn) => expected.acknowledged = lsn,
            Event::Flushed(lsn) => expected.flushed = lsn,
            Event::Committed(lsn) => expected.committed = lsn,
            _ => {}
        }
        crashed(disk.clone().killed(), &expected, expected.acknowledged.max(expected.flushed));
        let torn = disk.clone().without_power(seed.wrapping_mul(index as u64 + 7));
        crashed(torn, &expected, expected.flushed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 8,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Nothing acknowledged is lost by a killed process, nothing flushed by the power, and what is
    /// left is a prefix; also when the volume is opened, written and crashes again. A flush waits
    /// for the journal, or for the bucket; one that waits for nothing promises nothing.
    #[test]
    fn every_crash_leaves_a_prefix(
        first in steps(),
        second in steps(),
        seed in 1..u64::MAX,
        durability in prop::sample::select(&Durability::ALL[..]),
    ) {
        let dir = Disk::default().to_dir();
        let key = seed.is_multiple_of(3).then(|| VolumeKey::new([7; 32]));
        let of = (Lsn(0), key.clone());
        let with = (seed.is_multiple_of(2), durability);
        let (mut life, _, disk) = Life::open_with(dir, 1, of, with);
        life.run(&first);
        let mut crashes = 0u64;
        let expected = Expected { key: key.clone(), ..Expected::default() };
        crash_everywhere(&life, disk, expected, seed, |disk, expected, least| {
            crashes += 1;
            let dir = disk.to_dir();
            let last = check(dir.path(), expected, least);
            if !(crashes + seed).is_multiple_of(9) {
                return;
            }
            let is_late = (crashes / 9).is_multiple_of(2);
            let of = (expected.committed, key.clone());
            let with = (is_late, durability);
            let (mut life, _, disk) = Life::open_with(dir, 2, of, with);
            life.run(&second);
            let mut expected = expected.clone();
            // The opening has made durable what it has found, and forgotten the rest.
            (expected.acknowledged, expected.flushed) = (last, last);
            expected.records.retain(|lsn, _| *lsn <= last);
            let mut again = 0u64;
            crash_everywhere(&life, disk, expected, seed ^ crashes, |disk, expected, least| {
                again += 1;
                if again.is_multiple_of(3) {
                    check(disk.to_dir().path(), expected, least);
                }
            });
        });
    }
}
