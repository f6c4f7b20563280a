//! More of everything than there is room for.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sheave_core::{Buf, IoRequest};
use sheave_ring::{By, Event, RingConfig};

use crate::support::{name, next, pair, received, ring, small};

#[test]
fn nothing_is_lost_when_both_queues_overflow() {
    // Eight entries make 64 completions.
    let Some(mut ring) = ring(RingConfig { entries: 8, ..small() }) else { return };
    let mut pairs: Vec<_> = (0..300).map(|_| pair(&mut ring)).collect();
    for round in 0..3 {
        for (number, (socket, _)) in pairs.iter().enumerate() {
            ring.recv_into(socket, Buf::zeroed(4).into(), 0, number as u64);
        }
        ring.poll().unwrap();
        for (number, (_, peer)) in pairs.iter_mut().enumerate() {
            peer.write_all(&(number as u32 + round).to_le_bytes()).unwrap();
        }
        let mut seen = vec![false; pairs.len()];
        for _ in 0..pairs.len() {
            let Event::Landed { user, result, payload } = next(&mut ring) else { panic!("landed") };
            assert_eq!(result.unwrap(), 4);
            assert_eq!(payload.to_vec(), (user as u32 + round).to_le_bytes());
            assert!(!std::mem::replace(&mut seen[user as usize], true), "one event each");
        }
    }
    assert!(ring.next_event().is_none());
}

#[test]
fn file_requests_are_handed_back_when_there_are_too_many() {
    let Some(mut ring) = ring(RingConfig { file_requests_max: 3, ..small() }) else { return };
    let (reader, mut writer) = std::io::pipe().unwrap();
    let file = Arc::new(std::fs::File::from(std::os::fd::OwnedFd::from(reader)));
    let read = || IoRequest::Read { file: Arc::clone(&file), at: u64::MAX, into: Buf::zeroed(1) };
    for _ in 0..3 {
        ring.start(read(), (0, 0), 0, By::Caller).expect("room");
    }
    let back = ring.start(read(), (0, 0), 0, By::Caller).expect_err("no room");
    assert!(matches!(back, IoRequest::Read { into, .. } if into.len() == 1));
    ring.start_unbounded(read(), (0, 0));
    ring.start(read(), (0, 0), 0, By::Caller).expect_err("no room");
    writer.write_all(b"abcd").unwrap();
    for _ in 0..4 {
        let Event::File { result, .. } = next(&mut ring) else { panic!("a file event") };
        assert_eq!(result.unwrap(), 1);
    }
    ring.start(read(), (0, 0), 0, By::Caller).expect("room again");
}

#[test]
fn a_starter_leaves_room_for_others() {
    let Some(mut ring) = ring(RingConfig { file_requests_max: 64, ..small() }) else { return };
    let (reader, mut writer) = std::io::pipe().unwrap();
    let file = Arc::new(std::fs::File::from(std::os::fd::OwnedFd::from(reader)));
    let read = || IoRequest::Read { file: Arc::clone(&file), at: u64::MAX, into: Buf::zeroed(1) };
    let mut fill = |user| {
        let starts = |held: &usize| ring.start(read(), (user, 0), *held, By::Caller).is_ok();
        (0..).take_while(starts).count()
    };
    assert_eq!([1, 2, 3, 4, 5].map(&mut fill), [32, 16, 8, 4, 2]);
    writer.write_all(&[0; 62]).unwrap();
    for _ in 0..62 {
        assert!(matches!(next(&mut ring), Event::File { .. }));
    }
}

#[test]
fn sockets_work_with_and_without_a_place_in_the_table_and_places_are_used_again() {
    let Some(mut ring) = ring(RingConfig { registered_max: 2, ..small() }) else { return };
    for _ in 0..20 {
        let mut pairs: Vec<_> = (0..4).map(|_| pair(&mut ring)).collect();
        for (number, (socket, peer)) in pairs.iter_mut().enumerate() {
            ring.recv(socket, number as u64);
            peer.write_all(&[number as u8]).unwrap();
            let mut bytes = received(&mut ring).expect("bytes");
            assert_eq!(bytes.bytes(), [number as u8]);
            ring.give_back(bytes);
        }
        for (socket, mut peer) in pairs {
            ring.close(socket);
            assert_eq!(peer.read(&mut [0]).unwrap(), 0);
        }
    }
}

#[test]
fn a_closed_socket_is_gone_though_others_wait() {
    let Some(mut ring) = ring(small()) else { return };
    let (idle, _idle_peer) = pair(&mut ring);
    ring.recv(&idle, 0);
    ring.poll().unwrap();
    let (socket, mut peer) = pair(&mut ring);
    let before = descriptors();
    ring.close(socket);
    assert_eq!(peer.read(&mut [0]).unwrap(), 0, "the peer sees the end");
    assert_eq!(descriptors(), before - 1);
    assert!(ring.next_event().is_none());
}

#[test]
fn a_time_beyond_all_clocks_is_slept_through() {
    let Some(mut ring) = ring(small()) else { return };
    let (socket, peer) = pair(&mut ring);
    ring.recv(&socket, 0);
    for far in [Duration::from_nanos(u64::MAX), Duration::from_nanos(i64::MAX as u64)] {
        let begun = Instant::now();
        let late = write_later(peer.try_clone().unwrap(), Duration::from_millis(60));
        ring.wait(Some(far)).unwrap();
        let slept = begun.elapsed();
        late.join().unwrap();
        assert!(slept >= Duration::from_millis(50), "woke after {slept:?}");
        let bytes = received(&mut ring).expect("bytes");
        ring.give_back(bytes);
        ring.recv(&socket, 0);
    }
    let begun = Instant::now();
    ring.wait(Some(Duration::from_millis(30))).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(30), "a short time is kept");
    assert!(ring.next_event().is_none_or(|event| panic!("{}", name(&event))));
}

fn write_later(mut peer: UnixStream, after: Duration) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        std::thread::sleep(after);
        peer.write_all(b"x").unwrap();
    })
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
