//! A plugin and its daemon, and a client of both.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::fs::{FlockOperation, flock};
use sheave_control::v1::AttachRequest;
use sheave_control::{ControlClient, channel};
use sheave_csi_proto::v1::controller_client::ControllerClient;
use sheave_csi_proto::v1::identity_client::IdentityClient;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_csi_proto::v1::volume_capability::{AccessMode, AccessType};
use sheave_csi_proto::v1::*;
use sheave_tests::requests::{self, VolumeRequests};
use sheave_tests::{Daemon, Plugin, PoolNode};
use tokio::runtime::{Builder, Runtime};
use tonic::Status;

pub(crate) const MIB: i64 = 1 << 20;
/// The plugin's own node.
pub(crate) const NODE: &str = "n1";

pub(crate) struct Client {
    runtime: Arc<Runtime>,
    channel: tonic::transport::Channel,
    pub(crate) plugin: Plugin,
    pub(crate) daemon: Daemon,
    pub(crate) node: PoolNode,
    args: Vec<String>,
}

/// A filesystem on one node.
pub(crate) fn mount() -> VolumeCapability {
    requests::filesystem(Mode::SingleNodeWriter, "")
}

/// A block device on one node.
pub(crate) fn block() -> VolumeCapability {
    requests::block(Mode::SingleNodeWriter)
}

pub(crate) fn mode(capability: VolumeCapability, mode: Mode) -> VolumeCapability {
    let access_mode = Some(AccessMode { mode: mode.into() });
    VolumeCapability { access_mode, ..capability }
}

/// In MiB.
pub(crate) fn range(required: i64, limit: i64) -> CapacityRange {
    CapacityRange {
        required_bytes: required.saturating_mul(MIB),
        limit_bytes: limit.saturating_mul(MIB),
    }
}

pub(crate) fn parameters(pool: &str) -> HashMap<String, String> {
    [("pool".to_owned(), pool.to_owned())].into()
}

impl Client {
    /// Beside a daemon.
    pub(crate) fn new() -> Self {
        Self::start(&["--mode", "all", "--node-id", NODE])
    }

    /// A controller that has the pools itself, as another process than the daemon.
    pub(crate) fn without_devices() -> Self {
        Self::start(&["--mode", "controller", "--node-id", NODE, "--config", "pools.toml"])
    }

    /// Beside a daemon with more pools: tables of its configuration.
    pub(crate) fn with_pools(tables: &str) -> Self {
        Self::start_on(PoolNode::with_pools(tables), &["--mode", "all", "--node-id", NODE])
    }

    fn start(args: &[&str]) -> Self {
        Self::start_on(PoolNode::new(), args)
    }

    fn start_on(node: PoolNode, args: &[&str]) -> Self {
        let daemon = node.daemon();
        let config = node.config();
        let config = config.to_str().expect("UTF-8");
        let args: Vec<_> = args.iter().map(|arg| arg.replace("pools.toml", config)).collect();
        let plugin = start_plugin(&node, &args);
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let channel = {
            let _entered = runtime.enter();
            channel(plugin.socket())
        };
        Self { runtime: Arc::new(runtime), channel, plugin, daemon, node, args }
    }

    pub(crate) fn restart_plugin(&mut self) {
        self.plugin.kill();
        self.plugin = start_plugin(&self.node, &self.args);
        let _entered = self.runtime.enter();
        self.channel = channel(self.plugin.socket());
    }

    pub(crate) fn restart_daemon(&mut self) {
        self.daemon.kill();
        self.daemon = self.node.daemon();
    }

    fn controller(&self) -> ControllerClient<tonic::transport::Channel> {
        ControllerClient::new(self.channel.clone())
    }

    pub(crate) fn info(&self) -> GetPluginInfoResponse {
        let mut identity = IdentityClient::new(self.channel.clone());
        let call = identity.get_plugin_info(GetPluginInfoRequest {});
        self.runtime.block_on(call).expect("an answer").into_inner()
    }

    pub(crate) fn probe(&self) -> bool {
        let mut identity = IdentityClient::new(self.channel.clone());
        let call = identity.probe(ProbeRequest {});
        self.runtime.block_on(call).expect("an answer").into_inner().ready.expect("ready or not")
    }

    /// A request for a volume of the pool `fast`.
    pub(crate) fn request(&self, name: &str, range: CapacityRange) -> CreateVolumeRequest {
        requests::create(name, range, mount(), &[("pool", "fast")])
    }

    pub(crate) fn create(&self, name: &str) -> Volume {
        self.call_create(self.request(name, range(0, 0))).expect("an answer")
    }

    pub(crate) fn call_create(&self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        let answer = self.runtime.block_on(self.controller().create_volume(request))?;
        Ok(answer.into_inner().volume.expect("a volume"))
    }

    /// Begins to make a volume.
    pub(crate) fn start_create(&self, name: &str) -> JoinHandle<Result<Volume, Status>> {
        let (request, mut controller) = (self.request(name, range(0, 0)), self.controller());
        let runtime = Arc::clone(&self.runtime);
        thread::spawn(move || {
            let answer = runtime.block_on(controller.create_volume(request))?;
            Ok(answer.into_inner().volume.expect("a volume"))
        })
    }

    pub(crate) fn delete(&self, id: &str) -> Result<(), Status> {
        self.call_delete(requests::delete(id))
    }

    pub(crate) fn call_delete(&self, request: DeleteVolumeRequest) -> Result<(), Status> {
        self.runtime.block_on(self.controller().delete_volume(request)).map(drop)
    }

