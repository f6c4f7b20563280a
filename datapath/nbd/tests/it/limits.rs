//! What clients can take before they have negotiated, and how many there can be.

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
        // Who has negotiated may be silent.
        let mut client = Client::new(&server);
        std::thread::sleep(Duration::from_millis(600));
        assert_eq!(client.bytes(0, 3), [0; 3]);
    }

    fn those_who_negotiate_are_counted(engine) {
        let limits = Limits { negotiating_max: 3, ..Limits::default() };
        let server = server(engine, limits);
        let mut client = Client::new(&server);
        let mut strangers: Vec<_> = (0..3).map(|_| stranger(&server)).collect();
        for stranger in &mut strangers {
            stranger.read_exact(&mut [0; 18]).unwrap();
        }
        assert_eq!(end(stranger(&server)), [], "one too many");
        assert_eq!(client.bytes(0, 3), [0; 3], "others go on");
        strangers.pop();
        wait_until("there is room again", || {
            let mut next = stranger(&server);
            next.read_exact(&mut [0; 18]).is_ok()
        });
    }

    fn connections_are_counted(engine) {
        let limits = Limits { connections_max: 4, ..Limits::default() };
        let server = server(engine, limits);
        let mut clients: Vec<_> = (0..4).map(|_| Client::new(&server)).collect();
        wait_until("all are served", || server.connections() == 4);
        assert_eq!(end(stranger(&server)), [], "one too many");
        clients.pop();
        wait_until("one is gone", || server.connections() == 3);
        wait_until("there is room again", || stranger(&server).read_exact(&mut [0; 18]).is_ok());
        for client in &mut clients {
            assert_eq!(client.bytes(0, 3), [0; 3], "others go on");
        }
    }
}
