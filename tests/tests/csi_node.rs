//! The CSI service Node with a real daemon, whose devices are block devices of the real kernel.

#[allow(dead_code, reason = "another test with this module needs the rest")]
mod plugin;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use sheave_csi_proto::v1::node_server::Node as _;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_csi_proto::v1::{
    NodeExpandVolumeRequest, NodeGetCapabilitiesRequest, NodeGetInfoRequest,
    NodeGetVolumeHealthRequest, NodeGetVolumeStatsRequest,
};
use sheave_tests::requests::block;
use sheave_tests::{eventually, on_devices};
use tonic::{Code, Request, Status};

use plugin::{NODE, SIZE, Site, Volume, fails, mount};

/// The plugin is another process at each step.
#[test]
fn rule_30_a_claim_lives_from_its_first_mount_to_its_last() {
    on_devices("rule_30_a_claim_lives_from_its_first_mount_to_its_last", || {
        let mut site = Site::new();
        let volume = site.volume("claim", SIZE, mount(Mode::SingleNodeWriter, ""));
        assert_eq!(site.record(&volume).formatted, "");
        for round in 0..2 {
            let step = |site: &mut Site, call: &dyn Fn(&Site) -> Result<(), Status>| {
                for _ in 0..2 {
                    call(site).expect("done, also once more");
                    site.restart_plugin();
                }
            };
            step(&mut site, &|site| site.stage(&volume));
            let record = site.record(&volume);
            assert_eq!((record.formatted.as_str(), record.formatting), ("ext4", false));
            step(&mut site, &|site| site.publish(&volume, "a", false));
            let file = site.target("a").join("file");
            if round > 0 {
                assert_eq!(fs::read(&file).expect("the file"), vec![7; 1 << 20]);
            }
            fs::write(&file, vec![7; 1 << 20]).expect("written");
            check_stats(&site, &volume);
            step(&mut site, &|site| site.unpublish(&volume, "a"));
            step(&mut site, &|site| site.unstage(&volume));
            site.check_bare();
        }
        site.unpublish_from_node(&volume);
    });
}

fn check_stats(site: &Site, volume: &Volume) {
    let stats = NodeGetVolumeStatsRequest {
        volume_id: volume.id.clone(),
        volume_path: site.target("a").to_str().expect("UTF-8").to_owned(),
        ..NodeGetVolumeStatsRequest::default()
    };
    let call = site.service.node_get_volume_stats(Request::new(stats.clone()));
    let answer = site.wait(call).expect("statistics").into_inner();
    assert_eq!(answer.usage.len(), 2);
    let bytes = &answer.usage[0];
    assert!(bytes.total > 40 << 20 && bytes.used >= 1 << 20, "{bytes:?}");
    assert!(!answer.volume_condition.expect("a condition").abnormal);
    let gone = NodeGetVolumeStatsRequest { volume_path: "/no/such".to_owned(), ..stats };
    let call = site.service.node_get_volume_stats(Request::new(gone));
    fails(site.wait(call), Code::NotFound, "is not at");
    let health = NodeGetVolumeHealthRequest { volume_id: volume.id.clone(), ..Default::default() };
    let answer = site.wait(site.service.node_get_volume_health(Request::new(health)));
    let health = answer.expect("its health").into_inner().volume_health.expect("its health");
    assert_eq!(health.health_statuses, []);
}

