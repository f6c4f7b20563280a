//! Simulations of the protocol: many openers and writers on a store that delays, loses answers, and
//! lets old requests happen at any later time. A seed determines everything.
//!
//! Each run checks that no object is acknowledged which a later opening's prefix lacks, and that no
//! two openings acknowledge one number. The openers are the real ones ([`crate::open`]). The
//! writers make checkpoints, name them in roots, and delete what they have, as garbage collection
//! will.

mod actors;
mod clones;
mod executor;
mod nodes;

use std::sync::Arc;

use crate::check::{Options, check};
use crate::cipher::WrappingKey;
use crate::format::{Codec, Durability};
use crate::ids::{Blocks, Incarnation, VolumeId};
use crate::life::NewVolume;
use crate::memory_store::{Faults, MemoryStore, Random, TurnClock};
use crate::open::rules::{self, Rules};
use crate::retry::Requests;
use crate::threads::block_on;

use actors::World;
use executor::Executor;
use nodes::Nodes;

/// What a run was.
#[derive(Debug, Default)]
struct Seen {
    openings: usize,
    acknowledged: usize,
}

/// A volume of so many blocks. Some are compressed, and some are encrypted.
fn new_volume(random: &Random, size: Blocks) -> NewVolume {
    NewVolume {
        volume: VolumeId([1; 16]),
        incarnation: Incarnation([1; 16]),
        node: "n0".to_owned(),
        size,
        durability: Durability::Local,
        codec: if random.percent(50) { Codec::Lz4 } else { Codec::Plain },
        key: random.percent(30).then(|| WrappingKey::new([7; 32])),
    }
}

/// A run of so many turns. The violation that it found, if any.
fn run(seed: u64, turns: u64, rules: Rules) -> Result<Seen, String> {
    rules::set(rules);
    let random = Arc::new(Random::new(seed));
    let faults = Faults { late: 12, unanswered: 13, busy: 3 };
    let store = Arc::new(MemoryStore::new(Arc::clone(&random), faults));
    let world = World::new(store, Arc::clone(&random));
    let mut executor = Executor::new(Arc::clone(&random));
    let mut openers = 0;
    let openers_max = 6;
    for turn in 0..turns {
        if random.percent(5) {
            world.store.land_one();
        }
        let is_due = turn == 0 || executor.is_empty() || random.percent(2);
        if is_due && (openers < openers_max || executor.is_empty()) {
            openers += 1;
            executor.spawn(World::opener(Arc::clone(&world), openers));
        }
        executor.turn();
        if let Some(violation) = world.violation() {
            rules::set(Rules::ALL);
            return Err(format!("seed {seed}, turn {turn}: {violation}"));
        }
    }
    rules::set(Rules::ALL);
    Ok(world.seen())
}

/// Runs of consecutive seeds; the violations that they found.
fn runs(seeds: std::ops::Range<u64>, turns: u64) -> (Seen, Vec<String>) {
    let (mut all, mut violations) = (Seen::default(), Vec::new());
    for seed in seeds {
        match run(seed, turns, Rules::ALL) {
            Ok(seen) => {
                all.openings += seen.openings;
                all.acknowledged += seen.acknowledged;
            }
            Err(violation) => violations.push(violation),
        }
    }
    (all, violations)
}

/// `SHEAVE_SIM_SEEDS=FROM..TO` runs others.
fn seeds(count: u64) -> std::ops::Range<u64> {
    let Ok(text) = std::env::var("SHEAVE_SIM_SEEDS") else { return 0..count };
    let (from, to) = text.split_once("..").expect("SHEAVE_SIM_SEEDS=FROM..TO");
    from.parse().expect("a seed")..to.parse().expect("a seed")
}

#[test]
fn one_opening_at_most_commits() {
    let (seen, violations) = runs(seeds(100), 3000);
    assert!(violations.is_empty(), "{violations:?}");
    let is_busy = seen.openings > 200 && seen.acknowledged > 1000;
    assert!(is_busy || std::env::var_os("SHEAVE_SIM_SEEDS").is_some(), "{seen:?}");
}

