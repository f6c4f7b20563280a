//! Calls that meet: the operator beside the orchestrator, an attach beside a detach, two processes
//! with one pool.

use std::fs;
use std::iter;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use crate::client::{Client, NODE, mount};
use sheave_tests::{Call, Moment, eventually};
use tonic::Code;

/// How long a call is held up at most.
const LONG: Duration = Duration::from_secs(60);

#[test]
fn rule_07_what_the_operator_has_attached_is_not_published() {
    for (client, why) in [(Client::new(), "fake0"), (Client::without_devices(), "has locked it")] {
        let id = client.create("a").volume_id;
        client.daemon.attach(&id);
        let refused = client.publish(&id, &mount()).unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        assert!(refused.message().contains(why), "{refused}");
        assert_eq!(client.nodes(&id), [] as [&str; 0]);
        client.daemon.sheave("detach").arg(&id).ok();
        let published = client.publish(&id, &mount()).unwrap();
        client.attach(&id, published["epoch"].parse().unwrap()).unwrap();
        assert_eq!(client.publish(&id, &mount()).unwrap(), published, "the same again");
    }
}

/// A caller that heard "no such device" would forget a device that is about to be there.
#[test]
fn rule_29_a_detach_beside_an_attach_does_not_find_the_device_gone() {
    let client = Client::new();
    let id = client.create("a").volume_id;
    client.publish(&id, &mount()).unwrap();
    let kernel = &client.node.node.kernel;
    let (release, held) = channel::<()>();
    kernel.interrupt(Call::Add, Moment::Before, move || {
        let _ = held.recv_timeout(LONG);
    });
    thread::scope(|scope| {
        let attaching = scope.spawn(|| client.attach(&id, 1));
        assert!(eventually(|| kernel.has_struck()), "the attach begins");
        client.daemon.sheave("detach").arg(&id).output().check_refused("under way");
        drop(release);
        attaching.join().unwrap().unwrap();
    });
    client.daemon.sheave("detach").arg(&id).ok();
    client.node.node.check_bare(&client.daemon);
}

/// Both make the image longer, by its length of a moment earlier.
#[test]
fn rule_11_an_operators_resize_waits_for_that_of_the_orchestrator() {
    let client = Client::new();
    let id = client.create("a").volume_id;
    let device = client.daemon.attach(&id);
    let held = client.hold_pool();
    thread::scope(|scope| {
        // It is refused, too, while the operator's is under way.
        let expand = || match client.expand(&id, 64) {
            Err(status) if status.code() == Code::Aborted => None,
            answer => Some(answer),
        };
        let growing =
            scope.spawn(move || iter::repeat_with(expand).find_map(|answer| answer).unwrap());
        let is_under_way = || {
            let resize = client.daemon.sheave("volume resize --size 32M");
            let resized = resize.arg(&device).output();
            resized.stderr.contains("under way")
        };
        assert!(eventually(is_under_way));
        drop(held);
        growing.join().unwrap().unwrap();
    });
}

/// As another process does that has looked whether the volume is in use a moment earlier.
#[test]
fn rule_36_a_publication_that_ends_while_a_device_is_made_leaves_no_device() {
    let client = Client::new();
    let id = client.create("a").volume_id;
    client.publish(&id, &mount()).unwrap();
    let record = record_path(&client, &id);
    let kernel = &client.node.node.kernel;
    kernel.interrupt(Call::Add, Moment::Before, move || end_publications(&record));
    let fenced = client.attach(&id, 1).unwrap_err();
    assert!(kernel.has_struck());
    assert_eq!(fenced.code(), Code::FailedPrecondition, "{fenced}");
    assert_eq!(client.nodes(&id), [] as [&str; 0]);
    client.node.node.check_bare(&client.daemon);
    assert_eq!(client.publish(&id, &mount()).unwrap()["epoch"], "2", "on {NODE}");
}

fn record_path(client: &Client, id: &str) -> PathBuf {
    let (pool, uuid) = id.split_once('/').expect("a record");
    client.node.node.file(pool).join(format!("{uuid}.json"))
}

fn end_publications(record: &PathBuf) {
    let text = fs::read_to_string(record).expect("a record");
    let (json, _) = text.split_once('\n').expect("a record");
    let (start, rest) = json.split_once("\"publications\":[").expect("a record");
    let (_, end) = rest.split_once(']').expect("a record");
    let json = format!("{start}\"publications\":[]{end}");
    fs::write(record, format!("{json}\n{:08x}\n", crc32(json.as_bytes()))).expect("a record");
}

/// That of IEEE 802.3.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}
