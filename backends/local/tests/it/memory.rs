//! Properties of memory volumes only.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sheave_core::{Buf, ErrorKind, Op, Payload, Reply, Segment, Submitted, Tag, Volume};

use sheave_conformance::ops::{bytes, driver, extents, range, read, trim, write, zeroes};
use sheave_conformance::{Engine, PlainEngine};
use sheave_local::Memory;

const CHUNK: u64 = 64 << 10;

fn buf(payload: &Payload) -> Buf {
    match payload.segments() {
        [Segment::Data(buf)] => buf.clone(),
        other => panic!("not one buffer: {other:?}"),
    }
}

#[test]
fn a_write_buffer_is_the_memory_that_reads_answer_with() {
    let mut driver = driver(&Memory::new(1 << 20).unwrap());
    let data = driver.write_buffer(range(8192, 4096));
    data.copy_in(0, &[7; 4096]);
    let target = buf(&data);
    driver.run_one(Op::Write { range: range(8192, 4096), data, fua: true }).unwrap();
    let Reply::Data(answer) = driver.run_one(read(8192, 4096)).unwrap() else { panic!("data") };
    assert!(buf(&answer).is_same(&target), "no copy on the way in or out");
    assert_eq!(bytes(driver.run_one(read(0, 4096))), [0; 4096], "its neighbour is untouched");
}

#[test]
fn a_write_survives_a_trim_that_frees_its_buffer() {
    let volume = Memory::new(4 * CHUNK).unwrap();
    let (mut first, mut second) = (driver(&volume), driver(&volume));
    let target = range(CHUNK - 4096, 8192);
    let data = first.write_buffer(target);
    data.copy_in(0, &[7; 8192]);
    second.run_one(trim(0, 4 * CHUNK)).unwrap();
    first.run_one(Op::Write { range: target, data, fua: false }).unwrap();
    assert_eq!(bytes(second.run_one(read(CHUNK - 4096, 8192))), [7; 8192]);
}

#[test]
fn a_reply_in_flight_outlives_its_chunk() {
    let mut driver = driver(&Memory::new(CHUNK).unwrap());
    driver.run_one(write(0, &[7; 4096])).unwrap();
    let Reply::Data(answer) = driver.run_one(read(0, 4096)).unwrap() else { panic!("data") };
    driver.run_one(zeroes(0, CHUNK)).unwrap();
    assert_eq!(answer.to_vec(), [7; 4096]);
    assert_eq!(bytes(driver.run_one(read(0, 4096))), [0; 4096]);
}

#[test]
fn a_tebibyte_costs_what_is_written() {
    let size = 1 << 40;
    let mut driver = driver(&Memory::new(size).unwrap());
    driver.run_one(write(size - 5, b"hello")).unwrap();
    driver.run_one(write(size / 2, b"world")).unwrap();
    driver.run_one(trim(0, size / 2)).unwrap();
    assert_eq!(bytes(driver.run_one(read(size - 5, 5))), b"hello");
    let all = Op::BlockStatus { range: range(0, size), extents_max: 10 };
    let half = size / 2;
    let want = [
        (half, true, true),
        (CHUNK, false, false),
        (half - 2 * CHUNK, true, true),
        (CHUNK, false, false),
    ];
    assert_eq!(extents(driver.run_one(all)), want);
    let first = Op::BlockStatus { range: range(0, size), extents_max: 1 };
    assert_eq!(extents(driver.run_one(first)), want[..1]);
    assert_eq!(Memory::new((1 << 50) + 1).err().unwrap().kind(), ErrorKind::TooLarge);
}

#[test]
fn no_hole_keeps_the_range_allocated() {
    let mut driver = driver(&Memory::new(4 * CHUNK).unwrap());
    driver.run_one(write(0, &[7; 2 * CHUNK as usize])).unwrap();
    let no_hole =
        Op::WriteZeroes { range: range(0, 3 * CHUNK), fua: false, no_hole: true, fast: true };
    driver.run_one(no_hole).unwrap();
    let status = |driver: &mut sheave_conformance::Driver<_>| {
        extents(driver.run_one(Op::BlockStatus { range: range(0, 4 * CHUNK), extents_max: 9 }))
    };
    assert_eq!(status(&mut driver), [(3 * CHUNK, false, true), (CHUNK, true, true)]);
    assert_eq!(bytes(driver.run_one(read(0, 100))), [0; 100]);
    driver.run_one(zeroes(0, 4 * CHUNK)).unwrap();
    assert_eq!(status(&mut driver), [(4 * CHUNK, true, true)]);
}

