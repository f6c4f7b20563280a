//! The node engine publishes staged volumes, takes them away, and grows them.

use std::fs;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use sheave_node::{Access, Error, Fs, Kind, Node, Problem, Result, Severity};
use sheave_tests::{Run, Site, has_fs, in_namespace, may_grow, skip};

const SIZE: u64 = 320 << 20;

/// A site whose volume `v` is staged.
fn staged(fs: Option<Fs>) -> (Site, Node) {
    let site = Site::new();
    site.volumes.create("v", SIZE);
    let node = site.node();
    node.stage(site.stage_request(fs)).expect("staged");
    (site, node)
}

#[track_caller]
fn fails<T: std::fmt::Debug>(result: Result<T>, kind: Kind, why: &str) -> Error {
    let error = result.expect_err("it fails");
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(why), "no {why:?}: {error}");
    error
}

fn mount(args: &str) {
    Run::new("mount").args(args).ok();
}

#[test]
fn rule_01_rule_09_places_are_made_once_and_other_arguments_are_told_apart() {
    let test = "rule_01_rule_09_places_are_made_once_and_other_arguments_are_told_apart";
    in_namespace(test, || {
        let (site, node) = staged(Some(Fs::Ext4));
        let request = site.publish_request("a", Some(Fs::Ext4));
        let mut mounts = 0;
        for round in 0..10 {
            node.publish(request.clone()).expect("published");
            let now = fs::read_to_string("/proc/self/mountinfo").expect("mounts").lines().count();
            assert!(round == 0 || now == mounts, "one mount, however often");
            mounts = now;
        }
        fs::write(site.target("a").join("file"), "kept").expect("written");
        // The same place, other arguments.
        let mut other = request.clone();
        other.read_only = true;
        fails(node.publish(other), Kind::Exists, "other arguments");
        let mut other = request.clone();
        other.mode = "another".to_owned();
        fails(node.publish(other), Kind::Exists, "other arguments");
        // Another place, for a mode that has several, and one that has not.
        let mut second = site.publish_request("b", Some(Fs::Ext4));
        second.is_shared = false;
        fails(node.publish(second.clone()), Kind::Refused, "allows one place");
        assert!(!site.target("b").exists());
        second.is_shared = true;
        second.read_only = true;
        node.publish(second).expect("published");
        assert_eq!(fs::read_to_string(site.target("b").join("file")).expect("file"), "kept");
        assert!(fs::write(site.target("b").join("file"), "x").is_err(), "read-only");
        fails(node.unstage("v", &site.staging()), Kind::Refused, "still mounted");
        for _ in 0..2 {
            node.unpublish("v", &site.target("a")).expect("unpublished");
            node.unpublish("v", &site.target("b")).expect("unpublished");
        }
        node.unstage("v", &site.staging()).expect("unstaged");
        site.check_bare();
    });
}

#[test]
fn raw_block_volumes_are_devices_at_their_place() {
    let test = "raw_block_volumes_are_devices_at_their_place";
    in_namespace(test, || {
        let (site, node) = staged(None);
        assert_eq!(site.volumes.recorded("v"), "done block");
        let request = site.publish_request("a", None);
        node.publish(request.clone()).expect("published");
        node.publish(request.clone()).expect("published already");
        let device = site.volumes.loop_device("v").expect("a device");
        let place = fs::metadata(site.target("a")).expect("the place");
        assert!(place.file_type().is_block_device());
        assert_eq!(place.rdev(), fs::metadata(&device).expect("the device").rdev());
        let file = fs::File::options().write(true).open(site.target("a")).expect("the device");
        file.write_all_at(b"kept", 4096).expect("written");
        drop(file);
        assert_eq!(node.stats("v", &site.target("a")).expect("statistics").total_bytes, SIZE);
        let mut read_only = site.publish_request("b", None);
        read_only.read_only = true;
        node.publish(read_only.clone()).expect("published");
        node.publish(read_only.clone()).expect("published already");
        read_only.read_only = false;
        fails(node.publish(read_only), Kind::Exists, "other arguments");
        let options = Run::new("findmnt").args("--noheadings --output VFS-OPTIONS");
        let options = options.arg(site.target("b")).ok();
        assert!(options.split(',').any(|option| option == "ro"), "{options}");
        fails(node.unstage("v", &site.staging()), Kind::Refused, "still mounted");
        for pod in ["a", "b"] {
            node.unpublish("v", &site.target(pod)).expect("unpublished");
        }
        node.unstage("v", &site.staging()).expect("unstaged");
        site.check_bare();
        let image = fs::read(site.volumes.image("v")).expect("the image");
        assert_eq!(&image[4096..4100], b"kept");
        // It is not formatted from here on.
        fails(node.stage(site.stage_request(Some(Fs::Ext4))), Kind::Refused, "unknown data");
    });
}

