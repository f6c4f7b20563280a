//! A volume that CSI, FlexVolume and Docker use in turn on one node: they have the same lock, the
//! same state and the same record of what was formatted.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use serde_json::Value;
use sheave_csi_proto::v1::node_client::NodeClient;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_durable as durable;
use sheave_tests::requests::{VolumeRequests, filesystem, node_unpublish, node_unstage};
use sheave_tests::{
    Daemon, DockerPlugin, FlexSpec, FlexVolume, Mounts, Plugin, PoolNode, append_line,
    check_failed, eventually, on_devices,
};
use tokio::runtime::{Builder, Runtime};
use tonic::transport::Channel;
use tonic::{Code, Status};

struct Site {
    _mounts: Mounts,
    runtime: Runtime,
    channel: Channel,
    docker: DockerPlugin,
    flex: FlexVolume,
    daemon: Daemon,
    node: PoolNode,
    _plugin: Plugin,
}

impl Site {
    fn new() -> Self {
        let node = PoolNode::with_block_devices();
        let daemon = node.daemon();
        let dir = node.dir();
        for name in ["stage", "pods"] {
            fs::create_dir(dir.join(name)).expect("a directory");
        }
        let plugin = Plugin::start(dir, &["--mode", "all", "--node-id", "n1", "--local"]);
        let docker = DockerPlugin::start(dir, &["--node-id", "n1"]);
        let flex = FlexVolume::install(dir, "node = \"n1\"\n");
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let channel = {
            let _entered = runtime.enter();
            sheave_control::channel(plugin.socket())
        };
        let _mounts = Mounts::below(node.dir());
        Self { _mounts, runtime, channel, docker, flex, daemon, node, _plugin: plugin }
    }

    fn dir(&self) -> &Path {
        self.node.dir()
    }

    fn csi_mount(&self, id: &str) -> Result<PathBuf, Status> {
        let mut node = NodeClient::new(self.channel.clone());
        let volume = VolumeRequests::new(id, &filesystem(Mode::SingleNodeMultiWriter, "ext4"));
        let (staging, target) = (self.dir().join("stage"), self.dir().join("pods/a"));
        self.runtime.block_on(async {
            node.node_stage_volume(volume.node_stage(&staging)).await?;
            node.node_publish_volume(volume.node_publish(&staging, &target)).await
        })?;
        Ok(target)
    }

    fn csi_unmount(&self, id: &str) {
        let mut node = NodeClient::new(self.channel.clone());
        let unpublish = node_unpublish(id, &self.dir().join("pods/a"));
        let unstage = node_unstage(id, &self.dir().join("stage"));
        self.runtime.block_on(async {
            node.node_unpublish_volume(unpublish).await.expect("unpublished");
            node.node_unstage_volume(unstage).await.expect("unstaged");
        });
    }
}

