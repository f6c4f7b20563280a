//! Claims and classes that cannot be: the message says what is wrong and what to do, and nothing is
//! made.

use std::collections::HashMap;

use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_csi_proto::v1::volume_capability::{AccessType, MountVolume};
use sheave_csi_proto::v1::{CreateVolumeRequest, VolumeCapability, VolumeContentSource};
use tonic::Code;

use crate::client::{Client, block, mode, mount, range};

fn with(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn of_type(fs_type: &str, group: &str) -> VolumeCapability {
    let (fs_type, volume_mount_group) = (fs_type.to_owned(), group.to_owned());
    let mount_flags = Vec::new();
    let of = MountVolume { fs_type, mount_flags, volume_mount_group };
    VolumeCapability { access_type: Some(AccessType::Mount(of)), ..mount() }
}

/// A class or claim, its code, and parts of its message: what is wrong, and what to do.
type Case = (CreateVolumeRequest, Code, &'static [&'static str]);

fn classes(client: &Client) -> Vec<Case> {
    let class = |pairs: &[(&str, &str)]| {
        let pool = [("pool", "fast")];
        let parameters = with(&[&pool[..], pairs].concat());
        CreateVolumeRequest { parameters, ..client.request("bad", range(0, 0)) }
    };
    let changed = |pairs: &[(&str, &str)]| CreateVolumeRequest {
        mutable_parameters: with(pairs),
        ..client.request("bad", range(0, 0))
    };
    use Code::InvalidArgument as Wrong;
    vec![
        (class(&[("pol", "fast")]), Wrong, &["\"pol\"", "known: pool, front"]),
        (class(&[("pool", "slow")]), Wrong, &["\"slow\"", "configuration: fast, small"]),
        (class(&[("front", "usb")]), Wrong, &["front", "auto, ublk or nbd"]),
        (class(&[("limit-bps", "fast")]), Wrong, &["limit-bps", "such as 100M"]),
        (class(&[("limit-iops", "-1")]), Wrong, &["limit-iops", "such as 5000"]),
        (class(&[("force-unstage-after", "1")]), Wrong, &["force-unstage-after", "from 10"]),
        (changed(&[("pool", "small")]), Wrong, &["pool", "make another class"]),
        (changed(&[("size", "1")]), Wrong, &["\"size\"", "known: "]),
    ]
}

fn claims(client: &Client) -> Vec<Case> {
    let size = |required, limit| client.request("bad", range(required, limit));
    let claim = |capability| CreateVolumeRequest {
        volume_capabilities: vec![mount(), capability],
        ..client.request("bad", range(0, 0))
    };
    let small = CreateVolumeRequest { parameters: with(&[("pool", "small")]), ..size(1 << 13, 0) };
    let source = Some(VolumeContentSource::default());
    let clone = CreateVolumeRequest { volume_content_source: source, ..size(0, 0) };
    let many = Mode::MultiNodeMultiWriter;
    use Code::{InvalidArgument as Wrong, OutOfRange, ResourceExhausted};
    vec![
        (size(2, 1), OutOfRange, &["limit"]),
        (size(1 << 30, 0), OutOfRange, &["pool fast", "at most"]),
        (small, ResourceExhausted, &["pool small", "delete volumes, or raise its capacity"]),
        (clone, Wrong, &["neither snapshots nor clones", "leave out the source"]),
        (claim(mode(mount(), many)), Wrong, &["MULTI_NODE_MULTI_WRITER", "possible: "]),
        (claim(mode(block(), many)), Wrong, &["MULTI_NODE_MULTI_WRITER", "possible: "]),
        (claim(of_type("ntfs", "")), Wrong, &["\"ntfs\"", "use ext4, xfs, btrfs"]),
        (claim(of_type("ext4", "1000")), Wrong, &["volume_mount_group", "fsGroup"]),
    ]
}

#[test]
fn rule_03_rule_04_rule_10_what_cannot_be_made_is_named_and_nothing_is_left() {
    let client = Client::new();
    for (request, code, parts) in classes(&client).into_iter().chain(claims(&client)) {
        for _ in 0..2 {
            let refused = client.call_create(request.clone()).expect_err(parts[0]);
            assert_eq!(refused.code(), code, "{refused}");
            for part in parts {
                assert!(refused.message().contains(part), "no {part:?}: {refused}");
            }
            assert!(refused.details().is_empty() && refused.message().len() <= 1024, "{refused}");
        }
    }
    for pool in ["fast", "small"] {
        assert_eq!(client.node.files(pool), [] as [&str; 0]);
    }
}

/// No pool needs secrets. Those of a class that names some are neither wanted nor kept.
#[test]
fn rule_14_secrets_that_are_missing_or_not_needed_change_nothing() {
    let client = Client::new();
    let request = client.request("a", range(0, 0));
    let made = client.call_create(request.clone()).unwrap();
    let secrets = with(&[("password", "hunter2-correct-horse")]);
    let same = client.call_create(CreateVolumeRequest { secrets, ..request });
    assert_eq!(same.unwrap(), made);
    for name in client.node.files("fast") {
        let file = std::fs::read(client.node.node.file("fast").join(&name)).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&file).contains("hunter2"), "{name}");
    }
}