/// The table of second calls (the specification, "NodePublishVolume"), for all modes.
#[test]
fn rule_09_a_second_place_or_other_arguments_depend_on_the_mode() {
    on_devices("rule_09_a_second_place_or_other_arguments_depend_on_the_mode", || {
        let site = Site::new();
        let modes = [
            (Mode::SingleNodeWriter, false),
            (Mode::MultiNodeSingleWriter, true),
            (Mode::SingleNodeSingleWriter, false),
            (Mode::SingleNodeMultiWriter, true),
            (Mode::MultiNodeReaderOnly, true),
            (Mode::SingleNodeReaderOnly, false),
        ];
        for (mode, is_shared) in modes {
            let reads = matches!(mode, Mode::MultiNodeReaderOnly | Mode::SingleNodeReaderOnly);
            // Content first, since readers find nothing on a new volume.
            let mut volume =
                site.volume(mode.as_str_name(), SIZE, mount(Mode::SingleNodeWriter, "ext4"));
            if reads {
                site.stage(&volume).expect("staged");
                site.unstage(&volume).expect("unstaged");
            }
            site.unpublish_from_node(&volume);
            // The pool has no other mode for a writer with readers elsewhere.
            let is_known = mode != Mode::MultiNodeSingleWriter;
            let published = if is_known { mode } else { Mode::SingleNodeMultiWriter };
            volume.capability = mount(published, "ext4");
            site.publish_to_node(&mut volume, NODE);
            volume.capability = mount(mode, "ext4");
            check_second_calls(&site, &volume, is_shared, reads);
            site.unstage(&volume).expect("unstaged");
            site.check_bare();
        }
        let mut volume = site.volume("shared", SIZE, block(Mode::SingleNodeMultiWriter));
        volume.capability = block(Mode::MultiNodeMultiWriter);
        check_second_calls(&site, &volume, true, false);
        site.publish(&volume, "a", true).expect("published for reading only");
        site.unpublish(&volume, "a").expect("unpublished");
        site.unstage(&volume).expect("unstaged");
    });
}

fn check_second_calls(site: &Site, volume: &Volume, is_shared: bool, reads: bool) {
    fails(site.publish(volume, "a", false), Code::FailedPrecondition, "not staged");
    site.stage(volume).expect("staged");
    site.publish(volume, "a", false).expect("published");
    site.publish(volume, "a", false).expect("published already");
    let is_block = fs::metadata(site.target("a")).expect("there").file_type().is_block_device();
    if !reads && !is_block {
        fails(site.publish(volume, "a", true), Code::AlreadyExists, "other arguments");
    }
    if reads {
        let written = fs::write(site.target("a").join("file"), "x");
        assert!(written.is_err(), "the device refuses writes");
    }
    if is_shared {
        site.publish(volume, "b", false).expect("published at a second place");
        site.unpublish(volume, "b").expect("unpublished");
    } else {
        let second = site.publish(volume, "b", false);
        fails(second, Code::FailedPrecondition, "allows one place");
    }
    fails(site.unstage(volume), Code::FailedPrecondition, "still mounted");
    site.unpublish(volume, "a").expect("unpublished");
}

#[test]
fn rule_39_one_pod_or_many_write_and_readers_have_a_device_that_refuses_writes() {
    let test = "rule_39_one_pod_or_many_write_and_readers_have_a_device_that_refuses_writes";
    on_devices(test, || {
        let site = Site::new();
        let mut volume = site.volume("one", SIZE, mount(Mode::SingleNodeSingleWriter, "ext4"));
        let mut use_as = |mode: Mode, then: &dyn Fn(&Volume)| {
            site.unpublish_from_node(&volume);
            volume.capability = mount(mode, "ext4");
            site.publish_to_node(&mut volume, NODE);
            site.stage(&volume).expect("staged");
            site.publish(&volume, "a", false).expect("published");
            then(&volume);
            site.unpublish(&volume, "a").expect("unpublished");
            site.unstage(&volume).expect("unstaged");
            site.check_bare();
        };
        use_as(Mode::SingleNodeSingleWriter, &|volume| {
            let second = site.publish(volume, "b", false);
            fails(second, Code::FailedPrecondition, "allows one place");
            assert!(!site.target("b").exists());
        });
        use_as(Mode::SingleNodeMultiWriter, &|volume| {
            site.publish(volume, "b", false).expect("published");
            for pod in ["a", "b"] {
                fs::write(site.target(pod).join(pod), pod).expect("written");
            }
            site.unpublish(volume, "b").expect("unpublished");
        });
        for mode in [Mode::SingleNodeReaderOnly, Mode::MultiNodeReaderOnly] {
            use_as(mode, &|volume| {
                let before = fs::read(site.image(volume)).expect("the image");
                let path = site.daemon.device()["device"].as_str().expect("a path").to_owned();
                let device = fs::File::options().write(true).open(&path);
                let written = device.and_then(|device| {
                    device.write_all_at(&[7; 4096], 0).and_then(|()| device.sync_all())
                });
                written.expect_err("the device itself refuses it");
                let file = fs::read_to_string(site.target("a").join("b"));
                assert_eq!(file.expect("the file"), "b");
                assert!(fs::read(site.image(volume)).expect("the image") == before, "changed");
            });
        }
    });
}

