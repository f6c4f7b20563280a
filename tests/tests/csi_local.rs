//! `sheave csi --local`: a plugin that publishes and grows the volumes of its node by itself, since
//! neither an attacher nor a central resizer reaches it.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;
use sheave_csi_proto::v1::controller_client::ControllerClient;
use sheave_csi_proto::v1::controller_service_capability::{Type, rpc};
use sheave_csi_proto::v1::node_client::NodeClient;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_csi_proto::v1::*;
use sheave_node::Fs;
use sheave_tests::requests::{self, VolumeRequests};
use sheave_tests::{
    Daemon, FlexSpec, FlexVolume, Mounts, Plugin, PoolNode, Run, eventually, has_fs, sheave, skip,
};
use tokio::runtime::{Builder, Runtime};
use tonic::transport::Channel;
use tonic::{Code, Status};

const MIB: i64 = 1 << 20;
/// In MiB. XFS wants 300, and can grow without a capability that root of a container may lack.
const SIZE: i64 = 320;
const GROWN: i64 = 400;
const NODE: &str = "n1";
const NAME: &str = "claim";
/// How long a plugin that is asked to end stays at most.
const STAYS_MAX: Duration = Duration::from_secs(25);

struct Site {
    _mounts: Mounts,
    runtime: Runtime,
    channel: Channel,
    daemon: Daemon,
    node: PoolNode,
    plugin: Plugin,
}

impl Site {
    fn new() -> Self {
        let node = PoolNode::with_block_devices();
        let daemon = node.daemon();
        let dir = node.node.kernel.scratch().path();
        for name in ["stage", "pods"] {
            fs::create_dir(dir.join(name)).expect("a directory");
        }
        let plugin = start_plugin(&node);
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let channel = {
            let _entered = runtime.enter();
            sheave_control::channel(plugin.socket())
        };
        let _mounts = Mounts::below(node.dir());
        Self { _mounts, runtime, channel, daemon, node, plugin }
    }

    fn connect(&mut self) {
        let _entered = self.runtime.enter();
        self.channel = sheave_control::channel(self.plugin.socket());
    }

    fn end_plugin(&self) {
        Run::new("kill").arg("-TERM").arg(self.plugin.pid().to_string()).ok();
        assert!(eventually(|| self.plugin.log().contains("ending: SIGTERM")));
    }

    /// Has another daemon go on, with this configuration.
    fn restart_daemon(&mut self, config: &str) {
        fs::write(self.node.config(), config).expect("a configuration");
        self.daemon.kill();
        self.daemon = self.node.daemon();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.node.node.kernel.scratch().path().join(name)
    }

    fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel.clone())
    }

    fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }

    fn create(&self) -> String {
        let capability = xfs(Mode::SingleNodeWriter);
        let request = requests::create(NAME, range(SIZE), capability, &[("pool", "fast")]);
        let made = self.runtime.block_on(self.controller().create_volume(request));
        made.expect("made").into_inner().volume.expect("a volume").volume_id
    }

    fn delete(&self, id: &str) -> Result<(), Status> {
        self.runtime.block_on(self.controller().delete_volume(requests::delete(id))).map(drop)
    }

    fn stage(&self, id: &str, mode: Mode) -> Result<(), Status> {
        let request = VolumeRequests::new(id, &xfs(mode)).node_stage(&self.path("stage"));
        self.runtime.block_on(self.node().node_stage_volume(request)).map(drop)
    }

    fn unstage(&self, id: &str) -> Result<(), Status> {
        let request = requests::node_unstage(id, &self.path("stage"));
        self.runtime.block_on(self.node().node_unstage_volume(request)).map(drop)
    }

    fn publish(&self, id: &str) -> Result<(), Status> {
        let requests = VolumeRequests::new(id, &xfs(Mode::SingleNodeWriter));
        let request = requests.node_publish(&self.path("stage"), &self.path("pods/a"));
        self.runtime.block_on(self.node().node_publish_volume(request)).map(drop)
    }

    fn unpublish(&self, id: &str) -> Result<(), Status> {
        let request = requests::node_unpublish(id, &self.path("pods/a"));
        self.runtime.block_on(self.node().node_unpublish_volume(request)).map(drop)
    }

    fn expand(&self, id: &str, path: &str, mib: i64) -> Result<i64, Status> {
        let requests = VolumeRequests::new(id, &xfs(Mode::SingleNodeWriter));
        let request = requests.node_expand(&self.path("stage"), &self.path(path), range(mib));
        let answer = self.runtime.block_on(self.node().node_expand_volume(request))?;
        Ok(answer.into_inner().capacity_bytes)
    }

    /// What an attacher would have the controller do.
    fn publish_centrally(&self, id: &str, mode: Mode) {
        let request = VolumeRequests::new(id, &xfs(mode)).controller_publish(NODE);
        let call = self.controller();
        self.runtime.block_on({ call }.controller_publish_volume(request)).expect("published");
    }

    fn record(&self) -> Value {
        self.daemon.volume(&format!("fast/{NAME}"))
    }

    fn publications(&self) -> usize {
        self.record()["publications"].as_array().expect("publications").len()
    }
}