#[test]
fn rule_25_what_is_not_the_volumes_is_left_at_a_place() {
    let test = "rule_25_what_is_not_the_volumes_is_left_at_a_place";
    in_namespace(test, || {
        let (site, node) = staged(Some(Fs::Ext4));
        let target = site.target("a");
        fs::create_dir(&target).expect("a directory");
        fs::write(target.join("other"), "kept").expect("written");
        let request = site.publish_request("a", Some(Fs::Ext4));
        fails(node.publish(request.clone()), Kind::Refused, "not an empty directory");
        fails(node.unpublish("v", &target), Kind::Refused, "left as it is");
        assert_eq!(fs::read_to_string(target.join("other")).expect("the file"), "kept");
        fs::remove_file(target.join("other")).expect("removed");
        // Something else is mounted there.
        mount(&format!("-t tmpfs x {}", target.display()));
        fs::write(target.join("other"), "kept").expect("written");
        fails(node.publish(request), Kind::Refused, "mounted there already");
        fails(node.unpublish("v", &target), Kind::Refused, "something else is mounted");
        assert_eq!(fs::read_to_string(target.join("other")).expect("the file"), "kept");
    });
}

#[test]
fn rule_26_stacked_mounts_are_taken_away_as_a_whole() {
    let test = "rule_26_stacked_mounts_are_taken_away_as_a_whole";
    in_namespace(test, || {
        let (site, node) = staged(Some(Fs::Ext4));
        node.publish(site.publish_request("a", Some(Fs::Ext4))).expect("published");
        let (staging, target) = (site.staging(), site.target("a"));
        fs::write(target.join("file"), "kept").expect("written");
        // As two concurrent calls of an older program would.
        mount(&format!("--bind {} {}", staging.display(), target.display()));
        node.unpublish("v", &target).expect("unpublished");
        assert!(!target.exists());
        assert_eq!(fs::read_to_string(staging.join("file")).expect("the file"), "kept");
        mount(&format!("--bind {} {}", staging.display(), staging.display()));
        node.unstage("v", &staging).expect("unstaged");
        site.check_bare();
    });
}

#[test]
fn rule_09_a_place_that_something_else_hides_counts() {
    in_namespace("rule_09_a_place_that_something_else_hides_counts", || {
        let (site, node) = staged(Some(Fs::Ext4));
        let request = |pod: &str| {
            let mut request = site.publish_request(pod, Some(Fs::Ext4));
            request.is_shared = false;
            request
        };
        node.publish(request("a")).expect("published");
        mount(&format!("-t tmpfs x {}", site.target("a").display()));
        fails(node.publish(request("b")), Kind::Refused, "allows one place");
        node.unpublish("v", &site.target("a")).expect("unpublished");
        node.publish(request("b")).expect("published");
    });
}

#[test]
fn rule_09_a_raw_place_that_something_else_hides_counts() {
    in_namespace("rule_09_a_raw_place_that_something_else_hides_counts", || {
        let (site, node) = staged(None);
        let request = |pod: &str| {
            let mut request = site.publish_request(pod, None);
            request.is_shared = false;
            request
        };
        node.publish(request("a")).expect("published");
        let other = site.dir().join("other");
        fs::write(&other, "").expect("written");
        mount(&format!("--bind {} {}", other.display(), site.target("a").display()));
        fails(node.publish(request("b")), Kind::Refused, "allows one place");
        fails(node.unstage("v", &site.staging()), Kind::Refused, "still mounted");
        fs::remove_dir_all(site.dir().join("node")).expect("the state");
        fails(node.unstage("v", &site.staging()), Kind::Refused, "still mounted");
        node.unpublish("v", &site.target("a")).expect("unpublished");
        node.stage(site.stage_request(None)).expect("staged");
        node.publish(request("b")).expect("published");
    });
}

/// As a process leaves it that is killed between binding a place and setting its flags.
#[test]
fn rule_30_a_place_that_was_bound_only_gets_its_flags() {
    const FLAGS: [&str; 4] = ["ro", "noexec", "nosuid", "nodev"];
    in_namespace("rule_30_a_place_that_was_bound_only_gets_its_flags", || {
        let (site, node) = staged(Some(Fs::Ext4));
        let mut request = site.publish_request("a", Some(Fs::Ext4));
        let options = vec!["noexec".to_owned(), "nosuid,nodev".to_owned()];
        request.access = Access::Mount { fs: Fs::Ext4, options };
        request.read_only = true;
        for left in ["rw,exec,suid,dev", "ro,exec,suid,dev", "rw,noexec,nosuid,nodev"] {
            node.publish(request.clone()).expect("published");
            mount(&format!("-o remount,bind,{left} {}", site.target("a").display()));
            let in_use = fs::File::open(site.target("a")).expect("the place");
            node.publish(request.clone()).expect("published");
            drop(in_use);
            let has = Run::new("findmnt").args("--noheadings --output VFS-OPTIONS");
            let has = has.arg(site.target("a")).ok();
            let has: Vec<_> = has.trim().split(',').collect();
            assert!(FLAGS.iter().all(|flag| has.contains(flag)), "{left}: {has:?}");
        }
        node.unpublish("v", &site.target("a")).expect("unpublished");
        node.unstage("v", &site.staging()).expect("unstaged");
        site.check_bare();
    });
}

