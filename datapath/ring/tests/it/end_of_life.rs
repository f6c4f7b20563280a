//! A ring that is dropped while the kernel holds things of it.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sheave_core::{Buf, IoRequest, Payload};
use sheave_ring::{By, SendBatch};

use crate::support::{TIMEOUT, pair, pattern, ring, small};

#[test]
fn dropping_takes_back_what_the_kernel_holds() {
    let Some(mut ring) = ring(small()) else { return };
    let (receiving, mut receiving_peer) = pair(&mut ring);
    let (landing, mut landing_peer) = pair(&mut ring);
    let (sending, mut sending_peer) = pair(&mut ring);
    let (reader, mut writer) = std::io::pipe().unwrap();
    let file = Arc::new(std::fs::File::from(OwnedFd::from(reader)));
    let (place, into, reply) = (Buf::zeroed(100_000), Buf::zeroed(8), Buf::zeroed(4 << 20));
    ring.recv(&receiving, 0);
    ring.recv_into(&landing, place.clone().into(), 0, 0);
    let mut batch = Box::new(SendBatch::new());
    batch.payload(Payload::from(reply.clone()));
    ring.send(&sending, batch, 0);
    let read = IoRequest::Read { file: Arc::clone(&file), at: u64::MAX, into: into.clone() };
    ring.start(read, (0, 0), 0, By::Caller).expect("room");
    ring.poll().unwrap();
    landing_peer.write_all(&pattern(500)).unwrap();

    let begun = Instant::now();
    drop(ring);
    // The peers are silent for ever: a wait for one of them would have no end.
    assert!(begun.elapsed() < TIMEOUT, "it took {:?}", begun.elapsed());
    assert_eq!(Arc::strong_count(&file), 1, "nobody else holds the file");

    // Nothing arrives in memory that was taken back.
    let before = place.to_vec();
    receiving_peer.write_all(&[1; 100]).unwrap();
    let _ = landing_peer.write_all(&[1; 50_000]);
    writer.write_all(&[1; 8]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(place.to_vec() == before && into.is_zero());
    let (place, into, reply) = (place.reclaim(1), into.reclaim(1), reply.reclaim(1));
    assert!(place.is_some() && into.is_some() && reply.is_some(), "nobody else holds the buffers");

    // The sockets are still open, and what was sent of the reply is what it was.
    drop((receiving, landing, sending));
    let mut arrived = Vec::new();
    sending_peer.read_to_end(&mut arrived).unwrap();
    assert!(arrived.len() < 4 << 20 && arrived.iter().all(|byte| *byte == 0));
}

#[test]
fn dropping_a_ring_frees_its_descriptors() {
    if ring(small()).is_none() {
        return;
    }
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    for _ in 0..50 {
        let mut ring = ring(small()).expect("a ring");
        let (socket, _peer) = pair(&mut ring);
        ring.recv(&socket, 0);
        ring.poll().unwrap();
        drop(ring);
    }
    // Other tests of this process come and go.
    assert!(open() < before + 40, "{} descriptors, {before} before", open());
}
