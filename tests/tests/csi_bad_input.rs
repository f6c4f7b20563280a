//! What must not be done with a volume, or with a path: code and message say what is wrong, and
//! nothing is formatted, changed or left behind.

#[allow(dead_code, reason = "another test with this module needs the rest")]
mod plugin;

use std::fs;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};

use sheave_csi_proto::v1::VolumeCapability;
use sheave_csi_proto::v1::volume_capability::AccessType;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_tests::requests::block;
use sheave_tests::{Run, in_namespace, on_devices, skip};
use tonic::Code;

use plugin::{SIZE, Site, Volume, fails, mount};

fn image(site: &Site, volume: &Volume) -> PathBuf {
    let uuid = volume.id.split('/').next_back().expect("an id");
    site.node.file("images").join(format!("{uuid}.img"))
}

fn with_flags(flags: &[&str]) -> VolumeCapability {
    let mut capability = mount(Mode::SingleNodeWriter, "ext4");
    if let Some(AccessType::Mount(mount)) = &mut capability.access_type {
        mount.mount_flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
    }
    capability
}

/// Checks that staging fails, again and again, and changes neither the image nor the record.
#[track_caller]
fn fails_without_a_change(site: &Site, volume: &Volume, code: Code, why: &str) {
    let look = || (fs::read(image(site, volume)).expect("the image"), site.record(volume));
    let before = look();
    for _ in 0..2 {
        fails(site.stage(volume), code, why);
        site.check_bare();
    }
    assert!(look() == before, "{why}: it was changed");
}

#[test]
fn rule_16_rule_19_data_of_others_and_damaged_data_are_named_and_kept() {
    on_devices("rule_16_rule_19_data_of_others_and_damaged_data_are_named_and_kept", || {
        let site = Site::new();
        let write = |volume: &Volume, at: u64, bytes: &[u8]| {
            let file = fs::File::options().write(true).open(image(&site, volume));
            file.and_then(|file| file.write_all_at(bytes, at)).expect("written");
        };
        let foreign: [(&str, u64, &[u8], &str); 3] = [
            ("encrypted", 0, b"LUKS\xba\xbe\x00\x01", "LUKS"),
            ("partitioned", 512, b"EFI PART", "GPT"),
            ("other", 0, b"XFSB", ""),
        ];
        for (name, at, bytes, why) in foreign {
            let volume = site.volume(name, SIZE, mount(Mode::SingleNodeWriter, ""));
            write(&volume, at, bytes);
            fails_without_a_change(&site, &volume, Code::FailedPrecondition, why);
            assert_eq!(site.record(&volume).formatted, "", "{name}");
        }
        let mut volume = site.volume("damaged", SIZE, mount(Mode::SingleNodeWriter, "ext4"));
        site.stage(&volume).expect("staged");
        site.unstage(&volume).expect("unstaged");
        volume.capability = mount(Mode::SingleNodeWriter, "btrfs");
        fails_without_a_change(&site, &volume, Code::FailedPrecondition, "it holds ext4");
        volume.capability = mount(Mode::SingleNodeWriter, "ext4");
        let whole = fs::read(image(&site, &volume)).expect("the image");
        write(&volume, 0, &vec![0; 4096]);
        fails_without_a_change(&site, &volume, Code::FailedPrecondition, "nothing is formatted");
        write(&volume, 0, &vec![0; whole.len()]);
        fails_without_a_change(&site, &volume, Code::FailedPrecondition, "nothing is formatted");
        write(&volume, 0, &whole);
        site.stage(&volume).expect("staged");
        site.unstage(&volume).expect("unstaged");
    });
}

