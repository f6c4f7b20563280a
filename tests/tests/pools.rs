//! Pools of a daemon, from the command line: volumes are made, attached, limited, made longer,
//! deleted, and outlive the daemon.

use std::fs;
use std::io::Write as _;

use sheave_control::v1::AttachRequest;
use sheave_control::{ControlClient, channel};
use sheave_tests::{Daemon, FlexSpec, FlexVolume, PoolNode, Run, Wire, in_namespace};
use tokio::runtime::Builder;

const MIB: u64 = 1 << 20;

#[test]
fn a_volume_of_a_pool_from_its_creation_to_its_deletion() {
    let node = PoolNode::new();
    let daemon = node.daemon();
    assert_eq!(daemon.sheave("volume ls").ok(), "no volumes\n");
    for _ in 0..3 {
        assert_eq!(daemon.sheave("volume create fast/a --size 8M").ok(), "fast/a\n");
    }
    daemon.sheave("volume create fast/a --size 9M").output().check_refused("is there already");
    daemon.sheave("volume create fast/b").ok();
    assert_eq!(daemon.volume("fast/b")["size_bytes"], 4 * MIB);
    let made = daemon.volume("fast/a");
    assert_eq!((&made["size_bytes"], &made["device"]), (&(8 * MIB).into(), &().into()));
    let id = made["id"].as_str().expect("an id");
    assert!(id.starts_with("fast/") && id.len() == "fast/".len() + 36, "{id}");

    let device = daemon.attach("fast/a");
    assert_eq!(daemon.attach(id), device, "the same volume");
    assert_eq!(daemon.device()["volume_id"], id);
    assert_eq!(daemon.volume("fast/a")["device"], device.to_str().expect("UTF-8"));
    let mut wire = Wire::unix(&device).expect("the device");
    assert_eq!(wire.write(8 * MIB - 512, &[7; 512]).expect("a reply"), 0);
    daemon.sheave("volume delete fast/a").output().check_refused("detach it first");
    drop(wire);

    assert_eq!(daemon.sheave("volume resize fast/a --size 16M").ok(), format!("{}\n", 16 * MIB));
    assert_eq!(daemon.device()["size_bytes"], 16 * MIB);
    daemon.sheave("volume resize fast/a --size 8M").output().check_refused("cut data off");
    daemon.sheave("volume set fast/a --limit-iops 500").ok();
    assert_eq!(daemon.device()["limit_iops"], 500);

    daemon.sheave("detach fast/a").ok();
    node.node.check_bare(&daemon);
    let device = daemon.attach("fast/a");
    assert_eq!(daemon.device()["limit_iops"], 500, "a volume keeps its limits");
    let mut wire = Wire::unix(&device).expect("the device");
    assert_eq!(wire.read(8 * MIB - 512, 512).expect("a reply").expect("data"), [7; 512]);
    drop(wire);
    daemon.sheave("detach").arg(&device).ok();
    daemon.sheave("detach fast/a").output().check_refused("fast/a is no device here");
    for name in ["fast/a", "fast/b"] {
        daemon.sheave("volume delete").arg(name).ok();
        daemon.sheave("volume delete").arg(name).output().check_refused("has no volume");
    }
    assert_eq!(node.files("fast"), [] as [&str; 0]);
}

#[test]
fn volumes_and_their_devices_outlive_a_daemon() {
    let node = PoolNode::new();
    let mut daemon = node.daemon();
    daemon.sheave("volume create fast/a --size 2M --limit-bps 1M").ok();
    let (made, device) = (daemon.volume("fast/a"), daemon.attach("fast/a"));
    daemon.kill();
    let daemon = node.daemon();
    daemon.wait_for_recovery();
    let found = daemon.volume("fast/a");
    assert_eq!((&found["id"], &found["limit_bps"]), (&made["id"], &MIB.into()));
    assert_eq!(found["device"], device.to_str().expect("UTF-8"));
    assert_eq!(daemon.attach("fast/a"), device);
    daemon.sheave("detach fast/a").ok();
    daemon.sheave("volume delete fast/a").ok();
}