/// Overlapping writes, reads and frees race; each writer's own range stays its own.
#[test]
fn threads_that_free_chunks_do_not_disturb_the_others() {
    const ROUNDS: usize = 3000;
    let volume = Arc::new(Memory::new(2 * CHUNK).unwrap());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut workers = Vec::new();
        for lane in 0..2_u64 {
            let volume = &*volume;
            workers.push(scope.spawn(move || {
                let mut driver = driver(volume);
                let own = range(lane * 4096, 4096);
                for round in 0..ROUNDS {
                    let value = (round % 251) as u8 + 1;
                    let data = driver.write_buffer(own);
                    data.copy_in(0, &[value; 4096]);
                    driver.run_one(Op::Write { range: own, data, fua: false }).unwrap();
                    assert_eq!(
                        bytes(driver.run_one(Op::Read { range: own, into: None })),
                        [value; 4096]
                    );
                }
            }));
        }
        let (volume, stop) = (&*volume, &stop);
        scope.spawn(move || {
            let mut driver = driver(volume);
            while !stop.load(Ordering::Relaxed) {
                // A part of the first chunk, and all of the second.
                driver.run_one(trim(8192, 2 * CHUNK - 8192)).unwrap();
                driver.run_one(write(CHUNK, &[1; 100])).unwrap();
                driver.run_one(read(0, 2 * CHUNK)).unwrap();
            }
        });
        for worker in workers {
            worker.join().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn empty_ops_are_answered_and_empty_status_is_refused() {
    let mut driver = driver(&Memory::new(100).unwrap());
    assert_eq!(bytes(driver.run_one(read(100, 0))), b"");
    driver.run_one(write(100, b"")).unwrap();
    driver.run_one(trim(50, 0)).unwrap();
    let status = Op::BlockStatus { range: range(0, 0), extents_max: 1 };
    assert_eq!(driver.run_one(status).unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn null_forgets() {
    let mut driver = driver(&sheave_local::Null::new(1 << 40));
    driver.run_one(write(5, b"gone")).unwrap();
    assert_eq!(bytes(driver.run_one(read(5, 4))), [0; 4]);
    let status = Op::BlockStatus { range: range(0, 1 << 40), extents_max: 1 };
    assert_eq!(extents(driver.run_one(status)), [(1 << 40, true, true)]);
    assert!(driver.run_one(Op::Flush).is_ok());
}

#[test]
fn a_worker_that_panics_leaves_the_volume_usable() {
    let volume: Arc<dyn Volume> = Arc::new(Memory::new(CHUNK).unwrap());
    let inner = Arc::clone(&volume);
    let panicked = std::thread::spawn(move || {
        driver(&*inner).run_one(write(0, b"before")).unwrap();
        panic!("on purpose");
    });
    assert!(panicked.join().is_err());
    assert_eq!(bytes(driver(&*volume).run_one(read(0, 6))), b"before");
}

#[test]
fn a_tebibyte_of_zeroes_lets_others_have_their_turn() {
    let size = 1 << 40;
    let volume = Memory::new(size).unwrap();
    let mut backend = volume.backend().unwrap();
    let mut engine = PlainEngine::new(1);
    let op = Op::WriteZeroes { range: range(0, size), fua: false, no_hole: true, fast: true };
    assert!(matches!(backend.submit(op, Tag(1), engine.io()), Submitted::Queued));
    let mut turns = 0;
    let ended = loop {
        assert_eq!(backend.deadline(), Some(0), "there is more to do at once");
        if let Some(completion) = backend.reap(engine.io()) {
            break completion;
        }
        turns += 1;
        let answer = backend.submit(read(size - 1, 1), Tag(2), engine.io());
        assert!(matches!(answer, Submitted::Done(Ok(Reply::Data(_)))));
    };
    assert!(ended.tag == Tag(1) && ended.outcome.is_ok());
    assert!(turns > 1000, "{turns} turns for {} chunks", size / CHUNK);
    assert_eq!(backend.deadline(), None);
    let mut driver = driver(&volume);
    let status = Op::BlockStatus { range: range(0, CHUNK), extents_max: 1 };
    assert_eq!(extents(driver.run_one(status)), [(CHUNK, false, true)]);
}

#[test]
fn block_status_of_a_pebibyte_is_told_in_parts() {
    let size = 1 << 50;
    let mut driver = driver(&Memory::new(size).unwrap());
    let status = Op::BlockStatus { range: range(0, size), extents_max: 1 };
    let [(len, true, true)] = extents(driver.run_one(status))[..] else { panic!("one hole") };
    assert!(len >= 1 << 40 && len < size, "{len} bytes");
}
