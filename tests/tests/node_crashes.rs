//! The node engine's process is killed at each of its steps; the next one finishes or undoes what
//! it has begun.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use sheave_node::{Fs, Kind, Node};
use sheave_tests::{
    Run, Site, child, eventually, in_namespace, parents_dir, part, skip, system_path,
};

const SIZE: u64 = 64 << 20;
/// Each call of the engine to the daemon and its pools, before and after it is done.
const STEPS: &[&str] = &[
    "attach", "attached", "device", "record", "begin", "begun", "finish", "finished", "detach",
    "detached",
];

fn stage(site: &Site, node: &Node) -> Result<(), Kind> {
    node.stage(site.stage_request(Some(Fs::Ext4))).map_err(|error| error.kind())
}

fn publish(site: &Site, node: &Node) -> Result<(), Kind> {
    node.publish(site.publish_request("a", Some(Fs::Ext4))).map_err(|error| error.kind())
}

/// What the processes of a test do that are killed: all calls in turn.
fn do_all(site: &Site) {
    let node = site.node();
    let _ = stage(site, &node);
    let _ = publish(site, &node);
    let _ = node.unpublish("v", &site.target("a"));
    let _ = node.unstage("v", &site.staging());
}

#[test]
fn rule_30_a_process_killed_at_any_step_leaves_what_the_next_one_finishes() {
    let test = "rule_30_a_process_killed_at_any_step_leaves_what_the_next_one_finishes";
    if let Some(step) = part() {
        let site = Site::shared(parents_dir());
        let step = STEPS.iter().find(|known| **known == step).expect("a step");
        site.volumes.strike(step, Box::new(|| std::process::abort()));
        return do_all(&site);
    }
    in_namespace(test, || {
        for step in STEPS {
            for next in ["stage", "unstage"] {
                let site = Site::new();
                site.count_tool("mkfs.ext4");
                site.volumes.create("v", SIZE);
                let killed = child(test, step, site.dir()).output().expect("a child");
                assert_eq!(killed.status.signal(), Some(6), "{step}: {killed:?}");
                let node = site.node();
                let begun = Instant::now();
                if next == "stage" {
                    stage(&site, &node).expect("staged");
                    publish(&site, &node).expect("published");
                    fs::write(site.target("a").join("file"), "kept").expect("written");
                    node.unpublish("v", &site.target("a")).expect("unpublished");
                    node.unstage("v", &site.staging()).expect("unstaged");
                    site.check_bare();
                    // What was written is there, and was not formatted away.
                    stage(&site, &node).expect("staged");
                    let file = fs::read_to_string(site.staging().join("file"));
                    assert_eq!(file.expect("the file"), "kept");
                    assert!(site.tool_runs("mkfs.ext4") <= 2, "{step}");
                } else {
                    node.unpublish("v", &site.target("a")).expect("unpublished");
                }
                node.unstage("v", &site.staging()).expect("unstaged");
                assert!(begun.elapsed() < Duration::from_secs(60), "{step}");
                site.check_bare();
            }
        }
    });
}

/// A control group for a site, as a container has one; none, and that is noted, where this process
/// may make none.
fn make_group(test: &str, dir: &Path) -> Option<PathBuf> {
    let group = group_of(dir).filter(|group| fs::create_dir(group).is_ok());
    if group.is_none() {
        skip(test, "no control group can be made, so one process is killed instead");
    }
    group
}

fn group_of(dir: &Path) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let root = fields.find_map(|fields| (fields[2] == "cgroup2").then(|| fields[1].to_owned()))?;
    Some(Path::new(&root).join(dir.file_name()?))
}

