//! Byte ranges of a volume that ops in flight write, across all threads.
//!
//! A read-modify-write of a block must not overlap any other write to that block, or it would
//! restore old bytes of its neighbour. Whole-block writes may overlap each other. An op waits for
//! overlapping earlier ones, so there is neither starvation nor deadlock. It leaves a waker, which
//! is called when the last of them has left.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use sheave_core::{ByteRange, Result, memory};

/// The most ranges in the table.
const RANGES_MAX: usize = 4096;

/// The table.
#[derive(Default)]
pub(super) struct RangeLocks {
    state: Mutex<State>,
}

/// The identifier of a range in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket(u64);

/// Whether other ops may write the range too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Other sharing ops may.
    Shared,
    /// No other op may.
    Exclusive,
}

#[derive(Default)]
struct State {
    /// By ticket, ascending.
    entries: Vec<Entry>,
    exclusive_count: usize,
    next: u64,
    /// Backends that found no room for a range: one waker each.
    want_room: Vec<Waker>,
}

struct Entry {
    ticket: Ticket,
    range: ByteRange,
    mode: Mode,
    /// Set while the range is not granted.
    waker: Option<Waker>,
}

impl RangeLocks {
    /// Enters a range; `None` when the table is full. The bool says whether it is granted. If not,
    /// or if there was no room, `waker` is called once that has changed.
    ///
    /// # Errors
    /// When there is no memory for the table.
    pub(super) fn enter(
        &self,
        range: ByteRange,
        mode: Mode,
        waker: impl FnOnce() -> Waker,
    ) -> Result<Option<(Ticket, bool)>> {
        let mut state = self.state();
        if state.entries.len() >= RANGES_MAX {
            let waker = waker();
            if !state.want_room.iter().any(|other| other.will_wake(&waker)) {
                state.want_room.push(waker);
            }
            return Ok(None);
        }
        memory::attempt(|| state.entries.try_reserve(1))?;
        let ticket = Ticket(state.next);
        state.next += 1;
        state.entries.push(Entry { ticket, range, mode, waker: None });
        state.exclusive_count += usize::from(mode == Mode::Exclusive);
        let granted = state.is_granted(ticket);
        if !granted && let Some(entry) = state.entries.last_mut() {
            entry.waker = Some(waker());
        }
        Ok(Some((ticket, granted)))
    }

    /// Whether all overlapping earlier ops have left.
    pub(super) fn is_granted(&self, ticket: Ticket) -> bool {
        self.state().is_granted(ticket)
    }

    /// Removes a range.
    pub(super) fn leave(&self, ticket: Ticket) {
        let wakers = self.state().remove(ticket);
        // Without the lock, since a waker may take other locks.
        for waker in wakers {
            waker.wake();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code between two related changes can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Removes an entry, and returns the wakers of ops that waited for it.
    fn remove(&mut self, ticket: Ticket) -> Vec<Waker> {
        let Some(at) = self.position(ticket) else { return Vec::new() };
        let left = self.entries.remove(at);
        self.exclusive_count -= usize::from(left.mode == Mode::Exclusive);
        let mut wakers = std::mem::take(&mut self.want_room);
        for index in at..self.entries.len() {
            let Entry { ticket, range, ref waker, .. } = self.entries[index];
            if waker.is_some() && range.overlaps(left.range) && self.is_granted(ticket) {
                wakers.extend(self.entries[index].waker.take());
            }
        }
        wakers
    }

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
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::task::Wake;

    use super::*;

    fn range(start: u64, len: u64) -> ByteRange {
        ByteRange::within(start, len, u64::MAX).unwrap()
    }

    /// Counts its calls.
    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    fn counter() -> (Arc<Count>, impl Fn() -> Waker) {
        let count = Arc::<Count>::default();
        let waker = Arc::clone(&count).into();
        (count, move || Waker::clone(&waker))
    }

    fn asleep() -> Waker {
        panic!("granted at once")
    }

    #[test]
    fn later_waits_for_earlier_and_is_woken() {
        let locks = RangeLocks::default();
        let (patch_count, patch_waker) = counter();
        let (late_count, late_waker) = counter();
        let (shared, granted) = locks.enter(range(0, 512), Mode::Shared, asleep).unwrap().unwrap();
        assert!(granted);
        assert!(
            locks.enter(range(0, 1024), Mode::Shared, asleep).unwrap().unwrap().1,
            "writes may overlap"
        );
        let (patch, granted) =
            locks.enter(range(512, 512), Mode::Exclusive, patch_waker).unwrap().unwrap();
        assert!(!granted, "the second write is in the way");
        let (late, granted) =
            locks.enter(range(512, 512), Mode::Shared, late_waker).unwrap().unwrap();
        assert!(!granted, "a waiting patch is not overtaken");
        let other = locks.enter(range(1024, 512), Mode::Exclusive, asleep).unwrap().unwrap();
        assert!(other.1, "another block");
        locks.leave(shared);
        assert!(!locks.is_granted(patch));
        locks.leave(Ticket(1));
        assert!(locks.is_granted(patch) && !locks.is_granted(late));
        assert_eq!((patch_count.0.load(Relaxed), late_count.0.load(Relaxed)), (1, 0));
        locks.leave(patch);
        assert!(locks.is_granted(late));
        assert_eq!((patch_count.0.load(Relaxed), late_count.0.load(Relaxed)), (1, 1));
    }

    #[test]
    fn the_table_is_bounded_and_tells_of_room() {
        let locks = RangeLocks::default();
        let (first, _) = locks.enter(range(0, 1), Mode::Shared, asleep).unwrap().unwrap();
        for _ in 1..RANGES_MAX {
            locks.enter(range(0, 1), Mode::Shared, asleep).unwrap().unwrap();
        }
        let (count, waker) = counter();
        for _ in 0..3 {
            assert!(locks.enter(range(0, 1), Mode::Shared, &waker).unwrap().is_none());
        }
        locks.leave(first);
        assert_eq!(count.0.load(Relaxed), 1, "once for a backend");
        assert!(locks.enter(range(0, 1), Mode::Shared, asleep).unwrap().is_some());
    }
}
