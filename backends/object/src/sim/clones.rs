//! Clones that are made while their snapshot is deleted, by processes that are killed at any step,
//! on a store that lets old requests happen at any later time.
//!
//! Each run checks that a clone that exists has its snapshot.

use std::sync::Arc;

use super::executor::{Executor, killed_after};
use crate::clones::{self, NewClone};
use crate::format::{Codec, Durability, Root, State, keys};
use crate::head::Change;
use crate::ids::{Incarnation, VolumeId};
use crate::life::{self, NewVolume};
use crate::memory_store::{Below, Faults, MemoryStore, Random, TurnClock};
use crate::open::rules::{self, Rules};
use crate::retry::{Patience, Requests};
use crate::snapshots::{self, ClosedRoots, Roots as _};
use crate::threads::block_on;

const ACTORS: u64 = 4;

struct World {
    store: Arc<MemoryStore>,
    random: Arc<Random>,
    parent: Requests,
    target: Requests,
}

impl World {
    fn new(seed: u64) -> Arc<Self> {
        let random = Arc::new(Random::new(seed));
        let faults = Faults { late: 10, unanswered: 10, busy: 3 };
        let store = Arc::new(MemoryStore::new(Arc::clone(&random), faults));
        let of = |name: &str| {
            let store = Below { store: Arc::clone(&store), name: name.to_owned() };
            let requests = Requests::new(Arc::new(store), Arc::new(TurnClock), name);
            requests.with_patience(Patience::Endless)
        };
        let (parent, target) = (of("parent"), of("clone"));
        let new = NewVolume {
            volume: VolumeId([1; 16]),
            incarnation: Incarnation([1; 16]),
            node: "n".to_owned(),
            size: 1,
            durability: Durability::Local,
            codec: Codec::Plain,
            key: None,
        };
        block_on(life::create(&parent, &new)).expect("a new volume");
        let add: Change = Arc::new(|head| head.add("s", 0).map(drop));
        block_on(ClosedRoots { requests: &parent, key: None }.change(add)).expect("a snapshot");
        Arc::new(Self { store, random, parent, target })
    }

    /// A process that makes the clone, or deletes the snapshot.
    async fn act(self: Arc<Self>, clones: bool) {
        let life = if self.random.percent(40) { self.random.below(60) } else { u64::MAX };
        let incarnation = Incarnation(self.random.bytes());
        let new = NewClone {
            volume: VolumeId(self.random.bytes()),
            incarnation,
            node: "n".to_owned(),
            size: None,
            name: "clone".to_owned(),
            parent: "parent".to_owned(),
        };
        let roots = ClosedRoots { requests: &self.parent, key: None };
        let acting = async {
            match clones {
                true => clones::clone((&self.parent, &self.target), ("s", None), &new).await,
                false => snapshots::delete(&self.parent, "s", (incarnation, "n"), &roots).await,
            }
        };
        // Each may be refused, since the other one was faster.
        drop(killed_after(life, acting).await);
    }

    /// The newest root of a volume.
    fn newest(&self, name: &str) -> Option<Root> {
        let prefix = format!("{name}/{}", keys::ROOTS);
        let newest = self.store.keys().into_iter().find(|key| key.starts_with(&prefix))?;
        Some(Root::decode(&self.store.object(&newest)?).expect("a root"))
    }
}

/// Whether there is a clone at the end, and a snapshot.
fn run(seed: u64, rules: Rules) -> Result<(bool, bool), String> {
    rules::set(rules);
    let world = World::new(seed);
    let mut executor = Executor::new(Arc::clone(&world.random));
    let mut actors = 0;
    while actors < ACTORS || !executor.is_empty() {
        if actors < ACTORS && (executor.is_empty() || world.random.percent(20)) {
            executor.spawn(Arc::clone(&world).act(world.random.percent(50)));
            actors += 1;
        }
        if world.random.percent(5) {
            world.store.land_one();
        }
        executor.turn();
    }
    // What is on its way comes at last.
    (0..200).for_each(|_| world.store.land_one());
    rules::set(Rules::ALL);
    let is_cloned = world.newest("clone").is_some_and(|root| root.state != State::Deleted);
    let is_there = world.newest("parent").is_some_and(|root| root.snapshots.count == 1);
    match is_cloned && !is_there {
        false => Ok((is_cloned, is_there)),
        true => Err(format!("seed {seed}: the clone has no snapshot any more")),
    }
}

#[test]
fn a_clone_has_its_snapshot() {
    let (mut cloned, mut deleted) = (0, 0);
    for seed in 0..2000 {
        let (is_cloned, is_there) = run(seed, Rules::ALL).unwrap_or_else(|why| panic!("{why}"));
        cloned += usize::from(is_cloned);
        deleted += usize::from(!is_there);
    }
    assert!(cloned > 200 && deleted > 200, "{cloned} clones, {deleted} deleted");
}

#[test]
fn without_another_look_at_the_snapshot_it_is_noticed() {
    let rules = Rules { clones_look_again: false, ..Rules::ALL };
    assert!((0..2000).any(|seed| run(seed, rules).is_err()));
}

#[test]
fn without_the_mark_before_the_listing_it_is_noticed() {
    let rules = Rules { marks_first: false, ..Rules::ALL };
    assert!((0..2000).any(|seed| run(seed, rules).is_err()));
}
