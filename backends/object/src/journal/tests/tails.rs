//! What lies behind the end of a journal, and a journal without room.

use sheave_conformance::Engine as _;
use sheave_core::{Backend as _, Submitted, Tag};

use super::*;
use crate::format::record::Entry;

/// Writes records of eight blocks, of which a segment has room for two.
fn fill(life: &mut Life, byte: u8, count: usize) {
    for _ in 0..count {
        let bytes = vec![byte; 8 * BLOCK_BYTES as usize];
        life.driver.run_one(ops::write(0, &bytes)).unwrap();
    }
}

/// The disk when the process is killed.
fn killed(life: &Life, mut disk: Disk) -> Disk {
    life.trace.lock().unwrap().iter().for_each(|event| disk.apply(event));
    disk.killed()
}

/// Six writes in three segments, of which no one is flushed; the power loses the second one.
fn torn() -> Disk {
    let (mut life, _, disk) = Life::open(Disk::default().to_dir(), 1, Lsn(0));
    fill(&mut life, 1, 6);
    let mut disk = killed(&life, disk);
    let number_of = |bytes: &[u8]| SegmentHeader::decode(bytes.first_chunk().unwrap());
    let first = disk
        .stable
        .values_mut()
        .find(|bytes| number_of(bytes).is_ok_and(|header| header.number == 1));
    first.unwrap()[12 * PAGE_BYTES] ^= 1;
    disk
}

#[test]
fn a_second_crash_finds_what_was_written_after_the_first_one() {
    let disk = torn();
    assert_eq!(disk.recover(Lsn(0)).unwrap().next, Lsn(2));
    for count in [1, 2, 4] {
        let (mut life, _, again) = Life::open(disk.to_dir(), 2, Lsn(0));
        fill(&mut life, 2, count);
        let again = killed(&life, again).recover(Lsn(0)).unwrap();
        let found: Vec<_> = again.records.iter().map(|record| record.lsn.0).collect();
        assert_eq!(found, (1..count as u64 + 2).collect::<Vec<_>>());
    }
}

#[test]
fn what_was_lost_does_not_come_back() {
    let (mut life, _, disk) = Life::open(torn().to_dir(), 2, Lsn(0));
    fill(&mut life, 2, 1);
    // The bucket has these two; the segment that is begun then is torn altogether.
    let mut disk = killed(&life, disk);
    for bytes in disk.stable.values_mut() {
        let header = SegmentHeader::decode(bytes.first_chunk().unwrap());
        if header.is_ok_and(|header| header.opening.epoch == Epoch(2)) {
            bytes[..PAGE_BYTES].fill(0);
        }
    }
    assert_eq!(disk.recover(Lsn(2)).unwrap().records, []);
}

#[test]
fn a_crash_while_its_room_is_given_back_leaves_a_journal_that_fits() {
    let (mut life, _, disk) = Life::open(Disk::default().to_dir(), 1, Lsn(0));
    fill(&mut life, 1, 5);
    life.driver.run_one(Op::Flush).unwrap();
    life.engine.with(|front| front.tick(0));
    while life.commit() {}
    let disk = killed(&life, disk);
    let files: Vec<_> = disk.stable.keys().copied().collect();
    for gone in 0..1u32 << files.len() {
        let mut disk = disk.clone();
        disk.stable.retain(|file, _| {
            let index = files.iter().position(|other| other == file).unwrap();
            gone >> index & 1 == 0
        });
        let recovered = disk.recover(Lsn(5)).unwrap();
        assert_eq!((recovered.next, recovered.records.len()), (Lsn(6), 0), "{gone:b}");
    }
    let dir = disk.to_dir();
    JournalDir::open(dir.path(), SIZE).unwrap().clear().unwrap();
    assert_eq!(fs::read_dir(journal_path(dir.path())).unwrap().count(), 0);
}

#[test]
fn a_journal_without_room_is_opened_and_writes_wait_for_the_bucket() {
    let (mut life, _, disk) = Life::open(Disk::default().to_dir(), 1, Lsn(0));
    fill(&mut life, 1, 2 * SIZE.segments_max);
    let dir = killed(&life, disk).to_dir();
    let journal = JournalDir::open(dir.path(), SIZE).unwrap();
    let recovered = journal.recover((VOLUME, None), Lsn(0)).unwrap();
    assert_eq!((recovered.held.len(), recovered.free.len()), (SIZE.segments_max, 0));
    let opening = Opening { epoch: Epoch(2), incarnation: Incarnation([2; 16]) };
    let tuning = Tuning { journal: SIZE, object_bytes: 32 << 10, ..Tuning::default() };
    let parts = Parts {
        journal: Some(journal),
        recovered,
        map: Map::default(),
        committed: Lsn(0),
        traffic: Arc::default(),
        cached: None,
        key: None,
        tuning,
        durability: Durability::Local,
    };
    let bytes = BLOCKS * BLOCK_BYTES;
    let engine =
        Engine::new("test", (VOLUME, opening), (crate::volume::info(VOLUME), bytes), parts)
            .unwrap();
    let mut backend = ObjectBackend::new(Arc::new(Opened { engine: Arc::clone(&engine) }));
    let mut plain = PlainEngine::new(8);
    let op = ops::write(0, &[3; BLOCK_BYTES as usize]);
    assert!(matches!(backend.submit(op, Tag(1), plain.io()), Submitted::Queued));
    assert_eq!(plain.in_flight(), 0);
    while let NextBatch::Batch(batch) = engine.with(|front| front.next_batch(Waker::noop())) {
        engine.with(|front| front.committed(batch.last));
    }
    let mut done = Vec::new();
    let completion = loop {
        if let Some(completion) = backend.reap(plain.io()) {
            break completion;
        }
        plain.wait(None, &mut done);
        done.drain(..).for_each(|done| backend.io_done(done, plain.io()));
    };
    assert!(matches!(completion.outcome, Ok(Reply::Done)));
}

#[test]
fn a_recovered_segment_is_not_written_again() {
    let (mut life, _, disk) = Life::open(Disk::default().to_dir(), 1, Lsn(0));
    fill(&mut life, 1, 5);
    let dir = killed(&life, disk).to_dir();
    let journal = JournalDir::open(dir.path(), SIZE).unwrap();
    let mut recovered = journal.recover((VOLUME, None), Lsn(0)).unwrap();
    recovered.free.clear();
    let number_next = recovered.number_next;
    assert!(!recovered.held.is_empty());
    let opening = Opening { epoch: Epoch(2), incarnation: Incarnation([2; 16]) };
    let mut log = Log::new((VOLUME, None), opening, Lsn(0), recovered, Box::new(|| [7; 16]));
    let entry = Entry::Zero { span: Span { start: 0, blocks: 1 } };
    // However often a write asks for a place, until there is a segment.
    for _ in 0..3 {
        assert!(log.reserve(&entry, |_| ()).is_none());
    }
    log.add(journal.make_segment().unwrap());
    let reserved = log.reserve(&entry, |_| ()).unwrap();
    assert_eq!((reserved.segment.header.number, reserved.page), (number_next, 1));
}
