//! A server, and a client of it.

mod certificates;
mod client;
mod link;
mod random;
mod server;

pub(crate) use certificates::Certificates;
pub(crate) use client::{Answer, Client};
pub(crate) use link::Link;
pub(crate) use random::Random;
pub(crate) use server::{Running, Setup};

use std::fs::OpenOptions;
use std::io::Write;
use std::time::{Duration, Instant};

use sheave_shard::STOP_GRACE;

/// Longest wait for anything that must come. A slow machine with other work needs a small part of
/// it, and a test that passes never waits so long.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(120);

/// A stop that gives up on a client or a volume, on a slow machine.
pub(crate) const GIVEN_UP: Duration = Duration::from_secs(STOP_GRACE.as_secs() * 4);

/// Defines a test for each engine.
macro_rules! both_engines {
    ($($(#[$meta:meta])* fn $name:ident($engine:ident) $body:block)*) => { $(
        mod $name {
            use super::*;

            fn over($engine: sheave_shard::EngineChoice) $body

            $(#[$meta])*
            #[test]
            fn uring() {
                if !crate::support::uring_or_skip(stringify!($name)) {
                    return;
                }
                over(sheave_shard::EngineChoice::Uring);
            }

            $(#[$meta])*
            #[test]
            fn threads() {
                over(sheave_shard::EngineChoice::Threads);
            }
        }
    )* };
}
pub(crate) use both_engines;

/// Whether io_uring works here; if not, `make test` reports it at its end.
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
pub(crate) fn uring_or_skip(test: &str) -> bool {
    let Err(error) = sheave_ring::probe() else { return true };
    let line = format!("skipped: {test}: no io_uring: {error}\n");
    eprint!("{line}");
    if let Ok(path) = std::env::var("SHEAVE_SKIP_LOG") {
        let mut log = OpenOptions::new().create(true).append(true).open(path).unwrap();
        log.write_all(line.as_bytes()).unwrap();
    }
    false
}

/// Waits until a condition holds.
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < TIMEOUT, "{what}: not so after {TIMEOUT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes that depend on their position.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed | 1);
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend_from_slice(&random.next().to_le_bytes());
    }
    out.truncate(len);
    out
}
