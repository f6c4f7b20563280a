//! The node engine stages volumes on loop devices: what is formatted, and what never is.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use sheave_node::{Error, Fs, Kind, Severity};
use sheave_tests::{
    Run, Site, fs_types, has_fs, in_namespace, may_grow, refused, skip, system_path,
};

/// Large enough for each type.
const SIZE: u64 = 320 << 20;

#[test]
fn rule_16_a_new_volume_is_formatted_once_and_keeps_its_files() {
    let test = "rule_16_a_new_volume_is_formatted_once_and_keeps_its_files";
    in_namespace(test, || {
        for fs in fs_types(test) {
            let site = Site::new();
            let maker = format!("mkfs.{}", fs.name());
            site.count_tool(&maker);
            site.volumes.create("v", SIZE);
            let file = site.staging().join("file");
            for round in 0..3 {
                let node = site.node();
                node.stage(site.stage_request(Some(fs))).expect("staged");
                node.stage(site.stage_request(Some(fs))).expect("staged already");
                assert_eq!(site.volumes.recorded("v"), format!("done {}", fs.name()));
                if round > 0 {
                    assert_eq!(fs::read_to_string(&file).expect("the file"), "kept");
                }
                fs::write(&file, "kept").expect("written");
                node.unstage("v", &site.staging()).expect("unstaged");
                node.unstage("v", &site.staging()).expect("unstaged already");
                site.check_bare();
            }
            assert_eq!(site.tool_runs(&maker), 1, "{maker}");
        }
    });
}

#[test]
fn rule_16_what_cannot_be_read_is_not_formatted() {
    let test = "rule_16_what_cannot_be_read_is_not_formatted";
    in_namespace(test, || {
        let site = Site::new();
        site.count_tool("mkfs.ext4");
        let image = site.volumes.create("v", SIZE);
        // Its end cannot be read any more once it is a device.
        let cut = image.clone();
        site.volumes.strike(
            "attached",
            Box::new(move || {
                fs::File::options()
                    .write(true)
                    .open(&cut)
                    .and_then(|f| f.set_len(SIZE / 2))
                    .expect("cut");
                Ok(())
            }),
        );
        let error = site.node().stage(site.stage_request(Some(Fs::Ext4))).expect_err("unreadable");
        assert_eq!(error.kind(), Kind::Unavailable, "{error}");
        assert!(error.to_string().contains("cannot be read"), "{error}");
        assert_eq!(site.tool_runs("mkfs.ext4"), 0);
        assert_eq!(site.volumes.recorded("v"), "never");
        // It is open what comes of it, and it can be undone or tried again.
        site.volumes.strike_no_more();
        fs::File::options().write(true).open(&image).and_then(|f| f.set_len(SIZE)).expect("whole");
        site.node().stage(site.stage_request(Some(Fs::Ext4))).expect("staged");
    });
}

/// A call that looked unfinished may have ended before its volume is taken away as such.
#[test]
fn rule_35_only_what_a_call_has_left_in_the_middle_is_taken_away_as_unfinished() {
    let test = "rule_35_only_what_a_call_has_left_in_the_middle_is_taken_away_as_unfinished";
    in_namespace(test, || {
        let site = Site::new();
        site.volumes.create("v", SIZE);
        let node = site.node();
        node.unstage_unfinished("v", "csi").expect("there is nothing");
        node.stage(site.stage_request(Some(Fs::Ext4))).expect("staged");
        node.unstage_unfinished("v", "csi").expect("it is finished");
        node.publish(site.publish_request("a", Some(Fs::Ext4))).expect("it is still staged");
        node.unpublish("v", &site.target("a")).expect("unpublished");
        node.unstage("v", &site.staging()).expect("unstaged");
        let away = || Err(Error::new(Kind::Unavailable, "away"));
        site.volumes.strike("attached", Box::new(away));
        node.stage(site.stage_request(Some(Fs::Ext4))).expect_err("it ends in the middle");
        site.volumes.strike_no_more();
        assert_eq!(node.unfinished("csi").expect("the states").len(), 1);
        node.unstage_unfinished("v", "docker").expect("it is of another user");
        assert!(site.volumes.loop_device("v").is_some());
        node.unstage_unfinished("v", "csi").expect("taken away");
        site.check_bare();
    });
}

