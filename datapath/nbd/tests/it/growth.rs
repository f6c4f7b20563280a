//! Volumes that grow while they are served: clients keep the size that they negotiated, new ones
//! have the new size, and the kernel's client follows.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use sheave_core::NbdErrno;
use sheave_nbd::kernel_session;
use sheave_proto::wire::command;
use sheave_proto::{ClientConfig, ReplyStyle, Request};
use sheave_shard::{Assignment, Clock, Engine, EngineConfig, Served};
use sheave_telemetry::Registry;
use sheave_volumes::{OpenOptions, open};
use tempfile::TempDir;

use crate::support::{Client, Link, Running, Setup, TIMEOUT, both_engines, pattern};

const OLD: u64 = (1 << 20) + 5;
const NEW: u64 = 3 << 20;

/// A client that does not ask for block sizes may send any alignment.
fn connect(server: &Running) -> Client {
    let (style, block_sizes) = (ReplyStyle::Extended, false);
    let config = ClientConfig { style, block_sizes, ..ClientConfig::default() };
    Client::negotiate(Link::unix(&server.socket), config, None).unwrap()
}

both_engines! {
    fn new_connections_reach_what_has_grown(engine) {
        for direct in [false, true] {
            // Only a file system on a disk has direct I/O everywhere.
            let dir = TempDir::new_in("/var/tmp").unwrap();
            let path = dir.path().join("a.img");
            File::create(&path).unwrap().set_len(OLD).unwrap();
            let url = format!("{}?direct={direct}", path.display());
            let volume = open(&url, &OpenOptions::default()).unwrap();
            let server = Setup::of(engine, Arc::clone(&volume)).start();
            let mut old = connect(&server);
            assert_eq!(old.negotiated.size, OLD);
            // In flight while the volume grows; only the new client writes the last block.
            let before = pattern(1, 1 << 20);
            for at in (0..(1 << 20) - 4096).step_by(4096) {
                old.write(0, at, &before[at as usize..][..4096]);
            }
            old.link.flush().unwrap();
            File::options().write(true).open(&path).unwrap().set_len(NEW).unwrap();
            assert_eq!(volume.grow().unwrap(), NEW);
            let mut new = connect(&server);
            assert_eq!(new.negotiated.size, NEW);
            let across = pattern(2, 1 << 20);
            new.write(0, OLD - 1000, &across);
            assert_eq!(new.only_answer().error, None);
            while old.in_flight() > 0 {
                assert_eq!(old.answer().unwrap().expect("a reply").error, None);
            }
            assert_eq!(old.bytes(0, 1 << 19), before[..1 << 19]);
            assert_eq!(old.bytes(OLD - 1000, 1000), across[..1000]);
            old.read(OLD - 1, 2);
            let (error, _) = old.only_answer().error.expect("it keeps its size");
            assert_eq!(error, NbdErrno::Inval);
            assert_eq!(new.bytes(OLD - 1000, 1 << 20), across);
            assert_eq!(new.bytes(NEW - 512, 512), [0; 512]);
        }
    }
    fn the_kernel_reaches_what_has_grown_while_requests_are_in_flight(engine) {
        let dir = TempDir::new_in("/var/tmp").unwrap();
        let path = dir.path().join("a.img");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let url = format!("{}?fault=flush:delay=2s", path.display());
        let volume = open(&url, &OpenOptions::default()).unwrap();
        let config = EngineConfig { choice: engine, shards: 2, poll_us: 0 };
        let running = Engine::start(config, Clock::start()).unwrap();
        let (mut kernel, server) = UnixStream::pair().unwrap();
        kernel.set_read_timeout(Some(TIMEOUT)).unwrap();
        let served = Served::new(Arc::clone(&volume), Registry::new().volume("a"));
        let session = kernel_session(Arc::clone(&volume));
        let socket = server.into();
        running.serve(Assignment { socket, session, served, key: Some(1) }).unwrap();

        let write = Request { command: command::WRITE, length: 512, ..Request::default() };
        let beyond = Request { offset: 1 << 20, ..write };
        ask(&mut kernel, Request { cookie: 1, ..beyond });
        assert_eq!(reply(&mut kernel), (1, NbdErrno::NoSpc as u32), "it ends there");
        ask(&mut kernel, Request { cookie: 2, command: command::FLUSH, ..Request::default() });
        volume.extend(2 << 20).unwrap();
        assert_eq!(volume.grow().unwrap(), 2 << 20);
        ask(&mut kernel, Request { cookie: 3, ..beyond });
        assert_eq!(reply(&mut kernel), (3, 0), "before the flush that was in flight");
        assert_eq!(reply(&mut kernel), (2, 0));
        assert_eq!(std::fs::read(&path).unwrap()[1 << 20..][..512], [7; 512]);
        drop(kernel);
        running.stop();
    }
}

/// Sends a request of the kernel's client; a write has its data.
fn ask(kernel: &mut UnixStream, request: Request) {
    let mut bytes = Vec::new();
    request.encode(ReplyStyle::Simple, &mut bytes);
    if request.command == command::WRITE {
        bytes.resize(bytes.len() + request.length as usize, 7);
    }
    kernel.write_all(&bytes).unwrap();
}

/// The cookie and the error of the next reply.
fn reply(kernel: &mut UnixStream) -> (u64, u32) {
    let mut bytes = [0; 16];
    kernel.read_exact(&mut bytes).unwrap();
    let error = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
    (u64::from_be_bytes(bytes[8..].try_into().unwrap()), error)
}
