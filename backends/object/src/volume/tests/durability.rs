//! What flushes wait for: the journal, the store, or nothing.

use super::*;
use crate::format::{Header, keys};
use crate::ids::Seq;

/// The newest object that has writes. Others come and go beside them.
fn newest_written(place: &Place) -> Option<Seq> {
    let requests = place.requests();
    let listed = block_on(requests.list(keys::LOGS, "", 1000)).unwrap();
    let seq = |key: &str| {
        let body = block_on(requests.get(key, 0..4096)).unwrap()?;
        let header = Header::decode(&body).ok()?;
        (header.lsn_last >= header.lsn_first).then_some(header.id.seq)
    };
    listed.iter().filter_map(|object| seq(&object.key)).max()
}

fn open(durability: Durability) -> (Place, ObjectVolume) {
    let place = Place { durability, ..Place::empty() }.with_volume(BLOCKS);
    let volume = place.open("a", false);
    (place, volume)
}

/// Ops on an engine on which no sync is asked for.
fn steps_without_syncs(volume: &ObjectVolume) -> Steps {
    let engine = PlainEngine::new(64).with_mishaps(|request| match request {
        IoRequest::Sync { .. } => panic!("a flush waits for the journal"),
        _ => Mishap::None,
    });
    Steps { backend: volume.backend().unwrap(), engine, ended: Vec::new() }
}

impl Steps {
    /// Runs an op, and drops its outcome.
    fn run(&mut self, op: Op) {
        self.submit(op, 0);
        assert!(self.until(|ended| !ended.is_empty()), "an op that does not end");
        assert!(self.ended.remove(0).outcome.is_ok());
    }
}

fn fua_zeroes(block: u64) -> Op {
    ops::with_fua(ops::zeroes(block * BLOCK_BYTES, BLOCK_BYTES))
}

#[test]
fn what_was_flushed_to_the_store_survives_the_loss_of_the_node() {
    let (place, volume) = open(Durability::Remote);
    let mut steps = steps_without_syncs(&volume);
    for round in 1..=6u8 {
        for block in 0..4 {
            steps.run(write(8 * block, round));
        }
        match round % 3 {
            0 => steps.run(Op::Flush),
            1 => steps.run(ops::with_fua(write(50, round))),
            _ => steps.run(fua_zeroes(50)),
        }
        // Nothing is asked twice.
        let made = newest_written(&place);
        steps.run(Op::Flush);
        assert_eq!(newest_written(&place), made);
        let copy = Place::empty();
        lost::copy_store(&place.dir.path().join("store"), &copy.dir.path().join("store"));
        let other = copy.open("b", true);
        let mut reader = ops::driver(&other);
        let last = if round % 3 == 1 { round } else { 0 };
        for (block, byte) in [(0, round), (8, round), (16, round), (24, round), (50, last)] {
            let found = ops::bytes(reader.run_one(read(block)));
            assert_eq!(found[0], byte, "block {block} in round {round}");
        }
    }
}

#[test]
fn flushes_wait_for_a_store_that_is_away_and_writes_and_reads_do_not() {
    let (place, volume) = open(Durability::Remote);
    let mut steps = steps_without_syncs(&volume);
    place.is_away.store(true, Relaxed);
    steps.submit(write(1, 1), 1);
    assert!(steps.until(|ended| ended.len() == 1));
    steps.submit(Op::Flush, 2);
    steps.submit(ops::with_fua(write(2, 2)), 3);
    steps.submit(write(3, 3), 4);
    steps.submit(read(2), 5);
    let begun = Instant::now();
    steps.until(|_| begun.elapsed() > Duration::from_millis(200));
    let tags = |ended: &[Completion]| ended.iter().map(|done| done.tag.0).collect::<Vec<_>>();
    let mut ended = tags(&steps.ended);
    ended.sort_unstable();
    assert_eq!(ended, [1, 4, 5]);
    place.is_away.store(false, Relaxed);
    assert!(steps.until(|ended| ended.len() == 5), "{:?}", tags(&steps.ended));
    assert!(steps.ended.iter().all(|done| done.outcome.is_ok()));
}