#[test]
fn rule_36_rule_37_only_the_newest_publication_of_this_node_is_staged() {
    on_devices("rule_36_rule_37_only_the_newest_publication_of_this_node_is_staged", || {
        let site = Site::new();
        let mut volume = site.volume("moved", SIZE, mount(Mode::SingleNodeWriter, "ext4"));
        let old = volume.clone();
        site.unpublish_from_node(&volume);
        fails(site.stage(&volume), Code::FailedPrecondition, "not published");
        site.publish_to_node(&mut volume, "node-2");
        fails(site.stage(&old), Code::FailedPrecondition, "not published");
        fails(site.stage(&volume), Code::FailedPrecondition, "not published");
        site.check_bare();
        site.unpublish_from_node(&volume);
        site.publish_to_node(&mut volume, NODE);
        fails(site.stage(&old), Code::FailedPrecondition, "epoch");
        // A caller that does not know the epoch has the one of this node.
        let unknown = Volume { publication: Default::default(), ..volume.clone() };
        site.stage(&unknown).expect("staged");
        site.stage(&volume).expect("staged already");
        fails(site.publish(&old, "a", false), Code::FailedPrecondition, "anew");
        site.publish(&volume, "a", false).expect("published");
        site.unpublish(&volume, "a").expect("unpublished");
        site.unstage(&volume).expect("unstaged");
        site.check_bare();
        let mut absent = volume.clone();
        absent.id = "fast/6f7c9c1e-7c35-4a4c-9d8e-0d5e3d0f0a01".to_owned();
        fails(site.stage(&absent), Code::NotFound, "");
        site.unstage(&absent).expect("done");
        site.unpublish(&absent, "a").expect("done");
    });
}

/// A daemon dies, as it may at any time; the pod's writes go on, and so does the plugin.
#[test]
fn rule_30_a_killed_daemon_costs_a_pod_no_error() {
    on_devices("rule_30_a_killed_daemon_costs_a_pod_no_error", || {
        let mut site = Site::new();
        let volume = site.volume("kept", SIZE, mount(Mode::SingleNodeWriter, "ext4"));
        site.stage(&volume).expect("staged");
        site.publish(&volume, "a", false).expect("published");
        let (ended, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
        let file = site.target("a").join("file");
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut file = fs::File::create(&file).expect("a file");
                while !ended.load(Relaxed) {
                    file.write_all(&[7; 4096]).expect("written");
                    file.sync_all().expect("synced");
                    rounds.fetch_add(1, Relaxed);
                }
            });
            let goes_on = || {
                let before = rounds.load(Relaxed);
                assert!(eventually(|| rounds.load(Relaxed) > before + 5), "it stands still");
            };
            for _ in 0..3 {
                goes_on();
                site.restart_daemon();
                site.restart_plugin();
            }
            goes_on();
            ended.store(true, Relaxed);
            writer.join().expect("no error");
        });
        let len = fs::metadata(&file).expect("the file").len();
        assert_eq!(len, rounds.load(Relaxed) * 4096);
        // The channels connect anew.
        assert!(eventually(|| site.stage(&volume).is_ok()));
        site.publish(&volume, "a", false).expect("published already");
        site.unpublish(&volume, "a").expect("unpublished");
        site.unstage(&volume).expect("unstaged");
        site.check_bare();
    });
}

