//! An orchestrator's life with the plugin, as a seed determines it, see `sheave_tests::co`.
//!
//! `SHEAVE_CO_SEED` replays one, `SHEAVE_CO_STEPS` makes it longer.

use std::env;

use sheave_tests::co::{Cluster, Use, run};
use sheave_tests::{have, in_namespace, skip};

/// About half a minute for each arrangement.
const STEPS: u64 = 300;
const SEED: u64 = 1;

const USES: [(Use, i64); 4] = [
    (Use::Filesystem("ext4"), 32),
    (Use::Filesystem("ext4"), 64),
    (Use::Filesystem("xfs"), 320),
    (Use::Block, 8),
];

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}: {text:?} is no number")))
}

fn simulate(test: &str, has_controller: bool) {
    if !have("nbdfuse") {
        return skip(test, "nbdfuse (libnbd-bin) is not installed");
    }
    in_namespace(test, || {
        let seed = number("SHEAVE_CO_SEED").unwrap_or(SEED);
        let steps = number("SHEAVE_CO_STEPS").unwrap_or(STEPS);
        let mut cluster = Cluster::start(has_controller);
        let setup = cluster.setup(&USES, seed, steps);
        let report = run(&setup, &mut cluster);
        assert!(report.pods > 0 && report.kills > 0 && report.calls > steps, "{report:?}");
        cluster.check_bare();
    });
}

#[test]
fn rule_30_claims_and_pods_come_and_go_while_processes_are_killed() {
    let test = "rule_30_claims_and_pods_come_and_go_while_processes_are_killed";
    simulate(test, false);
}

#[test]
fn rule_30_claims_and_pods_come_and_go_beside_a_controller_of_its_own() {
    let test = "rule_30_claims_and_pods_come_and_go_beside_a_controller_of_its_own";
    simulate(test, true);
}
