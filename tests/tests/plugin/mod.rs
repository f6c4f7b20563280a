//! A node: a daemon with a pool, on block devices, and the service Node in the test's process.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sheave_control::v1 as control;
use sheave_control::{ControlClient, VolumesClient, channel};
use sheave_csi::context::Publication;
use sheave_csi::{NodeService, Plugin};
use sheave_csi_proto::v1::VolumeCapability;
use sheave_csi_proto::v1::node_server::Node as _;
use sheave_csi_proto::v1::volume_capability::AccessType;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
pub(crate) use sheave_tests::requests::filesystem as mount;
use sheave_tests::requests::{self, VolumeRequests};
use sheave_tests::{Daemon, FakeKernel, Node, sheave, start_runtime, unmount_below};
use tokio::runtime::Handle;
use tonic::{Code, Request, Status};

/// The node's id.
pub(crate) const NODE: &str = "node-1";
/// Of most volumes.
pub(crate) const SIZE: u64 = 64 << 20;

#[track_caller]
pub(crate) fn fails<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, why: &str) {
    let status = result.expect_err(why);
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(why), "no {why:?}: {status}");
    assert!(status.details().is_empty() && status.message().len() <= 1024, "{status}");
}

/// A node. All its mounts are in the namespace of the test.
pub(crate) struct Site {
    pub(crate) service: Arc<NodeService>,
    pub(crate) volumes: VolumesClient,
    pub(crate) runtime: Handle,
    pub(crate) daemon: Daemon,
    pub(crate) node: Node,
    start: fn(&Node) -> Daemon,
}

/// A volume that is published to the node.
#[derive(Clone)]
pub(crate) struct Volume {
    pub(crate) id: String,
    pub(crate) publication: Publication,
    pub(crate) capability: VolumeCapability,
    /// What its class adds for nodes.
    pub(crate) context: HashMap<String, String>,
}

impl Volume {
    fn requests(&self) -> VolumeRequests {
        VolumeRequests {
            publish_context: self.publication.to_context(),
            volume_context: self.context.clone(),
            ..VolumeRequests::new(&self.id, &self.capability)
        }
    }
}

impl Site {
    /// On devices of a stand-in that the real kernel has, too.
    pub(crate) fn new() -> Self {
        Self::start(FakeKernel::with_block_devices(), start, "")
    }

    /// On a kernel that has neither ublk nor nbd.
    pub(crate) fn without_drivers() -> Self {
        Self::start(FakeKernel::new(), start_without_stand_in, "")
    }

    /// With a second pool, `slow`, in this directory.
    pub(crate) fn with_pool(dir: &Path) -> Self {
        let more = format!("[pools.slow]\nurl = \"file://{}\"\n", dir.display());
        Self::start(FakeKernel::with_block_devices(), start, &more)
    }

    fn start(kernel: FakeKernel, start: fn(&Node) -> Daemon, more: &str) -> Self {
        let node = Node { kernel, image: String::new() };
        for name in ["images", "stage", "pods"] {
            fs::create_dir(node.file(name)).expect("a directory");
        }
        let images = node.file("images");
        let config = format!("[pools.fast]\nurl = \"file://{}\"\n{more}", images.display());
        fs::write(node.file("daemon.toml"), config).expect("a configuration");
        let daemon = start(&node);
        let runtime = start_runtime();
        let volumes = {
            let _inside = runtime.enter();
            VolumesClient::new(channel(&daemon.socket()))
        };
        let service = open(&runtime, &daemon.socket(), &node.file("state"));
        Self { service, volumes, runtime, daemon, node, start }
    }

    /// Has a new process of the plugin go on.
    pub(crate) fn restart_plugin(&mut self) {
        self.service = open(&self.runtime, &self.daemon.socket(), &self.node.file("state"));
    }

    /// Kills the daemon, and starts another.
    pub(crate) fn restart_daemon(&mut self) {
        self.daemon.kill();
        self.start_daemon();
    }

    /// Stops the daemon, which leaves what pods have to the next one.
    pub(crate) fn stop_daemon(&mut self) {
        self.daemon.signal("TERM");
        self.daemon.ends_well();
    }

    /// Starts a daemon once the one before has ended.
    pub(crate) fn start_daemon(&mut self) {
        self.daemon = (self.start)(&self.node);
    }

    pub(crate) fn wait<T>(
        &self,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        self.runtime.block_on(call)
    }

    /// Makes a volume, and publishes it to the node.
    pub(crate) fn volume(&self, name: &str, size: u64, capability: VolumeCapability) -> Volume {
        self.volume_of("fast", name, size, capability)
    }

    /// The same in this pool.
    pub(crate) fn volume_of(
        &self,
        pool: &str,
        name: &str,
        size: u64,
        capability: VolumeCapability,
    ) -> Volume {
        let request = control::CreateVolumeRequest {
            pool: pool.to_owned(),
            name: name.to_owned(),
            required_bytes: size,
            ..control::CreateVolumeRequest::default()
        };
        let mut volumes = self.volumes.clone();
        let made = self.wait(async { volumes.create_volume(request).await });
        let id = made.expect("made").into_inner().volume.expect("a volume").id;
        let (publication, context) = (Publication::default(), HashMap::new());
        let mut volume = Volume { id, publication, capability, context };
        self.publish_to_node(&mut volume, NODE);
        volume
    }

