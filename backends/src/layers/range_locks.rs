//! Byte ranges of a volume that ops in flight write, across all threads.
//!
//! A read-modify-write of a block must not overlap any other write to that block, or it would put
//! back the old bytes of its neighbour. Whole-block writes may overlap each other. Whoever comes
//! later waits for whoever came earlier, so nobody starves and nobody waits in a circle.

use std::sync::{Mutex, MutexGuard, PoisonError};

use sheave_core::{ByteRange, memory};

/// The most ranges in the table.
const RANGES_MAX: usize = 4096;

/// The table.
#[derive(Default)]
pub(super) struct RangeLocks {
    state: Mutex<State>,
}

/// The name of a range in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket(u64);

/// Whether others may write the range too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Others that share it may.
    Shared,
    /// Nobody may.
    Exclusive,
}

#[derive(Default)]
struct State {
    /// By ticket, ascending.
    entries: Vec<Entry>,
    exclusive_count: usize,
    next: u64,
}

struct Entry {
    ticket: Ticket,
    range: ByteRange,
    mode: Mode,
}

impl RangeLocks {
    /// Enters a range; `None` when the table is full or cannot grow. The bool tells whether it is
    /// granted.
    pub(super) fn enter(&self, range: ByteRange, mode: Mode) -> Option<(Ticket, bool)> {
        let mut state = self.state();
        let has_room = state.entries.len() < RANGES_MAX
            && memory::attempt(|| state.entries.try_reserve(1)).is_ok();
        if !has_room {
            return None;
        }
        let ticket = Ticket(state.next);
        state.next += 1;
        state.entries.push(Entry { ticket, range, mode });
        state.exclusive_count += usize::from(mode == Mode::Exclusive);
        let granted = state.is_granted(ticket);
        Some((ticket, granted))
    }

    /// Whether everybody who came earlier and stands in the way has left.
    pub(super) fn is_granted(&self, ticket: Ticket) -> bool {
        self.state().is_granted(ticket)
    }

    /// Takes a range out.
    pub(super) fn leave(&self, ticket: Ticket) {
        let mut state = self.state();
        if let Some(at) = state.position(ticket) {
            let entry = state.entries.remove(at);
            state.exclusive_count -= usize::from(entry.mode == Mode::Exclusive);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs between two changes that belong together.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_granted(&self, ticket: Ticket) -> bool {
        if self.exclusive_count == 0 {
            return true;
        }
        let Some(at) = self.position(ticket) else { return false };
        let (earlier, rest) = self.entries.split_at(at);
        let own = &rest[0];
        !earlier.iter().any(|other| {
            let exclusive = own.mode == Mode::Exclusive || other.mode == Mode::Exclusive;
            exclusive && other.range.overlaps(own.range)
        })
    }

    fn position(&self, ticket: Ticket) -> Option<usize> {
        self.entries.binary_search_by_key(&ticket.0, |entry| entry.ticket.0).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> ByteRange {
        ByteRange::within(start, len, u64::MAX).unwrap()
    }

    #[test]
    fn later_waits_for_earlier() {
        let locks = RangeLocks::default();
        let (shared, granted) = locks.enter(range(0, 512), Mode::Shared).unwrap();
        assert!(granted);
        assert!(locks.enter(range(0, 1024), Mode::Shared).unwrap().1, "writes may overlap");
        let (patch, granted) = locks.enter(range(512, 512), Mode::Exclusive).unwrap();
        assert!(!granted, "the second write is in the way");
        let (late, granted) = locks.enter(range(512, 512), Mode::Shared).unwrap();
        assert!(!granted, "a waiting patch is not overtaken");
        assert!(locks.enter(range(1024, 512), Mode::Exclusive).unwrap().1, "another block");
        locks.leave(shared);
        assert!(!locks.is_granted(patch));
        locks.leave(Ticket(1));
        assert!(locks.is_granted(patch) && !locks.is_granted(late));
        locks.leave(patch);
        assert!(locks.is_granted(late));
    }

    #[test]
    fn the_table_is_bounded() {
        let locks = RangeLocks::default();
        let (first, _) = locks.enter(range(0, 1), Mode::Shared).unwrap();
        for _ in 1..RANGES_MAX {
            locks.enter(range(0, 1), Mode::Shared).unwrap();
        }
        assert!(locks.enter(range(0, 1), Mode::Shared).is_none());
        locks.leave(first);
        assert!(locks.enter(range(0, 1), Mode::Shared).is_some());
    }
}
