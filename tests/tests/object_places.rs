//! Places of object volumes: what is in them, and volumes that grow.

use serde_json::Value;
use sheave_emulator::{Emulator, Settings};
use sheave_tests::{Bucket, Run, Scratch, Serve, sheave};

fn volume(command: &str) -> Run {
    Run::new(sheave()).args("volume").args(command)
}

/// Names, sizes and states that are listed.
fn listed(json: &str) -> Vec<(String, u64, String)> {
    let listed: Vec<Value> = serde_json::from_str(json).expect("JSON");
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let row = |row: &Value| {
        (text(&row["name"]), row["size_bytes"].as_u64().expect("a size"), text(&row["state"]))
    };
    listed.iter().map(row).collect()
}

#[test]
fn volumes_of_a_directory_are_listed_and_grow_while_they_are_closed() {
    let scratch = Scratch::on_disk();
    let store = format!("dir://{}", scratch.path().display());
    assert_eq!(volume("ls").arg(&store).ok(), "no volumes\n");
    for (name, size) in [("b", "8M"), ("a%20b", "4M"), ("gone", "4M")] {
        volume("create --size").arg(size).arg(format!("{store}/{name}")).ok();
    }
    volume("delete").arg(format!("{store}/gone")).ok();
    let server = Serve::new(format!("{store}/b?cache-dir={}", scratch.file("node"))).unix();
    let place = |name: &str| format!("{store}/{name}");
    let want = [(place("a%20b"), 4 << 20, "closed".into()), (place("b"), 8 << 20, "open".into())];
    assert_eq!(listed(&volume("ls --json").arg(&store).ok()), want);
    let text = volume("ls --long").arg(format!("{store}/")).ok();
    assert!(text.contains("STORED") && text.contains(&place("b")), "{text}");

    let told = volume("resize --size 16M").arg(place("b")).fails();
    assert!(told.contains("it is open, or was not closed,"), "{told}");
    drop(server);
    let grow = |size: &str| volume("resize --size").arg(size).arg(place("a%20b"));
    let told = grow("1M").fails();
    assert!(told.contains("it has 4194304 bytes; to make it 1048576 would cut data off"), "{told}");
    let told = grow("5000001").fails();
    assert!(told.contains("is not a multiple of 4096"), "{told}");
    assert_eq!(grow("12M").ok(), "12582912\n");
    assert_eq!(volume("resize").arg(place("a%20b")).ok(), "12582912\n");
    let server = Serve::new(format!("{store}/a%20b?cache-dir={}", scratch.file("node"))).unix();
    let size = Run::new("nbdinfo").args("--size").arg(server.uri()).ok();
    assert_eq!(size.trim(), "12582912");
}

#[test]
fn volumes_of_a_bucket_are_listed() {
    let store = Emulator::start(Settings::default(), "volumes");
    let bucket = Bucket::emulated(&store, "volumes");
    for name in ["one", "two", "deep/three"] {
        bucket.command("create --size 64M").arg(bucket.volume(name)).ok();
    }
    let names = |place: &str| {
        let json = bucket.command("ls --json").arg(place).ok();
        let found = listed(&json).into_iter().map(|(name, ..)| name);
        found.map(|name| name.split('?').next().expect("a URL").to_owned()).collect::<Vec<_>>()
    };
    // The place of all: what stands before the name, and the parameters.
    let place = bucket.volume("one").replacen("/one", "", 1);
    let url = |name: &str| format!("s3://volumes/volumes/{name}");
    assert_eq!(names(&place), [url("one"), url("two")]);
    assert_eq!(names(&bucket.volume("deep")), [url("deep/three")]);
    assert_eq!(names(&place.replacen("/volumes?", "?", 1)), [""; 0]);
    assert_eq!(names(&bucket.volume("none")), [""; 0]);
}
