//! Exports of NBD servers elsewhere as volumes.

mod engines;

use std::sync::Arc;

use sheave_conformance::{Driver, Options};
use sheave_core::{ByteRange, Op, Reply, Volume};
use sheave_tests::{Foreign, Serve};
use sheave_volumes::{OpenOptions, open};

use engines::{CallsEngine, on_both};

/// Neither a multiple of a block, nor of a page, nor of anything.
const SIZE: u64 = 3 * (64 << 10) + 777;
const OPTIONS: Options = Options { cases: 25, unaligned: true };

/// Opens a VOLUME and makes it all zeroes.
fn blank(volume: &str) -> Arc<dyn Volume> {
    let volume = open(volume, &OpenOptions::default()).expect("a volume");
    let mut driver = Driver::new(volume.backend().expect("a backend"), CallsEngine::new());
    let range = ByteRange::within(0, volume.size(), volume.size()).expect("all of it");
    let zero = Op::WriteZeroes { range, fua: false, no_hole: false, fast: false };
    assert!(matches!(driver.run_one(zero), Ok(Reply::Done)));
    drop(driver);
    volume
}

#[test]
fn an_export_of_sheave_is_a_volume() {
    let server = Serve::new(format!("memory:?size={SIZE}")).unix();
    on_both("remote sheave", OPTIONS, || blank(&server.uri()));
}

#[test]
fn an_export_of_nbdkit_is_a_volume() {
    let Some(server) =
        Foreign::nbdkit("an_export_of_nbdkit_is_a_volume", &format!("memory {SIZE}"))
    else {
        return;
    };
    on_both("remote nbdkit", OPTIONS, || blank(&server.uri()));
}

#[test]
fn an_export_of_qemu_is_a_volume() {
    let Some(server) = Foreign::qemu_nbd("an_export_of_qemu_is_a_volume", 4 << 20) else {
        return;
    };
    on_both("remote qemu-nbd", Options { cases: 6, ..OPTIONS }, || blank(&server.uri()));
}
