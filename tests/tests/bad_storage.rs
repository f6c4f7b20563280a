//! Images that vanish, shrink, are in use, or have no room.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use sheave_tests::{
    Bystander, HangingDisk, Run, Scratch, Serve, Server, Wire, both_engines, cmd, errno,
    eventually, have, in_namespace, pattern, request_header, sheave, skip,
};

const MIB: u64 = 1 << 20;

/// The lines about storage errors.
fn warnings(server: &Server) -> Vec<String> {
    let is_one = |line: &&str| line.contains(" WARN ") && line.contains("storage error");
    server.log().lines().filter(is_one).map(str::to_owned).collect()
}

both_engines! {
    fn an_image_that_shrinks_is_an_error_not_a_lie(engine) {
        let scratch = Scratch::new();
        let image = scratch.filled("disk.img", 8 << 20);
        let mut server = Serve::new(&image).args("--read-only").engine(engine).unix();
        let mut wire = Wire::ready(&server).expect("a client");
        wire.read(0, 4096).expect("a reply").expect("data");
        let file = File::options().write(true).open(&image).expect("the image");
        file.set_len(4 << 20).expect("shrink");
        let lost = wire.read(6 << 20, 65536).expect("a reply");
        assert_eq!(lost, Err(errno::EIO), "what is gone cannot be read");
        let half = wire.read((4 << 20) - 4096, 8192).expect("a reply");
        assert_eq!(half, Err(errno::EIO), "what is half gone cannot be read");
        let there = wire.read(MIB, 65536).expect("a reply").expect("the rest is there");
        assert!(there == pattern(8 << 20, 1)[1 << 20..][..65536]);
        assert!(server.is_alive());
        server.wait_for_log("storage error", 1);
        let lines = warnings(&server);
        assert!(lines.len() == 1 && lines[0].contains("cut"), "one line for two reads: {lines:?}");
    }

    fn many_storage_errors_make_few_lines_and_mistakes_of_clients_none(engine) {
        const COUNT: u64 = 5000;
        let volume = "memory:?size=1M&fault=read:error=EIO&fault=flush:error=ENOSPC";
        let server = Serve::new(volume).args("--name disk").engine(engine).unix();
        let mut wire = Wire::ready(&server).expect("a client");
        for _ in 0..100 {
            assert_eq!(wire.write(MIB - 1, &[1; 2]).expect("a reply"), errno::ENOSPC, "beyond");
            wire.request(99, 1, 0, 1).expect("send");
            assert_eq!(wire.simple_reply(1).expect("a reply"), errno::EINVAL);
        }
        assert_eq!(warnings(&server), [""; 0]);
        for _ in 0..COUNT {
            assert_eq!(wire.read(0, 1).expect("a reply"), Err(errno::EIO));
        }
        wire.request(cmd::FLUSH, 1, 0, 0).expect("send");
        assert_eq!(wire.simple_reply(1).expect("a reply"), errno::ENOSPC);
        // The log is written beside the replies.
        server.wait_for_log("storage error", 2);
        let lines = warnings(&server);
        // One of each kind, and one a minute.
        assert!((2..10).contains(&lines.len()), "{} lines: {lines:?}", lines.len());
        assert!(lines[0].contains("fault=read:error=EIO"), "{lines:?}");
        let stats: Value = serde_json::from_str(&server.sheave("stats --json").ok()).expect("JSON");
        let disk = &stats[0]["volumes"][0];
        let count = |op, kind, count| json!({ "op": op, "kind": kind, "count": count });
        let failures = [count("read", "io", COUNT), count("flush", "no_space", 1)];
        assert_eq!(disk["failures"], Value::from(failures.to_vec()));
        let last = disk["last_failure"]["text"].as_str().expect("a text");
        assert!(last.contains("fault=flush:error=ENOSPC"), "{last}");
        let text = server.sheave("stats").ok();
        assert!(text.contains(&format!("disk: {} storage errors, the last ", COUNT + 1)), "{text}");
    }

    fn an_image_that_vanishes_is_served_to_the_end(engine) {
        let scratch = Scratch::new();
        let image = scratch.filled("disk.img", 8 << 20);
        let mut server = Serve::new(&image).engine(engine).unix();
        let mut bystander = Bystander::new(&server);
        fs::remove_file(&image).expect("remove");
        bystander.check(&mut server);
        fs::write(&image, "another file of this name").expect("write");
        bystander.check(&mut server);
        assert!(server.interrupt().success(), "{}", server.log());
        let other = fs::read_to_string(&image).expect("read");
        assert_eq!(other, "another file of this name");
    }

    fn a_full_disk_reaches_the_client(engine) {
        let Some((_disk, mut server)) = server_on_a_small_disk(engine) else { return };
        let mut bystander = Bystander::new(&server);
        let mut wire = Wire::ready(&server).expect("a client");
        let data = pattern(1 << 20, 9);
        let mut written = Vec::new();
        let mut refused = Vec::new();
        for mib in 8..32 {
            match wire.write(mib * MIB, &data).expect("a reply") {
                0 => written.push(mib),
                error => {
                    assert_eq!(error, errno::ENOSPC, "a full disk");
                    refused.push(mib);
                }
            }
        }
        assert!(written.len() >= 8, "only {written:?} fitted");
        assert!(refused.len() >= 8, "{written:?} fitted into 16 MiB");
        server.wait_for_log("storage error", 1);
        let lines = warnings(&server);
        let text = "No space left on device (os error 28)";
        assert!(lines.len() == 1 && lines[0].contains(text), "the system's text: {lines:?}");
        // A small write without room is refused, too, and fast.
        wire.send(&request_header(0, cmd::WRITE, 1, 31 * MIB + 4096, 4096)).expect("send");
        wire.send(&data[..4096]).expect("send");
        assert_eq!(wire.simple_reply(1).expect("a reply"), errno::ENOSPC);
        for &mib in &written {
            let read = wire.read(mib * MIB, 1 << 20).expect("a reply").expect("data");
            assert!(read == data, "data written before the disk was full, at {mib} MiB");
        }
        bystander.check(&mut server);
        // Room made is room used.
        for &mib in &written[..4] {
            wire.request(cmd::TRIM, 2, mib * MIB, MIB as u32).expect("send");
            assert_eq!(wire.simple_reply(2).expect("a reply"), 0, "trim");
        }
        let at = refused[0] * MIB;
        assert_eq!(wire.write(at, &data).expect("a reply"), 0, "a write into the room");
        assert!(wire.read(at, 1 << 20).expect("a reply").expect("data") == data);
        bystander.check(&mut server);
    }

    fn an_image_in_use_is_refused(engine) {
        let scratch = Scratch::new();
        let image = scratch.filled("disk.img", 8 << 20);
        let mut server = Serve::new(&image).engine(engine).unix();
        let mut bystander = Bystander::new(&server);
        let output = Run::new(sheave()).arg("serve").arg(&image).arg("--socket")
            .arg(scratch.file("second")).args("--engine").arg(engine)
            .env("SHEAVE_RUNTIME_DIR", scratch.path()).output();
        assert_eq!(output.status.code(), Some(1), "{}", output.describe());
        assert_eq!(output.stderr.lines().count(), 1, "one line: {}", output.stderr);
        assert!(output.stderr.contains("disk.img"), "names it: {}", output.stderr);
        bystander.check(&mut server);
        drop(bystander);
        drop(server);
        // A server that starts after the first one has ended gets it.
        let mut server = Serve::new(&image).engine(engine).unix();
        Bystander::new(&server).check(&mut server);
    }
}