/// Static volumes, raw ones, other types, partitions, encrypted ones, and unknown data.
#[test]
fn rule_16_rule_19_what_may_hold_data_is_neither_formatted_nor_changed() {
    let test = "rule_16_rule_19_what_may_hold_data_is_neither_formatted_nor_changed";
    in_namespace(test, || {
        type Fill = fn(&Path);
        let nothing: Fill = |_| {};
        let mut cases: Vec<(&str, Fill, &str)> = vec![
            ("static", nothing, "never formatted"),
            ("done block", nothing, "raw block device"),
            ("done ext4", nothing, "was formatted as ext4"),
            ("never", |image| write(image, 0, b"LUKS\xba\xbe\x00\x01"), "LUKS"),
            ("never", |image| write(image, 512, b"EFI PART"), "GPT"),
            ("never", |image| write(image, 5 << 20, b"data"), "unknown data"),
            ("done xfs", |image| drop(mkfs("mkfs.ext4 -q -F", image)), "record says xfs"),
            ("begun ext4", |image| write(image, 0, b"LUKS\xba\xbe\x00\x01"), "LUKS"),
        ];
        if has_fs(Fs::Xfs) {
            cases.push(("never", |image| drop(mkfs("mkfs.xfs -q", image)), "holds xfs"));
            cases.push(("static", |image| drop(mkfs("mkfs.xfs -q", image)), "holds xfs"));
            cases.push(("done xfs", |image| drop(mkfs("mkfs.xfs -q", image)), "holds xfs"));
        }
        for (record, fill, why) in cases {
            let site = Site::new();
            let image = site.volumes.create("v", SIZE);
            fill(&image);
            site.volumes.set_record("v", record);
            let before = sum(&image);
            let node = site.node();
            for _ in 0..2 {
                refused(node.stage(site.stage_request(Some(Fs::Ext4))), why);
                site.check_bare();
            }
            assert_eq!(sum(&image), before, "{record}: {why}");
            assert_eq!(site.volumes.recorded("v"), record);
        }
    });
}

/// A program that has the device for itself keeps mkfs from it.
#[test]
fn rule_16_a_device_that_is_in_use_is_not_formatted() {
    let test = "rule_16_a_device_that_is_in_use_is_not_formatted";
    in_namespace(test, || {
        let site = Site::new();
        let image = site.volumes.create("v", SIZE);
        let user = Arc::new(Mutex::new(None));
        let (its, users) = (image.clone(), Arc::clone(&user));
        let take = move || {
            let device = Run::new("losetup").args("-n -O NAME -j").arg(&its).ok();
            let alone = OFlags::EXCL.bits().cast_signed();
            let opened = fs::File::options().read(true).custom_flags(alone).open(device.trim_end());
            *users.lock().expect("no panic") = Some(opened.expect("the device"));
            Ok(())
        };
        site.volumes.strike("attached", Box::new(take));
        let error = site.node().stage(site.stage_request(Some(Fs::Ext4))).expect_err("in use");
        assert!(error.to_string().contains("in use"), "{error}");
        assert_eq!(site.volumes.recorded("v"), "begun ext4");
        assert_eq!(fs::metadata(&image).expect("the image").blocks(), 0);
        site.volumes.strike_no_more();
        drop(user.lock().expect("no panic").take());
        site.node().stage(site.stage_request(Some(Fs::Ext4))).expect("staged");
    });
}

