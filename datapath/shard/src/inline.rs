//! Short writes to the page cache, carried out inline.
//!
//! Most file systems cannot write to the page cache without a thread that may sleep, so io_uring
//! hands such a write to a kernel worker: two switches for a copy of a few kilobytes. Inline it
//! costs half. But it may sleep after all, for a journal or because there are too many dirty pages,
//! and all connections of the shard with it. So after a slow write, inline execution is disabled
//! for one second: a disk that is behind stalls a shard at most once in that time. Meanwhile the
//! writes of a volume go to a thread of its own.
//!
//! A shard in which nothing else can be stalled has no such reason: it has one volume, and has
//! started nothing but inline writes in the last second. Its slow writes disable inline execution
//! for the rest of the turn, so that what arrives meanwhile waits for one of them and not for many.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use sheave_core::{IoDone, IoRequest, IoToken, Nanos};
use sheave_ring::plain;

use crate::Clock;
use crate::doorbell::Doorbell;
use crate::writer::{Writer, Written};

/// A write that takes longer is slow.
const SLOW_NS: Nanos = 1_000_000;
/// How long inline execution is disabled then.
const DISABLED_NS: Nanos = 1_000_000_000;
/// Longer writes go to a worker, which copies while the shard goes on.
const LEN_MAX_BYTES: usize = 128 << 10;
/// The most threads that write for a shard. Writes of more volumes go to the ring.
const WRITERS_MAX: usize = 16;

/// Short writes to the page cache of a shard's volumes.
pub(crate) struct InlineWrites {
    done: VecDeque<(u32, IoDone)>,
    disabled_until: Nanos,
    /// Whether the shard has no other volume.
    pub(crate) has_one_volume: bool,
    /// When a request was last started elsewhere.
    last_other: Nanos,
    writers: HashMap<u32, Behind>,
    written: Arc<Written>,
}

/// A volume's thread, and how many writes it has.
struct Behind {
    writer: Writer,
    count: usize,
}

impl InlineWrites {
    /// For the shard that this bell wakes.
    pub(crate) fn new(bell: Arc<Doorbell>) -> Self {
        let written = Arc::new(Written::new(bell));
        let (done, writers) = (VecDeque::new(), HashMap::new());
        let (disabled_until, last_other) = (0, 0);
        Self { done, disabled_until, has_one_volume: false, last_other, writers, written }
    }

    /// Carries a write out for that volume of the shard, here or in the volume's thread. Hands back
    /// what is for the ring.
    pub(crate) fn run(
        &mut self,
        volume: u32,
        request: IoRequest,
        token: IoToken,
        now: Nanos,
        clock: Clock,
    ) -> Result<(), IoRequest> {
        if !is_short_write(&request) {
            return Err(request);
        }
        // An inline write would wait for the file's lock, which the thread holds while it writes.
        let is_behind = self.writers.get(&volume).is_some_and(|behind| behind.count > 0);
        if is_behind || now < self.disabled_until {
            return self.leave(volume, request, token);
        }
        let began = clock.now();
        let result = plain::carry_out(&request);
        self.note(now, began, clock.now());
        self.done.push_back((volume, IoDone { token, request, result }));
        Ok(())
    }

    /// Leaves a short write to the volume's thread, if it has one or can have one. Hands back what
    /// is for the ring.
    pub(crate) fn leave(
        &mut self,
        volume: u32,
        request: IoRequest,
        token: IoToken,
    ) -> Result<(), IoRequest> {
        if !is_short_write(&request) {
            return Err(request);
        }
        if !self.writers.contains_key(&volume) && self.writers.len() < WRITERS_MAX {
            match Writer::start(volume, &self.written) {
                Ok(writer) => drop(self.writers.insert(volume, Behind { writer, count: 0 })),
                Err(error) => tracing::debug!(%error, "no thread for a volume's writes"),
            }
        }
        let Some(behind) = self.writers.get_mut(&volume) else { return Err(request) };
        behind.count += 1;
        behind.writer.push(request, token);
        Ok(())
    }

    /// Takes what the threads have written. Called when the bell has rung.
    pub(crate) fn take_written(&mut self) {
        let known = self.done.len();
        self.written.take(&mut self.done);
        for (volume, _) in self.done.iter().skip(known) {
            if let Some(behind) = self.writers.get_mut(volume) {
                behind.count -= 1;
            }
        }
    }

