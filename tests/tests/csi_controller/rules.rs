//! What every call must do; tests name the rule that they check.

use std::collections::HashMap;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::client::{Client, MIB, NODE, block, mode, mount, parameters, range};
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_csi_proto::v1::{
    ControllerExpandVolumeRequest, ControllerGetVolumeHealthRequest, CreateVolumeRequest,
    DeleteVolumeRequest, ListVolumesRequest, VolumeContentSource,
};
use sheave_tests::eventually;
use tonic::Code;

#[test]
fn rule_01_every_call_again_has_the_same_answer() {
    let client = Client::new();
    let made = client.create("a");
    assert_eq!(made.capacity_bytes, 4 * MIB);
    let published = client.publish(&made.volume_id, &mount()).unwrap();
    for _ in 0..10 {
        assert_eq!(client.create("a"), made);
        assert_eq!(client.publish(&made.volume_id, &mount()).unwrap(), published);
    }
    for _ in 0..10 {
        client.unpublish(&made.volume_id, NODE).unwrap();
    }
    for _ in 0..10 {
        client.delete(&made.volume_id).unwrap();
    }
    assert_eq!(client.node.files("fast"), [] as [&str; 0]);
}

#[test]
fn rule_03_the_same_name_otherwise_already_exists() {
    let client = Client::new();
    let sized = |required, limit| client.request("a", range(required, limit));
    let made = client.call_create(sized(8, 0)).unwrap();
    assert_eq!(client.call_create(sized(4, 8)).unwrap(), made, "it fits");
    let exists = |request| client.call_create(request).unwrap_err().code();
    assert_eq!(exists(sized(9, 0)), Code::AlreadyExists);
    assert_eq!(exists(sized(0, 4)), Code::AlreadyExists);
    let mut other = sized(8, 0);
    other.parameters.insert("front".into(), "nbd".into());
    assert_eq!(exists(other), Code::AlreadyExists);
    let mut other = sized(8, 0);
    other.mutable_parameters.insert("limit-iops".into(), "5".into());
    assert_eq!(exists(other), Code::AlreadyExists);
    let source = Some(VolumeContentSource::default());
    let cloned = CreateVolumeRequest { volume_content_source: source, ..sized(8, 0) };
    assert_eq!(exists(cloned), Code::InvalidArgument, "no pool has a source");
}

#[test]
fn rule_04_a_size_is_exact_or_out_of_range() {
    let client = Client::new();
    for (required, limit) in [(2, 1), (1 << 40, 0)] {
        let request = client.request("a", range(required, limit));
        assert_eq!(client.call_create(request).unwrap_err().code(), Code::OutOfRange);
    }
    let mut below = client.request("a", range(0, 0));
    below.capacity_range.as_mut().unwrap().required_bytes = -1;
    assert_eq!(client.call_create(below).unwrap_err().code(), Code::InvalidArgument);
    let mut odd = client.request(&"ü".repeat(64), range(0, 0));
    odd.capacity_range.as_mut().unwrap().required_bytes = 3 * MIB + 1;
    let made = client.call_create(odd).unwrap();
    assert_eq!(made.capacity_bytes, 3 * MIB + 4096);
    client.daemon.attach(&made.volume_id);
    assert_eq!(client.daemon.device()["size_bytes"], made.capacity_bytes);
}

#[test]
fn rule_05_what_is_absent_is_deleted_and_not_found_elsewhere() {
    let client = Client::new();
    let unknown = "fast/01234567-89ab-7cde-8f01-23456789abcd";
    for id in [unknown, "nonsense", "fast/a", "/", "fast/../../etc"] {
        client.delete(id).unwrap();
        client.unpublish(id, NODE).unwrap();
        assert_eq!(client.publish(id, &mount()).unwrap_err().code(), Code::NotFound, "{id}");
        assert_eq!(client.get(id).unwrap_err().code(), Code::NotFound, "{id}");
        assert_eq!(client.expand(id, 8).unwrap_err().code(), Code::NotFound, "{id}");
        assert_eq!(client.modify(id, &[]).unwrap_err().code(), Code::NotFound, "{id}");
        assert_eq!(client.validate(id, vec![mount()]).unwrap_err().code(), Code::NotFound);
    }
    // Whether it is absent cannot be known without its pool.
    let gone = "gone/01234567-89ab-7cde-8f01-23456789abcd";
    let refused = [
        client.delete(gone).unwrap_err(),
        client.unpublish(gone, NODE).unwrap_err(),
        client.publish(gone, &mount()).unwrap_err(),
        client.get(gone).unwrap_err(),
        client.expand(gone, 8).unwrap_err(),
    ];
    for refused in refused {
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        assert!(refused.message().contains("the configuration has no pool gone"), "{refused}");
    }
}