#[test]
fn rule_43_a_volume_moves_between_csi_flexvolume_and_docker() {
    let test = "rule_43_a_volume_moves_between_csi_flexvolume_and_docker";
    on_devices(test, || {
        let site = Site::new();
        let (docker, flex) = (&site.docker, &site.flex);
        let spec = FlexSpec::new("data", "fast/db");
        docker.create("db", &[("pool", "fast"), ("size", "32M")]).expect("created");
        let id = site.daemon.volume_id("fast/db");
        let line = |at: &Path, caller: &str| append_line(at, caller).lines().count();
        for round in 0..2 {
            let at = docker.mount("db", "c1").expect("mounted");
            assert_eq!(line(&at, "docker"), round * 4 + 1);
            check_failed(flex.set_up("a", &spec), "in use on this node by CSI or Docker");
            for call in ["unmount", "unmountdevice"] {
                check_failed(flex.call(&[call, at.to_str().expect("UTF-8")]), "docker has volume");
            }
            let status = site.csi_mount(&id).expect_err("it is in use");
            assert_eq!(status.code(), Code::AlreadyExists, "{status}");
            docker.unmount("db", "c1").expect("unmounted");

            // As kubelet, which asks again while staging goes on.
            let mut mounted = site.csi_mount(&id);
            let is_going_on = |mounted: &Result<_, Status>| {
                mounted.as_ref().is_err_and(|status| status.code() == Code::Aborted)
            };
            assert!(eventually(|| {
                if is_going_on(&mounted) {
                    mounted = site.csi_mount(&id);
                }
                !is_going_on(&mounted)
            }));
            let at = mounted.expect("mounted");
            assert_eq!(line(&at, "csi"), round * 4 + 2);
            check_failed(flex.set_up("a", &spec), "in use on this node by CSI or Docker");
            check_failed(docker.mount("db", "c1"), "in another way");
            for (call, dir) in [("unmount", "pods/a"), ("unmountdevice", "stage")] {
                let dir = site.dir().join(dir);
                check_failed(flex.call(&[call, dir.to_str().expect("UTF-8")]), "csi has volume");
            }
            assert_eq!(line(&at, "csi"), round * 4 + 3);
            site.csi_unmount(&id);

            let at = flex.set_up("a", &spec).expect("mounted");
            assert_eq!(line(&at, "flexvolume"), round * 4 + 4);
            check_failed(docker.mount("db", "c1"), "in another way");
            let status = site.csi_mount(&id).expect_err("it is in use");
            assert_eq!(status.code(), Code::AlreadyExists, "{status}");
            // Its name goes, and what pods have had is kept.
            assert_eq!(docker.get("db").expect("a volume")["Status"]["deleted_by_rm"], false);
            docker.remove("db").expect("removed");
            check_failed(docker.get("db"), "no volume is called db");
            flex.tear_down("a", &spec).expect("unmounted");
            docker.create("db", &[("pool", "fast")]).expect("adopted");
        }
        check_lock(&site, &spec, &id);
        docker.remove("db").expect("removed");
        site.daemon.sheave("volume delete fast/db").ok();
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
    });
}

/// The containers that had a volume end with the node, and after its start a pod has it first.
#[test]
fn references_of_before_a_reboot_are_forgotten_also_when_a_pod_has_the_volume() {
    let test = "references_of_before_a_reboot_are_forgotten_also_when_a_pod_has_the_volume";
    on_devices(test, || {
        let mut site = Site::new();
        site.docker.create("db", &[("pool", "fast"), ("size", "32M")]).expect("created");
        site.docker.mount("db", "c1").expect("mounted");
        let record = site.dir().join("docker/volumes/db.json");
        let mut of_before: Value = durable::read(&record).expect("read").expect("a record");
        site.docker.unmount("db", "c1").expect("unmounted");
        site.docker.kill();
        of_before["boot"] = "of before".into();
        durable::replace(&record, &of_before).expect("written");
        let spec = FlexSpec::new("data", "fast/db");
        let at = site.flex.set_up("a", &spec).expect("mounted");
        fs::write(at.join("file"), "data").expect("written");
        site.docker.restart();
        assert_eq!(site.docker.get("db").expect("a volume")["Status"]["references"], 0);
        site.docker.unmount("db", "c1").expect("there is nothing to do");
        assert_eq!(fs::read_to_string(at.join("file")).expect("the file"), "data");
        site.flex.tear_down("a", &spec).expect("unmounted");
    });
}

/// One lock: that of the test stands for a mkfs that another of the three has started.
fn check_lock(site: &Site, spec: &FlexSpec, id: &str) {
    let docker = &site.docker;
    let lock = site.node.lock_volume(id);
    check_failed(site.flex.set_up("a", spec), "another process works on it");
    let status = site.csi_mount(id).expect_err("it is locked");
    assert_eq!(status.code(), Code::Aborted, "{status}");
    drop(lock);
    // kubelet has what it has begun undone.
    site.csi_unmount(id);
    // Docker does not ask again, so its plugin waits.
    let lock = site.node.lock_volume(id);
    thread::scope(|scope| {
        let mounting = scope.spawn(|| docker.mount("db", "c1"));
        assert!(eventually(|| docker.log().contains("waiting: ")), "{}", docker.log());
        assert!(!mounting.is_finished(), "it does not wait");
        drop(lock);
        mounting.join().expect("it ends").expect("mounted");
    });
    docker.unmount("db", "c1").expect("unmounted");
}
