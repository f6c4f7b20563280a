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

use std::time::{Duration, Instant};

/// Nothing takes that long.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);

/// Defines a test for each engine.
macro_rules! both_engines {
    ($($(#[$meta:meta])* fn $name:ident($engine:ident) $body:block)*) => { $(
        mod $name {
            use super::*;

            fn over($engine: sheave_shard::EngineChoice) $body

            $(#[$meta])*
            #[test]
            fn uring() {
                if let Err(error) = sheave_ring::probe() {
                    return eprintln!("skipped, no io_uring: {error}");
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

/// Waits until something is so.
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < TIMEOUT, "{what}: not so after {TIMEOUT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes that tell where they belong.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed | 1);
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend_from_slice(&random.next().to_le_bytes());
    }
    out.truncate(len);
    out
}
