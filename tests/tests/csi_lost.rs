//! What an operator takes away under pods that run: a pool of the configuration, its name, the
//! plugin's state. Code, message and log say so; pods go on, and nothing is destroyed.

#[allow(dead_code, reason = "another test with this module needs the rest")]
mod plugin;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use sheave_control::v1 as control;
use sheave_csi_proto::v1::node_server::Node as _;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_csi_proto::v1::{NodeExpandVolumeRequest, VolumeCapability};
use sheave_tests::requests::block;
use sheave_tests::{eventually, on_devices};
use tonic::{Code, Request};

use plugin::{NODE, SIZE, Site, Volume, fails, mount};

/// Has the images in a pool of this name, with these settings, from the next daemon on.
fn rename_pool(site: &mut Site, name: &str, more: &str) {
    let images = site.node.file("images");
    let config = format!("[pools.{name}]\nurl = \"file://{}\"\n{more}", images.display());
    fs::write(site.node.file("daemon.toml"), config).expect("a configuration");
    site.restart_daemon();
    site.restart_plugin();
}

fn remove_pool(site: &mut Site) {
    fs::write(site.node.file("daemon.toml"), "").expect("a configuration");
    site.restart_daemon();
    site.restart_plugin();
}

fn write(site: &Site, capability: &VolumeCapability, byte: u8) {
    let target = site.target("a");
    let file = match *capability == block(Mode::SingleNodeWriter) {
        true => File::options().write(true).open(target),
        false => File::create(target.join("file")),
    };
    let file = file.expect("a file");
    file.write_all_at(&[byte; 4096], 0).and_then(|()| file.sync_all()).expect("written");
}

/// What a controller asks of the daemon.
macro_rules! ask {
    ($site:expr, $rpc:ident, $request:expr) => {{
        let (mut volumes, request) = ($site.volumes.clone(), $request);
        $site.wait(async { volumes.$rpc(request).await }).map(drop)
    }};
}

/// What cannot be done with a volume whose pool is not configured.
fn is_refused(site: &Site, volume: &Volume) {
    let id = || volume.id.clone();
    let path = site.target("a").to_str().expect("UTF-8").to_owned();
    let expand =
        NodeExpandVolumeRequest { volume_id: id(), volume_path: path, ..Default::default() };
    let key = Some(control::get_volume_request::Key::Id(id()));
    let publish = control::PublishVolumeRequest {
        id: id(),
        node: NODE.to_owned(),
        mode: Mode::SingleNodeWriter.into(),
        ..Default::default()
    };
    let answers = [
        site.wait(site.service.node_expand_volume(Request::new(expand))).map(drop),
        ask!(site, get_volume, control::GetVolumeRequest { key }),
        ask!(site, delete_volume, control::DeleteVolumeRequest { id: id(), uses: None }),
        ask!(site, publish_volume, publish),
        ask!(
            site,
            unpublish_volume,
            control::UnpublishVolumeRequest { id: id(), ..Default::default() }
        ),
        ask!(site, resize_volume, control::ResizeVolumeRequest { id: id(), ..Default::default() }),
        ask!(site, set_volume, control::SetVolumeRequest { id: id(), ..Default::default() }),
    ];
    for answer in answers {
        fails(answer, Code::FailedPrecondition, "the configuration has no pool fast");
    }
}

/// No program has a raw device open meanwhile.
fn is_not_taken_by_another_id(site: &Site, volume: &Volume, pool: &str) {
    let id = volume.id.replace("fast/", &format!("{pool}/"));
    let staging = site.node.file("by-another-id");
    fs::create_dir(&staging).expect("a directory");
    fails(
        site.stage_at(&Volume { id, ..volume.clone() }, &staging),
        Code::FailedPrecondition,
        &format!("as {}; detach it first", volume.id),
    );
    fs::remove_dir(&staging).expect("nothing is there");
    assert_eq!(site.daemon.device()["volume_id"], *volume.id);
}

