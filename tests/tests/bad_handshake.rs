//! Peers that misbehave before a session.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use sheave_tests::{
    Bystander, PATIENCE, Serve, Server, Wire, cmd, eventually, go_data, opt, option_header,
    pattern, reply,
};

/// The server gives up on a peer that has not chosen an export by then.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

fn server() -> Server {
    Serve::new("memory:?size=8M").unix()
}

fn greeted(server: &Server) -> Wire {
    let mut wire = Wire::connect(server).expect("connect");
    wire.handshake().expect("greeting");
    wire
}

#[test]
fn garbage_instead_of_options_ends_the_connection() {
    let mut server = server();
    let mut bystander = Bystander::new(&server);
    let flags_and = |rest: &[u8]| [&3_u32.to_be_bytes()[..], rest].concat();
    let garbage = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        pattern(65536, 3),
        vec![0; 1 << 20],
        vec![0xff; 4096],
        flags_and(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        flags_and(&pattern(65536, 4)),
        // Transmission before negotiation.
        flags_and(&sheave_tests::request_header(0, cmd::READ, 1, 0, 512)),
    ];
    for bytes in garbage {
        let mut wire = Wire::connect(&server).expect("connect");
        wire.greeting().expect("greeting");
        // The server may close before it has read everything.
        drop(wire.send(&bytes));
        assert!(wire.is_closed(), "{:?}…", &bytes[..8]);
    }
    bystander.check(&mut server);
}

#[test]
fn strangers_cannot_fill_the_log() {
    let server = server();
    let start = Instant::now();
    for _ in 0..300 {
        let mut wire = Wire::connect(&server).expect("connect");
        wire.greeting().expect("greeting");
        wire.send(b"GET ").expect("send");
        assert!(wire.is_closed());
    }
    server.wait_for_log("handshake ended", 1);
    let lines = server.log().matches("handshake ended").count();
    let seconds = start.elapsed().as_secs() as usize;
    assert!(lines <= seconds + 2, "{lines} lines in {seconds} s");
}

#[test]
fn unknown_client_flags_end_the_connection() {
    let mut server = server();
    let mut bystander = Bystander::new(&server);
    for flags in [4_u32, 1 << 31, u32::MAX] {
        let mut wire = Wire::connect(&server).expect("connect");
        wire.greeting().expect("greeting");
        wire.send(&flags.to_be_bytes()).expect("send");
        assert!(wire.is_closed(), "flags {flags:#x}");
    }
    bystander.check(&mut server);
}

#[test]
fn malformed_options_are_refused_and_the_haggling_goes_on() {
    let mut server = server();
    let mut bystander = Bystander::new(&server);
    let with_len = |len: u32, name: &[u8], infos: u16| {
        [&len.to_be_bytes()[..], name, &infos.to_be_bytes()].concat()
    };
    let bad_go = [
        Vec::new(),
        vec![0; 3],
        with_len(0xffff_ffff, b"name", 0),
        with_len(5, b"name", 0),
        with_len(2, b"name", 0),
        with_len(4, b"name", 7),
        with_len(4, b"na\0e", 0),
        with_len(4, b"na\xff\xfe", 0),
        with_len(4097, &[b'n'; 4097], 0),
    ];
    for option in [opt::GO, opt::INFO] {
        let mut wire = greeted(&server);
        for data in &bad_go {
            wire.option(option, data).expect("send");
            let (kind, _) = wire.option_reply(option).expect("an answer");
            let refused = [reply::ERR_INVALID, reply::ERR_UNKNOWN, reply::ERR_TOO_BIG];
            assert!(refused.contains(&kind), "option {option}, {data:?}: {kind:#x}");
        }
        wire.go("").expect("the right name afterwards");
        wire.read(0, 512).expect("a reply").expect("data");
    }
    bystander.check(&mut server);
}

#[test]
fn options_without_data_refuse_data() {
    let server = server();
    let mut wire = greeted(&server);
    for option in [opt::LIST, opt::STRUCTURED_REPLY] {
        wire.option(option, b"data").expect("send");
        assert_eq!(wire.option_reply(option).expect("an answer").0, reply::ERR_INVALID);
    }
    wire.option(0x0bad, &pattern(1000, 5)).expect("send");
    assert_eq!(wire.option_reply(0x0bad).expect("an answer").0, reply::ERR_UNSUP);
    wire.option(opt::ABORT, b"data that does not matter").expect("send");
    assert_eq!(wire.option_reply(opt::ABORT).expect("an answer").0, reply::ACK);
    assert!(wire.is_closed());
}

#[test]
fn the_old_way_of_naming_an_unknown_export_ends_the_connection() {
    let mut server = server();
    let mut bystander = Bystander::new(&server);
    let mut wire = greeted(&server);
    wire.option(opt::EXPORT_NAME, b"no such export").expect("send");
    assert!(wire.is_closed());
    bystander.check(&mut server);
}