#[test]
fn rule_10_options_and_capabilities_that_cannot_be_are_refused_before_anything_is_done() {
    let test =
        "rule_10_options_and_capabilities_that_cannot_be_are_refused_before_anything_is_done";
    on_devices(test, || {
        let site = Site::new();
        let mut volume = site.volume("new", SIZE, mount(Mode::SingleNodeWriter, ""));
        let options = [
            (&["noatime", "errors=panic"][..], "errors=panic cannot be used"),
            (&["journal_dev=0x801"], "journal_dev cannot be used"),
            (&["remount,rw"], "remount cannot be used"),
            (&["noatime,hunter2=correct"], "ext4 knows no mount option"),
            (&["hunter2"], "ext4 knows no mount option"),
            (&["a\0b"], "a byte 0"),
        ];
        for (flags, why) in options {
            volume.capability = with_flags(flags);
            fails_without_a_change(&site, &volume, Code::InvalidArgument, why);
            let status = site.stage(&volume).expect_err("refused");
            assert!(!status.message().contains("hunter2"), "{status}");
        }
        let mut group = with_flags(&[]);
        if let Some(AccessType::Mount(mount)) = &mut group.access_type {
            mount.volume_mount_group = "1000".to_owned();
        }
        let shared = mount(Mode::MultiNodeMultiWriter, "ext4");
        let foreign = mount(Mode::SingleNodeWriter, "ntfs");
        for (capability, why) in
            [(group, "fsGroup"), (shared, "raw block"), (foreign, "ext4, xfs, btrfs")]
        {
            volume.capability = capability;
            fails_without_a_change(&site, &volume, Code::InvalidArgument, why);
        }
        volume.capability = mount(Mode::SingleNodeWriter, "");
        volume.context.insert("force-unstage-after".to_owned(), "soon".to_owned());
        fails_without_a_change(&site, &volume, Code::InvalidArgument, "write seconds");
        volume.context.clear();
        assert_eq!(site.record(&volume).formatted, "");
        volume.capability = with_flags(&["noatime,errors=remount-ro", "commit=9"]);
        site.stage(&volume).expect("staged");
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        assert!(mounts.contains("commit=9"), "{mounts}");
        volume.capability = with_flags(&["noatime"]);
        fails(site.stage(&volume), Code::AlreadyExists, "other options");
        site.unstage(&volume).expect("unstaged");
    });
}

#[test]
fn rule_10_a_node_without_ublk_and_nbd_says_what_is_missing() {
    let test = "rule_10_a_node_without_ublk_and_nbd_says_what_is_missing";
    if ["/dev/ublk-control", "/dev/nbd0", "/sys/module/nbd"].iter().any(|at| Path::new(at).exists())
    {
        return skip(test, "this machine has a driver");
    }
    in_namespace(test, || {
        let site = Site::without_drivers();
        for capability in [mount(Mode::SingleNodeWriter, ""), block(Mode::SingleNodeWriter)] {
            let mut volume = site.volume("a", SIZE, capability);
            let why = "neither ublk nor nbd works here (see sheave doctor)";
            fails_without_a_change(&site, &volume, Code::FailedPrecondition, why);
            for (front, why) in [("ublk", "ublk_drv"), ("nbd", "modprobe nbd")] {
                volume.context.insert("front".to_owned(), front.to_owned());
                fails_without_a_change(&site, &volume, Code::FailedPrecondition, why);
            }
            site.unpublish_from_node(&volume);
        }
    });
}

#[test]
fn rule_25_rule_27_paths_of_others_are_left_as_they_are() {
    on_devices("rule_25_rule_27_paths_of_others_are_left_as_they_are", || {
        let site = Site::new();
        let volume = site.volume("placed", SIZE, mount(Mode::SingleNodeWriter, ""));
        let file = |name: &str| site.node.file(name);
        fs::create_dir(file("full")).expect("a directory");
        fs::write(file("full/data"), "kept").expect("written");
        symlink(site.staging(), file("link")).expect("a link");
        let wrong = [
            (file("absent"), Code::FailedPrecondition, "it is no directory"),
            (file("full/data"), Code::FailedPrecondition, "it is no directory"),
            (file("link"), Code::FailedPrecondition, "it is no directory"),
            (file("full"), Code::FailedPrecondition, "it is not empty"),
            (file("stage/../stage"), Code::InvalidArgument, "without .."),
            ("stage".into(), Code::InvalidArgument, "absolute"),
        ];
        for (path, code, why) in wrong {
            fails(site.stage_at(&volume, &path), code, why);
            site.check_bare();
        }
        assert_eq!(site.record(&volume).formatted, "");
        site.stage(&volume).expect("staged");
        // Inside of the volume, a file with data, and a place where something else is mounted.
        fails(site.publish(&volume, "../stage/a", false), Code::InvalidArgument, "..");
        fs::write(site.target("data"), "kept").expect("written");
        fails(site.publish(&volume, "data", false), Code::FailedPrecondition, "it is there");
        fails(site.unpublish(&volume, "data"), Code::FailedPrecondition, "it holds data");
        fs::create_dir(site.target("other")).expect("a directory");
        Run::new("mount").args("-t tmpfs x").arg(site.target("other")).ok();
        fs::write(site.target("other").join("data"), "kept").expect("written");
        fails(site.publish(&volume, "other", false), Code::FailedPrecondition, "mounted there");
        fails(site.unpublish(&volume, "other"), Code::FailedPrecondition, "it is left");
        for name in ["data", "other/data"] {
            assert_eq!(fs::read_to_string(site.target(name)).expect("the file"), "kept");
        }
        assert_eq!(fs::read_to_string(file("full/data")).expect("the file"), "kept");
        Run::new("umount").arg(site.target("other")).ok();
        fs::remove_dir(site.target("other")).expect("removed");
        fs::remove_file(site.target("data")).expect("removed");
        site.unstage(&volume).expect("unstaged");
        site.check_bare();
    });
}
