//! `sheave volume check`: healthy volumes, open and killed ones, and files that dd has changed.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::Value;
use sheave_emulator::{Emulator, Settings};
use sheave_tests::{Bucket, Output, Run, Scratch, Serve, Wire, pattern, sheave};

const MIB: usize = 1 << 20;

fn volume(command: &str) -> Run {
    Run::new(sheave()).args("volume").args(command)
}

/// Checks a volume that has no faults.
fn healthy(place: &str) -> String {
    let text = volume("check").arg(place).ok();
    assert!(text.ends_with("no faults\n"), "{text}");
    text
}

/// Checks one that has faults.
fn faulty(run: Run) -> Output {
    let output = run.output();
    assert_eq!(output.status.code(), Some(1), "{}", output.describe());
    output
}

/// The log objects of a volume in a directory, in order.
fn objects(dir: &Path) -> Vec<PathBuf> {
    let entries = |dir: &Path| {
        let mut found: Vec<_> = fs::read_dir(dir)
            .expect("a directory")
            .map(|entry| entry.expect("an entry").path())
            .collect();
        found.sort();
        found
    };
    entries(&dir.join("log")).iter().flat_map(|epoch| entries(epoch)).collect()
}

/// Changes a byte of a file in its place.
fn dd(file: &Path, at: usize) {
    let byte = fs::read(file).expect("a file")[at] ^ 0x40;
    Run::new("dd")
        .arg(format!("of={}", file.display()))
        .args(&format!("bs=1 count=1 conv=notrunc seek={at}"))
        .stdin(&[byte])
        .ok();
}

#[test]
fn what_dd_changes_is_named_and_all_else_is_healthy() {
    let scratch = Scratch::on_disk();
    let place = format!("dir://{}", scratch.file("vol"));
    volume("create --size 64M").arg(&place).ok();
    assert!(healthy(&place).contains("needed: 0 objects"));
    let on_node = format!("{place}?cache-dir={}", scratch.file("node"));
    let image = scratch.ext4("image", "64M");
    let mut server = Serve::new(&on_node).unix();
    Run::new("nbdcopy").arg(&image).arg(server.uri()).ok();
    assert!(healthy(&place).contains("it is open on node"));
    server.kill();
    assert!(healthy(&place).contains("it is open on node"));
    // What the journal has is in the store then.
    let mut server = Serve::new(&on_node).unix();
    assert!(server.end(Signal::TERM).success(), "{}", server.log());
    let mut server = Serve::new(&on_node).unix();
    let mut wire = Wire::ready(&server).expect("a client");
    assert_eq!(wire.write(0, &pattern(MIB, 1)).expect("a reply"), 0);
    drop(wire);
    assert!(server.end(Signal::TERM).success(), "{}", server.log());
    assert!(healthy(&place).contains(", closed\n"));
    let before = objects(&scratch.path().join("vol"));

    // The first blocks of the volume are in the object before the checkpoint.
    let newest = before[before.len() - 2].clone();
    let key = newest.strip_prefix(scratch.path().join("vol")).expect("a file there");
    let len = fs::metadata(&newest).expect("a file").len() as usize;
    assert!(len > MIB, "{newest:?} has {len} bytes");
    dd(&newest, len - 1);
    let told = faulty(volume("check").arg(&place)).stdout;
    let line = told.lines().next().expect("a line");
    let why = "the checksum of a frame is wrong; 1 blocks of 4 KiB cannot be read: 255";
    assert_eq!(line, format!("{}: {why}", key.display()));
    assert!(told.ends_with("faults: 1\n"), "{told}");
    let json = faulty(volume("check --json").arg(&place)).stdout;
    let json: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json["faults"][0]["key"], key.display().to_string());
    assert_eq!(json["faults"][0]["blocks"], serde_json::json!([{ "block": 255, "blocks": 1 }]));
    assert!(volume("check --fast").arg(&place).ok().contains("read: no data"));
    // What the check says, a reading says too.
    let server = Serve::new(&on_node).unix();
    let mut wire = Wire::ready(&server).expect("a client");
    assert!(wire.read(255 * 4096, 4096).expect("a reply").is_err());
    assert!(wire.read(254 * 4096, 4096).expect("a reply").is_ok());
    // Checkpoints of before are garbage by now, and nothing else is.
    assert!(objects(&scratch.path().join("vol")).contains(&newest), "what is needed stays");
}

#[test]
fn a_volume_in_a_bucket_is_checked_by_reads_alone() {
    let store = Emulator::start(Settings::default(), "volumes");
    let bucket = Bucket::emulated(&store, "volumes");
    bucket.command("create --size 64M").arg(bucket.volume("vol")).ok();
    let mut server = bucket.serve("vol", "a").unix();
    let mut wire = Wire::ready(&server).expect("a client");
    for at in 0..4 {
        assert_eq!(wire.write((at * MIB) as u64, &pattern(MIB, 1)).expect("a reply"), 0);
    }
    drop(wire);
    assert!(server.end(Signal::TERM).success(), "{}", server.log());
    let before = store.objects("volumes", "");
    let text = bucket.command("check").arg(bucket.volume("vol")).ok();
    assert!(text.ends_with("no faults\n"), "{text}");
    assert_eq!(store.objects("volumes", ""), before);
    let missing = bucket.command("check").arg(bucket.volume("other")).output();
    assert!(missing.stderr.contains("there is no volume"), "{}", missing.describe());
}
