//! Object volumes in directories, by the command line and foreign clients.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::Value;
use sheave_tests::{Output, Wire};
use sheave_tests::{Run, Scratch, Serve, Server, cmd, compare, eventually, request_header, sheave};

const MIB: u64 = 1 << 20;

/// A directory of volumes, and of what nodes keep.
struct Store {
    scratch: Scratch,
}

impl Store {
    fn new() -> Self {
        Self { scratch: Scratch::on_disk() }
    }

    fn place(&self, name: &str) -> String {
        format!("dir://{}", self.scratch.file(name))
    }

    /// A volume, as a node of this name has it.
    fn on_node(&self, name: &str, node: &str) -> String {
        format!("{}?cache-dir={}", self.place(name), self.scratch.file(node))
    }

    fn create(&self, name: &str, size: &str) {
        let created = volume("create").arg(self.place(name)).args("--size").arg(size).ok();
        assert_eq!(created.trim(), self.place(name));
    }

    fn info(&self, name: &str) -> Value {
        let text = volume("info").arg("--json").arg(self.place(name)).ok();
        serde_json::from_str(&text).expect("JSON")
    }

    fn state(&self, name: &str) -> String {
        self.info(name)["state"].as_str().expect("a state").to_owned()
    }

    fn serve(&self, name: &str, node: &str) -> Server {
        Serve::new(self.on_node(name, node)).unix()
    }

    /// The log objects of a volume, in order.
    fn objects(&self, name: &str) -> Vec<PathBuf> {
        let entries = |dir: &Path| {
            let found = fs::read_dir(dir)
                .expect("a directory")
                .map(|entry| entry.expect("an entry").path());
            let mut found: Vec<_> = found.collect();
            found.sort();
            found
        };
        let epochs = entries(&self.scratch.path().join(name).join("log"));
        epochs.iter().flat_map(|epoch| entries(epoch)).collect()
    }
}

fn volume(command: &str) -> Run {
    Run::new(sheave()).args("volume").args(command)
}

fn nbdcopy(from: impl AsRef<Path>, to: impl AsRef<Path>) {
    Run::new("nbdcopy").arg(from.as_ref()).arg(to.as_ref()).ok();
}

fn open_error(volume: &str) -> String {
    let output: Output =
        Run::new(sheave()).args("serve").arg(volume).args("--socket /nowhere/s").output();
    assert!(!output.status.success(), "{}", output.describe());
    let lines: Vec<_> = output.stderr.lines().filter(|line| line.starts_with("sheave: ")).collect();
    assert_eq!(lines.len(), 1, "one line: {}", output.describe());
    lines[0].to_owned()
}

#[test]
fn a_file_system_is_copied_in_and_out_and_survives_a_kill_and_the_loss_of_the_node() {
    let store = Store::new();
    store.create("vol", "64M");
    let image = store.scratch.ext4("image", "64M");
    let out = |name: &str| store.scratch.path().join(name);
    let mut server = store.serve("vol", "a");
    nbdcopy(&image, server.uri());
    nbdcopy(server.uri(), out("first"));
    compare(&image, out("first"));
    assert_eq!(store.state("vol"), "open");
    server.kill();
    let mut server = store.serve("vol", "a");
    nbdcopy(server.uri(), out("second"));
    compare(&image, out("second"));
    assert!(server.end(Signal::TERM).success());
    assert_eq!(store.state("vol"), "closed");
    // What the first node had is gone.
    fs::remove_dir_all(store.scratch.file("a")).expect("a directory");
    let server = store.serve("vol", "b");
    nbdcopy(server.uri(), out("third"));
    compare(&image, out("third"));
    Run::new("/usr/sbin/e2fsck").args("-f -n").arg(out("third")).ok();
}