fn start_plugin(node: &PoolNode) -> Plugin {
    let dir = node.node.kernel.scratch().path();
    Plugin::start(dir, &["--mode", "all", "--node-id", NODE, "--local"])
}

fn xfs(mode: Mode) -> VolumeCapability {
    requests::filesystem(mode, Fs::Xfs.name())
}

fn range(mib: i64) -> CapacityRange {
    requests::at_least(mib * MIB)
}

fn on_devices(test: &str, body: impl FnOnce()) {
    if !has_fs(Fs::Xfs) {
        return skip(test, "this system neither makes nor mounts XFS");
    }
    sheave_tests::on_devices(test, body);
}

#[track_caller]
fn fails<T: std::fmt::Debug>(result: Result<T, Status>, code: Code) {
    let status = result.expect_err("it fails");
    assert_eq!(status.code(), code, "{status}");
}

#[test]
fn a_node_publishes_and_grows_its_volumes_without_a_center() {
    on_devices("a_node_publishes_and_grows_its_volumes_without_a_center", || {
        let site = Site::new();
        let id = site.create();
        assert_eq!(site.publications(), 0);
        for _ in 0..2 {
            site.stage(&id, Mode::SingleNodeWriter).expect("staged, also once more");
            site.publish(&id).expect("published");
        }
        assert_eq!(site.publications(), 1);
        let file = site.path("pods/a/file");
        fs::write(&file, vec![7; 1 << 20]).expect("written");
        fails(site.delete(&id), Code::FailedPrecondition);
        fails(site.stage(&id, Mode::SingleNodeReaderOnly), Code::AlreadyExists);
        // Nothing grows that is not there.
        fails(site.expand(&id, "pods/b", GROWN), Code::NotFound);
        assert_eq!(site.record()["size_bytes"], SIZE * MIB);
        site.node.node.kernel.refuse_resizes();
        site.expand(&id, "pods/a", GROWN).expect_err("not while it is there");
        assert_eq!(site.record()["size_bytes"], GROWN * MIB);
        for _ in 0..2 {
            site.unpublish(&id).expect("unpublished");
            site.unstage(&id).expect("unstaged");
        }
        assert_eq!(site.publications(), 0);
        site.stage(&id, Mode::SingleNodeWriter).expect("staged");
        site.publish(&id).expect("published");
        for _ in 0..2 {
            assert_eq!(site.expand(&id, "pods/a", GROWN).expect("grown"), GROWN * MIB);
        }
        let df = Run::new("df").args("-m --output=size").arg(site.path("pods/a")).ok();
        let mib: i64 = df.lines().nth(1).expect("a size").trim().parse().expect("a number");
        assert!(mib > SIZE, "the file system has grown: {mib} MiB");
        assert_eq!(fs::read(&file).expect("the file"), vec![7; 1 << 20]);
        site.unpublish(&id).expect("unpublished");
        site.unstage(&id).expect("unstaged");
        for _ in 0..2 {
            site.delete(&id).expect("deleted");
        }
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
    });
}