#[test]
fn a_volume_is_taken_away_when_the_disk_of_the_state_is_full() {
    in_namespace("a_volume_is_taken_away_when_the_disk_of_the_state_is_full", || {
        let site = Site::new();
        let state = site.dir().join("node");
        fs::create_dir(&state).expect("a directory");
        mount(&format!("-t tmpfs -o size=64k x {}", state.display()));
        site.volumes.create("v", SIZE);
        let node = site.node();
        node.stage(site.stage_request(Some(Fs::Ext4))).expect("staged");
        node.publish(site.publish_request("a", Some(Fs::Ext4))).expect("published");
        let filler = state.join("filler");
        fs::write(&filler, vec![1; 1 << 20]).expect_err("it is full");
        let mut other = site.stage_request(Some(Fs::Ext4));
        other.volume = "w".to_owned();
        other.staging = site.dir().join("bin");
        fails(node.stage(other), Kind::Exhausted, "node state");
        node.unpublish("v", &site.target("a")).expect("unpublished");
        node.unstage("v", &site.staging()).expect("unstaged");
        fs::remove_file(&filler).expect("removed");
        assert_eq!(fs::read_dir(&state).expect("the states").count(), 0);
        Run::new("umount").arg(&state).ok();
        site.check_bare();
    });
}

#[test]
fn rule_27_nothing_is_published_but_from_the_volumes_own_device() {
    let test = "rule_27_nothing_is_published_but_from_the_volumes_own_device";
    in_namespace(test, || {
        let site = Site::new();
        let node = site.node();
        let request = site.publish_request("a", Some(Fs::Ext4));
        fails(node.publish(request.clone()), Kind::Refused, "not staged");
        site.volumes.create("v", SIZE);
        node.stage(site.stage_request(Some(Fs::Ext4))).expect("staged");
        // A type that was not staged, another path, an older publication.
        let mut other = request.clone();
        other.access = Access::Block;
        fails(node.publish(other), Kind::Refused, "another type");
        let mut other = request.clone();
        other.staging = site.dir().join("bin");
        fails(node.publish(other), Kind::Refused, "another path");
        let mut other = request.clone();
        other.epoch = Some(2);
        fails(node.publish(other), Kind::Refused, "anew");
        // Unmounted by other means: the path is on the root disk.
        let staging = site.staging();
        Run::new("umount").arg(&staging).ok();
        let refuse = || {
            fails(node.publish(request.clone()), Kind::Refused, "not mounted from its device");
            assert!(!site.target("a").exists(), "nothing is left");
        };
        refuse();
        let problems = node.health("v").expect("its health");
        assert_eq!(problems[0].severity, Severity::Inaccessible, "{problems:?}");
        // Another disk is there.
        mount(&format!("-t tmpfs x {}", staging.display()));
        refuse();
        Run::new("umount").arg(&staging).ok();
        // Its device was ended; then another volume has its name and number.
        let device = site.volumes.loop_device("v").expect("a device");
        Run::new("losetup").arg("--detach").arg(&device).ok();
        fails(node.publish(request.clone()), Kind::Refused, "its device is gone");
        // Staging finds out and does all anew.
        node.stage(site.stage_request(Some(Fs::Ext4))).expect("staged");
        node.publish(request.clone()).expect("published");
    });
}

#[test]
fn rule_29_unstaging_goes_on_where_it_has_failed() {
    let test = "rule_29_unstaging_goes_on_where_it_has_failed";
    in_namespace(test, || {
        let (site, node) = staged(Some(Fs::Ext4));
        site.volumes.strike(
            "detach",
            Box::new(|| Err(Error::new(Kind::Unavailable, "the daemon is away"))),
        );
        fails(node.unstage("v", &site.staging()), Kind::Unavailable, "the daemon is away");
        assert!(site.volumes.loop_device("v").is_some());
        fails(node.publish(site.publish_request("a", Some(Fs::Ext4))), Kind::Refused, "not staged");
        // Also by another process, and also when it is to be staged again.
        site.volumes.strike_no_more();
        let node = site.node();
        node.unstage("v", &site.staging()).expect("unstaged");
        site.check_bare();
        node.stage(site.stage_request(Some(Fs::Ext4))).expect("staged");
    });
}

