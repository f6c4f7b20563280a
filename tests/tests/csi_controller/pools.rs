//! Pools of other kinds than one healthy directory.

use std::fs;
use std::time::{Duration, Instant};

use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_csi_proto::v1::*;
use sheave_tests::{Scratch, Serve, Server, Wire};
use tonic::Code;

use super::client::{Client, NODE, mode, mount, parameters, range};

#[test]
fn a_list_without_the_volumes_of_a_pool_does_not_look_complete() {
    let client = Client::new();
    let made = client.create("a");
    let [dir, aside] = ["small", "aside"].map(|name| client.node.node.file(name));
    fs::rename(&dir, &aside).expect("renamed");
    let refused = client.list(ListVolumesRequest::default()).unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(refused.message().contains("pool small"), "{refused}");
    // Room is where a pool is.
    let all = client.capacity(GetCapacityRequest::default());
    assert!(all.available_capacity > 0);
    let of_small = GetCapacityRequest { parameters: parameters("small"), ..Default::default() };
    let refused = client.call_capacity(of_small).unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert_eq!(client.create("a"), made, "the other pool works");
    fs::rename(&aside, &dir).expect("renamed");
    let (ids, _) = client.list(ListVolumesRequest::default()).unwrap();
    assert_eq!(ids, [made.volume_id]);
}

/// A server with an export `disk`.
fn server() -> (Scratch, Server) {
    let scratch = Scratch::new();
    let image = scratch.filled("disk.img", 1 << 20);
    let server = Serve::new(image).args("--name disk").unix();
    (scratch, server)
}

fn table(server: &Server, more: &str) -> String {
    format!("[pools.remote]\nurl = \"nbd+unix:?socket={}\"\n{more}\n", server.socket())
}

#[test]
fn rule_16_exports_of_a_server_are_volumes_that_pods_read() {
    let (scratch, mut server) = server();
    let client = Client::with_pools(&table(&server, ""));
    let create = CreateVolumeRequest {
        parameters: parameters("remote"),
        ..client.request("b", range(0, 0))
    };
    let refused = client.call_create(create).unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented, "{refused}");
    assert!(refused.message().contains("NBD server"), "{refused}");
    let (ids, _) = client.list(ListVolumesRequest::default()).unwrap();
    let [id] = &ids[..] else { panic!("one export: {ids:?}") };
    assert!(id.starts_with("remote/") && id.len() == "remote/".len() + 36, "{id}");
    let found = client.get(id).unwrap().volume.expect("a volume");
    assert_eq!((&found.volume_id, found.capacity_bytes), (id, 1 << 20));
    assert_eq!(found.accessible_topology, [], "from everywhere");
    assert_eq!(client.daemon.volume("remote/disk")["id"], *id);

    let refused = client.publish(id, &mount()).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("trust_attacher"), "{refused}");
    let readers = mode(mount(), Mode::MultiNodeReaderOnly);
    for node in [NODE, "n2", NODE] {
        let context = client.publish_to(id, node, &readers, true).unwrap();
        assert_eq!(context["readonly"], "true");
    }
    // A node that would write all the same.
    let refused = client.attach(id, 0).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    client.unpublish(id, NODE).unwrap();
    assert_eq!(client.delete(id).unwrap_err().code(), Code::Unimplemented);
    assert_eq!(client.expand(id, 1).unwrap(), 1 << 20, "it is as long already");
    assert_eq!(client.expand(id, 2).unwrap_err().code(), Code::Unimplemented);

    // The operator of a node may write, as with the URL.
    let device = client.daemon.attach("remote/disk");
    assert_eq!(client.daemon.device()["volume_id"], *id);
    let mut wire = Wire::unix(&device).expect("the device");
    assert_eq!(wire.write(0, &[7; 512]).expect("a reply"), 0);
    drop(wire);
    client.daemon.sheave("detach").arg(id).ok();
    assert_eq!(fs::read(scratch.file("disk.img")).expect("the image")[..512], [7; 512]);

    server.kill();
    let begun = Instant::now();
    let away = [
        client.list(ListVolumesRequest::default()).map(drop),
        client.publish_to(id, NODE, &readers, true).map(drop),
        client.get(id).map(drop),
    ];
    for refused in away.map(|answer| answer.expect_err("the server is away")) {
        assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    }
    assert!(begun.elapsed() < Duration::from_secs(30), "10 s each");
    // What was published is let go without it.
    client.unpublish(id, "n2").unwrap();
}

#[test]
fn pods_write_to_exports_where_the_configuration_trusts_the_attacher() {
    let (_scratch, server) = server();
    let client = Client::with_pools(&table(&server, "trust_attacher = true"));
    let (ids, _) = client.list(ListVolumesRequest::default()).unwrap();
    let context = client.publish(&ids[0], &mount()).unwrap();
    assert_eq!(context["epoch"], "0");
    client.attach(&ids[0], 0).unwrap();
    client.daemon.sheave("detach").arg(&ids[0]).ok();
    client.unpublish(&ids[0], NODE).unwrap();
}
