//! Peers that misbehave in the middle of TLS.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use sheave_tests::{
    Certificates, Run, Serve, Server, Wire, both_engines, eventually, opt, pattern, python, reply,
};

const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

#[test]
fn garbage_and_silence_instead_of_a_client_hello() {
    let certificates = Certificates::new();
    let server = Serve::new("memory:?size=8M").tls(&certificates, true).tcp();
    for garbage in [b"GET / HTTP/1.1\r\n\r\n".to_vec(), pattern(100_000, 3), vec![0x16; 70_000]] {
        let mut wire = after_starttls(&server);
        drop(wire.send(&garbage));
        assert!(wire.is_closed(), "{:?}…", &garbage[..4]);
    }
    // The start of a ClientHello, and then nothing: the deadline of the handshake still counts.
    let start = Instant::now();
    let mut half = after_starttls(&server);
    half.send(&[0x16, 3, 1, 2, 0, 1, 0, 1]).expect("send");
    let mut silent = after_starttls(&server);
    for wire in [&mut half, &mut silent] {
        assert!(wire.is_closed());
        let after = start.elapsed();
        assert!(after < HANDSHAKE_DEADLINE * 2, "closed after {after:?}");
    }
    assert_alive(&server, &certificates);
}

#[test]
fn a_client_that_leaves_during_tls_leaves_nothing_behind() {
    let certificates = Certificates::new();
    let server = Serve::new("memory:?size=8M").tls(&certificates, true).tcp();
    assert_alive(&server, &certificates);
    let fds = server.fds();
    for round in 0..100_usize {
        let mut wire = after_starttls(&server);
        wire.send(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..round % 11]).expect("send");
    }
    assert!(eventually(|| server.fds() <= fds), "{} descriptors, {fds} before", server.fds());
    assert_alive(&server, &certificates);
}

both_engines! {
    fn records_that_are_broken_end_only_their_connection(engine) {
        let certificates = Certificates::new();
        let server = Serve::new("memory:?size=8M").engine(engine).tls(&certificates, true).tcp();
        python("broken_tls.py").arg(server.port().to_string()).arg(certificates.dir()).ok();
        assert_alive(&server, &certificates);
    }

    fn old_versions_are_refused(engine) {
        let certificates = Certificates::new();
        let server = Serve::new("memory:?size=8M").engine(engine).tls(&certificates, false).tcp();
        python("tls_versions.py").arg(server.port().to_string()).arg(certificates.dir()).ok();
    }
}

fn after_starttls(server: &Server) -> Wire {
    let stream = TcpStream::connect(("127.0.0.1", server.port())).expect("connect");
    let mut wire = Wire::tcp(stream).expect("a socket");
    wire.handshake().expect("greeting");
    wire.option(opt::STARTTLS, &[]).expect("send");
    assert_eq!(wire.option_reply(opt::STARTTLS).expect("an answer").0, reply::ACK);
    wire
}

fn assert_alive(server: &Server, certificates: &Certificates) {
    let uri = format!(
        "nbds://localhost:{}/?tls-certificates={}",
        server.port(),
        certificates.dir().display()
    );
    Run::new("nbdinfo").arg(uri).ok();
}
