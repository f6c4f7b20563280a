//! How long calls of the service Controller take with many volumes, and what memory an idle plugin
//! has: `cargo run --release -p sheave-tests --example csi_latency`.

use std::path::Path;
use std::time::{Duration, Instant};

use sheave_control::channel;
use sheave_csi_proto::v1::controller_client::ControllerClient;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_csi_proto::v1::{ControllerGetVolumeRequest, GetCapacityRequest, ListVolumesRequest};
use sheave_tests::co::{Answer, Call, Clients, resident_kib};
use sheave_tests::requests::{self, VolumeRequests};
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
    let capability = requests::block(Mode::SingleNodeWriter);
    let mut volumes = Vec::new();
    let times = |each: &mut dyn FnMut(usize) -> Duration| (0..VOLUMES).map(each).collect();
    let made = times(&mut |index| {
        let range = requests::at_least(MIB);
        let name = format!("pvc-{index}");
        let create = requests::create(&name, range, capability.clone(), &[("pool", "fast")]);
        let (answer, took) = client.time(Call::CreateVolume(create));
        let Answer::Volume(volume) = answer else { panic!("{answer:?}") };
        volumes.push(VolumeRequests::new(&volume.volume_id, &capability));
        took
    });
    show("create", made);
    let publish = |index: usize| {
        client.time(Call::ControllerPublish(volumes[index].controller_publish(NODE))).1
    };
    show("publish", times(&mut |index| publish(index)));
    let expand = |index: usize| {
        let range = requests::at_least(2 * MIB);
        client.time(Call::ControllerExpand(volumes[index].controller_expand(range))).1
    };
    show("expand", times(&mut |index| expand(index)));
    show_reads(&client, ControllerClient::new(client.channel(plugin.socket())), &volumes);
    let list = |_| client.time(Call::ListVolumes(ListVolumesRequest::default())).1;
    show("list 1000", (0..100).map(list).collect());
    let unpublish = |index: usize| {
        let request = requests::controller_unpublish(&volumes[index].id, NODE);
        client.time(Call::ControllerUnpublish(request)).1
    };
    show("unpublish", times(&mut |index| unpublish(index)));
    let delete =
        |index: usize| client.time(Call::DeleteVolume(requests::delete(&volumes[index].id))).1;
    show("delete", times(&mut |index| delete(index)));
    for (what, pid) in [("plugin", idle.pid()), ("daemon", daemon.pid())] {
        show_memory(what, resident_kib(pid));
    }
}

fn show_reads(client: &Client, controller: ControllerClient<Channel>, volumes: &[VolumeRequests]) {
    let get = |volume: &VolumeRequests| {
        let request = ControllerGetVolumeRequest { volume_id: volume.id.clone() };
        let mut controller = controller.clone();
        client.time_of(async move { controller.controller_get_volume(request).await.map(drop) })
    };
    show("get", volumes.iter().map(get).collect());
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
