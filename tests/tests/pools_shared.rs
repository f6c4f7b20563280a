//! Pools that nodes share: two daemons, each of a node of its own, over one directory. The stand-in
//! for a kernel takes the directory's file system for one whose locks hold between nodes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sheave_control::v1::AttachRequest;
use sheave_control::{ControlClient, channel};
use sheave_csi_proto::v1::controller_client::ControllerClient;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_tests::requests::{self, VolumeRequests};
use sheave_tests::{Daemon, Node, Plugin, Scratch, Wire, eventually};
use tokio::runtime::{Builder, Runtime};
use tonic::transport::Channel;
use tonic::{Code, Status};

/// How soon a volume of a dead node can be used on another one.
const MOVED_WITHIN: Duration = Duration::from_secs(30);

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

/// The controller, which an attacher calls.
struct Controller {
    runtime: Runtime,
    client: ControllerClient<Channel>,
    _plugin: Plugin,
}

impl Controller {
    /// Whose daemon is that of this node.
    fn beside(node: &Node) -> Self {
        let dir = node.kernel.scratch().path();
        let plugin = Plugin::start(dir, &["--mode", "all", "--node-id", "b"]);
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let client = {
            let _entered = runtime.enter();
            ControllerClient::new(channel(plugin.socket()))
        };
        Self { runtime, client, _plugin: plugin }
    }

    /// The epoch of a publication.
    fn publish(&self, id: &str, node: &str) -> Result<u64, Status> {
        self.publish_as(id, node, Mode::SingleNodeWriter)
    }

    fn publish_as(&self, id: &str, node: &str, mode: Mode) -> Result<u64, Status> {
        let volume = VolumeRequests::new(id, &requests::block(mode));
        let mut client = self.client.clone();
        let request = volume.controller_publish(node);
        let answer = self.runtime.block_on(client.controller_publish_volume(request))?;
        let context = answer.into_inner().publish_context;
        Ok(context.values().find_map(|value| value.parse().ok()).expect("an epoch"))
    }

    fn unpublish(&self, id: &str, node: &str) -> Result<(), Status> {
        let request = requests::controller_unpublish(id, node);
        let mut client = self.client.clone();
        self.runtime.block_on(client.controller_unpublish_volume(request)).map(drop)
    }

    /// What the plugin of a node has its daemon do.
    fn attach(&self, daemon: &Daemon, id: &str, node: &str, epoch: u64) -> PathBuf {
        self.attach_as(daemon, attach_request(id, node, epoch))
    }

    fn attach_as(&self, daemon: &Daemon, request: AttachRequest) -> PathBuf {
        self.runtime.block_on(async {
            let mut devices = ControlClient::new(channel(&daemon.socket()));
            let answer = devices.attach(request).await.expect("attached").into_inner();
            answer.device.expect("a device").path.into()
        })
    }
}

fn attach_request(id: &str, node: &str, epoch: u64) -> AttachRequest {
    AttachRequest {
        volume: id.to_owned(),
        epoch: Some(epoch),
        node: node.to_owned(),
        ..AttachRequest::default()
    }
}

fn write(device: &Path, byte: u8) {
    let mut wire = Wire::unix(device).expect("the device");
    assert_eq!(wire.write(0, &[byte; 512]).expect("a reply"), 0);
}

fn first_block(device: &Path) -> Vec<u8> {
    let mut wire = Wire::unix(device).expect("the device");
    wire.read(0, 512).expect("a reply").expect("data")
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

#[test]
fn a_reader_keeps_its_publication_while_it_has_the_device() {
    let nodes = Nodes::new();
    let a = nodes.daemon(0);
    let controller = Controller::beside(&nodes.nodes[0]);
    a.sheave("volume create shared/x").ok();
    let id = a.volume_id("shared/x");
    let publish = |node: &str| controller.publish_as(&id, node, Mode::MultiNodeReaderOnly);
    let epoch = publish("a").expect("published");
    publish("b").expect("published");
    let request = AttachRequest { read_only: true, ..attach_request(&id, "a", epoch) };
    controller.attach_as(&a, request);
    let refused = controller.unpublish(&id, "a").unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    controller.unpublish(&id, "b").expect("another node's");
    a.sheave("detach shared/x").ok();
    controller.unpublish(&id, "a").expect("unpublished");
}

/// What happens when a node is marked as out of service: the volume is detached by force, though
/// its kubelet has not unmounted it.
#[test]
fn rule_38_a_volume_is_taken_from_a_dead_node_in_time_and_never_from_a_live_one() {
    let nodes = Nodes::new();
    let (mut a, b) = (nodes.daemon(0), nodes.daemon(1));
    let controller = Controller::beside(&nodes.nodes[1]);
    a.sheave("volume create shared/x").ok();
    let id = a.volume_id("shared/x");
    let epoch = controller.publish(&id, "a").expect("published");
    let device = controller.attach(&a, &id, "a", epoch);
    write(&device, 1);
    // Only its kubelet is dead: nothing proves that its programs write no more.
    for node in ["a", ""] {
        let refused = controller.unpublish(&id, node).unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    }
    let refused = controller.publish(&id, "b").unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    write(&device, 2);
    let died = Instant::now();
    a.kill();
    assert!(eventually(|| controller.unpublish(&id, "a").is_ok()));
    let next = controller.publish(&id, "b").expect("published");
    assert!(next > epoch, "{next}");
    let moved = controller.attach(&b, &id, "b", next);
    assert!(died.elapsed() < MOVED_WITHIN, "{:?}", died.elapsed());
    assert_eq!(first_block(&moved), [2; 512]);
    write(&moved, 3);
    // The node that comes back serves its device no more, whose kernel may hold older data.
    let a = nodes.daemon(0);
    assert!(eventually(|| a.device()["waiting"].is_string()), "{}", a.log());
    assert_eq!(first_block(&moved), [3; 512]);
    a.sheave("detach shared/x --force").ok();
    assert_eq!(first_block(&moved), [3; 512]);
}