    /// What the attacher has the controller do.
    pub(crate) fn publish_to_node(&self, volume: &mut Volume, node: &str) {
        let mode = volume.capability.access_mode.map_or(0, |mode| mode.mode);
        let request = control::PublishVolumeRequest {
            id: volume.id.clone(),
            node: node.to_owned(),
            read_only: reads_only(mode),
            mode,
            block: matches!(volume.capability.access_type, Some(AccessType::Block(_))),
            claim: String::new(),
        };
        let mut volumes = self.volumes.clone();
        let published = self.wait(async { volumes.publish_volume(request).await });
        let epoch = published.expect("published").into_inner().epoch;
        let read_only = reads_only(mode);
        volume.publication = Publication { epoch: Some(epoch), read_only };
    }

    pub(crate) fn unpublish_from_node(&self, volume: &Volume) {
        let request =
            control::UnpublishVolumeRequest { id: volume.id.clone(), ..Default::default() };
        let mut volumes = self.volumes.clone();
        let ended = self.wait(async { volumes.unpublish_volume(request).await });
        ended.expect("unpublished");
    }

    /// What a node does before it formats a volume.
    pub(crate) fn mark_begun(&self, volume: &Volume, fs_type: &str) {
        let request = control::MarkFormattedRequest {
            id: volume.id.clone(),
            fs_type: fs_type.to_owned(),
            epoch: volume.publication.epoch.expect("published"),
            begun: true,
        };
        let mut volumes = self.volumes.clone();
        self.wait(async { volumes.mark_formatted(request).await }).expect("marked");
    }

    /// Where its pool has the volume's data.
    pub(crate) fn image(&self, volume: &Volume) -> PathBuf {
        let (_, uuid) = volume.id.split_once('/').expect("an id");
        self.node.file("images").join(format!("{uuid}.img"))
    }

    /// The volume's record.
    pub(crate) fn record(&self, volume: &Volume) -> control::Volume {
        let key = control::get_volume_request::Key::Id(volume.id.clone());
        let request = control::GetVolumeRequest { key: Some(key) };
        let mut volumes = self.volumes.clone();
        let found = self.wait(async { volumes.get_volume(request).await });
        found.expect("found").into_inner().volume.expect("a volume")
    }

    pub(crate) fn stage(&self, volume: &Volume) -> Result<(), Status> {
        self.stage_at(volume, &self.staging())
    }

    pub(crate) fn stage_at(&self, volume: &Volume, staging: &Path) -> Result<(), Status> {
        let request = Request::new(volume.requests().node_stage(staging));
        self.wait(self.service.node_stage_volume(request)).map(drop)
    }

    pub(crate) fn unstage(&self, volume: &Volume) -> Result<(), Status> {
        let request = Request::new(requests::node_unstage(&volume.id, &self.staging()));
        self.wait(self.service.node_unstage_volume(request)).map(drop)
    }

    pub(crate) fn publish(
        &self,
        volume: &Volume,
        pod: &str,
        read_only: bool,
    ) -> Result<(), Status> {
        let requests = VolumeRequests { read_only, ..volume.requests() };
        let request = Request::new(requests.node_publish(&self.staging(), &self.target(pod)));
        self.wait(self.service.node_publish_volume(request)).map(drop)
    }

    pub(crate) fn unpublish(&self, volume: &Volume, pod: &str) -> Result<(), Status> {
        let request = Request::new(requests::node_unpublish(&volume.id, &self.target(pod)));
        self.wait(self.service.node_unpublish_volume(request)).map(drop)
    }

    pub(crate) fn staging(&self) -> PathBuf {
        self.node.file("stage")
    }

    pub(crate) fn target(&self, pod: &str) -> PathBuf {
        self.node.file("pods").join(pod)
    }

    /// Checks that no device, mount, state or place is left.
    #[track_caller]
    pub(crate) fn check_bare(&self) {
        self.node.check_bare(&self.daemon);
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let dir = text(self.node.kernel.scratch().path());
        assert!(!mounts.contains(&dir), "{mounts}");
        for name in ["state", "stage", "pods"] {
            let left: Vec<_> = fs::read_dir(self.node.file(name)).expect(name).flatten().collect();
            assert!(left.is_empty(), "{name}: {left:?}");
        }
    }
}

impl Drop for Site {
    /// Leaves no mounts behind a test that failed: without its daemon, nothing ends them.
    fn drop(&mut self) {
        unmount_below(self.node.kernel.scratch().path());
    }
}

fn start(node: &Node) -> Daemon {
    let config = text(&node.file("daemon.toml"));
    let daemon = node.start(&["daemon", "--config", &config]);
    daemon.wait_for_log(" ready ");
    daemon
}

/// Devices are those of the real kernel then.
fn start_without_stand_in(node: &Node) -> Daemon {
    let daemon = Daemon::start(node.kernel.scratch(), |command| {
        command.arg(sheave()).args(["daemon", "--config"]).arg(node.file("daemon.toml"));
    });
    daemon.wait_for_log(" ready ");
    daemon
}

fn open(runtime: &Handle, socket: &Path, state: &Path) -> Arc<NodeService> {
    let _inside = runtime.enter();
    let plugin = Arc::new(Plugin {
        name: "csi.sheave.dev".to_owned(),
        version: "0.0.0".to_owned(),
        node_id: Some(NODE.to_owned()),
        is_local: false,
        volumes: VolumesClient::new(channel(socket)),
        devices: Some(ControlClient::new(channel(socket))),
    });
    Arc::new(NodeService::open(plugin, state.to_owned()).expect("an engine"))
}

fn reads_only(mode: i32) -> bool {
    [Mode::SingleNodeReaderOnly, Mode::MultiNodeReaderOnly].map(i32::from).contains(&mode)
}

fn text(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}
