//! How long calls of the service Controller take with many volumes, and what memory an idle plugin
//! has: `cargo run --release -p sheave-tests --example csi_latency`.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use sheave_control::channel;
use sheave_csi_proto::v1::controller_client::ControllerClient;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_csi_proto::v1::volume_capability::{AccessMode, AccessType, BlockVolume};
use sheave_csi_proto::v1::{
    CapacityRange, ControllerExpandVolumeRequest, ControllerGetVolumeRequest,
    ControllerPublishVolumeRequest, ControllerUnpublishVolumeRequest, CreateVolumeRequest,
    DeleteVolumeRequest, GetCapacityRequest, ListVolumesRequest, VolumeCapability,
};
use sheave_tests::co::{Answer, Call, Clients, resident_kib};
use sheave_tests::{Plugin, PoolNode};
use tokio::runtime::{Builder, Runtime};
use tonic::Status;
use tonic::transport::Channel;

const NODE: &str = "node-1";
const MIB: i64 = 1 << 20;
const VOLUMES: usize = 1000;

struct Client {
    runtime: Runtime,
    clients: Clients,
}

impl Client {
    fn channel(&self, socket: &Path) -> Channel {
        let _inside = self.runtime.enter();
        channel(socket)
    }

    fn time(&self, call: Call) -> (Answer, Duration) {
        let begun = Instant::now();
        let answer = self.runtime.block_on(self.clients.call(call)).expect("done");
        (answer, begun.elapsed())
    }

    fn time_of(&self, call: impl Future<Output = Result<(), Status>>) -> Duration {
        let begun = Instant::now();
        self.runtime.block_on(call).expect("done");
        begun.elapsed()
    }
}

fn capability() -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Block(BlockVolume {})),
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
    }
}

#[expect(clippy::print_stdout, reason = "what it is for")]
fn show(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!("{what:10} p50 {:?} p99 {:?} max {:?}", at(50), at(99), at(100));
}

fn main() {
    let node = PoolNode::new();
    let daemon = node.daemon();
    let dir = node.node.kernel.scratch().path();
    let quiet = |command: &mut std::process::Command| {
        command.env("SHEAVE_LOG", "info");
    };
    let plugin = Plugin::start_as("csi", dir, &["--mode", "all", "--node-id", NODE], quiet);
    let idle = Plugin::start_as("node", dir, &["--mode", "node", "--node-id", NODE], quiet);
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let clients = {
        let _inside = runtime.enter();
        Clients::new(plugin.socket(), idle.socket())
    };
    let client = Client { runtime, clients };
    let mut ids = Vec::new();
    let times = |each: &mut dyn FnMut(usize) -> Duration| (0..VOLUMES).map(each).collect();
    let made = times(&mut |index| {
        let (answer, took) = client.time(Call::CreateVolume(CreateVolumeRequest {
            name: format!("pvc-{index}"),
            capacity_range: Some(CapacityRange { required_bytes: MIB, limit_bytes: 0 }),
            volume_capabilities: vec![capability()],
            parameters: HashMap::from([("pool".to_owned(), "fast".to_owned())]),
            ..Default::default()
        }));
        let Answer::Volume(volume) = answer else { panic!("{answer:?}") };
        ids.push(volume.volume_id);
        took
    });
    show("create", made);
    let id = |index: usize| ids[index].clone();
    let publish = |index| {
        client.time(Call::ControllerPublish(ControllerPublishVolumeRequest {
            volume_id: id(index),
            node_id: NODE.to_owned(),
            volume_capability: Some(capability()),
            ..Default::default()
        }))
    };
    show("publish", times(&mut |index| publish(index).1));
    let expand = |index| {
        client.time(Call::ControllerExpand(ControllerExpandVolumeRequest {
            volume_id: id(index),
            capacity_range: Some(CapacityRange { required_bytes: 2 * MIB, limit_bytes: 0 }),
            ..Default::default()
        }))
    };
    show("expand", times(&mut |index| expand(index).1));
    show_reads(&client, ControllerClient::new(client.channel(plugin.socket())), &ids);
    let list = |_| client.time(Call::ListVolumes(ListVolumesRequest::default())).1;
    show("list 1000", (0..100).map(list).collect());
    let unpublish = |index| {
        client.time(Call::ControllerUnpublish(ControllerUnpublishVolumeRequest {
            volume_id: id(index),
            node_id: NODE.to_owned(),
            ..Default::default()
        }))
    };
    show("unpublish", times(&mut |index| unpublish(index).1));
    let delete = |index| {
        let request = DeleteVolumeRequest { volume_id: id(index), ..Default::default() };
        client.time(Call::DeleteVolume(request))
    };
    show("delete", times(&mut |index| delete(index).1));
    for (what, pid) in [("plugin", idle.pid()), ("daemon", daemon.pid())] {
        show_memory(what, resident_kib(pid));
    }
}

fn show_reads(client: &Client, controller: ControllerClient<Channel>, ids: &[String]) {
    let get = |id: &String| {
        let request = ControllerGetVolumeRequest { volume_id: id.clone() };
        let mut controller = controller.clone();
        client.time_of(async move { controller.controller_get_volume(request).await.map(drop) })
    };
    show("get", ids.iter().map(get).collect());
    let capacity = |_| {
        let mut controller = controller.clone();
        let request = GetCapacityRequest::default();
        client.time_of(async move { controller.get_capacity(request).await.map(drop) })
    };
    show("capacity", (0..100).map(capacity).collect());
}

#[expect(clippy::print_stdout, reason = "what it is for")]
fn show_memory(what: &str, kib: u64) {
    println!("{what:10} {kib} KiB resident");
}
