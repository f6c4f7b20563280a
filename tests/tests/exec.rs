//! Volumes whose NBD server is started for them: qcow2 by qemu-nbd, others by nbdkit.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use sheave_core::percent_encode;
use sheave_tests::{
    Load, Node, PATIENCE, Run, Scratch, Serve, Wire, compare, eventually, have, pattern, sheave,
};

/// Of all images, in bytes.
const LEN: usize = 24 << 20;

/// A VOLUME of a command, which appends its process number to a file first.
fn volume(command: &str, pids: &str) -> String {
    assert!(have("qemu-nbd") && have("nbdkit"), "this test needs qemu-nbd and nbdkit installed");
    let command = format!("sh -c 'echo $$ >>{pids}; exec {command}'");
    format!("nbd+exec:?command={}", percent_encode(command.as_bytes(), |c| !"% &".contains(c)))
}

/// The processes that were started, oldest first.
fn started(pids: &str) -> Vec<Pid> {
    let text = fs::read_to_string(pids).unwrap_or_default();
    let pids = text.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?));
    pids.collect()
}

fn is_gone(pid: Pid) -> bool {
    test_kill_process(pid).is_err()
}

/// Bytes on the disk of all files in a directory.
fn used(dir: &Scratch) -> u64 {
    let entries = fs::read_dir(dir.path()).expect("a directory").flatten();
    entries.filter_map(|entry| Some(entry.metadata().ok()?.blocks() * 512)).sum()
}