#[test]
fn a_killed_server_leaves_nothing_in_the_way() {
    let scratch = Scratch::new();
    let image = scratch.filled("disk.img", 8 << 20);
    let mut server = Serve::new(&image).unix();
    Bystander::new(&server).check(&mut server);
    let mut wire = Wire::ready(&server).expect("a client");
    assert_eq!(wire.write(0, &pattern(65536, 2)).expect("a reply"), 0);
    wire.request(cmd::FLUSH, 1, 0, 0).expect("send");
    assert_eq!(wire.simple_reply(1).expect("a reply"), 0);
    let socket = server.socket().to_owned();
    server.kill();
    assert!(Path::new(&socket).exists(), "a killed server cannot remove its socket");
    let mut second = std::process::Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--"])
        .arg(sheave())
        .args(["serve", &image, "--socket", &socket])
        .env("SHEAVE_RUNTIME_DIR", scratch.path())
        .spawn()
        .expect("a second server");
    let mut wire = None;
    let serves = eventually(|| {
        wire = Wire::connect(&server).ok();
        wire.is_some()
    });
    assert!(serves, "the second server does not serve");
    let mut wire = wire.expect("a connection");
    wire.handshake().expect("greeting");
    wire.go("").expect("go");
    let read = wire.read(0, 65536).expect("a reply").expect("data");
    second.kill().expect("our own child");
    second.wait().expect("our own child");
    assert!(read == pattern(65536, 2), "what was flushed before the kill");
}

