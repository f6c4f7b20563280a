//! `sheave daemon` and its devices on a stand-in for a kernel: made, used, limited, longer, handed
//! over, ended.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use sheave_tests::{
    Call, Daemon, FakeKernel, Load, Moment, Node, Run, Scratch, Wire, cmd, eventually,
    in_namespace, on_devices, sheave,
};

const SIZE: u64 = Node::SIZE;

#[test]
fn a_volume_is_a_device_until_it_is_detached() {
    let node = Node::new();
    let mut daemon = node.daemon();
    let device = daemon.attach(&node.image);
    assert_eq!(device, node.file("fake0"));
    assert_eq!(daemon.attach(&node.image), device, "the same once more");
    let found = daemon.device();
    assert_eq!(found["device"], device.to_str().expect("UTF-8"));
    assert_eq!((&found["front"], &found["size_bytes"]), (&"fake".into(), &SIZE.into()));
    node.check_served(&device);
    assert_eq!(node.records(), 1);
    let stats: Value = serde_json::from_str(&daemon.sheave("stats --json").ok()).expect("JSON");
    assert!(stats.to_string().contains("disk.img"), "{stats}");

    let user = Wire::unix(&device).expect("the device");
    daemon.sheave("detach").arg(&device).output().check_refused("in use");
    node.check_served(&device);
    drop(user);
    daemon.sheave("detach").arg(&node.image).ok();
    node.check_bare(&daemon);

    let device = daemon.attach(&node.image);
    let mut user = Wire::unix(&device).expect("the device");
    daemon.sheave("detach --force").arg(&device).ok();
    assert!(user.is_closed());
    node.check_bare(&daemon);
    daemon.signal("TERM");
    daemon.ends_well();
}

#[test]
fn a_device_that_is_read_only_stays_so() {
    let node = Node::new();
    let mut daemon = node.daemon();
    let attached = daemon.sheave("attach --read-only").arg(&node.image).ok();
    let device = PathBuf::from(attached.trim_end());
    let check_read_only = |daemon: &Daemon| {
        assert_eq!(daemon.device()["read_only"], true);
        let mut wire = Wire::unix(&device).expect("the device");
        assert_ne!(wire.write(0, &[1; 512]).expect("a reply"), 0);
        assert!(wire.read(0, 512).expect("a reply").is_ok());
    };
    check_read_only(&daemon);
    daemon.sheave("attach").arg(&node.image).output().check_refused("read-only");
    daemon.kill();
    let daemon = node.daemon();
    daemon.wait_for_recovery();
    check_read_only(&daemon);
}

#[test]
fn a_device_grows_while_it_is_busy() {
    let node = Node::new();
    let daemon = node.daemon();
    // A read of what is there only later does not end.
    let volume = format!("{}?fault=read:delay=3600s:range=2M-3M", node.image);
    let device = daemon.attach(&volume);
    let load = Load::start(&device);
    let resize = |size: &str| daemon.sheave("volume resize --size").arg(size).arg(&volume).output();
    for mib in 2..=4 {
        assert_eq!(resize(&format!("{mib}M")).stdout, format!("{}\n", mib * SIZE));
        assert_eq!(daemon.device()["size_bytes"], mib * SIZE);
        load.check_running();
    }
    let mut slow = Wire::unix(&device).expect("the device");
    slow.request(cmd::READ, 5, 2 * SIZE, 4096).expect("sent");
    assert_eq!(resize("5M").stdout, format!("{}\n", 5 * SIZE));
    load.check_running();
    resize("1M").check_refused("would cut data off");
    // It has grown by other means.
    let image = File::options().write(true).open(&node.image).expect("the image");
    image.set_len(6 * SIZE).expect("a longer image");
    assert_eq!(daemon.sheave("volume resize").arg(&device).ok(), format!("{}\n", 6 * SIZE));
    let mut wire = Wire::unix(&device).expect("the device");
    assert_eq!(wire.write(6 * SIZE - 512, &[9; 512]).expect("a reply"), 0);
    let longest = load.end();
    assert!(longest < Duration::from_secs(60), "a pause of {longest:?}");
    assert!(node.kernel.in_flight() > 0, "the slow read");
    assert_eq!(fs::read(&node.image).expect("the image")[6 * SIZE as usize - 512..], [9; 512]);
}

