//! TLS: certificates of both sides, and no way around it.

use sheave_tests::{
    Certificates, Run, Scratch, Serve, Server, Wire, both_engines, cmd, compare, go_data, opt,
    reply,
};
use std::net::TcpStream;

const MIB: u64 = 1 << 20;

both_engines! {
    fn copies_over_tls_are_exact(engine) {
        let certificates = Certificates::new();
        let scratch = Scratch::new();
        let image = scratch.islands("disk.img", 24 * MIB);
        let server = Serve::new("memory:?size=24M").engine(engine).tls(&certificates, true).tcp();
        let uri = nbds(&server, certificates.dir().to_str().expect("UTF-8 path"));
        Run::new("nbdcopy").arg(&image).arg(&uri).ok();
        Run::new("nbdcopy").args("--connections=4").arg(&uri).arg(scratch.file("out.img")).ok();
        compare(&image, scratch.file("out.img"));
        let info = Run::new("nbdinfo").arg(&uri).ok();
        assert!(info.contains("with TLS"), "{info}");
    }

    fn qemu_over_tls(engine) {
        let certificates = Certificates::new();
        let scratch = Scratch::new();
        let image = scratch.islands("disk.img", 16 * MIB);
        let server = Serve::new(&image).args("--read-only").engine(engine)
            .tls(&certificates, true).tcp();
        let credentials = format!(
            "tls-creds-x509,id=tls,endpoint=client,dir={}", certificates.dir().display()
        );
        let source = format!(
            "driver=nbd,server.type=inet,server.host=localhost,server.port={},tls-creds=tls",
            server.port()
        );
        Run::new("qemu-img").args("convert --object").arg(credentials).arg("--image-opts")
            .arg(source).args("-O raw").arg(scratch.file("out.img")).ok();
        compare(&image, scratch.file("out.img"));
    }

    fn strangers_and_the_nameless_are_refused(engine) {
        let certificates = Certificates::new();
        let server = Serve::new("memory:?size=1M").engine(engine).tls(&certificates, true).tcp();
        let nameless = certificates.without_client();
        Run::new("nbdinfo").arg(nbds(&server, &nameless.file(""))).fails();
        let stranger = certificates.stranger();
        let dir = stranger.dir().to_str().expect("UTF-8 path");
        Run::new("nbdinfo").arg(nbds(&server, dir)).fails();
        let dir = certificates.dir().to_str().expect("UTF-8 path");
        Run::new("nbdinfo").arg(nbds(&server, dir)).ok();
    }

    fn a_server_certificate_is_enough_without_client_authority(engine) {
        let certificates = Certificates::new();
        let server = Serve::new("memory:?size=1M").engine(engine).tls(&certificates, false).tcp();
        let nameless = certificates.without_client();
        Run::new("nbdinfo").arg(nbds(&server, &nameless.file(""))).ok();
    }

    fn plain_clients_are_told_to_use_tls(engine) {
        let certificates = Certificates::new();
        let server = Serve::new("memory:?size=1M").engine(engine).tls(&certificates, false).tcp();
        Run::new("nbdinfo").arg(server.uri()).fails();
        Run::new("nbdinfo").arg("--list").arg(server.uri()).fails();
        let mut wire = plain(&server);
        wire.handshake().expect("greeting");
        for (option, data) in [
            (opt::LIST, Vec::new()),
            (opt::STRUCTURED_REPLY, Vec::new()),
            (opt::INFO, go_data("")),
            (opt::GO, go_data("")),
            (opt::GO, go_data("no such export")),
        ] {
            wire.option(option, &data).expect("send");
            let (kind, text) = wire.option_reply(option).expect("reply");
            assert_eq!(kind, reply::ERR_TLS_REQD, "option {option}");
            assert!(!String::from_utf8_lossy(&text).contains("memory"), "names nothing");
        }
        // This one has no error reply.
        wire.option(opt::EXPORT_NAME, b"").expect("send");
        assert!(wire.is_closed(), "EXPORT_NAME without TLS");
        let dir = certificates.without_client();
        Run::new("nbdinfo").arg(nbds(&server, &dir.file(""))).ok();
    }

    fn plaintext_behind_starttls_is_not_obeyed(engine) {
        let certificates = Certificates::new();
        let server = Serve::new("memory:?size=1M").engine(engine).tls(&certificates, false).tcp();
        let mut wire = plain(&server);
        wire.handshake().expect("greeting");
        // One segment: the option, and what an attacker would like to be read as if encrypted.
        let mut bytes = sheave_tests::option_header(opt::STARTTLS, 0);
        let data = go_data("");
        bytes.extend(sheave_tests::option_header(opt::GO, data.len() as u32));
        bytes.extend(data);
        bytes.extend(sheave_tests::request_header(0, cmd::WRITE, 1, 0, 512));
        bytes.extend([0x55; 512]);
        wire.send(&bytes).expect("send");
        let answer = wire.option_reply(opt::STARTTLS).map(|(kind, _)| kind);
        assert!(matches!(answer, Ok(reply::ACK | reply::ERR_INVALID) | Err(_)), "{answer:?}");
        assert!(wire.is_closed(), "plaintext after STARTTLS");
        let dir = certificates.without_client();
        let scratch = Scratch::new();
        Run::new("nbdcopy").arg(nbds(&server, &dir.file(""))).arg(scratch.file("out.img")).ok();
        let out = std::fs::read(scratch.file("out.img")).expect("copy");
        assert!(out.iter().all(|&byte| byte == 0), "nothing was written");
    }

    fn a_server_without_certificates_refuses_starttls(engine) {
        let certificates = Certificates::new();
        let server = Serve::new("memory:?size=1M").engine(engine).tcp();
        let dir = certificates.dir().to_str().expect("UTF-8 path");
        Run::new("nbdinfo").arg(nbds(&server, dir)).fails();
        let mut wire = plain(&server);
        wire.handshake().expect("greeting");
        wire.option(opt::STARTTLS, &[]).expect("send");
        let (kind, _) = wire.option_reply(opt::STARTTLS).expect("reply");
        assert!(matches!(kind, reply::ERR_UNSUP | reply::ERR_POLICY), "{kind:#x}");
        wire.go("").expect("goes on without");
    }
}

