//! A node has what it had, after many rounds and with many volumes.
//!
//! `SHEAVE_CO_ROUNDS` makes the rounds more, such as 1000.

use std::env;
use std::time::Duration;

use sheave_tests::co::{Cluster, Use, all_at_once, cycle};
use sheave_tests::on_devices;

const ROUNDS: usize = 40;
const VOLUMES: usize = 100;
/// What a process may keep of many rounds: its allocator's caches.
const GROWTH_KIB_MAX: u64 = 8 << 10;

#[test]
fn rule_35_rounds_of_staging_leave_nothing() {
    on_devices("rule_35_rounds_of_staging_leave_nothing", || {
        let rounds = env::var("SHEAVE_CO_ROUNDS").ok();
        let rounds = rounds.map_or(ROUNDS, |text| text.parse().expect("SHEAVE_CO_ROUNDS"));
        let mut cluster = Cluster::start(false);
        let memory = cycle(&mut cluster, (Use::Filesystem("ext4"), 8), rounds);
        for (before, after) in memory.before_kib.into_iter().zip(memory.after_kib) {
            assert!(after < before + GROWTH_KIB_MAX, "{memory:?}");
        }
        cluster.check_bare();
    });
}

#[test]
fn a_hundred_volumes_are_staged_at_once_through_the_plugin() {
    on_devices("a_hundred_volumes_are_staged_at_once_through_the_plugin", || {
        let mut cluster = Cluster::start(false);
        let took = all_at_once(&mut cluster, (Use::Filesystem("ext4"), 4), VOLUMES);
        assert!(took < Duration::from_secs(60), "{took:?}");
        cluster.check_bare();
    });
}