/// What is shown of it is what it has, also by the next daemon.
#[test]
fn a_device_that_the_kernel_does_not_grow_keeps_its_size() {
    let node = Node::new();
    let mut daemon = node.daemon();
    let device = daemon.attach(&node.image);
    node.kernel.refuse_resizes();
    let grow = |daemon: &Daemon| {
        let grown = daemon.sheave("volume resize --size 3M").arg(&node.image).output();
        grown.check_refused("not supported");
        assert_eq!(daemon.device()["size_bytes"], SIZE);
    };
    for _ in 0..2 {
        grow(&daemon);
        daemon.kill();
        daemon = node.daemon();
        daemon.wait_for_recovery();
        assert_eq!(daemon.device()["size_bytes"], SIZE);
    }
    grow(&daemon);
    let mut wire = Wire::unix(&device).expect("the device");
    assert_eq!(wire.read(0, 512).expect("a reply").expect("data").len(), 512);
    drop(wire);
    daemon.sheave("detach").arg(&device).ok();
    daemon.attach(&node.image);
    assert_eq!(daemon.device()["size_bytes"], 3 * SIZE);
}

#[test]
fn limits_change_while_a_device_is_used_and_outlive_a_daemon() {
    let node = Node::new();
    let mut daemon = node.daemon();
    let device = daemon.attach(&node.image);
    let set = |daemon: &Daemon, limits: &str| {
        daemon.sheave("volume set").arg(&node.image).args(limits).ok();
    };
    let limits = |daemon: &Daemon| {
        let found = daemon.device();
        (found["limit_bps"].as_u64(), found["limit_iops"].as_u64())
    };
    assert_eq!(limits(&daemon), (None, None));
    let time = || {
        let mut wire = Wire::unix(&device).expect("the device");
        let begun = Instant::now();
        for _ in 0..30 {
            assert!(wire.read(0, 512).expect("a reply").is_ok());
        }
        begun.elapsed()
    };
    set(&daemon, "--limit-iops 20");
    assert!(time() > Duration::from_secs(1), "29 at 20 a second");
    set(&daemon, "--limit-bps 1G");
    assert_eq!(limits(&daemon), (Some(1 << 30), Some(20)), "the other stays");
    daemon.kill();
    let daemon = node.daemon();
    daemon.wait_for_recovery();
    assert_eq!(limits(&daemon), (Some(1 << 30), Some(20)));
    assert!(time() > Duration::from_secs(1), "the next daemon keeps it");
    // What waits for a low limit goes when it is lifted.
    set(&daemon, "--limit-iops 1");
    let mut wire = Wire::unix(&device).expect("the device");
    let begun = Instant::now();
    for cookie in 0..500 {
        wire.request(cmd::READ, cookie, 0, 512).expect("sent");
    }
    set(&daemon, "--limit-iops none --limit-bps 0");
    // They may overtake each other.
    let mut awaited: HashSet<u64> = (0..500).collect();
    while !awaited.is_empty() {
        let (error, cookie) = wire.any_simple_reply().expect("a reply");
        assert!(error == 0 && awaited.remove(&cookie), "{cookie}: {error}");
        wire.receive_vec(512).expect("data");
    }
    assert!(begun.elapsed() < Duration::from_secs(100), "500 at one a second");
    assert_eq!(limits(&daemon), (None, None));
    drop(wire);
    daemon.sheave("detach").arg(&device).ok();
    let unknown = daemon.sheave("volume set --limit-iops 1").arg(&node.image).output();
    unknown.check_refused("neither a device nor a volume");
}

#[test]
fn requests_wait_for_the_next_daemon() {
    let node = Node::new();
    let mut daemon = node.daemon();
    let volume = format!("{}?fault=flush:delay=3600s:count=1", node.image);
    let device = daemon.attach(&volume);
    let mut wire = Wire::unix(&device).expect("the device");
    wire.request(cmd::FLUSH, 1, 0, 0).expect("sent");
    assert_eq!(wire.write(0, &[5; 512]).expect("a reply"), 0, "behind it");
    daemon.kill();
    wire.request(cmd::READ, 2, 0, 512).expect("sent");
    assert!(eventually(|| node.kernel.in_flight() == 2));
    let _daemon = node.daemon();
    // The fault is counted anew, so the flush that is sent again waits once more.
    assert_eq!(wire.simple_reply(2).expect("a reply"), 0);
    assert_eq!(wire.receive_vec(512).expect("data"), [5; 512]);
    assert_eq!(node.kernel.in_flight(), 1);
}

#[test]
fn a_connection_that_dies_is_replaced() {
    let node = Node::new();
    let daemon = node.daemon();
    let device = daemon.attach(&node.image);
    let load = Load::start(&device);
    node.kernel.cut();
    load.check_running();
    let _longest = load.end();
    daemon.wait_for_log("does not serve it any more");
    node.check_served(&device);
}

