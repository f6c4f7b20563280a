//! Devices, in a guest with a kernel that has them (`tests/vm/run`).

use std::path::Path;
use std::process::Command;

use sheave_tests::{sheave, skip};

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
fn a_volume_that_does_not_answer_can_be_ended() {
    case("stalled.sh");
}

/// Runs a case in the guest that all tests of this run share, if there is one.
fn case(name: &str) {
    let vm = Path::new(env!("CARGO_MANIFEST_DIR")).join("vm");
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        return skip(name, "qemu-system-x86 is not installed");
    }
    let cases = vm.join("cases");
    let mut run = Command::new(vm.join("run"));
    run.env("SHEAVE_BIN", sheave());
    if let Some(guest) = std::env::var_os("SHEAVE_VM_GUEST") {
        run.arg("--keep").arg(guest);
    }
    if let Some(kernel) = std::env::var_os("SHEAVE_VM_KERNEL") {
        run.arg("--kernel").arg(kernel);
    }
    run.arg("--timeout=400").arg("--copy").arg(cases.join("common.sh"));
    // Its units say what a daemon is allowed.
    run.arg("--copy").arg(vm.join("../../deploy"));
    run.arg("--copy").arg(cases.join(name)).args(["--", "bash", name]);
    let output = run.output().expect("tests/vm/run runs");
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    if !output.status.success()
        && let Some(guest) = std::env::var_os("SHEAVE_VM_GUEST")
    {
        // What it has left must not make others fail.
        let _ = Command::new(vm.join("run")).arg("--stop").arg(guest).status();
    }
    assert!(output.status.success(), "{name}: {}\n{out}\n{err}", output.status);
}
