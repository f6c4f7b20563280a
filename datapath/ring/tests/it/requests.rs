//! Socket requests of backends, on the ring and by their plain twin.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use sheave_core::{Buf, IoRequest, Payload, Segment};
use sheave_ring::{By, Event, Ring, RingConfig, plain};

use crate::support::{TIMEOUT, name, next, pattern, pieces, ring, small};

/// Carries a request out and gives it back.
type CarryOut<'a> = &'a mut dyn FnMut(IoRequest) -> (io::Result<usize>, IoRequest);

fn pair() -> (Arc<OwnedFd>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(TIMEOUT)).unwrap();
    theirs.set_write_timeout(Some(TIMEOUT)).unwrap();
    (Arc::new(ours.into()), theirs)
}

#[test]
fn on_the_ring() {
    let Some(mut ring) = ring(small()) else { return };
    check(&mut |request| {
        ring.start(request, (5, 77), 0, By::Caller).expect("room");
        file_event(&mut ring)
    });
}

#[test]
fn by_plain_calls() {
    check(&mut |request| loop {
        let result = plain::carry_out(&request);
        if !result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            return (result, request);
        }
        let (IoRequest::Recv { socket, .. } | IoRequest::Send { socket, .. }) = &request else {
            panic!("a request for a file never waits");
        };
        let ready = PollFlags::IN | PollFlags::OUT;
        poll(&mut [PollFd::from_borrowed_fd(socket.as_fd(), ready)], None).unwrap();
        thread::yield_now();
    });
}

fn file_event(ring: &mut Ring) -> (io::Result<usize>, IoRequest) {
    match next(ring) {
        Event::File { user: (5, 77), result, request } => (result, request),
        other => panic!("{}", name(&other)),
    }
}

fn check(carry_out: CarryOut<'_>) {
    receives(carry_out);
    receives_all(carry_out);
    sends(carry_out);
    reports_errors(carry_out);
}

fn recv(socket: &Arc<OwnedFd>, into: &Payload, skip: usize, all: bool) -> IoRequest {
    IoRequest::Recv { socket: Arc::clone(socket), into: into.clone(), skip, all }
}

fn receives(carry_out: CarryOut<'_>) {
    let (socket, mut peer) = pair();
    for lens in [&[9000][..], &[1, 4000, 4999]] {
        let into = pieces(lens);
        into.copy_in(0, &[0xee; 10]);
        peer.write_all(&pattern(100)).unwrap();
        let (result, request) = carry_out(recv(&socket, &into, 10, false));
        assert_eq!(result.unwrap(), 100, "what is there, and not all that fits");
        assert_eq!(into.slice(0, 10).to_vec(), [0xee; 10]);
        assert_eq!(into.slice(10, 100).to_vec(), pattern(100));
        assert!(matches!(request, IoRequest::Recv { skip: 10, all: false, .. }));
    }
    peer.shutdown(Shutdown::Write).unwrap();
    let into = pieces(&[5]);
    assert_eq!(carry_out(recv(&socket, &into, 0, false)).0.unwrap(), 0, "the end");
}

fn receives_all(carry_out: CarryOut<'_>) {
    let (socket, mut peer) = pair();
    let bytes = pattern(3 << 20);
    let sent = bytes.clone();
    let writer = thread::spawn(move || peer.write_all(&sent).unwrap());
    let into = pieces(&[1 << 20, 5, (2 << 20) - 5]);
    let mut have = 0;
    while have < bytes.len() {
        let count = carry_out(recv(&socket, &into, have, true)).0.unwrap();
        assert!(count > 0);
        have += count;
    }
    writer.join().unwrap();
    assert!(into.to_vec() == bytes);
}

fn sends(carry_out: CarryOut<'_>) {
    let mut many = Payload::new();
    for number in 0..1500_usize {
        many.push(Segment::Data(Buf::from_bytes(&pattern(number % 50 + 1))));
        many.push(Segment::Zero(number % 3));
    }
    many.push(Segment::Zero(65 << 20));
    let one = Payload::from(Buf::from_bytes(&pattern(1 << 20)));
    for from in [one, many] {
        let (socket, mut peer) = pair();
        let want = from.to_vec();
        let reader = thread::spawn(move || {
            let mut bytes = Vec::new();
            peer.read_to_end(&mut bytes).unwrap();
            bytes
        });
        let mut skip = 7;
        while skip < want.len() {
            let send = IoRequest::Send { socket: Arc::clone(&socket), from: from.clone(), skip };
            skip += carry_out(send).0.unwrap();
        }
        drop(socket);
        assert!(reader.join().unwrap() == want[7..], "what was sent arrived");
    }
}

fn reports_errors(carry_out: CarryOut<'_>) {
    let (socket, peer) = pair();
    drop(peer);
    let from = pieces(&[3]);
    let send = IoRequest::Send { socket: Arc::clone(&socket), from, skip: 0 };
    assert_eq!(carry_out(send).0.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    let file = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
    let error = carry_out(recv(&file, &pieces(&[3]), 0, false)).0.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOTSOCK));
}

#[test]
fn a_receive_waits_beside_others_and_a_shutdown_ends_it() {
    let config = RingConfig { file_requests_max: 1, ..small() };
    let Some(mut ring) = ring(config) else { return };
    let pairs: Vec<_> = (0..5).map(|_| pair()).collect();
    let buffers: Vec<_> = (0..5).map(|_| Buf::zeroed(100)).collect();
    for (number, ((socket, _), buffer)) in pairs.iter().zip(&buffers).enumerate() {
        let into = Payload::from(buffer.clone());
        ring.start(recv(socket, &into, 0, number % 2 == 0), (1, number as u64), 0, By::Caller)
            .expect("room");
    }
    // They take nothing of the room for files.
    let file = Arc::new(tempfile::tempfile().unwrap());
    ring.start(IoRequest::Sync { file }, (5, 77), 0, By::Caller).expect("room");
    assert_eq!(file_event(&mut ring).0.unwrap(), 0);
    ring.wait(Some(Duration::from_millis(1))).unwrap();
    assert!(ring.next_event().is_none(), "nothing has arrived");
    for (socket, _) in &pairs {
        rustix::net::shutdown(socket, rustix::net::Shutdown::Both).unwrap();
    }
    let mut seen = [false; 5];
    for _ in 0..5 {
        let Event::File { user: (1, number), result, .. } = next(&mut ring) else { panic!() };
        assert_eq!(result.unwrap(), 0);
        assert!(!std::mem::replace(&mut seen[number as usize], true));
    }
    for buffer in buffers {
        assert!(buffer.reclaim(1).is_some(), "the ring holds the buffer no more");
    }
}