    /// The backend of the volume is gone. Its thread ends when it has written what it has.
    pub(crate) fn forget(&mut self, volume: u32) {
        self.writers.remove(&volume);
    }

    /// A request is started on the ring.
    pub(crate) fn other_started(&mut self, now: Nanos) {
        self.last_other = now;
    }

    /// Whether volumes' threads have writes to carry out.
    pub(crate) fn is_behind(&self) -> bool {
        self.writers.values().any(|behind| behind.count > 0)
    }

    /// Whether all completions have been taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.done.is_empty()
    }

    /// The next completion, with the volume whose backend is to have it.
    pub(crate) fn next_done(&mut self) -> Option<(u32, IoDone)> {
        self.done.pop_front()
    }

    /// Takes note of how long a write took, in the turn that began at `now`.
    fn note(&mut self, now: Nanos, began: Nanos, ended: Nanos) {
        if ended - began > SLOW_NS {
            let stalls_others = !self.has_one_volume || now < self.last_other + DISABLED_NS;
            self.disabled_until = ended + if stalls_others { DISABLED_NS } else { 0 };
        }
    }
}

fn is_short_write(request: &IoRequest) -> bool {
    let IoRequest::Write { from, .. } = request else { return false };
    from.len() <= LEN_MAX_BYTES && from.registered().is_none()
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

    fn inline() -> InlineWrites {
        InlineWrites::new(Arc::new(Doorbell::new().unwrap()))
    }

    fn is_taken(inline: &mut InlineWrites, len: usize, now: Nanos) -> bool {
        inline.run(7, write(len), IoToken(3), now, Clock::start()).is_ok()
    }

    fn end_one(inline: &mut InlineWrites, len: usize) {
        while inline.is_empty() {
            inline.take_written();
        }
        let (volume, done) = inline.next_done().unwrap();
        assert!(volume == 7 && done.token == IoToken(3) && done.result.unwrap() == len);
    }

    #[test]
    fn a_slow_write_disables_inline_execution_for_a_second() {
        let mut inline = inline();
        assert!(is_taken(&mut inline, 4096, 5) && !inline.is_empty());
        end_one(&mut inline, 4096);
        inline.note(5, 10, 10 + SLOW_NS + 1);
        assert!(is_taken(&mut inline, 4096, 10 + SLOW_NS + DISABLED_NS));
        assert!(inline.is_empty(), "the volume's thread writes");
        let later = 11 + SLOW_NS + DISABLED_NS;
        assert!(is_taken(&mut inline, 100, later), "behind the other");
        end_one(&mut inline, 4096);
        end_one(&mut inline, 100);
        assert!(is_taken(&mut inline, 4096, later));
        assert!(!inline.is_empty(), "inline again");
    }

    #[test]
    fn alone_a_slow_write_disables_inline_execution_for_the_turn() {
        let mut inline = inline();
        inline.has_one_volume = true;
        inline.other_started(5);
        let (turn, ended) = (5 + DISABLED_NS, 6 + DISABLED_NS + SLOW_NS);
        inline.note(turn - 1, turn - 1, ended);
        assert_eq!(inline.disabled_until, ended + DISABLED_NS, "a request of the ring may wait");
        inline.disabled_until = 0;
        inline.note(turn, turn, ended);
        assert!(is_taken(&mut inline, 4096, turn) && inline.is_empty(), "the rest of the turn");
        end_one(&mut inline, 4096);
        assert!(is_taken(&mut inline, 4096, ended) && !inline.is_empty(), "the next turn");
        inline.has_one_volume = false;
        inline.note(turn, turn, ended);
        assert_eq!(inline.disabled_until, ended + DISABLED_NS, "another volume may wait");
    }

    #[test]
    fn long_writes_and_those_of_too_many_volumes_are_for_the_ring() {
        let mut inline = inline();
        assert!(!is_taken(&mut inline, LEN_MAX_BYTES + 1, 5));
        inline.disabled_until = Nanos::MAX;
        for volume in 0..20 {
            let taken = inline.run(volume, write(10), IoToken(0), 5, Clock::start()).is_ok();
            assert_eq!(taken, (volume as usize) < WRITERS_MAX);
        }
        inline.forget(0);
        assert!(inline.run(20, write(10), IoToken(0), 5, Clock::start()).is_ok());
    }
}