#[test]
fn a_node_gives_back_what_its_user_has_staged_and_published_nowhere() {
    in_namespace("a_node_gives_back_what_its_user_has_staged_and_published_nowhere", || {
        let (site, node) = staged(Some(Fs::Ext4));
        assert!(node.is_giving_back("csi").expect("states"));
        assert!(!node.is_giving_back("other").expect("states"), "it is that of another");
        node.publish(site.publish_request("a", Some(Fs::Ext4))).expect("published");
        assert!(!node.is_giving_back("csi").expect("states"));
        node.unpublish("v", &site.target("a")).expect("unpublished");
        assert!(node.is_giving_back("csi").expect("states"));
        node.unstage("v", &site.staging()).expect("unstaged");
        assert!(!node.is_giving_back("csi").expect("states"));
    });
}

#[test]
fn rule_35_cycles_leave_everything_as_it_was() {
    let test = "rule_35_cycles_leave_everything_as_it_was";
    const CYCLES: usize = 100;
    in_namespace(test, || {
        let site = Site::new();
        site.volumes.create("v", SIZE);
        let node = site.node();
        let cycle = |fs| {
            node.stage(site.stage_request(fs)).expect("staged");
            node.publish(site.publish_request("a", fs)).expect("published");
            node.unpublish("v", &site.target("a")).expect("unpublished");
            node.unstage("v", &site.staging()).expect("unstaged");
        };
        let count = |dir: &str| fs::read_dir(dir).expect(dir).count();
        let threads = || count("/proc/self/task");
        let idle = threads();
        cycle(Some(Fs::Ext4));
        assert!(sheave_tests::eventually(|| threads() == idle), "{idle} {}", threads());
        let look = || {
            let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
            (mounts, count("/proc/self/fd"), threads())
        };
        let before = look();
        for _ in 0..CYCLES {
            cycle(Some(Fs::Ext4));
        }
        // Threads may still be ending.
        assert!(sheave_tests::eventually(|| look() == before), "{before:?} {:?}", look());
        site.check_bare();
    });
}

#[test]
fn rule_24_volumes_grow_while_they_are_written() {
    let test = "rule_24_volumes_grow_while_they_are_written";
    in_namespace(test, || {
        for fs in [Some(Fs::Ext4), Some(Fs::Xfs), Some(Fs::Btrfs), None] {
            if let Some(fs) = fs.filter(|fs| !has_fs(*fs) || !may_grow(*fs)) {
                let why = "this machine cannot make, mount or grow it";
                skip(&format!("{test}, {}", fs.name()), why);
                continue;
            }
            grow(fs);
        }
    });
}

fn grow(kind: Option<Fs>) {
    let (site, node) = staged(kind);
    node.publish(site.publish_request("a", kind)).expect("published");
    let target = site.target("a");
    let file = if kind.is_some() { target.join("file") } else { target.clone() };
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            if kind.is_some() {
                fs::write(&file, "").expect("made");
            }
            let file = fs::File::options().write(true).open(&file).expect("opened");
            let mut rounds = 0_u64;
            while !ended.load(Relaxed) {
                file.write_all_at(&[7; 4096], rounds % 64 * 4096).expect("written");
                file.sync_all().expect("synced");
                rounds += 1;
            }
            rounds
        });
        let image = fs::File::options().write(true).open(site.volumes.image("v"));
        fails(node.expand("v", &target, Some(2 * SIZE)), Kind::OutOfRange, "grow the volume");
        image.and_then(|image| image.set_len(2 * SIZE)).expect("longer");
        for path in [&target, &site.staging()] {
            let size = node.expand("v", path, Some(2 * SIZE)).expect("grown");
            assert_eq!(size, 2 * SIZE);
        }
        ended.store(true, Relaxed);
        assert!(writer.join().expect("no error") > 0);
    });
    let stats = node.stats("v", &target).expect("statistics");
    assert!(stats.total_bytes > SIZE + SIZE / 2, "{kind:?}: {stats:?}");
    fails(node.expand("v", &site.dir().join("bin"), None), Kind::NotFound, "neither");
    fails(node.stats("v", &site.dir().join("bin")), Kind::NotFound, "is not at");
    fails(node.stats("other", &target), Kind::NotFound, "is not at");
}

#[test]
fn an_error_of_the_filesystem_is_seen_in_its_health() {
    let test = "an_error_of_the_filesystem_is_seen_in_its_health";
    in_namespace(test, || {
        let (site, node) = staged(Some(Fs::Ext4));
        let reasons = |problems: Vec<Problem>| -> Vec<_> {
            problems.iter().map(|problem| problem.reason).collect()
        };
        assert_eq!(reasons(node.health("v").expect("its health")), [""; 0]);
        Run::new("mount").args("-o remount,ro").arg(site.staging()).ok();
        let problems = node.health("v").expect("its health");
        assert_eq!(reasons(problems), ["FilesystemReadOnly"]);
    });
}