#[test]
fn rule_31_a_daemon_gives_way_while_its_devices_are_busy() {
    let node = Node::new();
    let mut daemon = node.daemon();
    let device = daemon.attach(&node.image);
    let load = Load::start(&device);
    let before = daemon.device();
    // Connections go on, so none is replaced.
    node.kernel.strike(Call::Recover, Moment::Before, || {});
    for _ in 0..3 {
        let successor = node.start(&["daemon", "--takeover"]);
        daemon.ends_well();
        successor.wait_for_log(" ready ");
        successor.wait_for_recovery();
        load.check_running();
        daemon = successor;
    }
    assert_eq!(daemon.device(), before);
    assert!(!node.kernel.has_struck(), "a connection was replaced");
    let longest = load.end();
    assert!(longest < Duration::from_secs(60), "a pause of {longest:?}");
    node.check_served(&device);
}

#[test]
fn what_was_in_memory_is_gone_with_its_daemon() {
    let node = Node::new();
    let mut daemon = node.daemon();
    let device = daemon.attach("memory:?size=1M");
    let mut user = Wire::unix(&device).expect("the device");
    assert_eq!(user.write(0, &[1; 512]).expect("a reply"), 0);
    let successor = daemon.sheave("daemon --takeover").env("SHEAVE_STATE_DIR", daemon.dir());
    successor.output().check_refused("would be gone with this daemon");
    assert_eq!(user.read(0, 512).expect("a reply").expect("data"), [1; 512], "it is served on");
    daemon.kill();
    let daemon = node.daemon();
    daemon.wait_for_log("its memory is gone");
    assert!(user.is_closed());
    assert!(eventually(|| node.kernel.devices().is_empty()));
    assert!(eventually(|| daemon.sheave("ls").ok() == "no devices\n"));
}

#[test]
fn rule_32_a_volume_that_was_replaced_is_waited_for() {
    let node = Node::new();
    let mut daemon = node.daemon();
    let device = daemon.attach(&node.image);
    daemon.kill();
    fs::rename(&node.image, node.file("moved.img")).expect("another name");
    node.kernel.scratch().filled("disk.img", SIZE as usize);
    let daemon = node.daemon();
    daemon.wait_for_log("another file or disk");
    let why = daemon.device()["waiting"].to_string();
    assert!(why.contains("another file"), "{why}");
    daemon.sheave("detach").arg(&device).output().check_refused("waits for its volume");
    fs::rename(node.file("moved.img"), &node.image).expect("its name");
    daemon.wait_for_recovery();
    node.check_served(&device);
}

/// A record that was put back from a copy names a number that another device has by now.
#[test]
fn rule_28_a_device_is_known_by_its_key_and_not_by_its_number() {
    let node = Node::new();
    let mut daemon = node.daemon();
    let device = daemon.attach(&node.image);
    let entries = fs::read_dir(node.file("devices")).expect("the records").flatten();
    let mut records = entries.map(|entry| entry.path());
    let record = records.find(|path| path.extension().is_some_and(|kind| kind == "json"));
    let record = record.expect("a record");
    let copy = fs::read(&record).expect("the record");
    daemon.sheave("detach").arg(&node.image).ok();
    let other = node.kernel.scratch().filled("other.img", SIZE as usize);
    assert_eq!(daemon.attach(&other), device, "it has the number now");
    daemon.kill();
    fs::write(&record, copy).expect("written");
    let daemon = node.daemon();
    daemon.wait_for_recovery();
    assert!(!record.exists(), "it is of no device");
    assert_eq!((daemon.device()["volume"].as_str(), node.records()), (Some(&*other), 1));
    daemon.sheave("detach").arg(&node.image).output().check_refused("see: sheave ls");
    let data = Wire::unix(&device).expect("the device").read(0, 8192).expect("a reply");
    assert_eq!(data.expect("data"), fs::read(&other).expect("the image")[..8192]);
}

/// The daemon does not wait for its next look at the devices.
#[test]
fn rule_28_a_device_whose_number_another_one_has_is_not_named() {
    let node = Node::new();
    let daemon = node.daemon();
    let device = daemon.attach(&node.image);
    node.kernel.replace_all();
    assert_eq!(daemon.sheave("ls").ok(), "no devices\n");
    let again = daemon.attach(&node.image);
    assert_ne!(again, device);
    node.check_served(&again);
    node.kernel.replace_all();
    daemon.sheave("detach").arg(&node.image).ok();
    assert_eq!(node.records(), 0);
}

#[test]
fn rule_32_a_volume_that_has_become_smaller_is_waited_for() {
    let node = Node::new();
    let mut daemon = node.daemon();
    let device = daemon.attach(&node.image);
    daemon.kill();
    let image = fs::read(&node.image).expect("the image");
    let file = File::options().write(true).open(&node.image).expect("the image");
    file.set_len(SIZE - 4096).expect("less of it");
    let daemon = node.daemon();
    daemon.wait_for_log("the device has");
    let why = daemon.device()["waiting"].to_string();
    assert!(why.contains("give it its size back"), "{why}");
    file.write_all_at(&image[SIZE as usize - 4096..], SIZE - 4096).expect("all of it");
    daemon.wait_for_recovery();
    node.check_served(&device);
}

