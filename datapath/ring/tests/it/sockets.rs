//! Receiving and sending.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use sheave_core::{Buf, Payload, Segment};
use sheave_ring::{Event, SendBatch, plain};

use crate::support::{landed, name, next, pair, pattern, pieces, received, ring, sent, small};

#[test]
fn receives_what_arrives_and_then_the_end() {
    let Some(mut ring) = ring(small()) else { return };
    let (socket, mut peer) = pair(&mut ring);
    for round in 0..10 {
        ring.recv(&socket, 7);
        peer.write_all(&[round; 100]).unwrap();
        let mut bytes = received(&mut ring).expect("bytes");
        assert_eq!(bytes.bytes(), [round; 100]);
        ring.give_back(bytes);
    }
    // More than a buffer holds comes in parts.
    peer.write_all(&pattern(6000)).unwrap();
    let mut all = Vec::new();
    while all.len() < 6000 {
        ring.recv(&socket, 7);
        let mut bytes = received(&mut ring).expect("bytes");
        assert!(bytes.bytes().len() <= 4096);
        all.extend_from_slice(bytes.bytes());
        ring.give_back(bytes);
    }
    assert_eq!(all, pattern(6000));
    peer.shutdown(Shutdown::Write).unwrap();
    for _ in 0..5 {
        // The end takes no buffer away.
        ring.recv(&socket, 7);
        assert!(received(&mut ring).is_none());
    }
    peer.write_all(b"x").unwrap_err();
}

#[test]
fn says_so_when_all_buffers_are_out_and_goes_on_when_they_are_back() {
    let Some(mut ring) = ring(small()) else { return };
    let mut pairs: Vec<_> = (0..3).map(|_| pair(&mut ring)).collect();
    for (_, peer) in &mut pairs {
        peer.write_all(b"abc").unwrap();
    }
    for (number, (socket, _)) in pairs.iter().enumerate() {
        ring.recv(socket, number as u64);
    }
    let (mut held, mut unlucky) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        match next(&mut ring) {
            Event::Received { result, .. } => held.push(result.unwrap().expect("bytes")),
            Event::NoBuffer { user } => unlucky.push(user as usize),
            other => panic!("{}", name(&other)),
        }
    }
    assert_eq!((held.len(), unlucky.len()), (2, 1));
    ring.recv(&pairs[unlucky[0]].0, 0);
    assert!(matches!(next(&mut ring), Event::NoBuffer { .. }), "still none");
    held.into_iter().for_each(|bytes| ring.give_back(bytes));
    ring.recv(&pairs[unlucky[0]].0, 0);
    assert_eq!(received(&mut ring).expect("bytes").bytes(), b"abc");
}