/// Kills the newest program again and again while a command runs, at least so many times, once the
/// command has written something into the directory.
fn kill_while(mut running: Child, dir: &Scratch, pids: &str, times_min: usize) {
    let before = used(dir);
    assert!(eventually(|| used(dir) > before + (1 << 20)), "it writes");
    let (mut killed, begun) = (Vec::new(), Instant::now());
    while running.try_wait().expect("our own child").is_none() {
        assert!(begun.elapsed() < 2 * PATIENCE, "the command ends");
        if let Some(newest) = started(pids).last().filter(|pid| !killed.contains(*pid)) {
            // It may serve for a moment, and may have ended by itself.
            std::thread::sleep(Duration::from_millis(200));
            if kill_process(*newest, Signal::KILL).is_ok() {
                killed.push(*newest);
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let status = running.wait().expect("our own child");
    assert!(status.success(), "{status}");
    assert!(killed.len() >= times_min, "{} kills", killed.len());
}

fn copy(from: &str, to: &str) -> Child {
    let mut copy = Command::new(sheave());
    copy.args(["copy", "--quiet", from, to]).stdin(Stdio::null());
    copy.spawn().expect("a process")
}

fn qcow2(scratch: &Scratch) -> String {
    let image = scratch.file("disk.qcow2");
    Run::new("qemu-img").args("create -q -f qcow2").arg(&image).arg("24M").ok();
    image
}

#[test]
fn a_qcow2_image_is_copied_to_and_from_though_its_server_is_killed() {
    let scratch = Scratch::on_disk();
    let source = scratch.filled("disk.img", LEN);
    let (image, pids) = (qcow2(&scratch), scratch.file("pids"));
    let volume = volume(&format!("qemu-nbd -f qcow2 {image}"), &pids);
    kill_while(copy(&source, &format!("{volume}&limit-bps=6M")), &scratch, &pids, 3);
    assert!(started(&pids).into_iter().all(is_gone), "no program and no zombie is left");
    Run::new("qemu-img").args("compare -f raw -F qcow2").arg(&source).arg(&image).ok();
    let out = scratch.file("out.img");
    kill_while(copy(&format!("{volume}&limit-bps=6M"), &out), &scratch, &pids, 3);
    compare(&source, &out);
}

#[test]
fn a_served_volume_outlives_its_program() {
    let scratch = Scratch::on_disk();
    let source = scratch.filled("disk.img", LEN);
    let (file, pids) = (scratch.sparse("file", LEN as u64), scratch.file("pids"));
    let server = Serve::new(volume(&format!("nbdkit file {file}"), &pids)).unix();
    kill_while(copy(&format!("{source}?limit-bps=6M"), &server.uri()), &scratch, &pids, 3);
    compare(&source, &file);
    let out = scratch.file("out.img");
    copy(&server.uri(), &out).wait().expect("our own child");
    compare(&source, &out);
    drop(server);
    assert!(started(&pids).into_iter().all(is_gone), "no program and no zombie is left");
}

#[test]
fn another_sheave_is_a_program_too() {
    let scratch = Scratch::new();
    let image = scratch.islands("disk.img", LEN as u64);
    let serve = format!("{} serve {image} --name disk", sheave().display()).replace(' ', "%20");
    let out = scratch.file("out.img");
    assert!(copy(&format!("nbd+exec:/disk?command={serve}"), &out).wait().expect("it").success());
    compare(&image, &out);
}

#[test]
fn a_program_of_a_killed_server_ends() {
    let scratch = Scratch::new();
    let pids = scratch.file("pids");
    let mut server = Serve::new(volume("nbdkit null 1M", &pids)).unix();
    let program = *started(&pids).first().expect("it runs");
    assert!(!is_gone(program));
    server.kill();
    assert!(eventually(|| is_gone(program)), "an orphan");
}

#[test]
fn what_a_program_prints_is_in_the_log() {
    let scratch = Scratch::new();
    let pids = scratch.file("pids");
    let noisy =
        volume("sh -c \"echo all is well >&2; echo to output; exec nbdkit null 1M\"", &pids);
    let server = Serve::new(noisy).unix();
    server.wait_for_log("all is well", 1);
    server.wait_for_log("to output", 1);
    kill_process(started(&pids)[0], Signal::KILL).expect("a signal");
    server.wait_for_log("it is started again when a connection needs it", 1);
}

#[test]
fn an_image_that_is_missing_is_named() {
    let scratch = Scratch::new();
    let volume = volume("qemu-nbd -f qcow2 missing.qcow2", &scratch.file("pids"));
    for command in ["copy --quiet VOLUME /dev/null", "serve VOLUME"] {
        let arguments =
            command.split(' ').map(|word| if word == "VOLUME" { &*volume } else { word });
        let run = arguments.fold(Run::new(sheave()), Run::arg);
        let message = run.in_dir(Path::new(scratch.path())).fails();
        assert!(message.contains("missing.qcow2': No such file"), "{message}");
        let is_ours = |line: &&str| line.starts_with("sheave: ");
        assert_eq!(message.lines().filter(is_ours).count(), 1, "{message}");
    }
}

/// Waits until the newest program is another than before, and returns it.
fn next_program(pids: &str, before: usize) -> Pid {
    assert!(eventually(|| started(pids).len() > before), "it is started again");
    *started(pids).last().expect("a program")
}

#[test]
fn a_qcow2_image_is_a_device_that_outlives_its_server_and_its_daemon() {
    let node = Node::new();
    let (image, pids) = (qcow2(node.kernel.scratch()), node.kernel.scratch().file("pids"));
    let mut daemon = node.daemon();
    // A relative path is one of the directory in which `attach` runs.
    let volume = volume("qemu-nbd -f qcow2 disk.qcow2", &pids);
    let attach = || daemon.sheave("attach").arg(&volume).in_dir(node.kernel.scratch().path()).ok();
    let device = PathBuf::from(attach().trim_end());
    assert_eq!(attach().trim_end(), device.to_str().expect("UTF-8"), "the same once more");
    let load = Load::start(&device);
    for _ in 0..3 {
        let programs = started(&pids);
        kill_process(programs[programs.len() - 1], Signal::KILL).expect("a signal");
        next_program(&pids, programs.len());
        load.check_running();
    }
    let longest = load.end();
    assert!(longest < Duration::from_secs(30), "a pause of {longest:?}");
    // No flush covers these writes. The daemon forgets them, but the device lives on.
    let content = |block: u64| pattern(65536, block);
    let mut wire = Wire::unix(&device).expect("the device");
    for block in 0..64 {
        assert_eq!(wire.write(block * 65536, &content(block)).expect("a reply"), 0);
    }
    drop(wire);
    let programs = started(&pids);
    daemon.kill();
    assert!(eventually(|| programs.iter().all(|&pid| is_gone(pid))), "an orphan");
    let mut daemon = node.daemon();
    daemon.wait_for_recovery();
    let mut wire = Wire::unix(&device).expect("the device");
    for block in 0..64 {
        let read = wire.read(block * 65536, 65536).expect("a reply").expect("data");
        assert!(read == content(block), "block {block}");
    }
    drop(wire);
    let load = Load::start(&device);
    let successor = node.start(&["daemon", "--takeover"]);
    daemon.ends_well();
    successor.wait_for_log(" ready ");
    successor.wait_for_recovery();
    load.check_running();
    assert!(load.end() < Duration::from_secs(30));
    let programs = started(&pids);
    // The stand-in notices a moment later that nothing uses the device any more.
    let detach = || successor.sheave("detach").arg(&device).output().status.success();
    assert!(eventually(detach), "{}", successor.log());
    assert!(eventually(|| programs.iter().all(|&pid| is_gone(pid))), "it ends with the device");
    Run::new("qemu-img").args("check -q -f qcow2").arg(&image).ok();
}
