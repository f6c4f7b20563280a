//! Pools that nodes share: two daemons, each of a node of its own, over one directory. The stand-in
//! for a kernel takes the directory's file system for one whose locks hold between nodes.

use std::fs;

use sheave_tests::{Daemon, Node, Scratch, Wire, eventually};

/// Nodes whose daemons have one pool.
struct Nodes {
    dir: Scratch,
    nodes: [Node; 2],
}

impl Nodes {
    fn new() -> Self {
        Self { dir: Scratch::new(), nodes: [Node::new(), Node::new()] }
    }

    fn daemon(&self, of: usize) -> Daemon {
        let node = &self.nodes[of];
        let config = node.file("pools.toml");
        let url = format!("file://{}", self.dir.path().display());
        let keys = format!("url = \"{url}\"\nshared = true\ndefault_size = \"4M\"\n");
        fs::write(&config, format!("[pools.shared]\n{keys}")).expect("a file");
        let daemon = node.start(&["daemon", "--config", config.to_str().expect("UTF-8")]);
        daemon.wait_for_log(" ready ");
        daemon
    }
}

#[test]
fn rule_07_a_volume_of_a_shared_pool_is_used_by_one_node_at_a_time() {
    let nodes = Nodes::new();
    let [a, b] = [0, 1].map(|of| nodes.daemon(of));
    a.sheave("volume create shared/x").ok();
    assert_eq!(b.volume("shared/x")["id"], a.volume("shared/x")["id"]);
    let device = a.attach("shared/x");
    b.sheave("attach shared/x").output().check_refused("end that use first");
    b.sheave("volume delete shared/x").output().check_refused("has locked it");
    b.sheave("volume resize shared/x --size 8M").ok();
    a.sheave("volume resize shared/x --size 8M").ok();
    let mut wire = Wire::unix(&device).expect("the device");
    assert_eq!(wire.write((8 << 20) - 512, &[7; 512]).expect("a reply"), 0);
    drop(wire);
    a.sheave("detach shared/x").ok();
    let device = b.attach("shared/x");
    a.sheave("attach shared/x").output().check_refused("end that use first");
    let mut wire = Wire::unix(&device).expect("the device");
    assert_eq!(wire.read((8 << 20) - 512, 512).expect("a reply").expect("data"), [7; 512]);
    drop(wire);
    b.sheave("detach shared/x").ok();
    a.sheave("volume delete shared/x").ok();
    assert_eq!(b.sheave("volume ls").ok(), "no volumes\n");
}

#[test]
fn rule_37_a_node_that_comes_back_does_not_write_to_what_another_one_has_used() {
    let nodes = Nodes::new();
    let (mut a, b) = (nodes.daemon(0), nodes.daemon(1));
    a.sheave("volume create shared/x").ok();
    a.attach("shared/x");
    a.kill();
    // Unharmed, while no other node has had it.
    let mut a = nodes.daemon(0);
    a.wait_for_recovery();
    a.kill();
    let device = b.attach("shared/x");
    let mut wire = Wire::unix(&device).expect("the device");
    assert_eq!(wire.write(0, &[9; 512]).expect("a reply"), 0);
    drop(wire);
    b.sheave("detach shared/x").ok();
    // Its kernel may hold older data, which it would write now.
    let a = nodes.daemon(0);
    let waits = || {
        let device = a.device();
        device["waiting"].as_str().is_some_and(|why| why.contains("has used it since"))
    };
    assert!(eventually(waits), "{}", a.log());
    a.sheave("attach shared/x").output().check_refused("has used it since");
    a.sheave("detach shared/x --force").ok();
    let device = a.attach("shared/x");
    let mut wire = Wire::unix(&device).expect("the device");
    assert_eq!(wire.read(0, 512).expect("a reply").expect("data"), [9; 512]);
}