/// A pod may have it by the other id, and its program may have closed it for now.
#[test]
fn a_device_is_ended_by_the_id_that_it_was_attached_by_though_its_pool_was_renamed() {
    let node = PoolNode::new();
    let mut daemon = node.daemon();
    daemon.sheave("volume create fast/a").ok();
    let device = daemon.attach("fast/a");
    let old = daemon.volume("fast/a")["id"].clone();
    daemon.kill();
    let config = fs::read_to_string(node.config()).expect("a file");
    let config = config.replace("[pools.fast]", "[pools.renamed]");
    fs::write(node.config(), config).expect("a file");
    let daemon = node.daemon();
    daemon.wait_for_recovery();
    let new = daemon.volume("renamed/a")["id"].clone();
    let [old, new] = [&old, &new].map(|id| id.as_str().expect("an id"));
    let by = |id: &str| daemon.sheave("detach").arg(id).output();
    by(new).check_refused(&format!("is that of {old}"));
    assert_eq!(daemon.device()["volume_id"], old);
    assert_eq!(daemon.device()["device"], device.to_str().expect("UTF-8"));
    assert!(by(old).status.success());
    node.node.check_bare(&daemon);
    daemon.attach("renamed/a");
    assert_eq!(daemon.device()["volume_id"], new);
    by(old).check_refused("see: sheave ls");
    assert!(by(new).status.success());
    node.node.check_bare(&daemon);
}

/// What the plugin of a node does with a volume that is published to it.
fn attach_for(node: &str, daemon: &Daemon, volume: &str) {
    let record = daemon.volume(volume);
    let request = AttachRequest {
        volume: record["id"].as_str().expect("an id").to_owned(),
        epoch: record["publications"][0]["epoch"].as_u64(),
        node: node.to_owned(),
        ..AttachRequest::default()
    };
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        ControlClient::new(channel(&daemon.socket())).attach(request).await.expect("attached");
    });
}

/// No program of that node will end its use.
#[test]
fn a_volume_is_taken_from_a_node_that_is_gone_but_not_from_a_device() {
    let node = PoolNode::new();
    let daemon = node.daemon();
    daemon.sheave("volume create fast/a").ok();
    let flex = FlexVolume::install(node.node.kernel.scratch().path(), "attach = true\n");
    let spec = FlexSpec::new("pv1", "fast/a");
    let unpublish = |node: &str| daemon.sheave("volume unpublish fast/a --node").arg(node);
    unpublish("gone").output().check_refused("is not published to node gone");
    flex.attach(&spec, "gone").expect("attached");
    let refused = flex.attach(&spec, "n1").expect_err("another node has it");
    assert!(refused.contains("is published to node gone"), "{refused}");
    daemon.sheave("volume delete fast/a").output().check_refused("published to");
    unpublish("n1").output().check_refused("is not published to node n1");
    unpublish("gone").ok();
    flex.attach(&spec, "n1").expect("attached");
    attach_for("n1", &daemon, "fast/a");
    unpublish("n1").output().check_refused("detach it first");
    daemon.sheave("detach fast/a").ok();
    unpublish("n1").ok();
    daemon.sheave("volume delete fast/a").ok();
}

#[test]
fn a_pool_that_is_full_absent_or_unknown_says_so() {
    let node = PoolNode::new();
    let daemon = node.daemon();
    daemon.sheave("volume create small/a --size 6M").ok();
    let full = daemon.sheave("volume create small/b --size 5M").output();
    full.check_refused("pool small has room for 4194304 bytes");
    assert_eq!(node.files("small").len(), 3, "{:?}", node.files("small"));
    daemon.sheave("volume create none/a --size 1M").output().check_refused("fast, small");
    fs::rename(node.node.file("fast"), node.node.file("gone")).expect("renamed");
    daemon.sheave("volume create fast/a").output().check_refused("mount or make it");
    assert!(!node.node.file("fast").exists(), "it may be that it is not mounted");
}