#[test]
fn tls_over_a_unix_socket() {
    let certificates = Certificates::new();
    let server = Serve::new("memory:?size=1M").tls(&certificates, true).unix();
    let uri = format!(
        "nbds+unix://localhost/?socket={}&tls-certificates={}",
        server.socket(),
        certificates.dir().display()
    );
    let script = "import nbd, sys; h = nbd.NBD(); h.set_tls_verify_peer(False); \
                  h.set_uri_allow_local_file(True); \
                  h.connect_uri(sys.argv[1]); assert h.get_tls_negotiated(); h.pread(512, 0)";
    Run::new("/usr/bin/python3").arg("-c").arg(script).arg(uri).ok();
}

#[test]
fn a_wrong_key_is_refused_at_the_start() {
    let certificates = Certificates::new();
    let other = Certificates::new();
    let output = Run::new(sheave_tests::sheave())
        .args("serve memory:?size=1M --listen 127.0.0.1:0 --tls-cert")
        .arg(certificates.file("server-cert.pem"))
        .arg("--tls-key")
        .arg(other.file("server-key.pem"))
        .output();
    assert_eq!(output.status.code(), Some(1), "{}", output.describe());
    assert_eq!(output.stderr.lines().count(), 1, "one line: {}", output.stderr);
}

fn nbds(server: &Server, certificates: &str) -> String {
    format!("nbds://localhost:{}/?tls-certificates={certificates}", server.port())
}

fn plain(server: &Server) -> Wire {
    let stream = TcpStream::connect(("127.0.0.1", server.port())).expect("connect");
    Wire::tcp(stream).expect("a socket")
}