#[test]
fn rule_18_a_volume_that_has_lost_its_superblocks_is_unhealthy_and_never_formatted() {
    let test = "rule_18_a_volume_that_has_lost_its_superblocks_is_unhealthy_and_never_formatted";
    in_namespace(test, || {
        let site = Site::new();
        site.count_tool("mkfs.ext4");
        let image = site.volumes.create("v", SIZE);
        let node = site.node();
        let stage = || node.stage(site.stage_request(Some(Fs::Ext4)));
        stage().expect("staged");
        node.unstage("v", &site.staging()).expect("unstaged");
        assert_eq!(node.health("v").expect("its health"), []);
        let whole = fs::read(&image).expect("the image");
        // The main superblock, then all of it.
        for len in [4096, whole.len()] {
            write(&image, 0, &vec![0; len]);
            let damaged = sum(&image);
            refused(stage(), "nothing is formatted");
            assert_eq!(sum(&image), damaged);
            let problems = node.health("v").expect("its health");
            assert_eq!(problems[0].severity, Severity::DataLoss, "{problems:?}");
            site.check_bare();
        }
        write(&image, 0, &whole);
        stage().expect("staged");
        assert_eq!(node.health("v").expect("its health"), []);
        assert_eq!(site.tool_runs("mkfs.ext4"), 1);
    });
}

#[test]
fn rule_20_only_an_unclean_ext4_is_checked_and_a_damaged_one_is_not_mounted() {
    let test = "rule_20_only_an_unclean_ext4_is_checked_and_a_damaged_one_is_not_mounted";
    in_namespace(test, || {
        let site = Site::new();
        site.count_tool("e2fsck");
        let image = site.volumes.create("v", SIZE);
        let node = site.node();
        let stage = || node.stage(site.stage_request(Some(Fs::Ext4)));
        let unstage = || node.unstage("v", &site.staging()).expect("unstaged");
        stage().expect("staged");
        fs::write(site.staging().join("file"), "kept").expect("written");
        Run::new("sync").ok();
        // As after a power failure: with a journal to be replayed.
        let crashed = fs::read(&image).expect("the image");
        unstage();
        assert_eq!(site.tool_runs("e2fsck"), 0, "a clean one needs no check");
        write(&image, 0, &crashed);
        stage().expect("staged after a crash");
        assert_eq!(site.tool_runs("e2fsck"), 1);
        assert_eq!(fs::read_to_string(site.staging().join("file")).expect("the file"), "kept");
        unstage();
        // What cannot be repaired without a decision: no root directory.
        let debugfs = |request: &str| Run::new(system_path("debugfs")).args("-w -R").arg(request);
        debugfs("clri <2>").arg(&image).ok();
        debugfs("ssv state 2").arg(&image).ok();
        let error = refused(stage(), "e2fsck");
        assert!(error.to_string().contains("exit code 4"), "{error}");
        let problems = node.health("v").expect("its health");
        assert_eq!(problems[0].severity, Severity::DataLoss, "{problems:?}");
        site.check_bare();
        // Another end of it says nothing of the data.
        write(&image, 0, &crashed);
        for script in ["exit 8", "kill -9 $$"] {
            site.replace_tool("e2fsck", script);
            let error = stage().expect_err("it is not mounted");
            assert_eq!(error.kind(), Kind::Unavailable, "{error}");
            assert!(fs::read_dir(site.staging()).expect("a directory").next().is_none());
        }
    });
}

/// 15 TiB: files of this machine's file system may be no longer than 16 TiB less a block.
#[test]
fn rule_21_a_large_volume_is_staged_in_less_than_10_seconds() {
    let test = "rule_21_a_large_volume_is_staged_in_less_than_10_seconds";
    in_namespace(test, || {
        for fs in fs_types(test) {
            let site = Site::new();
            let image = site.volumes.create("v", 15 << 40);
            let begun = Instant::now();
            let node = site.node().answering_within(Duration::from_secs(100));
            node.stage(site.stage_request(Some(fs))).expect("staged");
            let took = begun.elapsed();
            assert!(took < Duration::from_secs(10), "{}: {took:?}", fs.name());
            node.unstage("v", &site.staging()).expect("unstaged");
            // Nothing is written that can be written later.
            let blocks = std::os::unix::fs::MetadataExt::blocks(&image.metadata().expect("image"));
            assert!(blocks * 512 < 1 << 30, "{}: {blocks} blocks", fs.name());
        }
    });
}

