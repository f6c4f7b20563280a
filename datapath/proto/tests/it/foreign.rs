//! Our client against other people's servers: nbdkit, qemu-nbd, nbd-server.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use sheave_core::NbdErrno;
use sheave_proto::wire::{command, reply_type, transmission_flag as flag};
use sheave_proto::{ClientConfig, ClientError, ClientNext, Goal, ReplyStyle};

use crate::peer::{SIZE, Server, TempDir};

#[test]
fn foreign_nbdkit_with_all_it_has() {
    let mut server = Server::nbdkit_memory(&[]);
    let client = server.connect(ClientConfig::default());
    // nbdkit refuses extended headers, so this is the second choice.
    assert_eq!(client.negotiated.style, ReplyStyle::Structured);
    assert!(client.negotiated.context("base:allocation").is_some());
    assert!(client.has(flag::SEND_DF | flag::CAN_MULTI_CONN | flag::SEND_FAST_ZERO));
    assert_eq!(client.negotiated.size, SIZE);
    client.exercise();
}

#[test]
fn foreign_nbdkit_with_simple_replies() {
    let mut server = Server::nbdkit_memory(&["--no-sr"]);
    let client = server.connect(ClientConfig::default());
    assert_eq!(client.negotiated.style, ReplyStyle::Simple);
    client.exercise();
    let simple = ClientConfig { style: ReplyStyle::Simple, ..ClientConfig::default() };
    Server::nbdkit_memory(&[]).connect(simple).exercise();
}

#[test]
fn foreign_nbdkit_without_fixed_newstyle() {
    for mask in ["0", "2"] {
        let mut server = Server::nbdkit_memory(&["--mask-handshake", mask]);
        let client = server.connect(ClientConfig::default());
        assert_eq!(client.negotiated.style, ReplyStyle::Simple);
        client.exercise();
    }
    let mut server = Server::nbdkit_memory(&["--mask-handshake", "1"]);
    server.connect(ClientConfig::default()).exercise();
}

#[test]
fn foreign_nbdkit_oldstyle_is_too_old() {
    let mut server = Server::nbdkit_memory(&["-o"]);
    let error = server.shake_hands(ClientConfig::default()).unwrap_err();
    assert!(matches!(error, ClientError::TooOld(_)));
}

#[test]
fn foreign_nbdkit_tells_its_block_sizes() {
    let filter = ["--filter=blocksize-policy"];
    let sizes = ["blocksize-minimum=512", "blocksize-preferred=64k", "blocksize-maximum=1M"];
    let size = SIZE.to_string();
    let args = [filter.as_slice(), &["memory", &size], &sizes].concat();
    let mut server = Server::nbdkit(&args);
    let client = server.connect(ClientConfig::default());
    let block = client.negotiated.block;
    assert_eq!((block.minimum, block.preferred, block.maximum_payload), (512, 65536, 1 << 20));
    client.exercise();
}

#[test]
fn foreign_nbdkit_lists_and_refuses() {
    let images = TempDir::new();
    for name in ["one", "two"] {
        fs::write(images.file(name), vec![7; 4096]).unwrap();
    }
    let dir = format!("dir={}", images.0.display());
    let mut server = Server::nbdkit(&["file", &dir]);
    let goal = |goal| ClientConfig { goal, export: "one".to_owned(), ..ClientConfig::default() };
    let (_, next) = server.shake_hands(goal(Goal::List)).unwrap();
    let ClientNext::Listed(mut entries) = next else { panic!("{next:?}") };
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let names: Vec<_> = entries.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names, ["one", "two"]);
    let (_, next) = server.shake_hands(goal(Goal::Info)).unwrap();
    assert!(matches!(next, ClientNext::Info(info) if info.size == 4096));
    let nowhere = ClientConfig { export: "nowhere".to_owned(), ..ClientConfig::default() };
    let error = server.shake_hands(nowhere).unwrap_err();
    assert!(matches!(error, ClientError::Refused { code: reply_type::ERR_UNKNOWN, .. }));
}