/// The daemon does not run at all for a while, though its sockets are there.
#[test]
fn rule_33_calls_answer_within_10_seconds_when_the_daemon_hangs() {
    on_devices("rule_33_calls_answer_within_10_seconds_when_the_daemon_hangs", || {
        let site = Site::new();
        let volume = site.volume("hung", SIZE, mount(Mode::SingleNodeWriter, "ext4"));
        site.daemon.signal("STOP");
        let begun = Instant::now();
        let status = site.stage(&volume).expect_err("it cannot be staged");
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        let open = [Code::Aborted, Code::Unavailable, Code::DeadlineExceeded];
        assert!(open.contains(&status.code()), "{status}");
        let begun = Instant::now();
        fails(site.unstage(&volume), Code::Aborted, "going on");
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        site.daemon.signal("CONT");
        assert!(eventually(|| site.stage(&volume).is_ok()), "it goes on");
        site.unstage(&volume).expect("unstaged");
        site.check_bare();
    });
}

#[test]
fn raw_block_volumes_are_devices_and_never_formatted() {
    on_devices("raw_block_volumes_are_devices_and_never_formatted", || {
        let site = Site::new();
        let mut volume = site.volume("raw", SIZE, block(Mode::SingleNodeWriter));
        site.stage(&volume).expect("staged");
        assert_eq!(site.record(&volume).formatted, "block");
        site.publish(&volume, "a", false).expect("published");
        let place = fs::metadata(site.target("a")).expect("the place");
        assert!(place.file_type().is_block_device());
        let data = vec![9; 1 << 20];
        let mut device = fs::File::options().write(true).open(site.target("a")).expect("open");
        device.write_all(&data).expect("written");
        device.sync_all().expect("synced");
        drop(device);
        let stats = NodeExpandVolumeRequest {
            volume_id: volume.id.clone(),
            volume_path: site.target("a").to_str().expect("UTF-8").to_owned(),
            ..NodeExpandVolumeRequest::default()
        };
        let size = site.wait(site.service.node_expand_volume(Request::new(stats)));
        assert_eq!(size.expect("its size").into_inner().capacity_bytes, SIZE as i64);
        site.unpublish(&volume, "a").expect("unpublished");
        site.unstage(&volume).expect("unstaged");
        site.unpublish_from_node(&volume);
        volume.capability = mount(Mode::SingleNodeWriter, "ext4");
        site.publish_to_node(&mut volume, NODE);
        fails(site.stage(&volume), Code::FailedPrecondition, "unknown data");
        site.check_bare();
    });
}

/// A pod may have a raw device closed for a moment, also when the daemon is upgraded.
#[test]
fn a_stopped_daemon_leaves_devices_of_pods_to_the_next_one_though_they_are_not_open() {
    let test = "a_stopped_daemon_leaves_devices_of_pods_to_the_next_one_though_they_are_not_open";
    on_devices(test, || {
        let mut site = Site::new();
        let volume = site.volume("raw", SIZE, block(Mode::SingleNodeWriter));
        site.stage(&volume).expect("staged");
        site.publish(&volume, "a", false).expect("published");
        let target = site.target("a");
        let write = |at: u64, byte: u8| {
            let device = fs::File::options().write(true).open(&target).expect("open");
            device.write_all_at(&[byte; 4096], at).expect("written");
            device.sync_all().expect("synced");
        };
        write(0, 9);
        let own = site.node.kernel.scratch().filled("own.img", 1 << 20);
        let device = site.daemon.attach(&own);
        site.stop_daemon();
        assert!(!device.exists(), "the operator's is ended as before");
        thread::scope(|scope| {
            // It waits for the next daemon, and for nothing else.
            let written = scope.spawn(|| write(8192, 7));
            assert!(eventually(|| site.node.kernel.in_flight() > 0 || written.is_finished()));
            assert!(!written.is_finished(), "nothing serves it");
            site.start_daemon();
            written.join().expect("no error");
        });
        site.daemon.wait_for_recovery();
        let image = fs::read(site.image(&volume)).expect("the image");
        assert_eq!((&image[..4096], &image[8192..][..4096]), (&[9; 4096][..], &[7; 4096][..]));
        // That it is a pod's is known to the next one, too.
        site.stop_daemon();
        site.start_daemon();
        site.daemon.wait_for_recovery();
        write(4096, 5);
        site.restart_plugin();
        site.unpublish(&volume, "a").expect("unpublished");
        site.unstage(&volume).expect("unstaged");
        let image = fs::read(site.image(&volume)).expect("the image");
        let bytes = [0, 4096, 8192].map(|at: usize| image[at]);
        assert_eq!(bytes, [9, 5, 7]);
        site.check_bare();
    });
}

