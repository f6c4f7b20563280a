//! Short writes to the page cache, carried out inline.
//!
//! Most file systems cannot write to the page cache without a thread that may sleep, so io_uring
//! hands such a write to a kernel worker: two switches for a copy of a few kilobytes. Inline it
//! costs half. But it may sleep after all, for a journal or because there are too many dirty pages,
//! and all connections of the shard with it. So after a slow write, inline execution is disabled
//! for one second: a disk that is behind stalls a shard at most once in that time.

use std::collections::VecDeque;

use sheave_core::{IoDone, IoRequest, IoToken, Nanos};
use sheave_ring::plain;

use crate::Clock;

/// A write that takes longer is slow.
const SLOW_NS: Nanos = 1_000_000;
/// How long inline execution is disabled then.
const DISABLED_NS: Nanos = 1_000_000_000;
/// Longer writes go to a worker, which copies while the shard goes on.
const LEN_MAX_BYTES: usize = 128 << 10;

/// Writes that were carried out inline, and whether more may be.
#[derive(Default)]
pub(crate) struct InlineWrites {
    done: VecDeque<(u32, IoDone)>,
    disabled_until: Nanos,
}

impl InlineWrites {
    /// Whether this request should be carried out inline.
    pub(crate) fn takes(&self, request: &IoRequest, now: Nanos) -> bool {
        let IoRequest::Write { from, .. } = request else { return false };
        let is_short = from.len() <= LEN_MAX_BYTES;
        is_short && from.registered().is_none() && now >= self.disabled_until
    }

    /// Carries it out for that volume of the shard.
    pub(crate) fn run(&mut self, volume: u32, request: IoRequest, token: IoToken, clock: Clock) {
        let began = clock.now();
        let result = plain::carry_out(&request);
        self.note(began, clock.now());
        self.done.push_back((volume, IoDone { token, request, result }));
    }

    /// Whether all ends have been taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.done.is_empty()
    }

    /// The next end, with the volume whose backend is to have it.
    pub(crate) fn next_done(&mut self) -> Option<(u32, IoDone)> {
        self.done.pop_front()
    }

    fn note(&mut self, began: Nanos, ended: Nanos) {
        if ended - began > SLOW_NS {
            self.disabled_until = ended + DISABLED_NS;
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
    fn a_slow_write_disables_inline_execution_for_a_second() {
        let mut inline = InlineWrites::default();
        assert!(inline.takes(&write(4096), 5));
        inline.note(10, 10 + SLOW_NS + 1);
        assert!(!inline.takes(&write(4096), 10 + SLOW_NS + DISABLED_NS));
        assert!(inline.takes(&write(4096), 11 + SLOW_NS + DISABLED_NS));
    }

    #[test]
    fn only_short_writes_are_taken_and_their_ends_are_kept() {
        let mut inline = InlineWrites::default();
        assert!(!inline.takes(&write(LEN_MAX_BYTES + 1), 5));
        inline.run(7, write(100), IoToken(3), Clock::start());
        let (volume, done) = inline.next_done().unwrap();
        assert!(volume == 7 && done.token == IoToken(3) && done.result.unwrap() == 100);
        assert!(inline.next_done().is_none());
    }
}
