//! The node engine's state on disk is removed while pods run: what the kernel and the daemon know
//! is enough to go on.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::time::Duration;

use sheave_node::{Fs, Kind, Node};
use sheave_tests::{Run, Site, fs_types, has_fs, in_namespace, refused};

const SIZE: u64 = 320 << 20;

/// Raw block volumes, and the types that can be tried here.
fn uses(test: &str) -> Vec<Option<Fs>> {
    fs_types(test).into_iter().map(Some).chain([None]).collect()
}

/// Loses the state. The process that has it open goes on in every other round.
fn lose(site: &Site, node: Node, round: usize) -> Node {
    fs::remove_dir_all(site.dir().join("node")).expect("the state");
    if round.is_multiple_of(2) { node } else { site.node() }
}

fn mounts(site: &Site) -> Vec<String> {
    let dir = site.dir().to_str().expect("UTF-8");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    mounts.lines().filter(|line| line.contains(dir)).map(str::to_owned).collect()
}

/// A volume that is published to the pod `a`, with programs that are counted.
fn published(fs: Option<Fs>) -> (Site, Node) {
    let site = Site::new();
    for tool in ["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "e2fsck", "xfs_repair", "btrfs"] {
        if has_fs(Fs::ALL.into_iter().find(|fs| tool.ends_with(fs.name())).unwrap_or(Fs::Ext4)) {
            site.count_tool(tool);
        }
    }
    site.volumes.create("v", SIZE);
    let node = site.node();
    node.stage(site.stage_request(fs)).expect("staged");
    node.publish(site.publish_request("a", fs)).expect("published");
    (site, node)
}

#[test]
fn rule_30_a_lost_state_keeps_nothing_from_being_published_and_unstaged() {
    let test = "rule_30_a_lost_state_keeps_nothing_from_being_published_and_unstaged";
    in_namespace(test, || {
        for fs in uses(test) {
            for round in 0..2 {
                goes_on(fs, round);
            }
        }
    });
}

fn goes_on(fs: Option<Fs>, round: usize) {
    let (site, node) = published(fs);
    let target = site.target("a");
    let write = |text: &str| match fs {
        Some(_) => fs::write(target.join("file"), text).expect("written"),
        None => assert!(fs::metadata(&target).expect("the device").file_type().is_block_device()),
    };
    write("before");
    let (record, before) = (site.volumes.recorded("v"), mounts(&site));
    let tools = |name: &str| site.tool_runs(name);
    let maker = fs.map(|fs| format!("mkfs.{}", fs.name())).unwrap_or_default();
    let checks = tools("e2fsck") + tools("xfs_repair");

    let node = lose(&site, node, round);
    assert_eq!(node.stats("v", &target).expect("statistics").filesystem.is_some(), fs.is_some());
    node.stats("v", &site.target("b")).expect_err("it is not there");
    assert!(node.expand("v", &target, None).is_ok_and(|size| size == SIZE));
    refused(node.unstage("v", &site.staging()), "still mounted");
    node.stage(site.stage_request(fs)).expect("staged all the same");
    write("staged");

    let node = lose(&site, node, round);
    let mut second = site.publish_request("b", fs);
    second.is_shared = false;
    refused(node.publish(second), "allows one place");
    let mut other = site.publish_request("a", fs);
    other.read_only = true;
    let error = node.publish(other).expect_err("it is published for writing");
    assert_eq!(error.kind(), Kind::Exists, "{error}");
    node.publish(site.publish_request("a", fs)).expect("published already");
    let mut other = site.publish_request("a", fs);
    other.mode = "another".to_owned();
    let error = node.publish(other).expect_err("its arguments are known again");
    assert_eq!(error.kind(), Kind::Exists, "{error}");
    write("published");
    assert_eq!(mounts(&site), before, "nothing is mounted twice");

    let node = lose(&site, node, round);
    node.unpublish("v", &target).expect("unpublished");
    node.unstage("v", &site.staging()).expect("unstaged");
    site.check_bare();
    assert_eq!(site.volumes.recorded("v"), record);
    assert_eq!(tools(&maker), usize::from(fs.is_some()), "formatted once");
    assert_eq!(tools("e2fsck") + tools("xfs_repair"), checks, "none checks what is mounted");
    node.stage(site.stage_request(fs)).expect("staged");
    if fs.is_some() {
        let kept = fs::read_to_string(site.staging().join("file"));
        assert_eq!(kept.expect("the file"), "published");
    }
    node.unstage("v", &site.staging()).expect("unstaged");
}

#[test]
fn an_adopted_volume_keeps_the_policy_of_its_class() {
    in_namespace("an_adopted_volume_keeps_the_policy_of_its_class", || {
        let (site, node) = published(Some(Fs::Ext4));
        let policy = || {
            let state = fs::read_to_string(site.dir().join("node/v.json")).expect("the state");
            let at = state.find("force_after_s").map(|at| &state[at..]);
            at.and_then(|rest| rest.split([':', ',', '}']).nth(1)).map(str::to_owned)
        };
        assert_eq!(policy(), None);
        let node = lose(&site, node, 0);
        let mut publish = site.publish_request("a", Some(Fs::Ext4));
        publish.force_unstage_after = Some(Duration::from_secs(60));
        node.publish(publish).expect("published");
        assert_eq!(policy().as_deref(), Some("60"));
        // As it is after an older program has adopted it.
        let mut stage = site.stage_request(Some(Fs::Ext4));
        stage.force_unstage_after = Some(Duration::from_secs(90));
        node.stage(stage).expect("staged");
        assert_eq!(policy().as_deref(), Some("90"));
    });
}

#[test]
fn rule_27_a_lost_state_is_not_made_up_from_what_is_mounted_elsewhere() {
    in_namespace("rule_27_a_lost_state_is_not_made_up_from_what_is_mounted_elsewhere", || {
        let (site, node) = published(Some(Fs::Ext4));
        let node = lose(&site, node, 0);
        Run::new("umount").arg(site.staging()).ok();
        let request = || site.stage_request(Some(Fs::Ext4));
        let publish = || site.publish_request("b", Some(Fs::Ext4));
        for _ in 0..2 {
            refused(node.stage(request()), "its state is lost");
            refused(node.publish(publish()), "its state is lost");
        }
        // Another disk is where the volume was staged.
        Run::new("mount").args("-t tmpfs none").arg(site.staging()).ok();
        refused(node.publish(publish()), "its state is lost");
        refused(node.stage(request()), "its state is lost");
        assert!(!site.target("b").exists());
        assert_eq!(site.tool_runs("e2fsck"), 0);
        node.unpublish("v", &site.target("a")).expect("unpublished");
        refused(node.stage(request()), "something else is mounted");
        refused(node.publish(publish()), "not staged");
        Run::new("umount").arg(site.staging()).ok();
        node.stage(request()).expect("staged");
        node.unstage("v", &site.staging()).expect("unstaged");
        site.check_bare();
    });
}