/// Volumes whose storage hangs, and the requests of each: more together than a ring takes.
const HUNG: usize = 8;
const DEPTH: u64 = 256;

#[test]
fn queues_of_volumes_that_hang_do_not_stop_others() {
    let test = "queues_of_volumes_that_hang_do_not_stop_others";
    if !have("nbdfuse") {
        return skip(test, "nbdfuse (libnbd-bin) is not installed");
    }
    in_namespace(test, || {
        for parameters in ["?direct=true", ""] {
            others_are_served_beside_those_that_hang(parameters);
        }
    });
}

fn others_are_served_beside_those_that_hang(parameters: &str) {
    let (disk, scratch) = (HangingDisk::new(), Scratch::new());
    let well = scratch.filled("well.img", 8 << 20);
    let mut config = format!("shards = 1\n[[export]]\nname = \"well\"\nvolume = \"{well}\"\n");
    for index in 0..HUNG {
        let path = disk.dir().join(index.to_string());
        let mut file = File::create(&path).expect("an image");
        file.write_all(&pattern(DEPTH as usize * 65536, 1)).expect("write an image");
        file.sync_all().expect("sync an image");
        let path = path.display();
        config +=
            &format!("[[export]]\nname = \"{index}\"\nvolume = \"file:{path}{parameters}\"\n");
    }
    // Else they would be read from memory.
    disk.forget();
    fs::write(scratch.file("serve.toml"), config).expect("a configuration");
    let server = Serve::configured(&scratch.file("serve.toml")).engine("uring").unix();
    let open = |export: &str| {
        let mut wire = Wire::connect(&server).expect("a client");
        wire.handshake().expect("greeting");
        wire.go(export).expect("an export");
        wire
    };
    let mut bystander = open("well");
    let mut wires = Vec::from_iter((0..HUNG).map(|index| open(&index.to_string())));
    // The commit of the journal that a flush makes is under way when the disk stops answering.
    let mut writer = open("0");
    assert_eq!(writer.write(0, &pattern(65536, 2)).expect("a reply"), 0);
    let hang = disk.hang();
    writer.request(cmd::FLUSH, DEPTH, 0, 0).expect("send");
    for wire in &mut wires {
        // Together, so that the server begins many in one turn.
        let read = |cookie| request_header(0, cmd::READ, cookie, cookie * 65536, 4096);
        wire.send(&Vec::from_iter((0..DEPTH).flat_map(read))).expect("send");
    }
    bystander.set_timeout(Duration::from_secs(30));
    for round in 0..200 {
        // Each may have to wait for the journal.
        writer.send(&request_header(0, cmd::WRITE, round, 0, 4096)).expect("send");
        writer.send(&[3; 4096]).expect("send");
        let read = bystander.read(round * 4096, 4096).expect("a reply beside volumes that hang");
        assert_eq!(read.expect("data").len(), 4096);
        assert_eq!(bystander.write(round * 4096, &[7; 4096]).expect("a reply"), 0);
    }
    drop(hang);
    for _ in 0..201 {
        assert_eq!(writer.any_simple_reply().expect("a reply").0, 0);
    }
    for wire in &mut wires {
        for _ in 0..DEPTH {
            assert_eq!(wire.any_simple_reply().expect("a reply").0, 0);
            wire.receive_vec(4096).expect("data");
        }
    }
}

/// A sparse image of 32 MiB on a file system of 16 MiB, which goes away with the server. The
/// directory must outlive it: removing a directory unmounts what others have mounted there.
fn server_on_a_small_disk(engine: &str) -> Option<(Scratch, Server)> {
    let scratch = Scratch::new();
    let mount = scratch.path().to_str().expect("UTF-8 path");
    let root = rustix::process::geteuid().is_root();
    let unshare: &[&str] =
        if root { &["unshare", "-m"] } else { &["unshare", "--map-root-user", "-m"] };
    let probe = unshare.iter().skip(1).fold(Run::new(unshare[0]), |run, arg| run.arg(arg));
    let probe = probe.args("mount -t tmpfs -o size=16M none").arg(mount).output();
    if !probe.status.success() {
        skip("a_full_disk_reaches_the_client", "may not mount a tmpfs");
        return None;
    }
    let prepare = r#"mount -t tmpfs -o size=16M none "$0" && truncate -s 32M "$0/disk.img" &&
                     exec "$@""#;
    let wrapper = [unshare, &["sh", "-c", prepare, mount]].concat();
    let image = scratch.file("disk.img");
    let server = Serve::new(image).through(&wrapper).engine(engine).unix();
    Some((scratch, server))
}
