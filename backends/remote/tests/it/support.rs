//! What the tests have in common: a volume on a server, and short ways to use it.

use std::time::{Duration, Instant};

use sheave_conformance::{Driver, PlainEngine};
use sheave_core::{Buf, ByteRange, Error, Op, Outcome, Reply, Volume as _};
use sheave_remote::{RemoteOptions, RemoteVolume};

use crate::server::{Life, Server};

/// Requests that an engine has room for.
pub(crate) const ROOM: usize = 16;
/// Bytes of a small export.
pub(crate) const SMALL: u64 = 64 * 512;

pub(crate) fn open(server: &Server, change: impl FnOnce(&mut RemoteOptions)) -> RemoteVolume {
    let mut options = RemoteOptions::new(server.uri().parse().unwrap());
    options.pause_max = Duration::from_millis(2);
    change(&mut options);
    RemoteVolume::open(options).unwrap()
}

pub(crate) type Plain = Driver<PlainEngine>;

pub(crate) fn driver(volume: &RemoteVolume) -> Plain {
    Driver::new(volume.backend().unwrap(), PlainEngine::new(ROOM))
}

pub(crate) fn read(driver: &mut Plain, at: u64) -> Result<Vec<u8>, Error> {
    let range = ByteRange::within(at, 512, at + 512).unwrap();
    match driver.run_one(Op::Read { range, into: None })? {
        Reply::Data(data) => Ok(data.to_vec()),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn fails(outcome: Outcome) -> String {
    outcome.expect_err("it fails").to_string()
}

pub(crate) fn write(at: u64, byte: u8) -> Op {
    let range = ByteRange::within(at, 512, SMALL).unwrap();
    Op::Write { range, data: Buf::from_bytes(&[byte; 512]).into(), fua: false }
}

#[track_caller]
pub(crate) fn wait_until(server: &Server, is_so: impl Fn(&Life) -> bool) {
    let begun = Instant::now();
    while !is_so(&server.lock()) {
        assert!(begun.elapsed() < Duration::from_secs(60), "the server does not come to it");
        std::thread::sleep(Duration::from_millis(1));
    }
}
