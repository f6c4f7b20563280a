//! Two threads that write into the same blocks through the block size layer.

use std::sync::Arc;

use sheave_core::{Buf, Op, Payload, Volume};
use tempfile::TempDir;

use sheave_conformance::ops::{bytes, driver, range, read, write};
use sheave_conformance::{Driver, PlainEngine};
use sheave_layers::BlockSize;
use sheave_local::{FileOptions, FileVolume};

const BLOCKS: u64 = 4;
const ROUNDS: u64 = 1500;

/// A direct file; returns its block.
fn volume(dir: &TempDir) -> (Arc<dyn Volume>, u64) {
    let path = dir.path().join("a.img");
    std::fs::write(&path, vec![0; BLOCKS as usize * 4096]).unwrap();
    let options = FileOptions { direct: true, ..FileOptions::new(path) };
    let file = FileVolume::open(&options).unwrap();
    let block = u64::from(file.info().block.minimum);
    assert!(block > 1);
    (Arc::new(BlockSize::new(Arc::new(file))), block)
}

/// Runs `body` for lanes 0 and 1 at the same time.
fn race(volume: &dyn Volume, body: impl Fn(u64, &mut Driver<PlainEngine>) + Sync) {
    std::thread::scope(|scope| {
        let body = &body;
        let lanes = [0, 1].map(|lane| scope.spawn(move || body(lane, &mut driver(volume))));
        for lane in lanes {
            lane.join().unwrap();
        }
    });
}

#[test]
fn neighbours_in_one_block_do_not_undo_each_other() {
    let dir = TempDir::new_in("/var/tmp").unwrap();
    let (volume, block) = volume(&dir);
    race(&*volume, |lane, driver| {
        for round in 0..ROUNDS {
            // Lanes alternate in pieces of 100 bytes, which straddle blocks as well.
            let at = (round % (BLOCKS - 1)) * block + block - 200 + lane * 100 + (round % 2) * 200;
            let value = [(round % 250) as u8 + 1; 100];
            driver.run_one(write(at, &value)).unwrap();
            assert_eq!(bytes(driver.run_one(read(at, 100))), value, "round {round}");
        }
    });
}

#[test]
fn a_patch_does_not_undo_a_write_of_the_whole_block() {
    let dir = TempDir::new_in("/var/tmp").unwrap();
    let (volume, block) = volume(&dir);
    race(&*volume, |lane, driver| {
        for round in 0..ROUNDS {
            let value = (round % 250) as u8 + 1;
            if lane == 0 {
                // Bytes that the other lane does not look at.
                driver.run_one(write(10, &[value; 90])).unwrap();
                continue;
            }
            let data = Payload::from(Buf::from_bytes(&vec![value; block as usize]));
            driver.run_one(Op::Write { range: range(0, block), data, fua: false }).unwrap();
            let got = bytes(driver.run_one(read(100, block - 100)));
            assert!(got.iter().all(|byte| *byte == value), "round {round}: {value} was undone");
        }
    });
}

#[test]
fn patches_in_flight_together_on_one_backend_keep_each_others_bytes() {
    let dir = TempDir::new_in("/var/tmp").unwrap();
    let (volume, block) = volume(&dir);
    let mut driver = driver(&*volume);
    let ops: Vec<Op> = (0..block / 8).map(|at| write(at * 8, &(at + 1).to_le_bytes())).collect();
    assert!(driver.run(ops).iter().all(Result::is_ok));
    let want: Vec<u8> = (0..block / 8).flat_map(|at| (at + 1).to_le_bytes()).collect();
    assert_eq!(bytes(driver.run_one(read(0, block))), want);
}

#[test]
fn a_backend_that_goes_away_leaves_no_lock_behind() {
    let dir = TempDir::new_in("/var/tmp").unwrap();
    let (volume, _) = volume(&dir);
    let mut gone = volume.backend().unwrap();
    let mut engine = PlainEngine::new(4);
    let io = sheave_conformance::Engine::io(&mut engine);
    let submitted = gone.submit(write(1, b"x"), sheave_core::Tag(1), io);
    assert!(matches!(submitted, sheave_core::Submitted::Queued));
    drop(gone);
    driver(&*volume).run_one(write(2, b"y")).unwrap();
}
