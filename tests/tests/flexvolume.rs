//! `sheave flexvolume`, as Kubernetes calls it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use sheave_tests::{FlexSite, FlexSpec, FlexVolume, Run, check_failed, on_devices, sheave};

const NODE: &str = "n1";
const WITH_ATTACH: &str = "node = \"n1\"\nattach = true\n";
const WITHOUT: &str = "node = \"n1\"\n";

#[test]
fn a_pod_has_its_volume_without_attach_and_leaves_nothing() {
    on_devices("a_pod_has_its_volume_without_attach_and_leaves_nothing", || {
        let site = FlexSite::new(WITHOUT);
        let flex = &site.flex;
        let init = flex.call(&["init"]).expect("init");
        assert_eq!(init["capabilities"]["attach"], false);
        let spec = FlexSpec::new("data", "fast/db");
        let mut reading = spec.clone();
        reading.read_only = true;
        reading.secrets.insert("key".to_owned(), "aHVudGVyMg==".to_owned());
        for round in 0..2 {
            let first = flex.set_up("a", &spec).expect("mounted");
            // Kubelet does not call again for what is mounted, but a restarted one may.
            let json = spec.json(&[]);
            flex.call(&["mount", first.to_str().expect("UTF-8"), &json]).expect("the same again");
            let file = first.join("file");
            if round == 1 {
                assert_eq!(fs::read(&file).expect("the file"), vec![7; 1 << 20]);
            }
            fs::write(&file, vec![7; 1 << 20]).expect("written");
            let second = flex.set_up("b", &spec).expect("another pod of this node");
            let reader = flex.set_up("c", &reading).expect("one that reads");
            assert_eq!(fs::read(second.join("file")).expect("the file").len(), 1 << 20);
            let why = fs::write(reader.join("file"), "x").expect_err("read-only");
            assert_eq!(why.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
            assert_eq!(site.publications(), 1);
            flex.configure("node = \"n2\"\nattach = true\n");
            check_failed(flex.attach(&spec, "n2"), "published to node n1");
            flex.configure(WITHOUT);
            for pod in ["a", "c"] {
                flex.tear_down(pod, &spec).expect("unmounted");
            }
            fs::write(second.join("other"), "still there").expect("written");
            flex.tear_down("b", &spec).expect("unmounted");
            flex.call(&["unmount", second.to_str().expect("UTF-8")]).expect("the same again");
            site.check_bare();
        }
        let log = site.daemon.log();
        assert!(!log.contains("aHVudGVyMg"), "a secret in the log");
    });
}

#[test]
fn a_pod_has_its_volume_by_attach_and_leaves_nothing() {
    on_devices("a_pod_has_its_volume_by_attach_and_leaves_nothing", || {
        let site = FlexSite::new(WITH_ATTACH);
        let flex = &site.flex;
        let init = flex.call(&["init"]).expect("init");
        assert_eq!(init["capabilities"]["attach"], true);
        let spec = FlexSpec::new("pv1", "fast/db");
        for round in 0..2 {
            assert_eq!(flex.is_attached(&spec, NODE), Ok(false));
            let device = flex.attach(&spec, NODE).expect("attached");
            assert_eq!(flex.attach(&spec, NODE).as_ref(), Ok(&device), "the same again");
            assert_eq!(flex.is_attached(&spec, NODE), Ok(true));
            check_failed(flex.attach(&spec, "n2"), "published to node n1");
            for _ in 0..2 {
                flex.mount_device(&spec, &device).expect("mounted");
            }
            let file = flex.set_up("a", &spec).expect("mounted").join("file");
            if round == 1 {
                assert_eq!(fs::read_to_string(&file).expect("the file"), "data");
            }
            fs::write(&file, "data").expect("written");
            flex.set_up("b", &spec).expect("mounted");
            check_failed(flex.detach(&spec, NODE), "detach it first");
            check_failed(flex.unmount_device(&spec), "still mounted");
            for pod in ["a", "b", "a"] {
                flex.tear_down(pod, &spec).expect("unmounted");
            }
            let dir = flex.device_dir(&spec);
            for _ in 0..2 {
                flex.unmount_device(&spec).expect("unmounted");
                flex.call(&["unmountdevice", dir.to_str().expect("UTF-8")]).expect("done already");
                flex.detach(&spec, NODE).expect("detached");
            }
            site.check_bare();
        }
    });
}

#[test]
fn what_is_not_this_drivers_is_left_as_it_is() {
    on_devices("what_is_not_this_drivers_is_left_as_it_is", || {
        let site = FlexSite::new(WITH_ATTACH);
        let flex = &site.flex;
        site.daemon.sheave("volume create fast/other --size 32M").ok();
        let spec = FlexSpec::new("data", "fast/db");
        let device = flex.attach(&spec, NODE).expect("attached");
        // Names that are no claim, or are of another node.
        for (claim, node) in
            [("other", NODE), ("data", "n2"), ("fast/db", NODE), ("/dev/sda", NODE)]
        {
            flex.call(&["detach", claim, node]).expect("there is nothing to do");
        }
        assert_eq!(site.publications(), 1);
        let other = FlexSpec::new("data", "fast/other");
        check_failed(flex.mount_device(&other, &device), "of another volume");
        for wrong in ["", "/dev/loop0", "fast/db", &device.replace(":n1", ":n2")] {
            let why = if wrong.ends_with(":n2") { "not attached to" } else { "none of this" };
            check_failed(flex.mount_device(&spec, wrong), why);
        }
        flex.mount_device(&spec, &device).expect("mounted");
        let pod = flex.set_up("a", &spec).expect("mounted");
        fs::write(pod.join("file"), "data").expect("written");
        let staged = flex.device_dir(&spec);
        let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
        check_failed(flex.call(&["unmount", &text(&staged)]), "that is where it is staged");
        check_failed(flex.call(&["unmountdevice", &text(&pod)]), "is staged at");
        let foreign = site.dir().join("foreign");
        fs::create_dir(&foreign).expect("a directory");
        Run::new("mount").args("-t tmpfs none").arg(&foreign).ok();
        fs::write(foreign.join("file"), "theirs").expect("written");
        for call in ["unmount", "unmountdevice"] {
            check_failed(flex.call(&[call, &text(&foreign)]), "left as it is");
            flex.call(&[call, "/no/such/directory"]).expect("there is nothing to do");
        }
        assert_eq!(fs::read_to_string(foreign.join("file")).expect("the file"), "theirs");
        Run::new("umount").arg(&foreign).ok();
        for volume in ["fast", "fast/", "fast/../db", "fast/no", "slow/db", "/etc", "../db"] {
            let spec = FlexSpec::new("wrong", volume);
            let why = flex.set_up("a", &spec).expect_err("there is none");
            assert!(why.contains("the daemon: "), "{volume}: {why}");
        }
        for volume in ["/tmp/x.img", "./x.img", "file:///tmp/x.img", "x.img"] {
            let why = "is no volume of a pool: write POOL/NAME; the pools are: fast, small";
            check_failed(flex.set_up("a", &FlexSpec::new("wrong", volume)), why);
        }
        assert_eq!(fs::read_to_string(pod.join("file")).expect("the file"), "data");
        flex.tear_down("a", &spec).expect("unmounted");
        flex.unmount_device(&spec).expect("unmounted");
        flex.detach(&spec, NODE).expect("detached");
        let device = flex.attach(&spec, "n2").expect("attached");
        check_failed(flex.mount_device(&spec, &device), "attached to node n2, and this is n1");
        flex.detach(&spec, "n2").expect("detached");
        let unnamed = FlexSpec { name: String::new(), ..spec };
        check_failed(flex.attach(&unnamed, NODE), "have no kubernetes.io/pvOrVolumeName");
        site.check_bare();
    });
}

#[test]
fn rule_35_a_lock_that_a_killed_call_has_left_goes_away() {
    on_devices("rule_35_a_lock_that_a_killed_call_has_left_goes_away", || {
        let site = FlexSite::new(WITHOUT);
        let id = site.daemon.volume_id("fast/db");
        // It was killed before it has written a state.
        let staging = site.dir().join("flexvolume").join(id.replace('/', "_"));
        fs::create_dir_all(staging).expect("a directory");
        fs::write(site.node.engine_file(&id, "lock"), "").expect("written");
        site.flex.call(&["unmount", "/no/such/directory"]).expect("there is nothing to do");
        site.check_bare();
    });
}

/// The lock that the test takes stands for a call that hangs.
#[test]
fn rule_35_a_volume_that_hangs_holds_up_no_other_ones_unmount() {
    on_devices("rule_35_a_volume_that_hangs_holds_up_no_other_ones_unmount", || {
        let site = FlexSite::new(WITHOUT);
        let mut ids = Vec::new();
        for name in ["hangs", "left", "pods"] {
            site.daemon.sheave(&format!("volume create fast/{name} --size 32M")).ok();
            ids.push(site.daemon.volume_id(&format!("fast/{name}")));
        }
        // What killed calls have left.
        let own = site.dir().join("flexvolume");
        let leave = |id: &str| {
            fs::create_dir_all(own.join(id.replace('/', "_"))).expect("a directory");
        };
        let left = || -> Vec<_> {
            let all = fs::read_dir(&own).expect("a directory");
            all.map(|entry| entry.expect("an entry").file_name()).collect()
        };
        let lock = site.node.lock_volume(&ids[0]);
        let hanging = [OsString::from(ids[0].replace('/', "_"))];
        for id in &ids[..2] {
            leave(id);
        }
        let begun = Instant::now();
        site.flex.call(&["unmount", "/no/such/directory"]).expect("there is nothing to do");
        assert_eq!(left(), hanging);
        let spec = FlexSpec::new("data", "fast/pods");
        site.flex.set_up("a", &spec).expect("mounted");
        leave(&ids[1]);
        site.flex.tear_down("a", &spec).expect("unmounted");
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        assert_eq!(left(), hanging);
        drop(lock);
        site.flex.call(&["unmount", "/no/such/directory"]).expect("there is nothing to do");
        site.check_bare();
    });
}

/// Such as by a container that was started meanwhile, and has a copy of the mount.
#[test]
fn a_volume_that_is_mounted_elsewhere_for_a_moment_is_released_by_the_next_call() {
    let test = "a_volume_that_is_mounted_elsewhere_for_a_moment_is_released_by_the_next_call";
    on_devices(test, || {
        let site = FlexSite::new(WITHOUT);
        let spec = FlexSpec::new("data", "fast/db");
        site.flex.set_up("a", &spec).expect("mounted");
        let volume = site.daemon.volume("fast/db");
        let device = volume["device"].as_str().expect("a device");
        let elsewhere = tempfile::tempdir().expect("a directory");
        Run::new("mount").arg(device).arg(elsewhere.path()).ok();
        site.flex.tear_down("a", &spec).expect_err("it is mounted elsewhere");
        Run::new("umount").arg(elsewhere.path()).ok();
        site.flex.tear_down("a", &spec).expect("unmounted");
        site.check_bare();
    });
}

#[test]
fn what_can_never_be_mounted_is_refused_before_it_is_attached() {
    on_devices("what_can_never_be_mounted_is_refused_before_it_is_attached", || {
        let site = FlexSite::new(WITH_ATTACH);
        let mut small = FlexSpec::new("data", "fast/db");
        small.fs_type = "btrfs".to_owned();
        let mut option = FlexSpec::new("data", "fast/db");
        option.options.insert("mount-options".to_owned(), "noatime,bind".to_owned());
        let specs = [(small, "too few for btrfs"), (option, "bind cannot be used")];
        for (spec, why) in &specs {
            let device = site.flex.attach(spec, NODE).expect("published");
            check_failed(site.flex.mount_device(spec, &device), why);
            fs::remove_dir(site.flex.device_dir(spec)).expect("an empty directory");
            site.flex.detach(spec, NODE).expect("detached");
        }
        site.flex.configure(WITHOUT);
        for (spec, why) in &specs {
            check_failed(site.flex.set_up("a", spec), why);
        }
        assert_eq!(site.record()["epoch"], 2, "it was not published");
        site.check_bare();
        let log = site.daemon.log();
        assert!(!log.contains("attached"), "{log}");
    });
}

#[test]
fn an_installed_driver_is_replaced_as_a_whole() {
    let dir = tempfile::tempdir().expect("a directory");
    let place = dir.path().join("vendor.example~driver");
    let install = |args: &str| {
        let run = Run::new(sheave()).args("flexvolume install").arg(dir.path());
        run.args("--driver vendor.example/driver").args(args)
    };
    let init = || -> Value {
        let answer = Run::new(place.join("driver")).arg("init").ok();
        serde_json::from_str(&answer).expect("JSON")
    };
    let said = install("--node n1").ok();
    assert!(said.contains(place.join("driver").to_str().expect("UTF-8")), "{said}");
    assert_eq!(init()["capabilities"]["attach"], false);
    // While it runs, which forbids to write to it.
    let driver = place.join("driver");
    let running = std::process::Command::new(&driver)
        .arg0("sheave")
        .args(["serve", "memory:?size=1M", "--socket"])
        .arg(dir.path().join("socket"))
        .spawn();
    let mut running = running.expect("started");
    install("--node n1 --attach").ok();
    assert_eq!(init()["capabilities"]["attach"], true);
    running.kill().expect("killed");
    running.wait().expect("ended");
    let mut names: Vec<_> = fs::read_dir(&place)
        .expect("a directory")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["driver", "flexvolume.toml"]);
    let missing = dir.path().join("missing");
    let error = Run::new(sheave()).args("flexvolume install").arg(&missing).fails();
    assert!(error.contains("is kubelet's directory of volume plugins elsewhere?"), "{error}");
    assert!(!missing.exists());
    for wrong in ["--driver a", "--driver ../x/y", "--node a\"b"] {
        let output = Run::new(sheave()).args("flexvolume install").arg(dir.path()).args(wrong);
        assert_eq!(output.output().status.code(), Some(2), "{wrong}");
    }
}

#[test]
fn rule_43_what_is_not_supported_or_wrong_has_an_answer_without_a_daemon() {
    let dir = tempfile::tempdir().expect("a directory");
    let flex = FlexVolume::install(dir.path(), WITHOUT);
    flex.call(&["init"]).expect("kubelet drops a driver whose init fails");
    for call in [&["getvolumename", "{}"][..], &["provision"], &["INIT"]] {
        assert_eq!(flex.call(call), Err("Not supported".to_owned()));
    }
    check_failed(flex.call(&[]), "operation is missing");
    check_failed(flex.call(&["mount", "/d"]), "write mount DIR OPTIONS");
    let spec = FlexSpec::new("data", "fast/db");
    check_failed(flex.set_up("a", &spec), "no daemon at");
    let dir = flex.pod_dir("a", &spec);
    check_failed(flex.call(&["unmount", dir.to_str().expect("UTF-8")]), "no daemon at");
    check_failed(flex.attach(&spec, NODE), "no daemon at");
    check_failed(flex.detach(&spec, NODE), "no daemon at");
    let other = tempfile::tempdir().expect("a directory");
    let flex = FlexVolume::install(other.path(), "attached = true\n");
    check_failed(flex.call(&["init"]), "unknown field");
}