#[test]
fn a_volume_is_made_described_and_deleted() {
    let store = Store::new();
    store.create("vol", "1G");
    let info = store.info("vol");
    assert_eq!((&info["size_bytes"], &info["state"]), (&Value::from(1 << 30), &"closed".into()));
    assert_eq!((&info["objects"], &info["stored_bytes"]), (&0.into(), &0.into()));
    let text = volume("info").arg(store.place("vol")).ok();
    assert!(text.contains("size_bytes: 1073741824\n"), "{text}");
    let place = store.place("vol");
    let told = volume("create").arg(&place).args("--size 1G").fails();
    assert!(told.contains("there is a volume already; delete it"), "{told}");
    // A node's journal goes too.
    drop(store.serve("vol", "a"));
    let journals = || fs::read_dir(store.scratch.file("a")).expect("a directory").count();
    assert_eq!(journals(), 1);
    volume("delete").arg(store.on_node("vol", "a")).ok();
    assert_eq!(journals(), 0);
    for told in [volume("info").arg(&place).fails(), open_error(&store.on_node("vol", "a"))] {
        assert!(told.contains("the volume is deleted"), "{told}");
    }
    store.create("vol", "2G");
    assert_ne!(store.info("vol")["uuid"], info["uuid"]);
    assert_eq!(store.info("vol")["size_bytes"], 2_u64 << 30);
}

#[test]
fn wrong_commands_are_told_in_a_line() {
    let store = Store::new();
    let place = store.place("vol");
    let below = store.place("no/such/vol");
    let create = || volume("create").arg(&place);
    let cases = [
        (create().fails(), "the size is missing; add --size 10G"),
        (create().args("--size 1000").fails(), "1000 bytes is not a multiple of 4096"),
        (create().args("--size 0").fails(), "a size of 0 blocks cannot be"),
        (create().args("--size 1G --limit-bps 1M").fails(), "has no limits of its own"),
        (volume("create --size 1G").arg(&below).fails(), "the directory above it must exist"),
        (volume("info").arg(&place).fails(), "there is no volume; make it with"),
        (volume("delete").arg(&place).fails(), "there is no volume; make it with"),
        (volume("delete").arg("nbd://h/e").fails(), "not made, described or deleted"),
        (volume("info").arg("dir:vol").fails(), "dir:///store/name"),
        (open_error(&place), "there is no volume; make it with"),
    ];
    for (told, want) in cases {
        assert!(told.contains(want), "{want}: {told}");
    }
    assert!(fs::read_dir(store.scratch.path()).expect("a directory").next().is_none());
}

#[test]
fn a_volume_is_open_once_and_taken_over_on_demand() {
    let store = Store::new();
    store.create("vol", "16M");
    let mut first = store.serve("vol", "a");
    let mut wire = Wire::ready(&first).expect("a client");
    let write = |wire: &mut Wire, fill: u8| {
        let bytes = vec![fill; 8192];
        wire.send(&request_header(0, cmd::WRITE, 7, MIB, 8192)).expect("send");
        wire.send(&bytes).expect("send");
        wire.any_simple_reply().expect("a reply").0
    };
    assert_eq!(write(&mut wire, 1), 0);
    let told = open_error(&store.on_node("vol", "a"));
    assert!(told.contains("the volume is open on this node"), "{told}");
    let told = open_error(&store.on_node("vol", "b"));
    assert!(told.contains("is open on node") && told.contains("--take-over"), "{told}");
    let told = volume("delete").arg(store.place("vol")).fails();
    assert!(told.contains("it is open on node"), "{told}");

    let second = Serve::new(store.on_node("vol", "b")).args("--take-over").unix();
    let mut other = Wire::ready(&second).expect("a client");
    assert_eq!(write(&mut other, 2), 0);
    // The first one learns of it when it uploads, and says so.
    let has_failed = || {
        wire.request(cmd::FLUSH, 0, 0, 0).expect("send");
        wire.simple_reply(0).expect("a reply") != 0
    };
    assert!(eventually(has_failed), "{}", first.log());
    first.wait_for_log("another node has taken over the volume", 1);
    first.kill();
    drop(other);
    drop(second);

    // Back on the first node, its journal is kept aside.
    let third = store.serve("vol", "a");
    third.wait_for_log(".orphan", 1);
    let mut wire = Wire::ready(&third).expect("a client");
    let read = wire.read(MIB, 8192).expect("a reply").expect("its data");
    assert!(read.iter().all(|byte| *byte == 2));
}