#[test]
fn a_volume_grows_while_a_pod_uses_it() {
    on_devices("a_volume_grows_while_a_pod_uses_it", || {
        let site = Site::new();
        let id = site.create();
        site.stage(&id, Mode::SingleNodeWriter).expect("staged");
        site.publish(&id).expect("published");
        let (small, large) = (site.path("pods/a/small"), site.path("pods/a/large"));
        let mut file = fs::File::create(&small).expect("a file");
        file.write_all(&[7; 1 << 20]).expect("written");
        for _ in 0..2 {
            assert_eq!(site.expand(&id, "pods/a", GROWN).expect("grown"), GROWN * MIB);
        }
        file.write_all(&[8; 1 << 20]).expect("written");
        // More than there was room for, beside the journal of 64 MiB.
        let data = vec![9; ((SIZE - 30) * MIB) as usize];
        fs::write(&large, &data).expect("written");
        drop(file);
        site.unpublish(&id).expect("unpublished");
        site.unstage(&id).expect("unstaged");
        site.stage(&id, Mode::SingleNodeWriter).expect("staged");
        site.publish(&id).expect("published");
        assert_eq!(fs::read(&small).expect("the file"), [[7; 1 << 20], [8; 1 << 20]].concat());
        assert!(fs::read(&large).expect("the file") == data, "other contents");
        site.unpublish(&id).expect("unpublished");
        site.unstage(&id).expect("unstaged");
        site.delete(&id).expect("deleted");
    });
}

/// kubelet does not unstage what it has forgotten, such as on a node that was set up anew.
#[test]
fn a_publication_that_was_left_behind_is_in_the_way_of_nothing() {
    on_devices("a_publication_that_was_left_behind_is_in_the_way_of_nothing", || {
        let site = Site::new();
        let id = site.create();
        site.publish_centrally(&id, Mode::SingleNodeReaderOnly);
        site.stage(&id, Mode::SingleNodeWriter).expect("staged");
        site.unstage(&id).expect("unstaged");
        site.publish_centrally(&id, Mode::SingleNodeWriter);
        site.delete(&id).expect("deleted");
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
    });
}

/// kubelet does not unstage after an answer that is final, and an operator has to look.
/// Its device is made when a pod uses it, so none says yet that it is in use.
#[test]
fn rule_06_rule_43_what_flexvolume_has_published_is_neither_taken_nor_deleted() {
    let test = "rule_06_rule_43_what_flexvolume_has_published_is_neither_taken_nor_deleted";
    on_devices(test, || {
        let site = Site::new();
        let id = site.create();
        let flex = FlexVolume::install(&site.path(""), "attach = true\n");
        let spec = FlexSpec::new("pv1", &id);
        let device = flex.attach(&spec, NODE).expect("attached");
        for mode in [Mode::SingleNodeMultiWriter, Mode::SingleNodeWriter] {
            let status = site.stage(&id, mode).expect_err("it is published");
            assert_eq!(status.code(), Code::AlreadyExists, "{status}");
            assert!(status.message().contains("for pv1"), "{status}");
            site.unstage(&id).expect("nothing is staged");
        }
        let status = site.delete(&id).expect_err("it is published");
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
        assert_eq!(flex.attach(&spec, NODE), Ok(device), "the same publication");
        flex.detach(&spec, NODE).expect("detached");
        site.delete(&id).expect("deleted");
    });
}

#[test]
fn a_volume_that_cannot_be_staged_is_free_for_the_operator() {
    on_devices("a_volume_that_cannot_be_staged_is_free_for_the_operator", || {
        let site = Site::new();
        let id = site.create();
        let image = site.path(&format!("{id}.img"));
        let file = fs::File::options().write(true).open(image).expect("its image");
        file.write_all_at(b"LUKS\xba\xbe", 0).expect("written");
        for _ in 0..2 {
            fails(site.stage(&id, Mode::SingleNodeWriter), Code::FailedPrecondition);
            assert_eq!(site.publications(), 0);
        }
        let volume = format!("fast/{NAME}");
        site.daemon.attach(&volume);
        site.daemon.sheave("detach").arg(&volume).ok();
        site.delete(&id).expect("deleted");
    });
}

