//! Devices, in a guest with a kernel that has them (`tests/vm/run`).

use std::env;
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitStatus};
use std::sync::{Mutex, PoisonError};

use sheave_tests::{sheave, skip};

/// More than `harness.sh` needs for a case whose time is over.
const TIMEOUT_S: u64 = 3600;

#[test]
fn volumes_are_devices() {
    case("attach.sh");
}

#[test]
fn what_cannot_be_attached_is_said() {
    case("errors.sh");
}

#[test]
fn devices_outlive_their_daemon() {
    case("recover.sh");
}

#[test]
fn remote_volumes_outlive_their_server() {
    case("remote.sh");
}

#[test]
fn a_daemon_gives_way_to_another() {
    case("upgrade.sh");
}

#[test]
fn a_daemon_that_dies_leaves_nothing_half_made() {
    case("dying.sh");
}

#[test]
fn a_daemon_ends_when_nothing_uses_it() {
    case("ending.sh");
}

#[test]
fn a_daemon_outlives_its_log() {
    case("log.sh");
}

#[test]
fn a_daemon_does_not_depend_on_disks() {
    case("protected.sh");
}

#[test]
fn the_daemon_is_a_service() {
    case("service.sh");
}

#[test]
fn a_bad_disk_below_is_not_forgotten_with_a_daemon() {
    case("disk.sh");
}

#[test]
fn a_device_grows_while_it_is_used() {
    case("resize.sh");
}

#[test]
fn limits_change_while_a_device_is_used() {
    case("limits.sh");
}

#[test]
fn a_device_has_the_blocks_of_the_disk_below() {
    case("sectors.sh");
}

#[test]
fn a_volume_that_does_not_answer_can_be_ended() {
    case("stalled.sh");
}

#[test]
fn rule_37_two_nodes_share_a_pool_on_nfs() {
    case("nfs.sh");
}

#[test]
fn claims_live_on_devices_of_every_front() {
    case("claims_live.sh");
}

#[test]
fn rule_27_rule_28_rule_32_rule_39_a_node_refuses_what_is_not_the_claims_device() {
    case("claims_refused.sh");
}

#[test]
fn rule_30_rule_31_claims_outlive_plugin_and_daemon() {
    case("claims_killed.sh");
}

#[test]
#[expect(clippy::print_stdout, reason = "how long it took, with --nocapture")]
fn rule_34_claims_are_staged_again_after_a_loss_of_power() {
    let shared = env::var("SHEAVE_VM_GUEST").ok();
    let guest = shared.clone().unwrap_or_else(|| format!("test-{}", process::id()));
    let volumes = format!("VOLUMES={}", env::var("VOLUMES").as_deref().unwrap_or("10"));
    let run = |options: &[&str], env: &[&str]| {
        kept_case("claims_many.sh", Some(&guest), options, &[env, &[&volumes]].concat())
    };
    let turn = turn();
    let before = run(&[], &["PHASE=before", "CASE_GOES_ON=1"]);
    let is_ready = before.as_ref().is_some_and(|(status, _)| status.success());
    let after = is_ready.then(|| run(&["--reset"], &["PHASE=after"])).flatten();
    drop(turn);
    if shared.is_none() {
        let stopped = Command::new(vm().join("run")).args(["--stop", &guest]).status();
        assert!(stopped.expect("tests/vm/run runs").success());
    }
    for (status, said) in [before, after].into_iter().flatten() {
        assert!(status.success(), "{status}\n{said}");
        println!("{said}");
    }
}

#[test]
fn csi_flexvolume_and_docker_keep_what_is_written() {
    case("three_ways.sh");
}

#[test]
fn containers_of_docker_keep_their_volumes_when_all_is_killed() {
    case("docker_engine.sh");
}

#[test]
fn object_volumes_outlive_their_daemon_and_their_node() {
    case("objects.sh");
}

