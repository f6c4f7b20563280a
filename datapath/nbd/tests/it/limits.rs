//! Bounds on clients that have not negotiated, and on their number.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use sheave_nbd::Limits;

use crate::support::{Client, Running, Setup, TIMEOUT, both_engines, wait_until};

fn server(engine: sheave_shard::EngineChoice, limits: Limits) -> Running {
    Setup { limits, ..Setup::new(engine, "memory:?size=1M") }.start()
}

/// Connects and negotiates nothing.
fn stranger(server: &Running) -> UnixStream {
    let stream = UnixStream::connect(&server.socket).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream
}

/// Reads to the end.
fn end(mut stream: UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    match stream.read_to_end(&mut all) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
    all
}

both_engines! {
    fn the_handshake_has_a_deadline(engine) {
        let limits = Limits { handshake_timeout_ms: 300, ..Limits::default() };
        let server = server(engine, limits);
        let begun = Instant::now();
        let silent = stranger(&server);
        let mut dripping = stranger(&server);
        let drip = std::thread::spawn(move || {
            // Options that no server knows, byte by byte.
            let option = [&b"IHAVEOPT"[..], &[0, 0, 0, 99, 0, 0, 0, 0]].concat();
            let all = [&[0, 0, 0, 1][..], &option.repeat(6000)].concat();
            for byte in all {
                if dripping.write_all(&[byte]).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            panic!("it was listened to for minutes");
        });
        assert_eq!(end(silent).len(), 18, "the greeting");
        drip.join().unwrap();
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(10), "{took:?}");
        // A client that has negotiated may be silent.
        let mut client = Client::new(&server);
        std::thread::sleep(Duration::from_millis(600));
        assert_eq!(client.bytes(0, 3), [0; 3]);
    }

    fn a_silent_client_makes_room_for_another(engine) {
        let limits = Limits { negotiating_max: 3, ..Limits::default() };
        let server = server(engine, limits);
        let mut client = Client::new(&server);
        let mut silent: Vec<_> = (0..3).map(|_| stranger(&server)).collect();
        for silent in &mut silent {
            silent.read_exact(&mut [0; 18]).unwrap();
        }
        let begun = Instant::now();
        let mut next = Client::new(&server);
        assert!(begun.elapsed() < Duration::from_secs(8), "before the deadline of the handshake");
        assert_eq!(next.bytes(0, 3), [0; 3], "it waited in the queue and is served");
        assert_eq!(end(silent.remove(0)), [0; 0], "the oldest gave way");
        silent[1].write_all(&[0, 0, 0, 1]).unwrap();
        assert_eq!(client.bytes(0, 3), [0; 3], "others go on");
    }

    fn a_burst_beyond_all_places_is_served(engine) {
        let limits = Limits { negotiating_max: 2, ..Limits::default() };
        let server = server(engine, limits);
        let clients: Vec<_> = (0..40)
            .map(|_| {
                let mut stream = stranger(&server);
                std::thread::spawn(move || {
                    stream.read_exact(&mut [0; 18]).unwrap();
                    // A round trip.
                    std::thread::sleep(Duration::from_millis(20));
                    let abort = [&[0, 0, 0, 1][..], b"IHAVEOPT", &[0, 0, 0, 2, 0, 0, 0, 0]];
                    stream.write_all(&abort.concat()).unwrap();
                    let mut reply = [0; 20];
                    stream.read_exact(&mut reply).unwrap();
                    assert_eq!(reply[12..16], [0, 0, 0, 1], "an ACK");
                })
            })
            .collect();
        for client in clients {
            client.join().unwrap();
        }
    }

    fn connections_beyond_the_bound_wait_for_one_that_ends(engine) {
        let limits = Limits { connections_max: 4, ..Limits::default() };
        let server = server(engine, limits);
        let mut clients: Vec<_> = (0..4).map(|_| Client::new(&server)).collect();
        wait_until("all are served", || server.connections() == 4);
        let mut next = stranger(&server);
        next.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let error = next.read_exact(&mut [0; 18]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "it waits and is not closed");
        clients.pop();
        next.set_read_timeout(Some(TIMEOUT)).unwrap();
        next.read_exact(&mut [0; 18]).unwrap();
        for client in &mut clients {
            assert_eq!(client.bytes(0, 3), [0; 3], "others go on");
        }
    }

    fn a_full_server_stops_at_once(engine) {
        let limits = Limits { connections_max: 1, ..Limits::default() };
        let mut server = server(engine, limits);
        let mut client = Client::new(&server);
        let _waiting: Vec<_> = (0..3).map(|_| stranger(&server)).collect();
        assert_eq!(client.bytes(0, 3), [0; 3]);
        drop(client);
        assert!(server.stop() < Duration::from_secs(5));
    }
}