#[test]
fn rule_06_a_volume_in_use_is_not_deleted() {
    let client = Client::new();
    let id = client.create("a").volume_id;
    let files = client.node.files("fast");
    client.publish(&id, &mount()).unwrap();
    let refused = client.delete(&id).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains(NODE), "{refused}");
    client.unpublish(&id, NODE).unwrap();
    client.daemon.attach(&id);
    let refused = client.delete(&id).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("fake0"), "{refused}");
    assert_eq!(client.node.files("fast"), files);
    client.daemon.sheave("detach").arg(&id).ok();
    client.delete(&id).unwrap();
}

#[test]
fn rule_07_a_volume_is_published_in_one_way_to_a_node_that_is_known() {
    let client = Client::new();
    let id = client.create("a").volume_id;
    let unknown = client.publish_to(&id, "n2", &mount(), false).unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    assert!(unknown.message().contains("n2"), "{unknown}");
    client.publish(&id, &mount()).unwrap();
    let read_only = client.publish_to(&id, NODE, &mount(), true).unwrap_err();
    let as_block = client.publish(&id, &block()).unwrap_err();
    let other_mode = client.publish(&id, &mode(mount(), Mode::SingleNodeMultiWriter)).unwrap_err();
    for refused in [read_only, as_block, other_mode] {
        assert_eq!(refused.code(), Code::AlreadyExists, "{refused}");
    }
    assert_eq!(client.nodes(&id), [NODE]);
}

#[test]
fn rule_08_a_volume_is_unpublished_when_its_device_is_gone() {
    let client = Client::new();
    let id = client.create("a").volume_id;
    client.publish(&id, &mount()).unwrap();
    client.attach(&id, 1).unwrap();
    for node in [NODE, ""] {
        let refused = client.unpublish(&id, node).unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    }
    assert_eq!(client.nodes(&id), [NODE]);
    client.daemon.sheave("detach").arg(&id).ok();
    client.unpublish(&id, "").unwrap();
    assert_eq!(client.nodes(&id), [] as [&str; 0]);
}

#[test]
fn rule_09_all_seven_access_modes_are_judged() {
    let client = Client::new();
    let id = client.create("a").volume_id;
    let modes = [
        (Mode::SingleNodeWriter, true),
        (Mode::SingleNodeReaderOnly, true),
        (Mode::MultiNodeReaderOnly, true),
        (Mode::MultiNodeSingleWriter, false),
        (Mode::MultiNodeMultiWriter, false),
        (Mode::SingleNodeSingleWriter, true),
        (Mode::SingleNodeMultiWriter, true),
        (Mode::Unknown, false),
    ];
    for (of, can) in modes {
        for capability in [mode(mount(), of), mode(block(), of)] {
            let mut request = client.request(&format!("{of:?}"), range(0, 0));
            request.volume_capabilities = vec![capability.clone()];
            let made = client.call_create(request);
            let published = client.publish(&id, &capability);
            if can {
                made.unwrap();
                published.unwrap();
                client.unpublish(&id, NODE).unwrap();
            } else {
                assert_eq!(made.unwrap_err().code(), Code::InvalidArgument, "{of:?}");
                assert_eq!(published.unwrap_err().code(), Code::InvalidArgument, "{of:?}");
            }
            if of != Mode::Unknown {
                let validated = client.validate(&id, vec![capability.clone()]).unwrap();
                assert_eq!(validated.confirmed.is_some(), can, "{of:?}");
                assert_eq!(validated.message.is_empty(), can, "{validated:?}");
            }
        }
    }
}

