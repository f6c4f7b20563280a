//! The FlexVolume driver beside other users of volumes, and beside storage that is not there.

use std::fs;
use std::path::Path;
use std::thread;

use serde_json::{Value, json};
use sheave_tests::{
    DockerSite, FlexSpec, FlexVolume, HangingDisk, Mounts, PoolNode, Run, check_failed, eventually,
    on_devices,
};

const WITH_ATTACH: &str = "attach = true\nnode = \"n1\"\n";

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn a_volume_that_docker_has_staged_is_neither_shown_nor_detached() {
    on_devices("a_volume_that_docker_has_staged_is_neither_shown_nor_detached", || {
        let site = DockerSite::new();
        let flex = FlexVolume::install(site.dir(), WITH_ATTACH);
        site.plugin.create("db", &[("pool", "fast"), ("size", "32M")]).expect("created");
        site.plugin.mount("db", "c1").expect("mounted");
        let spec = FlexSpec::new("data", "fast/db");
        let dir = site.dir().join("pod");
        fs::create_dir(&dir).expect("a directory");
        let shown = flex.call(&["mount", text(&dir), &spec.json(&[])]);
        check_failed(shown, "in use on this node by CSI or Docker");
        site.plugin.unmount("db", "c1").expect("unmounted");
        check_failed(flex.call(&["detach", "docker:db", "n1"]), "no name of a volume");
        let spec = FlexSpec::new("docker:db", "fast/db");
        check_failed(flex.attach(&spec, "n1"), "no name of a volume");
        site.check_unmounted();
    });
}

/// A pod's leftovers are in a pool on a disk that hangs.
#[test]
fn rule_35_a_call_ends_while_what_it_tidies_up_hangs() {
    on_devices("rule_35_a_call_ends_while_what_it_tidies_up_hangs", || {
        let disk = HangingDisk::new();
        let slow = format!("[pools.slow]\nurl = \"file://{}\"\n", disk.dir().display());
        let node = PoolNode::with_block_devices().and_pools(&slow);
        let daemon = node.daemon();
        let flex = FlexVolume::install(node.dir(), "node = \"n1\"\n");
        let mounts = Mounts::below(node.dir());
        for name in ["slow/left", "fast/pods"] {
            daemon.sheave(&format!("volume create {name} --size 32M")).ok();
        }
        let (left, pods) = (FlexSpec::new("left", "slow/left"), FlexSpec::new("pods", "fast/pods"));
        let at = flex.set_up("a", &left).expect("mounted");
        fs::write(at.join("file"), vec![7; 1 << 20]).expect("written");
        flex.set_up("b", &pods).expect("mounted");
        // As a call leaves it that is killed behind its first step.
        Run::new("umount").arg(&at).ok();
        let id = daemon.volume("slow/left")["id"].as_str().expect("an id").replace('/', "%2f");
        let path = node.dir().join(format!("node/{id}.json"));
        let state = fs::read_to_string(&path).expect("a state");
        let mut state: Value =
            serde_json::from_str(state.lines().next().expect("a line")).expect("JSON");
        state["targets"] = json!([]);
        fs::write(&path, state.to_string()).expect("written");
        let hang = disk.hang();
        let has_ended = thread::scope(|scope| {
            let call = scope.spawn(|| flex.tear_down("b", &pods).expect("unmounted"));
            let has_ended = eventually(|| call.is_finished());
            drop(hang);
            call.join().expect("no panic");
            has_ended
        });
        assert!(has_ended, "it waits for the disk");
        let is_bare = || {
            let tidied = flex.call(&["unmount", "/no/such/directory"]);
            tidied.is_ok() && mounts.targets().is_empty() && node.node.kernel.devices().is_empty()
        };
        assert!(eventually(is_bare), "{:?}", mounts.targets());
    });
}

#[test]
fn a_pool_that_is_not_there_keeps_no_volume_of_another_from_being_detached() {
    let node = PoolNode::with_pools("[pools.gone]\nurl = \"file:///no/such/directory\"\n");
    let daemon = node.daemon();
    daemon.sheave("volume create fast/db").ok();
    let flex = FlexVolume::install(node.dir(), WITH_ATTACH);
    let spec = FlexSpec::new("data", "fast/db");
    flex.attach(&spec, "n1").expect("attached");
    flex.detach(&spec, "n1").expect("detached");
    assert!(!flex.is_attached(&spec, "n1").expect("an answer"));
    // It may be in that pool.
    check_failed(flex.detach(&spec, "n1"), "pool gone");
}