/// Damages an object in several ways: what `fails` says names it. `want`: of another object.
fn check_damage(object: &Path, other: &Path, want: &str, fails: impl Fn() -> String) {
    let name = object.file_name().expect("a name").to_string_lossy().into_owned();
    let whole = fs::read(object).expect("an object");
    let other = fs::read(other).expect("an object");
    for (body, want) in [
        (None, "the object is missing"),
        (Some(&whole[..100]), "ends too early"),
        (Some(&other[..]), want),
    ] {
        match body {
            Some(body) => fs::write(object, body).expect("write"),
            None => fs::remove_file(object).expect("remove"),
        }
        let told = fails();
        assert!(told.contains(want) && told.contains(&name), "{told}");
    }
    fs::write(object, &whole).expect("write");
}

#[test]
fn damaged_objects_are_named_and_never_served() {
    let store = Store::new();
    store.create("vol", "64M");
    let image = store.scratch.filled("image", 64 << 20);
    let server = store.serve("vol", "a");
    nbdcopy(&image, server.uri());
    drop(server);
    let objects = store.objects("vol");
    assert!(objects.len() >= 2, "{objects:?}");
    let whole = fs::read(&objects[0]).expect("an object");
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    fs::write(&objects[0], &changed).expect("write");
    let server = store.serve("vol", "a");
    let failed = Run::new("nbdcopy").arg(server.uri()).arg(store.scratch.file("out")).fails();
    assert!(failed.contains("Input/output error"), "{failed}");
    drop(server);
    // An object is named when its blocks are read, and a checkpoint by an opening, which needs it.
    let copy = || {
        let copy = Run::new(sheave()).args("copy").arg(store.on_node("vol", "a"));
        copy.arg(store.scratch.file("out")).fails()
    };
    let checkpoint = objects.last().expect("objects");
    let open = || open_error(&store.on_node("vol", "a"));
    check_damage(&objects[0], &objects[1], "the checksum of a frame is wrong", copy);
    check_damage(checkpoint, &objects[0], "a frame ends too early", open);
    fs::write(&objects[0], &whole).expect("write");
    let server = store.serve("vol", "a");
    nbdcopy(server.uri(), store.scratch.file("out"));
    compare(&image, store.scratch.file("out"));
}

#[test]
fn what_a_flush_waits_for_is_set_and_kept() {
    let store = Store::new();
    volume("create --size 16M --durability remote").arg(store.place("vol")).ok();
    assert_eq!(store.info("vol")["durability"], "remote");
    let mut server = store.serve("vol", "a");
    let mut wire = Wire::ready(&server).expect("a client");
    let bytes = sheave_tests::pattern(MIB as usize, 1);
    assert_eq!(wire.write(MIB, &bytes).expect("a reply"), 0);
    wire.request(cmd::FLUSH, 0, 0, 0).expect("send");
    assert_eq!(wire.simple_reply(0).expect("a reply"), 0);
    let set =
        |durability| volume("set").arg(store.place("vol")).args("--durability").arg(durability);
    let told = set("local").fails();
    assert!(told.contains("it is open, or was not closed, on node"), "{told}");
    // The node is gone, with its journal.
    drop(wire);
    server.kill();
    fs::remove_dir_all(store.scratch.path().join("a")).expect("a directory");
    let mut server = Serve::new(store.on_node("vol", "b")).args("--take-over").unix();
    let read = Wire::ready(&server).expect("a client").read(MIB, MIB as u32);
    assert!(read.expect("a reply").expect("data") == bytes);
    assert!(server.end(Signal::TERM).success(), "{}", server.log());
    let output = set("unsafe").output();
    assert!(output.status.success() && output.stderr.contains("flushes wait for nothing"));
    assert_eq!(store.info("vol")["durability"], "unsafe");
    let server = store.serve("vol", "b");
    server.wait_for_log("flushes wait for nothing", 1);
    let told = volume("set --durability remote").arg("disk.img").fails();
    assert!(told.contains("--durability is for object volumes"), "{told}");
}
