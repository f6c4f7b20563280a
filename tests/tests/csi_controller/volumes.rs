//! Volumes that grow, are limited, have no room, have a place, are unwell, outlive their servers.

use sheave_csi_proto::v1::{
    ControllerGetVolumeHealthRequest, ControllerGetVolumeRequest, CreateVolumeRequest,
    GetCapacityRequest, Topology, TopologyRequirement,
};
use sheave_tests::{Wire, eventually};
use tonic::Code;

use crate::client::{Client, MIB, NODE, block, mount, parameters, range};

#[test]
fn a_published_volume_grows_and_its_limits_change_while_it_is_used() {
    let client = Client::new();
    let mut request = client.request("a", range(8, 0));
    request.parameters.insert("limit-iops".into(), "100".into());
    request.mutable_parameters.insert("limit-iops".into(), "5000".into());
    let id = client.call_create(request).unwrap().volume_id;
    client.publish(&id, &block()).unwrap();
    let device = client.attach(&id, 1).unwrap();
    assert_eq!(client.daemon.device()["limit_iops"], 5000, "mutable parameters count more");
    let mut wire = Wire::unix(device.as_ref()).expect("the device");
    assert_eq!(wire.write(0, &[7; 512]).expect("a reply"), 0);
    assert_eq!(client.expand(&id, 16).unwrap(), 16 * MIB);
    assert_eq!(client.expand(&id, 12).unwrap(), 16 * MIB, "it is long enough");
    assert_eq!(client.daemon.device()["size_bytes"], 16 * MIB);
    client.modify(&id, &[("limit-bps", "64M"), ("limit-iops", "none")]).unwrap();
    let device = client.daemon.device();
    assert_eq!((&device["limit_bps"], &device["limit_iops"]), (&(64 * MIB).into(), &().into()));
    for wrong in [("limit-bps", "fast"), ("pool", "small"), ("size", "1")] {
        let refused = client.modify(&id, &[("limit-iops", "7"), wrong]).unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    assert!(client.daemon.device()["limit_iops"].is_null(), "nothing was applied");
    client.modify(&id, &[]).unwrap();
    assert_eq!(client.daemon.device()["limit_bps"], 64 * MIB, "what is absent stays");
    assert_eq!(wire.read(0, 512).expect("a reply").expect("data"), [7; 512]);
}

#[test]
fn a_volume_grows_whose_device_cannot_while_it_is_used() {
    let client = Client::new();
    let id = client.create("a").volume_id;
    client.publish(&id, &block()).unwrap();
    client.attach(&id, 1).unwrap();
    client.node.node.kernel.refuse_resizes();
    for _ in 0..2 {
        assert_eq!(client.expand(&id, 16).unwrap(), 16 * MIB, "the node sees to the device");
    }
    client.daemon.sheave("detach").arg(&id).ok();
    client.attach(&id, 1).unwrap();
    assert_eq!(client.daemon.device()["size_bytes"], 16 * MIB);
}

#[test]
fn a_pool_that_is_full_is_exhausted_and_capacity_tells_before() {
    let client = Client::new();
    let capacity = |pool: &str, topology: Option<&str>| {
        let accessible_topology = topology.map(|node| Topology {
            segments: [("topology.csi.sheave.dev/node".to_owned(), node.to_owned())].into(),
        });
        let parameters = parameters(pool);
        client.capacity(GetCapacityRequest {
            accessible_topology,
            parameters,
            ..Default::default()
        })
    };
    let all = capacity("small", Some(NODE));
    assert_eq!(all.available_capacity, 10 * MIB);
    assert_eq!((all.maximum_volume_size, all.minimum_volume_size), (Some(10 * MIB), Some(MIB)));
    assert_eq!(capacity("small", Some("n2")).available_capacity, 0, "it is of one node");
    let small = |name: &str, mib| {
        let parameters = parameters("small");
        client
            .call_create(CreateVolumeRequest { parameters, ..client.request(name, range(mib, 0)) })
    };
    let id = small("a", 6).unwrap().volume_id;
    assert_eq!(capacity("small", None).available_capacity, 4 * MIB);
    let full = small("b", 5).unwrap_err();
    assert!(full.code() == Code::ResourceExhausted && full.message().contains("small"), "{full}");
    assert_eq!(client.expand(&id, 11).unwrap_err().code(), Code::ResourceExhausted);
    small("b", 4).unwrap();
}

#[test]
fn volumes_of_a_local_pool_are_where_their_node_is() {
    let client = Client::new();
    let topology = |node: &str| Topology {
        segments: [("topology.csi.sheave.dev/node".to_owned(), node.to_owned())].into(),
    };
    let wanted = |nodes: &[&str]| {
        let requisite: Vec<_> = nodes.iter().map(|node| topology(node)).collect();
        let mut request = client.request("a", range(0, 0));
        request.accessibility_requirements =
            Some(TopologyRequirement { preferred: requisite.clone(), requisite });
        client.call_create(request)
    };
    assert_eq!(wanted(&["n2"]).unwrap_err().code(), Code::ResourceExhausted);
    assert_eq!(client.node.files("fast"), [] as [&str; 0]);
    assert_eq!(wanted(&["n2", NODE]).unwrap().accessible_topology, [topology(NODE)]);
}

#[test]
fn a_volume_whose_image_is_gone_is_not_well() {
    let client = Client::new();
    let id = client.create("a").volume_id;
    let get = || client.call_get(ControllerGetVolumeRequest { volume_id: id.clone() }).unwrap();
    let health = || {
        let request =
            ControllerGetVolumeHealthRequest { volume_id: id.clone(), ..Default::default() };
        client.call_health(request).unwrap().health_statuses
    };
    assert!(!get().status.unwrap().volume_condition.unwrap().abnormal);
    assert_eq!(health(), []);
    let image = client.node.node.file("fast").join(format!("{}.img", &id["fast/".len()..]));
    std::fs::remove_file(image).unwrap();
    let condition = get().status.unwrap().volume_condition.unwrap();
    assert!(condition.abnormal && condition.message.contains(".img"), "{condition:?}");
    assert_eq!(health().len(), 1);
    assert_eq!(health()[0].reason, "StorageUnusable");
}

#[test]
fn plugin_and_daemon_that_are_killed_lose_nothing() {
    let mut client = Client::new();
    let made = client.create("a");
    let published = client.publish(&made.volume_id, &mount()).unwrap();
    client.attach(&made.volume_id, 1).unwrap();
    client.restart_plugin();
    assert_eq!(client.create("a"), made);
    client.restart_daemon();
    client.daemon.wait_for_recovery();
    let again = || client.call_create(client.request("a", range(0, 0)));
    // The first call may find that the daemon is another one.
    let is_found = || again().map_err(|error| assert_eq!(error.code(), Code::Unavailable)).is_ok();
    assert!(eventually(is_found), "the plugin finds the new daemon");
    assert_eq!(again().unwrap(), made);
    assert_eq!(client.publish(&made.volume_id, &mount()).unwrap(), published);
    let refused = client.unpublish(&made.volume_id, NODE).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "its device is still there");
}

#[test]
fn a_controller_without_devices_has_the_pools_of_its_configuration() {
    let client = Client::without_devices();
    let made = client.create("a");
    client.publish(&made.volume_id, &mount()).unwrap();
    assert_eq!(client.expand(&made.volume_id, 8).unwrap(), 8 * MIB);
    // Another process on the node has it open.
    client.attach(&made.volume_id, 1).unwrap();
    let refused = client.unpublish(&made.volume_id, NODE).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    client.daemon.sheave("detach").arg(&made.volume_id).ok();
    client.unpublish(&made.volume_id, NODE).unwrap();
    client.delete(&made.volume_id).unwrap();
    assert_eq!(client.node.files("fast"), [] as [&str; 0]);
}

#[test]
fn rule_41_identity_says_what_the_plugin_is_and_whether_it_works() {
    let mut client = Client::new();
    let info = client.info();
    assert_eq!(info.name, "csi.sheave.dev");
    assert!(client.probe());
    client.daemon.kill();
    assert!(!client.probe(), "not ready, and no error: a restart of the plugin mends nothing");
}