#[test]
fn rule_05_a_volume_is_unstaged_though_its_pool_is_not_configured_any_more() {
    on_devices("rule_05_a_volume_is_unstaged_though_its_pool_is_not_configured_any_more", || {
        let mut site = Site::new();
        let id = site.create();
        site.stage(&id, Mode::SingleNodeWriter).expect("staged");
        site.publish(&id).expect("published");
        let config = fs::read_to_string(site.node.config()).expect("a configuration");
        site.restart_daemon(&config.replace("[pools.fast]", "[pools.renamed]"));
        for _ in 0..2 {
            site.unpublish(&id).expect("unpublished");
            site.unstage(&id).expect("unstaged");
        }
        site.node.node.check_bare(&site.daemon);
        fails(site.stage(&id, Mode::SingleNodeWriter), Code::FailedPrecondition);
        fails(site.delete(&id), Code::FailedPrecondition);
        site.restart_daemon(&config);
        // That it was published is in the pool, and in the way of nothing.
        assert_eq!(site.publications(), 1);
        site.stage(&id, Mode::SingleNodeWriter).expect("staged");
        site.unstage(&id).expect("unstaged");
        assert_eq!(site.publications(), 0);
        site.delete(&id).expect("deleted");
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
    });
}

#[test]
fn it_claims_nothing_that_a_center_would_call() {
    on_devices("it_claims_nothing_that_a_center_would_call", || {
        let site = Site::new();
        let asked = ControllerGetCapabilitiesRequest {};
        let answer = site.runtime.block_on(site.controller().controller_get_capabilities(asked));
        let capabilities = answer.expect("an answer").into_inner().capabilities;
        let all: Vec<_> = capabilities
            .into_iter()
            .map(|of| match of.r#type {
                Some(Type::Rpc(rpc)) => rpc.r#type(),
                None => rpc::Type::Unknown,
            })
            .collect();
        use rpc::Type::{CreateDeleteVolume, ExpandVolume, ModifyVolume, PublishUnpublishVolume};
        assert!(all.contains(&CreateDeleteVolume), "{all:?}");
        for central in [PublishUnpublishVolume, ExpandVolume, ModifyVolume] {
            assert!(!all.contains(&central), "{all:?}");
        }
    });
}

#[test]
fn it_is_controller_and_node_in_one() {
    let error = Run::new(sheave())
        .args("csi --local --mode node --node-id n1 --endpoint unix:///nowhere/csi.sock")
        .fails();
    assert!(error.contains("--mode all"), "{error}");
}

/// A node that shuts down ends its pods first, and the plugin while their volumes are unstaged.
#[test]
fn rule_40_a_plugin_stays_until_volumes_without_pods_are_unstaged() {
    on_devices("rule_40_a_plugin_stays_until_volumes_without_pods_are_unstaged", || {
        let mut site = Site::new();
        let id = site.create();
        site.stage(&id, Mode::SingleNodeWriter).expect("staged");
        site.publish(&id).expect("published");
        // A plugin that is replaced does not wait for the pods.
        let asked = Instant::now();
        site.end_plugin();
        assert!(eventually(|| site.plugin.has_ended()));
        assert!(asked.elapsed() < STAYS_MAX, "it has waited: {}", site.plugin.log());
        site.plugin = start_plugin(&site.node);
        site.connect();
        site.unpublish(&id).expect("unpublished");
        site.end_plugin();
        site.connect();
        site.unstage(&id).expect("a plugin that ends answers");
        assert!(eventually(|| site.plugin.has_ended()));
        assert!(!site.plugin.log().contains("though volumes are staged"), "{}", site.plugin.log());
    });
}