#[test]
fn a_case_that_fails_takes_no_other_with_it() {
    // It leaves mounted devices without a daemon, and what waits for them.
    let Some((status, said)) = run_case("harness_fails.sh", &[]) else { return };
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("FAILED: on purpose"), "{said}");
    case("harness_passes.sh");
    let Some((status, said)) = run_case("harness_sleeps.sh", &["CASE_TIMEOUT_S=10"]) else {
        return;
    };
    assert_eq!(status.code(), Some(124), "{said}");
    for what in ["the time is over", "sleep infinity", "--- processes", "--- kernel"] {
        assert!(said.contains(what), "no {what:?} in:\n{said}");
    }
    // Only another guest helps.
    let Some((status, said)) = run_case("harness_stuck.sh", &[]) else { return };
    assert_eq!(status.code(), Some(125), "{said}");
    assert!(said.contains("waits: dd") && said.contains("cannot be cleaned up"), "{said}");
    case("harness_passes.sh");
}

/// Runs a case, which must pass.
fn case(name: &str) {
    if let Some((status, said)) = run_case(name, &[]) {
        assert!(status.success(), "{name}: {status}\n{said}");
    }
}

/// No other case runs in a guest meanwhile.
fn turn() -> impl Drop {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a case in the guest that all tests of this run share, if there is one.
fn run_case(name: &str, env: &[&str]) -> Option<(ExitStatus, String)> {
    let _turn = turn();
    kept_case(name, env::var("SHEAVE_VM_GUEST").ok().as_deref(), &[], env)
}

/// Runs a case in the guest of this name, which goes on running, or in one of its own: its status,
/// and what it printed. `harness.sh` cleans up after it.
fn kept_case(
    name: &str,
    guest: Option<&str>,
    options: &[&str],
    env: &[&str],
) -> Option<(ExitStatus, String)> {
    let vm = vm();
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        skip(name, "qemu-system-x86 is not installed");
        return None;
    }
    let cases = vm.join("cases");
    let mut run = Command::new(vm.join("run"));
    run.env("SHEAVE_BIN", sheave()).args(options);
    if let Some(guest) = guest {
        run.args(["--keep", guest]);
    }
    if let Some(kernel) = env::var_os("SHEAVE_VM_KERNEL") {
        run.arg("--kernel").arg(kernel);
    }
    run.arg("--timeout").arg(TIMEOUT_S.to_string());
    run.arg("--copy").arg(vm.join("harness.sh")).arg("--copy").arg(cases.join("common.sh"));
    // Its units say what a daemon is allowed.
    run.arg("--copy").arg(vm.join("../../deploy"));
    for copy in more_for(name)? {
        run.arg("--copy").arg(copy);
    }
    run.arg("--copy").arg(cases.join(name)).args(["--", "env"]).args(env);
    let output = run.args(["bash", "harness.sh", name]).output().expect("tests/vm/run runs");
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let said = format!("{}\n{}", text(&output.stdout), text(&output.stderr));
    Some((output.status, said))
}

/// What some cases need beside themselves; nothing if it cannot be had here.
fn more_for(name: &str) -> Option<Vec<PathBuf>> {
    let cases = vm().join("cases");
    let (claims, claim) = (cases.join("claims.sh"), env!("CARGO_BIN_EXE_claim").into());
    Some(match name {
        "three_ways.sh" => vec![claims, cases.join("ways.sh"), claim],
        "objects.sh" => vec![vm().join("soak/soak.sh")],
        "docker_engine.sh" => vec![claims, docker(name)?],
        _ if name.starts_with("claims") => vec![claims, claim],
        _ => Vec::new(),
    })
}

/// The programs of Docker for a guest, if they can be fetched.
fn docker(name: &str) -> Option<PathBuf> {
    let made = Command::new(vm().join("docker")).output().expect("tests/vm/docker runs");
    let text = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
    if made.status.success() {
        return Some(text(&made.stdout).into());
    }
    skip(name, &format!("no Docker: {}", text(&made.stderr).replace('\n', "; ")));
    None
}

/// What makes guests.
fn vm() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vm")
}