#[test]
fn flushes_that_come_together_share_an_object() {
    let (place, volume) = open(Durability::Remote);
    let mut steps = steps_without_syncs(&volume);
    for round in 0..3 {
        let creates = || volume.opened.engine.traffic.by_kind().create.answered;
        let before = creates();
        place.is_hung.store(true, Relaxed);
        for block in 0..32 {
            steps.submit(fua_zeroes(block), block);
        }
        let begun = Instant::now();
        steps.until(|_| begun.elapsed() > Duration::from_millis(50));
        assert!(steps.ended.is_empty(), "the store has not answered");
        place.is_hung.store(false, Relaxed);
        assert!(steps.until(|ended| ended.len() == 32), "{} of them", steps.ended.len());
        steps.ended.clear();
        // One for the first of them, one for those that came meanwhile, perhaps a checkpoint with
        // its root, and what the worker's ticks have sealed on a busy machine.
        let made = creates() - before;
        assert!((2..=10).contains(&made), "{made} objects in round {round}");
    }
}

#[test]
fn without_durability_flushes_wait_for_nothing() {
    let (place, volume) = open(Durability::Unsafe);
    let mut steps = steps_without_syncs(&volume);
    place.is_hung.store(true, Relaxed);
    for block in 0..4 {
        steps.run(ops::with_fua(write(block, 7)));
        steps.run(Op::Flush);
    }
    place.is_hung.store(false, Relaxed);
    drop(steps);
    drop(volume);
    place.wait("a");
    // An orderly end keeps all.
    let volume = place.open("b", false);
    assert_eq!(ops::bytes(ops::driver(&volume).run_one(read(3)))[0], 7);
}

#[test]
fn flushes_that_wait_for_the_store_fail_with_the_volume() {
    let (place, volume) = open(Durability::Remote);
    let mut writes = 0;
    let engine = PlainEngine::new(1).with_mishaps(move |request| match request {
        IoRequest::Write { .. } => {
            writes += 1;
            if writes == 2 { Mishap::Errno(nix::libc::EIO) } else { Mishap::None }
        }
        _ => Mishap::None,
    });
    let mut steps = Steps { backend: volume.backend().unwrap(), engine, ended: Vec::new() };
    place.is_hung.store(true, Relaxed);
    steps.submit(ops::with_fua(write(1, 1)), 1);
    steps.submit(write(2, 2), 2);
    let has_ended = steps.until(|ended| ended.len() == 2);
    place.is_hung.store(false, Relaxed);
    assert!(has_ended, "{:?}", steps.ended);
    assert!(steps.ended.drain(..).all(|done| is_kind(done.outcome, ErrorKind::Io)));
}

#[test]
fn the_durability_of_a_closed_volume_is_set_and_stays() {
    let (place, volume) = open(Durability::Local);
    let set = |durability| block_on(life::set_durability(&place.requests(), durability));
    let told = set(Durability::Remote).unwrap_err();
    assert!(told.kind() == ErrorKind::Busy && told.to_string().contains("on node a"), "{told}");
    ops::driver(&volume).run_one(write(1, 1)).unwrap();
    let before = volume.opened.engine.opening;
    drop(volume);
    place.wait("a");
    set(Durability::Remote).unwrap();
    set(Durability::Remote).unwrap();
    for node in ["b", "a"] {
        let volume = place.open(node, false);
        assert_eq!(volume.opened.engine.status().durability, "remote");
        assert!(volume.opened.engine.opening.epoch > before.epoch, "epochs are not used again");
        let mut driver = ops::driver(&volume);
        assert_eq!(ops::bytes(driver.run_one(read(1)))[0], 1);
        driver.run_one(ops::with_fua(write(2, 2))).unwrap();
        drop((driver, volume));
        place.wait(node);
    }
}