/// Whether one of the runs sees two openings that commit.
fn is_noticed(rules: Rules) -> bool {
    let is_meant = |why: String| why.contains("acknowledge") || why.contains("cut off");
    (0..400).any(|seed| run(seed, 3000, rules).is_err_and(is_meant))
}

#[test]
fn without_claiming_first_it_is_noticed() {
    assert!(is_noticed(Rules { claims_first: false, ..Rules::ALL }));
}

#[test]
fn without_the_second_listing_it_is_noticed() {
    assert!(is_noticed(Rules { lists_again: false, ..Rules::ALL }));
}

#[test]
fn with_claims_that_are_deleted_it_is_noticed() {
    assert!(is_noticed(Rules { keeps_claims: false, ..Rules::ALL }));
}

/// A run of nodes with journals. What there was: see [`Nodes::seen`].
fn run_nodes(seed: u64, turns: u64) -> Result<[usize; 8], String> {
    let random = Arc::new(Random::new(seed));
    let faults = Faults { late: 8, unanswered: 8, busy: 3 };
    let store = Arc::new(MemoryStore::new(Arc::clone(&random), faults));
    let nodes = Nodes::new(store, Arc::clone(&random));
    let mut executor = Executor::new(Arc::clone(&random));
    for turn in 0..turns {
        if random.percent(5) {
            nodes.store.land_one();
        }
        if (executor.is_empty() || random.percent(1))
            && let Some(node) = nodes.idle_node()
        {
            executor.spawn(nodes.clone().process(node));
        }
        executor.turn();
        if nodes.store.take_deleted() {
            nodes.audit();
        }
        if let Some(violation) = nodes.violation() {
            return Err(format!("seed {seed}, turn {turn}: {violation}"));
        }
    }
    let requests = Requests::new(nodes.store.clone(), Arc::new(TurnClock), "sim");
    let options =
        Options { reads_data: true, repairs: true, key: nodes.key.clone(), progress: &|_| {} };
    match block_on(check(&requests, &options)) {
        Ok(report) if report.faults.is_empty() => Ok(nodes.seen()),
        other => Err(format!("seed {seed}: the check finds {other:?}")),
    }
}

#[test]
fn nodes_lose_nothing_acknowledged_and_leave_prefixes() {
    let mut all = [0; 8];
    for seed in seeds(60) {
        let seen = run_nodes(seed, 6000).unwrap_or_else(|violation| panic!("{violation}"));
        all.iter_mut().zip(seen).for_each(|(all, seen)| *all += seen);
    }
    let [openings, replays, takeovers, checkpoints, leaves, snapshots, swept, moved] = all;
    let is_busy = openings > 150 && replays > 30 && takeovers > 30;
    let is_busy = is_busy && checkpoints > 100 && leaves > 100;
    let is_busy = is_busy && snapshots > 50 && swept > 500 && moved > 300;
    assert!(is_busy || std::env::var_os("SHEAVE_SIM_SEEDS").is_some(), "{all:?}");
}

/// Whether one of the runs of nodes misses something that was deleted.
fn is_missed(rules: Rules) -> bool {
    rules::set(rules);
    let is_missed = (0..60).any(|seed| {
        run_nodes(seed, 6000)
            .is_err_and(|why| why.contains("missing") || why.contains("is refused"))
    });
    rules::set(Rules::ALL);
    is_missed
}

#[test]
fn what_is_deleted_before_a_root_names_the_checkpoint_is_missed() {
    assert!(is_missed(Rules { deletes_behind_root: false, ..Rules::ALL }));
}

#[test]
fn what_snapshots_need_and_is_deleted_is_missed() {
    assert!(is_missed(Rules { keeps_snapshots: false, ..Rules::ALL }));
}

/// What goes wrong then is in map/tests.rs. It takes rare times, so the engine notices the cause.
#[test]
fn what_is_moved_beside_a_checkpoint_is_noticed() {
    rules::set(Rules { moves_between: false, ..Rules::ALL });
    let run_some = || (0..60).for_each(|seed| drop(run_nodes(seed, 6000)));
    let outcome = std::panic::catch_unwind(run_some);
    rules::set(Rules::ALL);
    let why = outcome.unwrap_err().downcast::<String>().expect("a message");
    assert!(why.contains("no checkpoint begins while blocks are moved"), "{why}");
}
