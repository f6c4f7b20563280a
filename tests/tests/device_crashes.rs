//! `sheave daemon`, killed at every step of what it does with a device, on a stand-in for a kernel:
//! the next daemon finds the device with its data, or nothing.

use std::sync::mpsc::{SyncSender, sync_channel};

use sheave_tests::{Call, Daemon, Moment, Node, Run, Wire, eventually};

use Call::{Add, Claim, End, Find, List, Recover, Resize, Size, Start};
use Left::{Device, Nothing};
use Moment::{After, Before};

const SIZE: u64 = Node::SIZE;

/// What is left after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Nothing,
    Device,
}

/// Kills a daemon at its next call of this kind. Its process ID is sent to the returned channel,
/// since the daemon may not have been started yet.
fn kill_at(node: &Node, call: Call, moment: Moment) -> SyncSender<u32> {
    let (tell, told) = sync_channel(1);
    node.kernel.strike(call, moment, move || {
        let pid: u32 = told.recv().expect("the daemon's process ID");
        drop(Run::new("kill").arg("-9").arg(pid.to_string()).output());
    });
    tell
}

/// A daemon succeeds one that has died: what is left, and that the volume can be a device.
#[track_caller]
fn succeed(node: &Node, left: Left) -> Daemon {
    let daemon = node.daemon();
    let device = node.file("fake0");
    match left {
        Nothing => node.check_bare(&daemon),
        Device => {
            daemon.wait_for_recovery();
            node.check_served(&device);
        }
    }
    assert_eq!(daemon.attach(&node.image), device);
    node.check_served(&device);
    assert_eq!(node.records(), 1);
    daemon
}

#[test]
fn a_crash_while_attaching_leaves_a_device_or_nothing() {
    for (call, moment, left) in [
        (Add, Before, Nothing),
        (Add, After, Nothing),
        (Start, Before, Nothing),
        (Start, After, Device),
        (Size, Before, Device),
        (Size, After, Device),
    ] {
        let node = Node::new();
        let mut daemon = node.daemon();
        kill_at(&node, call, moment).send(daemon.pid()).expect("it is waited for");
        let attached = daemon.sheave("attach").arg(&node.image).output();
        attached.check_refused("ended without an answer");
        assert!(node.kernel.has_struck(), "{moment:?} {call:?}");
        daemon.kill();
        succeed(&node, left);
    }
}

#[test]
fn a_crash_while_recovering_loses_nothing() {
    for (call, moment) in [
        (Find, Before),
        (Find, After),
        (List, Before),
        (Recover, Before),
        (Recover, After),
        (Size, Before),
        (Size, After),
    ] {
        let node = Node::new();
        let mut daemon = node.daemon();
        daemon.attach(&node.image);
        daemon.kill();
        let pid = kill_at(&node, call, moment);
        let mut second = node.start(&["daemon"]);
        pid.send(second.pid()).expect("it is waited for");
        assert!(eventually(|| node.kernel.has_struck()), "{moment:?} {call:?}");
        second.kill();
        succeed(&node, Device);
    }
}

#[test]
fn a_crash_while_taking_over_loses_nothing() {
    for (call, moment) in [(Find, Before), (Find, After), (List, Before), (List, After)] {
        let node = Node::new();
        let mut daemon = node.daemon();
        daemon.attach(&node.image);
        let pid = kill_at(&node, call, moment);
        let mut second = node.start(&["daemon", "--takeover"]);
        pid.send(second.pid()).expect("it is waited for");
        daemon.ends_well();
        assert!(eventually(|| node.kernel.has_struck()), "{moment:?} {call:?}");
        second.kill();
        succeed(&node, Device);
    }
}

#[test]
fn a_crash_while_detaching_leaves_a_device_or_nothing() {
    for (call, moment, left) in [
        (Claim, Before, Device),
        (Claim, After, Device),
        (End, Before, Device),
        (End, After, Nothing),
    ] {
        let node = Node::new();
        let mut daemon = node.daemon();
        daemon.attach(&node.image);
        kill_at(&node, call, moment).send(daemon.pid()).expect("it is waited for");
        let detached = daemon.sheave("detach").arg(&node.image).output();
        detached.check_refused("ended without an answer");
        daemon.kill();
        succeed(&node, left);
    }
}

/// The kernel's NBD client shows such a device as connected, and nothing can serve it any more.
#[test]
fn a_device_that_was_ended_while_it_was_open_is_forgotten_and_its_volume_attached_anew() {
    let node = Node::new();
    node.kernel.show_ended();
    let mut daemon = node.daemon();
    let device = daemon.attach(&node.image);
    let mut program = Wire::unix(&device).expect("the device");
    assert!(program.read(0, 512).expect("a reply").is_ok());
    kill_at(&node, End, After).send(daemon.pid()).expect("it is waited for");
    let detached = daemon.sheave("detach --force").arg(&node.image).output();
    detached.check_refused("ended without an answer");
    daemon.kill();
    let daemon = node.daemon();
    daemon.wait_for_log("it was ended while a program had it open");
    assert!(eventually(|| node.records() == 0), "its record is left:\n{}", daemon.log());
    assert!(eventually(|| daemon.sheave("ls").ok() == "no devices\n"), "{}", daemon.log());
    assert!(program.read(0, 512).expect("a reply").is_err(), "it is not served");
    let device = daemon.attach(&node.image);
    assert_eq!(device, node.file("fake1"));
    node.check_served(&device);
}

#[test]
fn a_crash_while_growing_is_completed_by_the_next_daemon() {
    for (call, moment) in [(Size, Before), (Resize, Before), (Resize, After), (Size, After)] {
        let node = Node::new();
        let mut daemon = node.daemon();
        let device = daemon.attach(&node.image);
        kill_at(&node, call, moment).send(daemon.pid()).expect("it is waited for");
        let grown = daemon.sheave("volume resize --size 3M").arg(&node.image).output();
        grown.check_refused("ended without an answer");
        daemon.kill();
        let daemon = succeed(&node, Device);
        assert_eq!(daemon.device()["size_bytes"], 3 * SIZE, "{moment:?} {call:?}");
        let mut wire = Wire::unix(&device).expect("the device");
        assert_eq!(wire.write(3 * SIZE - 512, &[9; 512]).expect("a reply"), 0);
    }
}