#[test]
fn rule_10_what_is_missing_is_an_invalid_argument_and_nothing_happens() {
    let client = Client::new();
    let id = client.create("a").volume_id;
    let files = client.node.files("fast");
    let good = || client.request("b", range(0, 0));
    let mut no_mode = mount();
    no_mode.access_mode = None;
    let mut no_type = mount();
    no_type.access_type = None;
    for wrong in [
        CreateVolumeRequest { name: String::new(), ..good() },
        CreateVolumeRequest { volume_capabilities: Vec::new(), ..good() },
        CreateVolumeRequest { volume_capabilities: vec![mount(), no_mode.clone()], ..good() },
        CreateVolumeRequest { volume_capabilities: vec![no_type.clone()], ..good() },
        CreateVolumeRequest { parameters: HashMap::new(), ..good() },
        CreateVolumeRequest { parameters: parameters("none"), ..good() },
        CreateVolumeRequest { mutable_parameters: parameters("fast"), ..good() },
    ] {
        let refused = client.call_create(wrong).unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    for refused in [
        client.delete("").unwrap_err(),
        client.publish("", &mount()).unwrap_err(),
        client.publish_to(&id, "", &mount(), false).unwrap_err(),
        client.publish(&id, &no_mode).unwrap_err(),
        client.unpublish("", NODE).unwrap_err(),
        client.get("").unwrap_err(),
        client.validate(&id, Vec::new()).unwrap_err(),
        client.validate("", vec![mount()]).unwrap_err(),
        client.modify("", &[]).unwrap_err(),
        client
            .call_expand(ControllerExpandVolumeRequest {
                volume_id: id.clone(),
                ..Default::default()
            })
            .unwrap_err(),
        client.call_health(ControllerGetVolumeHealthRequest::default()).unwrap_err(),
    ] {
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    assert_eq!(client.node.files("fast"), files);
}

#[test]
fn rule_11_a_second_call_is_aborted_at_once_and_the_first_goes_on() {
    let client = Client::new();
    // Calls that change the pool wait, as with a pool that is slow.
    let held = client.hold_pool();
    let mut calls = vec![client.start_create("a"), client.start_create("a")];
    let second = || calls.iter().position(JoinHandle::is_finished);
    assert!(eventually(|| second().is_some()));
    let second = calls.swap_remove(second().unwrap());
    assert_eq!(second.join().unwrap().unwrap_err().code(), Code::Aborted);
    let quickest = (0..20).map(|_| {
        let begun = Instant::now();
        let again = client.call_create(client.request("a", range(0, 0)));
        assert_eq!(again.unwrap_err().code(), Code::Aborted);
        begun.elapsed()
    });
    assert!(quickest.min().unwrap() < Duration::from_millis(50));
    drop(held);
    let made = calls.remove(0).join().unwrap().unwrap();
    assert_eq!(client.create("a"), made, "a later call joins it");
}

#[test]
fn rule_12_and_33_a_pool_that_hangs_is_an_outcome_that_is_not_known() {
    let client = Client::new();
    let id = client.create("a").volume_id;
    let _held = client.hold_pool();
    let begun = Instant::now();
    let uncertain = [
        client.call_create(client.request("b", range(0, 0))).unwrap_err(),
        client.publish(&id, &mount()).unwrap_err(),
    ];
    for error in uncertain {
        let codes = [Code::Aborted, Code::Unavailable, Code::DeadlineExceeded];
        assert!(codes.contains(&error.code()), "{error}");
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "10 s each: {:?}", begun.elapsed());
}

#[test]
fn rule_13_pages_are_stable_and_a_bad_token_is_aborted() {
    let client = Client::new();
    let ids: Vec<_> = (0..5).map(|n| client.create(&format!("v{n}")).volume_id).collect();
    let list = |token: &str, max| {
        let starting_token = token.to_owned();
        client.list(ListVolumesRequest { max_entries: max, starting_token }).unwrap()
    };
    let (first, token) = list("", 2);
    assert_eq!(first, ids[..2]);
    client.delete(&ids[1]).unwrap();
    client.delete(&ids[2]).unwrap();
    let newest = client.create("newest").volume_id;
    let (second, token) = list(&token, 2);
    assert_eq!(second, ids[3..]);
    assert_eq!(list(&token, 2), (vec![newest], String::new()));
    assert_eq!(list("", 0).0.len(), 4);
    for starting_token in ["invalid-token", "fast/a", "5"] {
        let starting_token = starting_token.to_owned();
        let request = ListVolumesRequest { max_entries: 0, starting_token };
        assert_eq!(client.list(request).unwrap_err().code(), Code::Aborted);
    }
    let below = ListVolumesRequest { max_entries: -1, ..Default::default() };
    assert_eq!(client.list(below).unwrap_err().code(), Code::InvalidArgument);
}

#[test]
fn rule_14_no_secret_is_in_a_log_or_a_message() {
    const SECRET: &str = "hunter2-correct-horse";
    let client = Client::new();
    let secrets: HashMap<_, _> = [("password".to_owned(), SECRET.to_owned())].into();
    let mut flagged = mount();
    client.set_flags(&mut flagged, &[SECRET]);
    let mut request = client.request("a", range(0, 0));
    request.secrets = secrets.clone();
    request.volume_capabilities = vec![flagged.clone()];
    let id = client.call_create(request.clone()).unwrap().volume_id;
    client.publish(&id, &flagged).unwrap();
    let mut messages = Vec::new();
    request.parameters.insert(format!("unknown-{}", "x".repeat(2000)), SECRET.into());
    messages.push(client.call_create(request.clone()).unwrap_err());
    request.parameters = parameters("fast");
    request.parameters.insert("limit-bps".into(), SECRET.into());
    messages.push(client.call_create(request.clone()).unwrap_err());
    request.parameters = parameters("fast");
    request.secrets.insert("long".into(), SECRET.repeat(400));
    messages.push(client.call_create(request).unwrap_err());
    let delete = DeleteVolumeRequest { volume_id: id.clone(), secrets };
    messages.push(client.call_delete(delete).unwrap_err());
    for error in messages {
        assert!(!error.message().contains(SECRET) && error.message().len() <= 1024, "{error}");
        assert!(error.details().is_empty() && !error.message().is_empty());
    }
    for log in [client.plugin.log(), client.daemon.log()] {
        assert!(!log.contains(SECRET), "{log}");
    }
}

#[test]
fn rule_15_what_is_too_long_is_refused() {
    let client = Client::new();
    let id = client.create(&"n".repeat(128)).volume_id;
    let mut long = client.request("b", range(0, 0));
    long.name = "n".repeat(129);
    assert_eq!(client.call_create(long).unwrap_err().code(), Code::InvalidArgument);
    let node = "n".repeat(257);
    let refused = client.publish_to(&id, &node, &mount(), false).unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(client.get(&"n".repeat(129)).unwrap_err().code(), Code::InvalidArgument);
    let mut full = client.request("b", range(0, 0));
    full.mutable_parameters.insert("limit-iops".into(), "5".repeat(5000));
    assert_eq!(client.call_create(full).unwrap_err().code(), Code::InvalidArgument);
}

#[test]
fn rule_36_every_publication_has_a_higher_epoch_and_an_old_one_is_refused() {
    let client = Client::new();
    let id = client.create("a").volume_id;
    for epoch in 1..=3 {
        let published = client.publish(&id, &mount()).unwrap();
        assert_eq!(published["epoch"], epoch.to_string());
        let fenced = client.attach(&id, epoch - 1).unwrap_err();
        assert_eq!(fenced.code(), Code::FailedPrecondition, "{fenced}");
        client.attach(&id, epoch).unwrap();
        client.daemon.sheave("detach").arg(&id).ok();
        client.unpublish(&id, NODE).unwrap();
        let fenced = client.attach(&id, epoch).unwrap_err();
        assert_eq!(fenced.code(), Code::FailedPrecondition, "{fenced}");
    }
    client.node.node.check_bare(&client.daemon);
}