/// mkfs and fsck outlive the process that has started them, and nothing else works on the volume
/// meanwhile.
#[test]
fn rule_11_rule_20_a_program_outlives_the_killed_process_and_keeps_the_volume_locked() {
    let test = "rule_11_rule_20_a_program_outlives_the_killed_process_and_keeps_the_volume_locked";
    if part().is_some() {
        let dir = parents_dir();
        if let Some(group) = group_of(&dir) {
            // As a container has one.
            fs::write(group.join("cgroup.procs"), "0").expect("entered");
        }
        return do_all(&Site::shared(dir));
    }
    in_namespace(test, || {
        for tool in ["mkfs.ext4", "e2fsck"] {
            let site = Site::new();
            let image = site.volumes.create("v", SIZE);
            let node = site.node();
            if tool == "e2fsck" {
                stage(&site, &node).expect("staged");
                fs::write(site.staging().join("file"), "kept").expect("written");
                node.unstage("v", &site.staging()).expect("unstaged");
                let unclean = system_path("debugfs");
                Run::new(unclean).args("-w -R").arg("ssv state 0").arg(&image).ok();
            }
            let real = system_path(tool);
            let script = format!(
                "echo >>$0.count\necho $$ >$0.pid\n\
                 while [ ! -e $0.go ]; do sleep 0.02; done\nexec {real} \"$@\""
            );
            site.replace_tool(tool, &script);
            let file = |end: &str| site.dir().join("bin").join(format!("{tool}.{end}"));
            let group = make_group(test, site.dir());
            let mut killed = child(test, "all", site.dir()).spawn().expect("a child");
            assert!(eventually(|| file("pid").exists()), "it is started");
            if let Some(group) = &group {
                // Its runtime kills all that is in it.
                let processes = || fs::read_to_string(group.join("cgroup.procs")).expect("a group");
                assert!(eventually(|| processes().lines().count() == 1), "{}", processes());
                fs::write(group.join("cgroup.kill"), "1").expect("killed");
            } else {
                killed.kill().expect("killed");
            }
            killed.wait().expect("ended");
            if let Some(group) = group {
                assert!(eventually(|| fs::remove_dir(&group).is_ok()), "it is empty");
            }
            // Two calls of the next process: both hear of it at once.
            for _ in 0..2 {
                let begun = Instant::now();
                assert_eq!(stage(&site, &node), Err(Kind::Pending));
                assert!(begun.elapsed() < Duration::from_secs(2), "at once");
            }
            assert_eq!(site.tool_runs(tool), 1);
            fs::write(file("go"), "").expect("written");
            assert!(eventually(|| stage(&site, &node) != Err(Kind::Pending)), "it ends");
            stage(&site, &node).expect("staged");
            if tool == "e2fsck" {
                assert_eq!(site.tool_runs(tool), 1, "it had ended well");
                let file = fs::read_to_string(site.staging().join("file"));
                assert_eq!(file.expect("the file"), "kept");
            } else {
                assert_eq!(site.volumes.recorded("v"), "done ext4");
                assert_eq!(site.tool_runs(tool), 1, "what it has made is whole");
            }
        }
    });
}

/// A caller that does not wait, and one that comes after it.
#[test]
fn rule_11_rule_33_calls_answer_in_time_and_a_later_one_joins_the_result() {
    let test = "rule_11_rule_33_calls_answer_in_time_and_a_later_one_joins_the_result";
    in_namespace(test, || {
        let site = Site::new();
        site.volumes.create("v", SIZE);
        let real = system_path("mkfs.ext4");
        let script = "echo >>$0.count\nwhile [ ! -e $0.go ]; do sleep 0.02; done";
        site.replace_tool("mkfs.ext4", &format!("{script}\nexec {real} \"$@\""));
        let node = site.node().answering_within(Duration::from_millis(300));
        let patient = |node: &Node| {
            let begun = Instant::now();
            let result = stage(&site, node);
            (result, begun.elapsed())
        };
        let (first, took) = patient(&node);
        assert_eq!(first, Err(Kind::Pending));
        assert!(took < Duration::from_secs(5), "{took:?}");
        let (second, took) = patient(&node);
        assert_eq!(second, Err(Kind::Pending));
        assert!(took < Duration::from_millis(250), "{took:?}");
        assert_eq!(node.unstage("v", &site.staging()).unwrap_err().kind(), Kind::Pending);
        let go = site.dir().join("bin/mkfs.ext4.go");
        fs::write(go, "").expect("written");
        assert!(eventually(|| stage(&site, &node) == Ok(())), "it ends");
        assert_eq!(site.tool_runs("mkfs.ext4"), 1);
    });
}

