//! Each process of a node is killed at each of its steps in each call.
//!
//! By default some of the steps are tried; `SHEAVE_CO_STRIDE=1` tries all.

use std::env;

use sheave_tests::co::{Cluster, Process, Use, kill_at_each_step};
use sheave_tests::{have, in_namespace, skip};

fn kill(test: &str, process: Process, used: (Use, i64), stride: usize) {
    for (program, package) in [("nbdfuse", "libnbd-bin"), ("strace", "strace")] {
        if !have(program) {
            return skip(test, &format!("{program} ({package}) is not installed"));
        }
    }
    in_namespace(test, || {
        let wanted = env::var("SHEAVE_CO_STRIDE").ok();
        let stride = wanted.map_or(stride, |text| text.parse().expect("SHEAVE_CO_STRIDE"));
        let mut cluster = Cluster::start(process == Process::Controller);
        let killed = kill_at_each_step(&mut cluster, process, used, stride);
        assert!(killed.kills > 5, "{killed:?}");
        cluster.check_bare();
    });
}

#[test]
fn rule_30_the_plugin_is_killed_at_each_step_of_each_call() {
    let test = "rule_30_the_plugin_is_killed_at_each_step_of_each_call";
    kill(test, Process::Node, (Use::Filesystem("ext4"), 32), 7);
}

#[test]
fn rule_30_the_controller_is_killed_at_each_step_of_each_call() {
    let test = "rule_30_the_controller_is_killed_at_each_step_of_each_call";
    kill(test, Process::Controller, (Use::Block, 8), 2);
}

#[test]
fn rule_30_the_daemon_is_killed_at_each_step_of_each_call() {
    let test = "rule_30_the_daemon_is_killed_at_each_step_of_each_call";
    kill(test, Process::Daemon, (Use::Filesystem("ext4"), 32), 5);
}