#[test]
fn a_path_that_looks_like_a_volume_of_a_pool_is_written_with_a_dot() {
    let node = PoolNode::new();
    let daemon = node.daemon();
    let dir = node.node.file("work").join("fast");
    fs::create_dir_all(&dir).expect("a directory");
    fs::write(dir.join("a"), vec![0; MIB as usize]).expect("a file");
    let attach =
        |volume: &str| daemon.sheave("attach").arg(volume).in_dir(&node.node.file("work")).output();
    attach("fast/a").check_refused("has no volume a");
    assert!(attach("./fast/a").status.success());
    assert!(daemon.device()["volume_id"].is_null());
    daemon.sheave("volume create fast/a").ok();
    assert!(attach("fast/a").status.success());
    assert_eq!(node.node.kernel.devices().len(), 2);
}

/// As a pool is whose volumes have been filled.
#[test]
fn a_pool_on_a_full_disk_can_be_emptied() {
    in_namespace("a_pool_on_a_full_disk_can_be_emptied", || {
        let node = PoolNode::new();
        let dir = node.node.file("fast");
        Run::new("mount").args("-t tmpfs -o size=6M none").arg(&dir).ok();
        let daemon = node.daemon();
        for name in ["fast/a", "fast/b"] {
            daemon.sheave("volume create").arg(name).ok();
        }
        let image = node.files("fast").into_iter().find(|name| name.ends_with(".img"));
        let image = dir.join(image.expect("an image"));
        let mut file = fs::File::options().write(true).open(image).expect("the image");
        while file.write_all(&[7; 4096]).is_ok() {}
        drop(file);
        daemon.sheave("volume create fast/c").output().check_refused("No space left");
        let larger = daemon.sheave("volume create fast/c --size 7M").output();
        larger.check_refused("as many as its file system has");
        for limit in ["500", "600"] {
            daemon.sheave("volume set fast/a --limit-iops").arg(limit).ok();
        }
        assert_eq!(daemon.volume("fast/a")["limit_iops"], 600);
        for name in ["fast/a", "fast/b"] {
            daemon.sheave("volume delete").arg(name).ok();
        }
        assert_eq!(node.files("fast"), [] as [&str; 0]);
        daemon.sheave("volume create fast/c").ok();
        drop(daemon);
        Run::new("umount").arg(&dir).ok();
    });
}

#[test]
fn a_pool_that_is_not_mounted_is_no_empty_pool_and_holds_up_no_others() {
    let node = PoolNode::new();
    let daemon = node.daemon();
    daemon.sheave("volume create fast/a").ok();
    daemon.sheave("volume create small/b --size 1M").ok();
    // What is below a mount: an empty directory.
    let [dir, aside] = ["fast", "aside"].map(|name| node.node.file(name));
    fs::rename(&dir, &aside).expect("renamed");
    fs::create_dir(&dir).expect("a directory");
    let check = |daemon: &Daemon| {
        daemon.sheave("volume create fast/a").output().check_refused("is it mounted?");
        let listed = daemon.sheave("volume ls").output();
        let listing = listed.stdout.clone();
        assert!(listing.contains("small/b") && !listing.contains("fast/a"), "{listing}");
        listed.check_refused("volumes are missing in the list: pool fast: ");
        daemon.sheave("volume ls fast").output().check_refused("is it mounted?");
        assert!(daemon.sheave("volume ls small").ok().contains("small/b"));
        assert_eq!(fs::read_dir(&dir).expect("a directory").count(), 0, "nothing is written there");
    };
    check(&daemon);
    drop(daemon);
    // Another daemon remembers the pool, too.
    let daemon = node.daemon();
    check(&daemon);
    fs::remove_dir(&dir).expect("removed");
    fs::rename(&aside, &dir).expect("renamed");
    assert!(daemon.sheave("volume ls").ok().contains("fast/a"));
}

#[test]
fn a_volume_with_a_damaged_record_is_listed_with_its_trouble() {
    let node = PoolNode::new();
    let daemon = node.daemon();
    daemon.sheave("volume create fast/a").ok();
    let id = daemon.volume_id("fast/a");
    let uuid = id.strip_prefix("fast/").expect("a pool");
    fs::write(node.node.file("fast").join(format!("{uuid}.json")), "{}").expect("written");
    let listed = daemon.sheave("volume ls").ok();
    assert!(listed.contains(&id) && listed.contains("is damaged"), "{listed}");
    daemon.sheave("volume delete").arg(&id).output().check_refused("is damaged");
}