#[test]
fn foreign_nbdkit_refuses_tls_or_wants_it() {
    let tls = ClientConfig { tls: true, ..ClientConfig::default() };
    let error = Server::nbdkit_memory(&["--tls=off"]).shake_hands(tls).unwrap_err();
    assert!(matches!(error, ClientError::Refused { .. }), "{error}");

    let keys = TempDir::new();
    fs::write(keys.file("psk"), "alice:00112233445566778899aabbccddeeff\n").unwrap();
    let psk = format!("--tls-psk={}", keys.file("psk").display());
    let mut server = Server::nbdkit_memory(&["--tls=require", &psk]);
    let error = server.shake_hands(ClientConfig::default()).unwrap_err();
    assert!(matches!(error, ClientError::Refused { code: reply_type::ERR_TLS_REQD, .. }));
    let tls = ClientConfig { tls: true, ..ClientConfig::default() };
    let (_, next) = server.shake_hands(tls).unwrap();
    assert!(matches!(next, ClientNext::StartTls));
}

#[test]
fn foreign_nbdkit_errors_arrive() {
    let size = SIZE.to_string();
    let args = ["--filter=error", "memory", &size, "error-pwrite=ENOSPC", "error-pwrite-rate=1"];
    let mut server = Server::nbdkit(&args);
    let mut client = server.connect(ClientConfig::default());
    let full = client.call(command::WRITE, 0, 0, 4096, &[1; 4096]);
    assert_eq!(full.error, Some(NbdErrno::NoSpc));
    client.ok(command::READ, 0, 0, 4096, &[]);
    client.disconnect();
}

fn image(dir: &TempDir) -> PathBuf {
    let path = dir.file("image");
    fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    path
}

#[test]
fn foreign_qemu_nbd() {
    let dir = TempDir::new();
    let image = image(&dir);
    let mut args = ["-t", "-f", "raw", "-x", "disk", "-D", "about it", "-e", "8", "-k"]
        .map(OsString::from)
        .to_vec();
    args.extend([dir.file("socket").into(), image.into()]);
    let mut server = Server::start(dir, "qemu-nbd", &args);
    let export = "disk".to_owned();
    let client = server.connect(ClientConfig { export, ..ClientConfig::default() });
    assert!(client.negotiated.style >= ReplyStyle::Structured);
    assert_eq!(client.negotiated.description.as_deref(), Some("about it"));
    client.exercise();
    let error = server.shake_hands(ClientConfig::default()).unwrap_err();
    assert!(matches!(error, ClientError::Refused { code: reply_type::ERR_UNKNOWN, .. }));
}

#[test]
fn foreign_qemu_nbd_shows_holes() {
    let dir = TempDir::new();
    let image = image(&dir);
    let mut args = ["-t", "-f", "raw", "-k"].map(OsString::from).to_vec();
    args.extend([dir.file("socket").into(), image.into()]);
    let mut server = Server::start(dir, "qemu-nbd", &args);
    let mut client = server.connect(ClientConfig::default());
    client.ok(command::WRITE, 0, 1 << 20, 65536, &[9; 65536]);
    let reply = client.ok(command::READ, 0, 0, 4 << 20, &[]);
    assert!(reply.holes > 0);
    let (head, rest) = reply.data.split_at(1 << 20);
    let (data, tail) = rest.split_at(65536);
    assert!(head.iter().chain(tail).all(|byte| *byte == 0) && data.iter().all(|byte| *byte == 9));
    client.disconnect();
}

/// nbd-server, for one connection: it does not fork, so that we know which process to kill.
fn nbd_server() -> Server {
    let dir = TempDir::new();
    let image = image(&dir);
    // It insists on TCP beside the unix socket, so it needs a port of its own.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let text = format!(
        "[generic]\nport = {port}\nlistenaddr = 127.0.0.1\nunixsock = {}\nallowlist = true\n\
         [disk]\nexportname = {}\nflush = true\nfua = true\ntrim = true\n",
        dir.file("socket").display(),
        image.display(),
    );
    fs::write(dir.file("config"), text).unwrap();
    let args = ["-d".into(), "-C".into(), dir.file("config").into()];
    Server::start(dir, "nbd-server", &args)
}

#[test]
fn foreign_nbd_server() {
    let export = "disk".to_owned();
    let mut server = nbd_server();
    let client = server.connect(ClientConfig { export, ..ClientConfig::default() });
    assert_eq!(client.negotiated.size, SIZE);
    client.exercise();
}

#[test]
fn foreign_nbd_server_lists() {
    let list = ClientConfig { goal: Goal::List, ..ClientConfig::default() };
    let (_, next) = nbd_server().shake_hands(list).unwrap();
    assert!(matches!(next, ClientNext::Listed(entries) if entries.len() == 1));
}
