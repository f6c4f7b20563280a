//! An export whose volume grows: connections keep their size, new ones have the new size.

use std::fs::File;
use std::sync::Arc;

use sheave_core::NbdErrno;
use sheave_proto::{ClientConfig, ReplyStyle};
use sheave_volumes::{OpenOptions, open};
use tempfile::TempDir;

use crate::support::{Client, Link, Running, Setup, both_engines, pattern};

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
            // In flight while the volume grows; the last block is left to the new client.
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
}