/// Half of a filesystem, as an mkfs leaves it that was killed with its node.
#[test]
fn a_killed_mkfs_is_repeated_and_a_whole_one_is_kept() {
    let test = "a_killed_mkfs_is_repeated_and_a_whole_one_is_kept";
    in_namespace(test, || {
        let site = Site::new();
        site.count_tool("mkfs.ext4");
        let image = site.volumes.create("v", SIZE);
        site.volumes.set_record("v", "begun ext4");
        let node = site.node();
        fs::write(&image, [&[0; 4096][..], b"half of it"].concat()).expect("written");
        fs::File::options().write(true).open(&image).and_then(|f| f.set_len(SIZE)).expect("long");
        stage(&site, &node).expect("staged");
        assert_eq!(site.tool_runs("mkfs.ext4"), 1);
        fs::write(site.staging().join("file"), "kept").expect("written");
        node.unstage("v", &site.staging()).expect("unstaged");
        // As if the record had not come through; it is whole, so it is kept.
        site.volumes.set_record("v", "begun ext4");
        stage(&site, &node).expect("staged");
        assert_eq!(site.tool_runs("mkfs.ext4"), 1);
        assert_eq!(fs::read_to_string(site.staging().join("file")).expect("the file"), "kept");
        // Damaged, and yet it was mounted, so it is not made again.
        node.unstage("v", &site.staging()).expect("unstaged");
        let whole = fs::read(&image).expect("the image");
        Run::new("debugfs").arg("-w").arg("-R").arg("clri /file").arg(&image).ok();
        site.volumes.set_record("v", "begun ext4");
        assert_eq!(stage(&site, &node), Err(Kind::Refused));
        assert_eq!(site.tool_runs("mkfs.ext4"), 1);
        fs::write(&image, whole).expect("written");
        stage(&site, &node).expect("staged");
        // With a journal to be replayed, it was mounted: a person has to look.
        Run::new("sync").ok();
        let crashed = fs::read(&image).expect("the image");
        node.unstage("v", &site.staging()).expect("unstaged");
        fs::write(&image, crashed).expect("written");
        site.volumes.set_record("v", "begun ext4");
        assert_eq!(stage(&site, &node), Err(Kind::Refused));
        assert_eq!(site.tool_runs("mkfs.ext4"), 1);
    });
}

/// A node that was started anew has neither devices nor mounts, whatever its states say.
#[test]
fn rule_34_after_a_reboot_volumes_are_staged_anew() {
    let test = "rule_34_after_a_reboot_volumes_are_staged_anew";
    in_namespace(test, || {
        for next in ["stage", "unstage"] {
            let site = Site::new();
            site.count_tool("mkfs.ext4");
            site.volumes.create("v", SIZE);
            let node = site.node();
            stage(&site, &node).expect("staged");
            publish(&site, &node).expect("published");
            fs::write(site.target("a").join("file"), "kept").expect("written");
            // All is gone but the directories and the state, which is of another boot.
            for path in [site.target("a"), site.staging()] {
                Run::new("umount").arg(path).ok();
            }
            site.volumes.end();
            let state = site.dir().join("node/v.json");
            let text = fs::read_to_string(&state).expect("a state");
            let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("an id");
            assert!(text.contains(boot.trim()), "{text}");
            // As older programs have written it, without a checksum.
            let json = text.lines().next().expect("a line").replace(boot.trim(), "another");
            fs::write(&state, json).expect("written");
            let node = site.node();
            assert_eq!(publish(&site, &node), Err(Kind::Refused));
            if next == "stage" {
                stage(&site, &node).expect("staged");
                publish(&site, &node).expect("published");
                let file = fs::read_to_string(site.target("a").join("file"));
                assert_eq!(file.expect("the file"), "kept");
                assert_eq!(site.tool_runs("mkfs.ext4"), 1);
            }
            node.unpublish("v", &site.target("a")).expect("unpublished");
            node.unstage("v", &site.staging()).expect("unstaged");
            site.check_bare();
        }
    });
}

/// What a node has to do that comes back with all its pods.
#[test]
fn a_hundred_volumes_are_staged_at_once() {
    let test = "a_hundred_volumes_are_staged_at_once";
    const VOLUMES: usize = 100;
    in_namespace(test, || {
        let site = Site::new();
        let node = site.node().answering_within(Duration::from_secs(100));
        let name = |index| format!("v{index}");
        let staging = |index| site.staging().join(name(index));
        let each = |call: &(dyn Fn(usize) + Sync)| {
            thread::scope(|scope| {
                (0..VOLUMES).for_each(|index| drop(scope.spawn(move || call(index))));
            });
        };
        (0..VOLUMES).for_each(|index| {
            site.volumes.create(&name(index), 8 << 20);
            fs::create_dir(staging(index)).expect("a directory");
        });
        each(&|index| {
            let mut request = site.stage_request(Some(Fs::Ext4));
            (request.volume, request.staging) = (name(index), staging(index));
            node.stage(request).expect("staged");
            fs::write(staging(index).join("file"), name(index)).expect("written");
        });
        each(&|index| {
            let file = fs::read_to_string(staging(index).join("file")).expect("the file");
            assert_eq!(file, name(index), "each has its own device");
            node.unstage(&name(index), &staging(index)).expect("unstaged");
            assert_eq!(site.volumes.loop_device(&name(index)), None);
        });
    });
}