    pub(crate) fn publish(
        &self,
        id: &str,
        capability: &VolumeCapability,
    ) -> Result<HashMap<String, String>, Status> {
        self.publish_to(id, NODE, capability, false)
    }

    pub(crate) fn publish_to(
        &self,
        id: &str,
        node: &str,
        capability: &VolumeCapability,
        read_only: bool,
    ) -> Result<HashMap<String, String>, Status> {
        let requests = VolumeRequests::new(id, capability);
        let request = VolumeRequests { read_only, ..requests }.controller_publish(node);
        let answer = self.runtime.block_on(self.controller().controller_publish_volume(request))?;
        Ok(answer.into_inner().publish_context)
    }

    pub(crate) fn unpublish(&self, id: &str, node: &str) -> Result<(), Status> {
        let request = requests::controller_unpublish(id, node);
        let mut controller = self.controller();
        self.runtime.block_on(controller.controller_unpublish_volume(request)).map(drop)
    }

    pub(crate) fn get(&self, id: &str) -> Result<ControllerGetVolumeResponse, Status> {
        self.call_get(ControllerGetVolumeRequest { volume_id: id.to_owned() })
    }

    pub(crate) fn call_get(
        &self,
        request: ControllerGetVolumeRequest,
    ) -> Result<ControllerGetVolumeResponse, Status> {
        let mut controller = self.controller();
        Ok(self.runtime.block_on(controller.controller_get_volume(request))?.into_inner())
    }

    /// The nodes that have a volume.
    pub(crate) fn nodes(&self, id: &str) -> Vec<String> {
        self.get(id).expect("an answer").status.expect("a status").published_node_ids
    }

    pub(crate) fn call_health(
        &self,
        request: ControllerGetVolumeHealthRequest,
    ) -> Result<VolumeHealth, Status> {
        let mut controller = self.controller();
        let answer = self.runtime.block_on(controller.controller_get_volume_health(request))?;
        Ok(answer.into_inner().volume_health.expect("a health"))
    }

    /// In MiB.
    pub(crate) fn expand(&self, id: &str, required: i64) -> Result<i64, Status> {
        self.call_expand(VolumeRequests::new(id, &mount()).controller_expand(range(required, 0)))
    }

    pub(crate) fn call_expand(
        &self,
        request: ControllerExpandVolumeRequest,
    ) -> Result<i64, Status> {
        let mut controller = self.controller();
        let answer = self.runtime.block_on(controller.controller_expand_volume(request))?;
        let answer = answer.into_inner();
        assert!(answer.node_expansion_required);
        Ok(answer.capacity_bytes)
    }

    pub(crate) fn modify(&self, id: &str, parameters: &[(&str, &str)]) -> Result<(), Status> {
        let pairs = parameters.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let request = ControllerModifyVolumeRequest {
            volume_id: id.to_owned(),
            mutable_parameters: pairs.collect(),
            ..Default::default()
        };
        let mut controller = self.controller();
        self.runtime.block_on(controller.controller_modify_volume(request)).map(drop)
    }

    pub(crate) fn validate(
        &self,
        id: &str,
        volume_capabilities: Vec<VolumeCapability>,
    ) -> Result<ValidateVolumeCapabilitiesResponse, Status> {
        let volume_id = id.to_owned();
        let request = ValidateVolumeCapabilitiesRequest {
            volume_id,
            volume_capabilities,
            ..Default::default()
        };
        let mut controller = self.controller();
        let call = controller.validate_volume_capabilities(request);
        Ok(self.runtime.block_on(call)?.into_inner())
    }

    /// Ids, and the token for more.
    pub(crate) fn list(
        &self,
        request: ListVolumesRequest,
    ) -> Result<(Vec<String>, String), Status> {
        let answer = self.runtime.block_on(self.controller().list_volumes(request))?.into_inner();
        let ids = answer.entries.into_iter().map(|entry| entry.volume.expect("a volume").volume_id);
        Ok((ids.collect(), answer.next_token))
    }

    pub(crate) fn capacity(&self, request: GetCapacityRequest) -> GetCapacityResponse {
        self.call_capacity(request).expect("an answer")
    }

    pub(crate) fn call_capacity(
        &self,
        request: GetCapacityRequest,
    ) -> Result<GetCapacityResponse, Status> {
        let mut controller = self.controller();
        Ok(self.runtime.block_on(controller.get_capacity(request))?.into_inner())
    }

    /// Attaches a volume as a node does, and returns the path of its device.
    pub(crate) fn attach(&self, id: &str, epoch: u64) -> Result<String, Status> {
        let request = AttachRequest {
            volume: id.to_owned(),
            epoch: Some(epoch),
            node: NODE.to_owned(),
            ..AttachRequest::default()
        };
        let channel = {
            let _entered = self.runtime.enter();
            channel(&self.daemon.socket())
        };
        let answer = self.runtime.block_on(ControlClient::new(channel).attach(request))?;
        Ok(answer.into_inner().device.expect("a device").path)
    }

    /// Keeps others from changing the pool.
    pub(crate) fn hold_pool(&self) -> File {
        let path = self.node.node.file("fast").join(".sheave.lock");
        let file = File::options().create(true).append(true).open(path).expect("the lock");
        flock(&file, FlockOperation::LockExclusive).expect("locked");
        file
    }

    pub(crate) fn set_flags(&self, capability: &mut VolumeCapability, flags: &[&str]) {
        if let Some(AccessType::Mount(mount)) = &mut capability.access_type {
            mount.mount_flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        }
    }
}

fn start_plugin(node: &PoolNode, args: &[String]) -> Plugin {
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    Plugin::start(node.node.kernel.scratch().path(), &args)
}