#[test]
fn rule_05_a_pool_that_is_not_configured_any_more_is_named_and_its_devices_are_ended() {
    let test = "rule_05_a_pool_that_is_not_configured_any_more_is_named_and_its_devices_are_ended";
    on_devices(test, || {
        let mut site = Site::new();
        for (name, capability) in [
            ("files", mount(Mode::SingleNodeWriter, "ext4")),
            ("raw", block(Mode::SingleNodeWriter)),
        ] {
            for new_name in [None, Some("renamed")] {
                let mut volume = site.volume(name, SIZE, capability.clone());
                let other = site.volume("other", SIZE, mount(Mode::SingleNodeWriter, "ext4"));
                site.stage(&volume).expect("staged");
                site.publish(&volume, "a", false).expect("published");
                write(&site, &capability, 1);
                match new_name {
                    Some(name) => rename_pool(&mut site, name, ""),
                    None => remove_pool(&mut site),
                }
                site.daemon.wait_for_recovery();
                site.daemon.wait_for_log("the configuration lacks its pool");
                assert!(site.daemon.log().contains(&volume.id));
                assert_eq!(site.daemon.device()["volume_id"], *volume.id);
                write(&site, &capability, 2);
                is_refused(&site, &volume);
                site.stage(&volume).expect("staged already");
                site.publish(&volume, "a", false).expect("published already");
                if let Some(name) = new_name {
                    is_not_taken_by_another_id(&site, &volume, name);
                }
                write(&site, &capability, 3);
                fails(site.unstage(&volume), Code::FailedPrecondition, "still mounted");
                for _ in 0..2 {
                    site.unpublish(&volume, "a").expect("unpublished");
                    site.unstage(&volume).expect("unstaged");
                }
                site.check_bare();
                for volume in [&volume, &other] {
                    fails(site.stage(volume), Code::FailedPrecondition, "put the pool back");
                    site.check_bare();
                }
                rename_pool(&mut site, "fast", "");
                site.unpublish_from_node(&volume);
                site.publish_to_node(&mut volume, NODE);
                site.stage(&volume).expect("staged");
                site.publish(&volume, "a", false).expect("published");
                let file = match name {
                    "raw" => fs::read(site.image(&volume)),
                    _ => fs::read(site.target("a").join("file")),
                };
                assert_eq!(file.expect("what was written")[..4096], [3; 4096]);
                site.unpublish(&volume, "a").expect("unpublished");
                site.unstage(&volume).expect("unstaged");
                site.unpublish_from_node(&volume);
                site.unpublish_from_node(&other);
            }
        }
    });
}

/// Whether another node has used the volume since is written in the pool.
#[test]
fn rule_37_a_volume_of_a_shared_pool_is_not_written_while_the_pool_is_not_configured() {
    let test = "rule_37_a_volume_of_a_shared_pool_is_not_written_while_the_pool_is_not_configured";
    on_devices(test, || {
        let mut site = Site::new();
        rename_pool(&mut site, "fast", "shared = true\n");
        let volume = site.volume("raw", SIZE, block(Mode::SingleNodeWriter));
        site.stage(&volume).expect("staged");
        let waits = |site: &Site| {
            let why = site.daemon.device()["waiting"].as_str().unwrap_or_default().to_owned();
            why.contains("nodes shared its pool")
        };
        remove_pool(&mut site);
        assert!(eventually(|| waits(&site)), "{}", site.daemon.log());
        fails(site.unstage(&volume), Code::Unavailable, "nodes shared its pool");
        // Where it is said to be of this node alone, nothing is known of other nodes either.
        rename_pool(&mut site, "fast", "");
        assert!(eventually(|| waits(&site)), "{}", site.daemon.log());
        rename_pool(&mut site, "fast", "shared = true\n");
        site.daemon.wait_for_recovery();
        // What was begun is ended first.
        site.unstage(&volume).expect("unstaged");
        site.stage(&volume).expect("staged");
        site.publish(&volume, "a", false).expect("published");
        write(&site, &volume.capability, 7);
        site.unpublish(&volume, "a").expect("unpublished");
        site.unstage(&volume).expect("unstaged");
        assert_eq!(fs::read(site.image(&volume)).expect("the image")[..4096], [7; 4096]);
        site.check_bare();
    });
}

#[test]
fn rule_30_pods_are_ended_though_the_state_of_the_plugin_was_removed() {
    on_devices("rule_30_pods_are_ended_though_the_state_of_the_plugin_was_removed", || {
        let mut site = Site::new();
        for capability in [mount(Mode::SingleNodeWriter, "xfs"), block(Mode::SingleNodeWriter)] {
            for restarted in [false, true] {
                let name = format!("{restarted}");
                let mut volume = site.volume(&name, 320 << 20, capability.clone());
                site.stage(&volume).expect("staged");
                site.publish(&volume, "a", false).expect("published");
                write(&site, &capability, 1);
                fs::remove_dir_all(site.node.file("state")).expect("removed");
                if restarted {
                    site.restart_daemon();
                    site.restart_plugin();
                    site.daemon.wait_for_recovery();
                }
                // It was published anew, which the daemon compares.
                let old = volume.publication;
                volume.publication.epoch = old.epoch.map(|epoch| epoch + 1);
                fails(site.stage(&volume), Code::FailedPrecondition, "epoch");
                volume.publication = old;
                site.publish(&volume, "a", false).expect("published already");
                write(&site, &capability, 2);
                fs::remove_dir_all(site.node.file("state")).expect("removed");
                site.unpublish(&volume, "a").expect("unpublished");
                site.unstage(&volume).expect("unstaged");
                site.check_bare();
                site.unpublish_from_node(&volume);
                ask!(
                    site,
                    delete_volume,
                    control::DeleteVolumeRequest { id: volume.id.clone(), uses: None }
                )
                .expect("deleted");
            }
        }
    });
}
