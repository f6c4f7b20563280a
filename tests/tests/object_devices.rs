//! Object volumes as devices of `sheave daemon`, on a stand-in for a kernel: a daemon that is
//! killed or gives way leaves them to the next one, with all that was written.

use std::path::Path;
use std::time::Duration;

use sheave_tests::{Load, Node, Run, Serve, Wire, cmd, pattern, sheave};

/// Makes a volume and returns its text. Its journals are in the node's state directory.
fn volume(node: &Node) -> String {
    let volume = format!("dir://{}", node.file("objects").display());
    Run::new(sheave()).args("volume create --size 8M").arg(&volume).ok();
    volume
}

#[test]
fn the_next_daemon_has_what_a_killed_one_has_answered() {
    let node = Node::new();
    let volume = volume(&node);
    let mut daemon = node.daemon();
    let device = daemon.attach(&volume);
    let data = pattern(64 << 10, 5);
    let mut wire = Wire::unix(&device).expect("the device");
    for round in 0..3u64 {
        // Answered, and not flushed.
        assert_eq!(wire.write((2 << 20) + (round << 16), &data).expect("a reply"), 0);
        let load = Load::start(&device);
        daemon.kill();
        daemon = node.daemon();
        daemon.wait_for_recovery();
        load.check_running();
        let longest = load.end();
        assert!(longest < Duration::from_secs(60), "a pause of {longest:?}");
        for earlier in 0..=round {
            let read = wire.read((2 << 20) + (earlier << 16), 64 << 10).expect("a reply");
            assert!(read.expect("data") == data, "{earlier} in round {round}");
        }
    }
    wire.request(cmd::FLUSH, 0, 0, 0).expect("sent");
    assert_eq!(wire.simple_reply(0).expect("a reply"), 0);
    drop(wire);
    daemon.sheave("detach").arg(&volume).ok();
    assert_eq!(daemon.sheave("ls").ok(), "no devices\n");
    // It can be used elsewhere as soon as it is written to its store.
    let device = daemon.attach(&volume);
    let mut wire = Wire::unix(&device).expect("the device");
    assert!(wire.read(2 << 20, 64 << 10).expect("a reply").expect("data") == data);
}

#[test]
fn a_daemon_gives_way_while_its_object_volume_is_busy() {
    let node = Node::new();
    let volume = volume(&node);
    let mut daemon = node.daemon();
    let device = daemon.attach(&volume);
    let load = Load::start(&device);
    for _ in 0..2 {
        let successor = node.start(&["daemon", "--takeover"]);
        daemon.ends_well();
        successor.wait_for_log(" ready ");
        successor.wait_for_recovery();
        load.check_running();
        daemon = successor;
    }
    let longest = load.end();
    assert!(longest < Duration::from_secs(60), "a pause of {longest:?}");
}

#[test]
fn a_device_takes_a_volume_over_and_does_not_take_it_back() {
    let node = Node::new();
    let volume = volume(&node);
    let elsewhere = Serve::new(format!("{volume}?cache-dir={}", node.file("elsewhere").display()));
    let mut first = elsewhere.unix();
    let mut daemon = node.daemon();
    let told = daemon.sheave("attach").arg(&volume).fails();
    assert!(told.contains("it is open on node") && told.contains("--take-over"), "{told}");
    let device = daemon.sheave("attach --take-over").arg(&volume).ok();
    let mut wire = Wire::unix(Path::new(device.trim_end())).expect("the device");
    assert_eq!(wire.write(0, &pattern(64 << 10, 5)).expect("a reply"), 0);
    drop(wire);
    first.kill();
    daemon.kill();
    // While the daemon is away, another node takes the volume.
    let second = elsewhere.args("--take-over").unix();
    let mut daemon = node.daemon();
    daemon.wait_for_log("it is open on node");
    let mut wire = Wire::ready(&second).expect("a client");
    assert_eq!(wire.write(0, &pattern(64 << 10, 6)).expect("a reply"), 0);
    wire.request(cmd::FLUSH, 0, 0, 0).expect("sent");
    assert_eq!(wire.simple_reply(0).expect("a reply"), 0, "it still has the volume");
    daemon.kill();
}