#[test]
fn a_reset_is_an_error() {
    let Some(mut ring) = ring(small()) else { return };
    let (socket, peer) = pair(&mut ring);
    ring.send(&socket, batch_of(&[b"never read"]), 0);
    sent(&mut ring);
    drop(peer);
    ring.recv(&socket, 1);
    match next(&mut ring) {
        Event::Received { user: 1, result: Err(error) } => {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        other => panic!("{}", name(&other)),
    }
    ring.send(&socket, batch_of(&[b"to nobody"]), 2);
    match next(&mut ring) {
        Event::Sent { user: 2, result: Err(error), batch } => {
            assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
            assert_eq!(batch.unsent(), 9);
        }
        other => panic!("{}", name(&other)),
    }
}

#[test]
fn receives_into_place_whole_however_it_arrives() {
    let Some(mut ring) = ring(small()) else { return };
    let (socket, mut peer) = pair(&mut ring);
    let bytes = pattern(10_000);
    let payload = pieces(&[1, 5000, 0, 999, 4000]);
    payload.copy_in(0, &[0xee; 10]);
    ring.recv_into(&socket, payload, 10, 0);
    for part in bytes[10..].chunks(1777) {
        ring.wait(Some(Duration::from_millis(1))).unwrap();
        assert!(ring.next_event().is_none(), "not before all is there");
        peer.write_all(part).unwrap();
    }
    let (count, payload) = landed(&mut ring);
    assert_eq!(count, 9990);
    assert_eq!(payload.slice(0, 10).to_vec(), [0xee; 10]);
    assert!(payload.to_vec()[10..] == bytes[10..]);
}

#[test]
fn the_end_in_mid_payload_makes_it_short_and_then_nothing_comes() {
    let Some(mut ring) = ring(small()) else { return };
    let (socket, mut peer) = pair(&mut ring);
    ring.recv_into(&socket, pieces(&[1000]), 0, 0);
    peer.write_all(&pattern(400)).unwrap();
    drop(peer);
    let (count, payload) = landed(&mut ring);
    assert_eq!((count, payload.slice(0, 400).to_vec()), (400, pattern(400)));
    ring.recv_into(&socket, payload, 400, 0);
    assert_eq!(landed(&mut ring).0, 0);
}

#[test]
fn a_payload_of_more_pieces_than_a_call_takes_lands_in_parts() {
    let Some(mut ring) = ring(small()) else { return };
    let (socket, mut peer) = pair(&mut ring);
    let bytes = pattern(2500);
    peer.write_all(&bytes).unwrap();
    let (mut payload, mut have, mut calls) = (pieces(&[1; 2500]), 0, 0);
    while have < 2500 {
        ring.recv_into(&socket, payload, have, 0);
        let (count, back) = landed(&mut ring);
        assert!(count <= 1024);
        (payload, have, calls) = (back, have + count, calls + 1);
    }
    assert_eq!((payload.to_vec(), calls), (bytes, 3));
}

#[test]
fn sends_any_number_of_parts_of_any_kind() {
    let Some(mut ring) = ring(small()) else { return };
    let (socket, peer) = pair(&mut ring);
    let (mut batch, want) = long_batch();
    let reader = read_all(peer, want.len());
    let mut calls = 0;
    while batch.unsent() > 0 {
        ring.send(&socket, batch, 3);
        batch = sent(&mut ring);
        calls += 1;
    }
    assert!(calls > 3, "so many parts do not fit into {calls} calls");
    assert!(reader.join().unwrap() == want, "what was sent arrived");
    let mut buffers = 0;
    batch.clear(|_| buffers += 1);
    assert_eq!((buffers, batch.len(), batch.unsent()), (3000, 0, 0));
}

#[test]
fn the_plain_twin_sends_and_receives_the_same() {
    let (ours, peer) = UnixStream::pair().unwrap();
    let (mut batch, want) = long_batch();
    let reader = read_all(peer.try_clone().unwrap(), want.len());
    while batch.unsent() > 0 {
        let count = plain::send(ours.as_fd(), &mut batch).unwrap();
        batch.advance(count);
    }
    assert!(reader.join().unwrap() == want, "what was sent arrived");

    let bytes = pattern(5000);
    let mut peer = peer;
    peer.write_all(&bytes).unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    let payload = pieces(&[1, 7, 4092, 900]);
    let mut have = 0;
    while have < payload.len() {
        have += plain::recv_into(ours.as_fd(), &payload, have).unwrap();
    }
    assert_eq!(payload.to_vec(), bytes);
    assert_eq!(plain::recv_into(ours.as_fd(), &pieces(&[5]), 0).unwrap(), 0);
    drop(peer);
    plain::send(ours.as_fd(), &mut batch_of(&[b"x"])).unwrap_err();
}

#[test]
fn what_tls_takes_is_what_would_be_sent() {
    let (mut batch, want) = long_batch();
    let (mut seen, mut bounce, mut spent) = (Vec::new(), Vec::new(), SendBatch::new());
    for max in (1..).map(|turn| turn * 4099) {
        let before = seen.len();
        batch.drain(max, &mut bounce, &mut spent, |bytes| {
            assert!(bytes.len() <= 1 << 20, "in pieces that need little memory");
            seen.extend_from_slice(bytes);
        });
        assert_eq!(seen.len() - before, max.min(want.len() - before));
        assert_eq!(batch.unsent(), want.len() - seen.len());
        if batch.unsent() == 0 {
            break;
        }
    }
    assert!(seen == want, "all bytes in order");
    assert!(bounce.capacity() <= 1 << 20, "{} bytes are kept", bounce.capacity());
    let mut buffers = 0;
    spent.clear(|_| buffers += 1);
    assert!(buffers == 3000 && batch.is_empty(), "{buffers} buffers can be used again");
}

/// A batch of 3000 replies, with zeroes beyond what one call takes, and its bytes.
fn long_batch() -> (Box<SendBatch>, Vec<u8>) {
    let (mut batch, mut want) = (Box::new(SendBatch::new()), Vec::new());
    for number in 0..3000_usize {
        let data = pattern(number % 97 + 1);
        batch.head(|head| head.extend_from_slice(&number.to_be_bytes()));
        batch.payload(Payload::from(Buf::from_bytes(&data)));
        want.extend_from_slice(&number.to_be_bytes());
        want.extend_from_slice(&data);
        if number % 1000 == 0 {
            let zeroes = [1, 65_537, 66 << 20][number / 1000];
            batch.segment(Segment::Zero(zeroes));
            want.resize(want.len() + zeroes, 0);
        }
    }
    assert_eq!(batch.len(), want.len());
    (batch, want)
}

fn batch_of(replies: &[&[u8]]) -> Box<SendBatch> {
    let mut batch = Box::new(SendBatch::new());
    replies.iter().for_each(|reply| batch.head(|head| head.extend_from_slice(reply)));
    batch
}

fn read_all(mut peer: UnixStream, len: usize) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = vec![0; len];
        peer.read_exact(&mut bytes).unwrap();
        bytes
    })
}
