//! File requests carried out on the spot.
//!
//! Most file systems cannot write to the page cache without a thread that may sleep, so io_uring
//! hands such a write to a kernel worker: two switches for a copy of a few kilobytes. Carried out
//! at once it costs half. But it may sleep after all, for a journal or because there are too many
//! dirty pages, and all connections of the shard with it. So a write that took long closes this
//! way for a while: a disk that is behind stalls a shard at most once a second.

use std::collections::VecDeque;

use sheave_core::{IoDone, IoRequest, IoToken, Nanos};
use sheave_ring::plain;

use crate::Clock;

/// A request that takes longer closes the way.
const SLOW_NS: Nanos = 1_000_000;
/// For this long.
const CLOSED_NS: Nanos = 1_000_000_000;
/// Longer writes go to a worker, which copies while the shard goes on.
const LEN_MAX_BYTES: usize = 128 << 10;

/// Requests that have ended on the spot, and whether more may.
#[derive(Default)]
pub(crate) struct Quick {
    done: VecDeque<(u32, IoDone)>,
    closed_until: Nanos,
}

impl Quick {
    /// Whether this request should be carried out on the spot.
    pub(crate) fn takes(&self, request: &IoRequest, now: Nanos) -> bool {
        let IoRequest::Write { from, .. } = request else { return false };
        let is_short = from.len() <= LEN_MAX_BYTES;
        is_short && from.registered().is_none() && now >= self.closed_until
    }

    /// Carries it out for that volume of the shard.
    pub(crate) fn run(&mut self, volume: u32, request: IoRequest, token: IoToken, clock: Clock) {
        let began = clock.now();
        let result = plain::carry_out(&request);
        self.note(began, clock.now());
        self.done.push_back((volume, IoDone { token, request, result }));
    }

    /// Whether there is no end to be told.
    pub(crate) fn is_empty(&self) -> bool {
        self.done.is_empty()
    }

    /// The next end to be told to the volume's backend.
    pub(crate) fn next_done(&mut self) -> Option<(u32, IoDone)> {
        self.done.pop_front()
    }

    fn note(&mut self, began: Nanos, ended: Nanos) {
        if ended - began > SLOW_NS {
            self.closed_until = ended + CLOSED_NS;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sheave_core::Buf;

    use super::*;

    fn write(len: usize) -> IoRequest {
        let file = Arc::new(tempfile::tempfile().unwrap());
        IoRequest::Write { file, at: 0, from: Buf::zeroed(len).into(), dsync: false }
    }

    #[test]
    fn a_slow_write_closes_the_way_for_a_while() {
        let mut quick = Quick::default();
        assert!(quick.takes(&write(4096), 5));
        quick.note(10, 10 + SLOW_NS + 1);
        assert!(!quick.takes(&write(4096), 10 + SLOW_NS + CLOSED_NS));
        assert!(quick.takes(&write(4096), 11 + SLOW_NS + CLOSED_NS));
    }

    #[test]
    fn only_short_writes_are_taken_and_their_ends_are_told() {
        let mut quick = Quick::default();
        assert!(!quick.takes(&write(LEN_MAX_BYTES + 1), 5));
        quick.run(7, write(100), IoToken(3), Clock::start());
        let (volume, done) = quick.next_done().unwrap();
        assert!(volume == 7 && done.token == IoToken(3) && done.result.unwrap() == 100);
        assert!(quick.next_done().is_none());
    }
}