#[test]
fn a_stopped_daemon_serves_what_pods_use_until_the_plugin_detaches_it() {
    on_devices("a_stopped_daemon_serves_what_pods_use_until_the_plugin_detaches_it", || {
        let mut site = Site::new();
        let volume = site.volume("used", SIZE, mount(Mode::SingleNodeWriter, "ext4"));
        site.stage(&volume).expect("staged");
        site.publish(&volume, "a", false).expect("published");
        site.daemon.signal("TERM");
        site.daemon.wait_for_log("served on, until");
        let mut file = fs::File::create(site.target("a").join("file")).expect("a file");
        file.write_all(&[7; 4096]).expect("written");
        file.sync_all().expect("synced");
        drop(file);
        site.unpublish(&volume, "a").expect("unpublished");
        site.unstage(&volume).expect("unstaged");
        site.daemon.ends_well();
        assert_eq!(site.node.records(), 0);
    });
}

/// What the operator has written to a volume stays, whatever its record said before.
#[test]
fn rule_16_what_the_operator_had_attached_is_not_formatted() {
    on_devices("rule_16_what_the_operator_had_attached_is_not_formatted", || {
        let site = Site::new();
        for name in ["never", "begun"] {
            let mut volume = site.volume(name, SIZE, mount(Mode::SingleNodeWriter, "ext4"));
            if name == "begun" {
                site.mark_begun(&volume, "ext4");
            }
            site.unpublish_from_node(&volume);
            let device = site.daemon.attach(&volume.id);
            let mut file = fs::File::options().write(true).open(device).expect("the device");
            file.write_all(&[7; 4096]).expect("written");
            file.sync_all().expect("synced");
            drop(file);
            site.daemon.sheave("detach").arg(&volume.id).ok();
            site.publish_to_node(&mut volume, NODE);
            fails(site.stage(&volume), Code::FailedPrecondition, "raw block device");
            site.check_bare();
            assert_eq!(site.record(&volume).formatted, "block");
            assert_eq!(fs::read(site.image(&volume)).expect("the image")[..4096], [7; 4096]);
        }
    });
}

/// Where no superblock can be, and no sample is taken.
#[test]
fn rule_16_a_single_byte_anywhere_in_an_image_keeps_it_from_being_formatted() {
    on_devices("rule_16_a_single_byte_anywhere_in_an_image_keeps_it_from_being_formatted", || {
        let site = Site::new();
        let volume = site.volume("a", 1 << 30, mount(Mode::SingleNodeWriter, "ext4"));
        let image = fs::File::options().write(true).open(site.image(&volume)).expect("the image");
        image.write_all_at(&[7], (777 << 20) + 54_321).expect("written");
        image.sync_all().expect("synced");
        fails(site.stage(&volume), Code::FailedPrecondition, "although it was never used");
        site.check_bare();
        assert_eq!(site.record(&volume).formatted, "");
    });
}

#[test]
fn the_node_says_what_it_is_and_can() {
    on_devices("the_node_says_what_it_is_and_can", || {
        let site = Site::new();
        let info = site.wait(site.service.node_get_info(Request::new(NodeGetInfoRequest {})));
        let info = info.expect("its name").into_inner();
        assert_eq!(info.node_id, NODE);
        let segments = info.accessible_topology.expect("a topology").segments;
        assert_eq!(segments["topology.csi.sheave.dev/node"], NODE);
        let request = Request::new(NodeGetCapabilitiesRequest {});
        let answer = site.wait(site.service.node_get_capabilities(request));
        assert!(answer.expect("capabilities").into_inner().capabilities.len() >= 5);
    });
}
