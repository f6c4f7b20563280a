//! Volumes whose map is in leaves, of which few are in memory.

use std::collections::BTreeMap;

use super::*;
use crate::format::{Entry, HEADER_BYTES, Header, LEAF_BLOCKS, keys};
use crate::memory_store::Random;

const LEAVES: u64 = 24;

/// Blocks that are not zeroes, with their byte.
type Model = BTreeMap<u64, u8>;

/// Writes blocks, runs and zeroes, many at the borders of leaves.
fn write_some(driver: &mut Driver<PlainEngine>, random: &Random, model: &mut Model) {
    for _ in 0..60 {
        let near = random.below(LEAVES + 1) * LEAF_BLOCKS + random.below(8);
        let block = near.saturating_sub(4).min(LEAVES * LEAF_BLOCKS - 1);
        let most = LEAVES * LEAF_BLOCKS - block;
        if random.percent(20) {
            let count = (1 + random.below(3 * LEAF_BLOCKS)).min(most);
            driver.run_one(ops::trim(block * BLOCK_BYTES, count * BLOCK_BYTES)).unwrap();
            let gone = block..block + count;
            model.retain(|at, _| !gone.contains(at));
        } else {
            let (count, byte) = ((1 + random.below(4)).min(most), random.below(255) as u8 + 1);
            let data = vec![byte; (count * BLOCK_BYTES) as usize];
            driver.run_one(ops::write(block * BLOCK_BYTES, &data)).unwrap();
            model.extend((block..block + count).map(|at| (at, byte)));
        }
    }
}

/// Checks content and extents. The order is random, so that leaves come and go.
fn check(driver: &mut Driver<PlainEngine>, random: &Random, model: &Model) {
    for _ in 0..120 {
        let near = random.below(LEAVES + 1) * LEAF_BLOCKS + random.below(12);
        let block = near.saturating_sub(6).min(LEAVES * LEAF_BLOCKS - 1);
        let count = (1 + random.below(20)).min(LEAVES * LEAF_BLOCKS - block);
        let found = driver.run_one(ops::read(block * BLOCK_BYTES, count * BLOCK_BYTES));
        for (at, data) in ops::bytes(found).chunks(BLOCK_BYTES as usize).enumerate() {
            let want = model.get(&(block + at as u64)).copied().unwrap_or_default();
            assert!(data.iter().all(|byte| *byte == want), "block {block}+{at} is not {want}");
        }
    }
    check_extents(driver, random, model);
}

fn check_extents(driver: &mut Driver<PlainEngine>, random: &Random, model: &Model) {
    let (mut at, mut data_blocks) = (0, 0);
    while at < LEAVES * LEAF_BLOCKS {
        let len = (LEAVES * LEAF_BLOCKS - at) * BLOCK_BYTES;
        let range = ops::range(at * BLOCK_BYTES, len);
        let extents_max = 1 + random.below(50) as usize;
        let outcome = driver.run_one(Op::BlockStatus { range, extents_max });
        for (len, is_hole, _) in ops::extents(outcome) {
            let end = at + len / BLOCK_BYTES;
            let has_data = model.range(at..end).next().is_some();
            assert!(!(is_hole && has_data), "blocks {at} to {end} are no hole");
            data_blocks += if is_hole { 0 } else { end - at };
            at = end;
        }
    }
    assert_eq!(data_blocks, model.len() as u64);
}

#[test]
fn leaves_are_read_when_they_are_needed() {
    let place = Place::with_blocks(LEAVES * LEAF_BLOCKS);
    let (random, mut model) = (Random::new(5), Model::new());
    let mut in_leaves = 0;
    for round in 0..5 {
        let volume = place.open("a", false);
        let mut driver = ops::driver(&volume);
        check(&mut driver, &random, &model);
        write_some(&mut driver, &random, &mut model);
        check(&mut driver, &random, &model);
        drop(driver);
        drop(volume);
        place.wait("a");
        let root = block_on(open::find(&place.requests())).unwrap();
        assert!(root.directory.is_some(), "round {round}");
        in_leaves += count_leaves(&place);
    }
    assert!(in_leaves > 20, "{in_leaves} leaves");
}

#[test]
fn leaves_go_from_memory_when_nothing_is_read_and_come_back_from_the_cache() {
    // Nothing is cleaned, which reads the map, too.
    let mut place = Place::with_blocks(LEAVES * LEAF_BLOCKS);
    place.space_percent = 1_000_000;
    let (random, mut model) = (Random::new(6), Model::new());
    for _ in 0..2 {
        let volume = place.open("a", false);
        write_some(&mut ops::driver(&volume), &random, &mut model);
        drop(volume);
        place.wait("a");
    }
    assert!(count_leaves(&place) > 0);
    let volume = place.open("a", false);
    let engine = &volume.opened.engine;
    let mut driver = ops::driver(&volume);
    check(&mut driver, &random, &model);
    assert!(engine.with(|front| front.is_restless()), "leaves are in memory");
    let by = Instant::now() + Duration::from_secs(60);
    while engine.with(|front| front.is_restless()) {
        assert!(Instant::now() < by, "the volume does not become idle");
        std::thread::sleep(Duration::from_millis(5));
    }
    let gets = engine.traffic.by_kind().get.answered;
    check_extents(&mut driver, &random, &model);
    assert_eq!(engine.traffic.by_kind().get.answered, gets);
}

/// Leaves in the checkpoints that were made.
fn count_leaves(place: &Place) -> usize {
    let requests = place.requests();
    let objects = block_on(requests.list(keys::LOGS, "", 1000)).unwrap();
    let leaves_of = |key: &str| {
        let body = block_on(requests.get(key, 0..64 << 20)).unwrap().unwrap();
        let header = Header::decode(&body).unwrap();
        let index = &body[HEADER_BYTES..header.index_end()];
        let entries = header.decode_index(index).unwrap();
        let is_leaf = |entry: &&Entry| matches!(entry, Entry::Leaf { .. });
        entries.iter().filter(is_leaf).count()
    };
    objects.iter().map(|object| leaves_of(&object.key)).sum()
}