#[test]
fn a_volume_that_is_missing_holds_up_no_others() {
    const COUNT: usize = 8;
    let node = Node::new();
    let mut daemon = node.daemon();
    let images: Vec<_> =
        (0..COUNT).map(|at| node.kernel.scratch().filled(&format!("{at}.img"), 8192)).collect();
    let devices: Vec<_> = images.iter().map(|image| daemon.attach(image)).collect();
    daemon.kill();
    fs::remove_file(&images[3]).expect("one image less");
    let daemon = node.daemon();
    let waiting = || -> Vec<_> {
        let list: Value = serde_json::from_str(&daemon.sheave("ls --json").ok()).expect("JSON");
        let list = list.as_array().expect("a list").clone();
        assert_eq!(list.len(), COUNT);
        let waits = list.iter().filter(|found| !found["waiting"].is_null());
        waits.map(|found| found["volume"].as_str().expect("a volume").to_owned()).collect()
    };
    assert!(eventually(|| waiting() == images[3..=3]), "{:?} wait", waiting());
    for (at, (image, device)) in images.iter().zip(&devices).enumerate().filter(|(at, _)| *at != 3)
    {
        let mut wire = Wire::unix(device).expect("the device");
        let data = wire.read(0, 8192).expect("a reply").expect("data");
        assert_eq!(data, fs::read(image).expect("the image"), "{at}");
    }
    daemon.sheave("detach --force").arg(&images[3]).ok();
    assert_eq!(node.kernel.devices().len(), COUNT - 1);
}

#[test]
fn a_daemon_that_is_to_end_serves_on_what_is_used() {
    let node = Node::new();
    let mut daemon = node.daemon();
    let device = daemon.attach(&node.image);
    let mut user = Wire::unix(&device).expect("the device");
    daemon.signal("TERM");
    daemon.wait_for_log("served on");
    assert!(user.read(0, 512).expect("a reply").is_ok());
    drop(user);
    daemon.ends_well();
    assert_eq!(node.kernel.devices(), [] as [PathBuf; 0]);
}

/// A loop device, until it is dropped.
struct Loop(String);

impl Loop {
    fn over(file: &str) -> Self {
        Self(Run::new("losetup").args("--find --show").arg(file).ok().trim_end().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Run::new("losetup").arg("--detach").arg(&self.0).output();
    }
}

/// As kubelet's over the raw device of a pod, with a path that the daemon's container has not. The
/// first process of a container may be out of reach, so the shell is one.
#[test]
fn a_loop_device_is_a_user_though_its_file_is_in_another_mount_namespace() {
    let test = "a_loop_device_is_a_user_though_its_file_is_in_another_mount_namespace";
    in_namespace(test, || {
        const FIRST: &str = r#"unshare --mount sh -c "$0" "$@"; exit $?"#;
        const HIDE: &str = r#"mount --bind /dev/null "$0" && exec "$1" device-helper "$2""#;
        let scratch = Scratch::new();
        let device = Loop::over(&scratch.filled("disk.img", 1 << 20));
        let user = Loop::over(&device.0);
        let name = |device: &Loop| device.0.strip_prefix("/dev/").expect("a device").to_owned();
        let task = format!(r#"{{"Claim":{{"name":"{}"}}}}"#, name(&device));
        let refused = Run::new("unshare")
            .args("--pid --fork --kill-child --mount-proc sh -c")
            .arg(FIRST)
            .arg(HIDE)
            .arg(&device.0)
            .arg(sheave())
            .arg(&task)
            .ok();
        assert!(refused.contains(&format!("in use: {};", name(&user))), "{refused}");
        drop(user);
        let claimed = || Run::new(sheave()).arg("device-helper").arg(&task).ok();
        assert!(eventually(|| claimed().contains(r#""errno":0"#)), "it is free");
    });
}

#[test]
fn a_loop_device_on_a_device_ends_with_the_stand_in() {
    on_devices("a_loop_device_on_a_device_ends_with_the_stand_in", || {
        let kernel = FakeKernel::with_block_devices();
        let image = kernel.scratch().filled("disk.img", Node::SIZE as usize);
        let node = Node { kernel, image };
        let mut daemon = node.daemon();
        let device = fs::canonicalize(daemon.attach(&node.image)).expect("a block device");
        let device = device.to_str().expect("UTF-8");
        let user = Loop::over(device);
        let is_there = |device: &str| {
            let name = device.strip_prefix("/dev/").expect("a device");
            Path::new("/sys/block").join(name).join("loop").exists()
        };
        assert!(is_there(device) && is_there(&user.0));
        daemon.kill();
        drop(node);
        assert!(eventually(|| !is_there(&user.0)), "{} is left", user.0);
        assert!(eventually(|| !is_there(device)), "{device} is left");
    });
}