#[test]
fn rule_23_a_read_only_device_is_mounted_without_a_change() {
    let test = "rule_23_a_read_only_device_is_mounted_without_a_change";
    in_namespace(test, || {
        for fs in fs_types(test) {
            let site = Site::new();
            let image = site.volumes.create("v", SIZE);
            let node = site.node();
            let mut request = site.stage_request(Some(fs));
            request.attach.read_only = true;
            refused(node.stage(request.clone()), "mount it once read-write");
            site.check_bare();
            node.stage(site.stage_request(Some(fs))).expect("staged");
            fs::write(site.staging().join("file"), "kept").expect("written");
            Run::new("sync").ok();
            // With a log to be replayed.
            let crashed = fs::read(&image).expect("the image");
            node.unstage("v", &site.staging()).expect("unstaged");
            write(&image, 0, &crashed);
            let before = sum(&image);
            node.stage(request).expect("staged read-only");
            let device = site.volumes.loop_device("v").expect("a device");
            let read_only = Run::new("blockdev").arg("--getro").arg(device).ok();
            assert_eq!(read_only.trim(), "1");
            assert!(fs::write(site.staging().join("file"), "x").is_err());
            node.unstage("v", &site.staging()).expect("unstaged");
            assert_eq!(sum(&image), before, "{}", fs.name());
        }
    });
}

#[test]
fn a_missing_program_and_a_volume_too_small_are_told_before_anything_is_written() {
    let test = "a_missing_program_and_a_volume_too_small_are_told_before_anything_is_written";
    in_namespace(test, || {
        let site = Site::new();
        let image = site.volumes.create("v", 20 << 20);
        let before = sum(&image);
        let node = site.node();
        refused(node.stage(site.stage_request(Some(Fs::Xfs))), "too few for xfs");
        refused(node.stage(site.stage_request(Some(Fs::Btrfs))), "too few for btrfs");
        assert_eq!(site.volumes.recorded("v"), "never");
        assert_eq!(sum(&image), before);
        // Too small is not too small for ext4, whatever was tried before.
        node.stage(site.stage_request(Some(Fs::Ext4))).expect("staged");
    });
}

#[test]
fn rule_24_a_filesystem_shorter_than_its_device_is_grown_when_it_is_staged() {
    let test = "rule_24_a_filesystem_shorter_than_its_device_is_grown_when_it_is_staged";
    in_namespace(test, || {
        for fs in fs_types(test) {
            let site = Site::new();
            let image = site.volumes.create("v", SIZE);
            let node = site.node();
            if !may_grow(fs) {
                skip(&format!("{test}, {}", fs.name()), "CAP_SYS_RESOURCE is missing");
                continue;
            }
            node.stage(site.stage_request(Some(fs))).expect("staged");
            node.unstage("v", &site.staging()).expect("unstaged");
            // As a clone of it would be.
            site.volumes.set_record("v", "static");
            fs::File::options()
                .write(true)
                .open(&image)
                .and_then(|f| f.set_len(2 * SIZE))
                .expect("longer");
            node.stage(site.stage_request(Some(fs))).expect("staged");
            let stats = node.stats("v", &site.staging()).expect("statistics");
            assert!(stats.total_bytes > SIZE + SIZE / 2, "{}: {stats:?}", fs.name());
        }
    });
}

fn mkfs(command: &str, image: &Path) -> String {
    let (name, args) = command.split_once(' ').expect("arguments");
    Run::new(system_path(name)).args(args).arg(image).ok()
}

fn write(image: &Path, at: u64, bytes: &[u8]) {
    let file = fs::File::options().write(true).open(image).expect("the image");
    file.write_all_at(bytes, at).expect("written");
}

fn sum(image: &Path) -> String {
    Run::new("sha256sum").arg(image).ok()
}