#[test]
fn announced_lengths_cost_nothing() {
    let mut server = server();
    let mut bystander = Bystander::new(&server);
    let before = server.rss_kib();
    let mut wires = Vec::new();
    for option in [opt::GO, opt::LIST, 0x0bad] {
        for len in [1 << 20, 1 << 30, u32::MAX] {
            let mut wire = greeted(&server);
            wire.send(&option_header(option, len)).expect("send");
            drop(wire.send(&vec![0x41; 256 << 10]));
            wires.push(wire);
        }
    }
    bystander.check(&mut server);
    let grown = server.rss_kib().saturating_sub(before);
    assert!(grown < 4096, "{grown} KiB for announced options");
}

#[test]
fn endless_options_end() {
    let mut server = server();
    let mut bystander = Bystander::new(&server);
    let before = server.rss_kib();
    // The answers are not read.
    let mut wire = greeted(&server);
    wire.set_timeout(Duration::from_secs(2));
    let option = option_header(opt::LIST, 0);
    let sent = (0..200_000).take_while(|_| wire.send(&option).is_ok()).count();
    assert!(sent < 200_000, "the server listens to {sent} options");
    let grown = server.rss_kib().saturating_sub(before);
    assert!(grown < 4096, "{grown} KiB for unread answers");
    bystander.check(&mut server);
}

#[test]
fn truncated_handshakes_leave_nothing_behind() {
    let mut server = server();
    let mut bystander = Bystander::new(&server);
    bystander.check(&mut server);
    let fds = server.fds();
    let data = go_data("");
    let mut whole = 3_u32.to_be_bytes().to_vec();
    whole.extend(option_header(opt::GO, data.len() as u32));
    whole.extend(data);
    for cut in 0..whole.len() {
        let mut wire = Wire::connect(&server).expect("connect");
        wire.send(&whole[..cut]).expect("send");
        if cut % 2 == 0 {
            wire.stop_sending();
            assert!(wire.is_closed(), "after {cut} bytes and an end");
        }
    }
    bystander.check(&mut server);
    assert!(returns_to(fds + 1, || server.fds()), "{} of {fds} descriptors", server.fds());
}

#[test]
fn silent_and_slow_peers_meet_the_deadline() {
    let mut server = server();
    let mut bystander = Bystander::new(&server);
    let start = Instant::now();
    let silent = Wire::connect(&server).expect("connect");
    let mut flags_only = Wire::connect(&server).expect("connect");
    flags_only.handshake().expect("greeting");
    let mut slow = Wire::connect(&server).expect("connect");
    slow.handshake().expect("greeting");
    // A byte a second is progress, but not an export.
    let drip = thread::spawn(move || {
        let option = option_header(opt::GO, 4096);
        let mut drops = option.iter().chain(std::iter::repeat(&b'a'));
        while start.elapsed() < PATIENCE && slow.send(&[*drops.next().expect("endless")]).is_ok() {
            thread::sleep(Duration::from_millis(500));
        }
        start.elapsed()
    });
    for mut wire in [silent, flags_only] {
        assert!(wire.is_closed(), "still open after {:?}", start.elapsed());
        let after = start.elapsed();
        assert!(after < HANDSHAKE_DEADLINE * 2, "closed after {after:?}");
        assert!(after > HANDSHAKE_DEADLINE / 2, "closed after only {after:?}");
    }
    let after = drip.join().expect("the slow peer");
    assert!(after < HANDSHAKE_DEADLINE * 2, "a slow peer lasts {after:?}");
    bystander.check(&mut server);
}

#[test]
fn a_flood_of_silent_connections_is_survived() {
    const FLOOD: usize = 3000;
    let mut server = server();
    let mut bystander = Bystander::new(&server);
    bystander.check(&mut server);
    let before = (server.fds(), server.rss_kib());
    let address = SocketAddrUnix::new(server.socket()).expect("a short path");
    let mut flood = Vec::new();
    while flood.len() < FLOOD {
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .expect("a socket");
        match connect(&socket, &address) {
            Ok(()) => flood.push(socket),
            // The server's queue is full: it does not take all that come.
            Err(rustix::io::Errno::AGAIN) => break,
            Err(error) => panic!("connect: {}", io::Error::from(error)),
        }
    }
    assert!(flood.len() > 100, "only {} connections", flood.len());
    thread::sleep(Duration::from_millis(300));
    let (fds, rss_kib) = (server.fds(), server.rss_kib());
    assert!(fds < before.0 + 1200, "{fds} descriptors for {} silent peers", flood.len());
    assert!(rss_kib < before.1 + (32 << 10), "{rss_kib} KiB for {} silent peers", flood.len());
    drop(flood);
    assert!(returns_to(before.0 + 1, || server.fds()), "{} descriptors left", server.fds());
    bystander.check(&mut server);
}

/// Closing takes the server a moment.
fn returns_to(limit: usize, count: impl Fn() -> usize) -> bool {
    eventually(|| count() <= limit)
}
