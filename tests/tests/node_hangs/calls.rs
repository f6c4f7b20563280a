//! Calls of every kind to a plugin, made all at once.

use std::collections::{BTreeSet, HashMap};
use std::pin::Pin;
use std::time::{Duration, Instant};

use sheave_csi_proto::v1::controller_client::ControllerClient;
use sheave_csi_proto::v1::identity_client::IdentityClient;
use sheave_csi_proto::v1::node_client::NodeClient;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_csi_proto::v1::*;
use sheave_tests::eventually;
use sheave_tests::requests::{self, VolumeRequests, at_least};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tonic::Status;
use tonic::transport::Channel;

use crate::is_open;
use crate::plugin::{NODE, SIZE, Site, mount};

pub(crate) type Call = Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;

/// A call to a plugin, by its name.
macro_rules! call {
    ($channel:expr, $client:ident, $rpc:ident, $request:expr) => {{
        let mut client = $client::new($channel.clone());
        let request = $request;
        let call: Call = Box::pin(async move { client.$rpc(request).await.map(drop) });
        (stringify!($rpc), call)
    }};
}

/// What a plugin of this channel is asked in vain while the storage of these volumes hangs.
pub(crate) fn hanging_calls(
    channel: &Channel,
    ids: &[String],
    site: &Site,
) -> Vec<(&'static str, Call)> {
    let mut calls = changes(channel, ids, site);
    calls.extend(questions(channel, ids));
    calls
}

fn changes(channel: &Channel, ids: &[String], site: &Site) -> Vec<(&'static str, Call)> {
    let limits = HashMap::from([("limit-iops".to_owned(), "5000".to_owned())]);
    vec![
        call!(channel, ControllerClient, create_volume, create("new", "slow")),
        call!(channel, ControllerClient, delete_volume, requests::delete(&ids[0])),
        call!(channel, ControllerClient, controller_publish_volume, publish(&ids[1])),
        call!(
            channel,
            ControllerClient,
            controller_unpublish_volume,
            requests::controller_unpublish(&ids[2], "")
        ),
        call!(
            channel,
            ControllerClient,
            controller_expand_volume,
            about(&ids[4]).controller_expand(at_least(128 << 20))
        ),
        call!(
            channel,
            ControllerClient,
            controller_modify_volume,
            ControllerModifyVolumeRequest {
                volume_id: ids[5].clone(),
                mutable_parameters: limits,
                ..Default::default()
            }
        ),
        call!(channel, NodeClient, node_stage_volume, about(&ids[6]).node_stage(&site.staging())),
    ]
}

fn questions(channel: &Channel, ids: &[String]) -> Vec<(&'static str, Call)> {
    let id = || ids[3].clone();
    vec![
        call!(
            channel,
            ControllerClient,
            validate_volume_capabilities,
            ValidateVolumeCapabilitiesRequest {
                volume_id: id(),
                volume_capabilities: vec![capability()],
                ..Default::default()
            }
        ),
        call!(channel, ControllerClient, list_volumes, ListVolumesRequest::default()),
        // Whether the directory is still that of the pool is looked up.
        call!(
            channel,
            ControllerClient,
            get_capacity,
            GetCapacityRequest {
                parameters: HashMap::from([("pool".to_owned(), "slow".to_owned())]),
                ..Default::default()
            }
        ),
        call!(
            channel,
            ControllerClient,
            controller_get_volume,
            ControllerGetVolumeRequest { volume_id: id() }
        ),
        call!(
            channel,
            ControllerClient,
            controller_list_volume_health,
            ControllerListVolumeHealthRequest::default()
        ),
    ]
}

/// What needs no storage.
pub(crate) fn free_calls(channel: &Channel, ids: &[String]) -> Vec<(&'static str, Call)> {
    let volume_id = ids[6].clone();
    vec![
        call!(channel, IdentityClient, get_plugin_info, GetPluginInfoRequest {}),
        call!(channel, IdentityClient, get_plugin_capabilities, GetPluginCapabilitiesRequest {}),
        call!(channel, IdentityClient, probe, ProbeRequest {}),
        call!(
            channel,
            ControllerClient,
            controller_get_capabilities,
            ControllerGetCapabilitiesRequest {}
        ),
        call!(channel, NodeClient, node_get_info, NodeGetInfoRequest {}),
        call!(channel, NodeClient, node_get_capabilities, NodeGetCapabilitiesRequest {}),
        call!(channel, NodeClient, node_get_storage_health, NodeGetStorageHealthRequest::default()),
        call!(
            channel,
            NodeClient,
            node_get_volume_health,
            NodeGetVolumeHealthRequest { volume_id, ..Default::default() }
        ),
    ]
}

pub(crate) fn create(name: &str, pool: &str) -> CreateVolumeRequest {
    requests::create(name, at_least(SIZE as i64), capability(), &[("pool", pool)])
}

pub(crate) fn publish(id: &str) -> ControllerPublishVolumeRequest {
    about(id).controller_publish(NODE)
}

fn about(id: &str) -> VolumeRequests {
    VolumeRequests::new(id, &capability())
}

fn capability() -> VolumeCapability {
    mount(Mode::SingleNodeWriter, "")
}

/// Makes calls, all at once; answers with their names, times and results.
pub(crate) fn all(
    runtime: &Runtime,
    calls: Vec<(&'static str, Call)>,
) -> Vec<(&'static str, Duration, Result<(), Status>)> {
    let mut set = JoinSet::new();
    runtime.block_on(async {
        for (name, call) in calls {
            let begun = Instant::now();
            set.spawn(async move {
                let answer = call.await;
                (name, begun.elapsed(), answer)
            });
        }
        set.join_all().await
    })
}

/// Makes calls again until each has succeeded.
pub(crate) fn converge(runtime: &Runtime, calls: &dyn Fn() -> Vec<(&'static str, Call)>) {
    let mut left: BTreeSet<_> = calls().into_iter().map(|(name, _)| name).collect();
    assert!(eventually(|| {
        for (name, call) in calls() {
            if !left.contains(name) {
                continue;
            }
            match runtime.block_on(call) {
                Ok(()) => drop(left.remove(name)),
                Err(status) => assert!(is_open(status.code()), "{name}: {status}"),
            }
        }
        left.is_empty()
    }));
}

/// What the controller and the node of a plugin say is wrong with a volume.
pub(crate) async fn health(channel: &Channel, id: &str) -> (Vec<String>, Vec<String>) {
    let volume_id = id.to_owned();
    let request = ControllerGetVolumeHealthRequest { volume_id, ..Default::default() };
    let asked = ControllerClient::new(channel.clone()).controller_get_volume_health(request).await;
    let of_controller = asked.expect("an answer").into_inner().volume_health;
    let request = NodeGetVolumeHealthRequest { volume_id: id.to_owned(), ..Default::default() };
    let asked = NodeClient::new(channel.clone()).node_get_volume_health(request).await;
    let of_node = asked.expect("an answer").into_inner().volume_health;
    let [of_controller, of_node] = [of_controller, of_node].map(|health| {
        let entries = health.expect("its health").health_statuses.into_iter();
        entries.map(|entry| entry.reason).collect()
    });
    (of_controller, of_node)
}
