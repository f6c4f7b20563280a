//! One `fdatasync` at a time on each description, for all jobs that wait for one.
//!
//! Two at once on one description would race for the error of a failed write-back, which the kernel
//! reports once. So a job that comes while one runs waits for the next, together with all others
//! that do. Under load this also makes flushes cheap.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use sheave_core::{Result, memory};

/// Jobs that wait for a sync of a backend's file.
#[derive(Default)]
pub(super) struct GroupSync {
    /// Jobs that the sync in flight serves.
    running: Vec<usize>,
    /// Jobs that came after it began.
    waiting: Vec<usize>,
    in_flight: bool,
}

impl GroupSync {
    /// Adds a job. True: start a sync now.
    pub(super) fn join(&mut self, key: usize) -> bool {
        self.waiting.push(key);
        self.next()
    }

    /// Makes room for so many jobs in all.
    pub(super) fn make_room(&mut self, count: usize) -> Result<()> {
        memory::attempt(|| self.waiting.try_reserve(count - self.waiting.len()))?;
        memory::attempt(|| self.running.try_reserve(count - self.running.len()))
    }

    /// Takes the next job that the completed sync has served.
    pub(super) fn served(&mut self) -> Option<usize> {
        self.running.pop()
    }

    /// Notes that the sync has completed and all jobs that it served are taken. True: start the
    /// next one now.
    pub(super) fn completed(&mut self) -> bool {
        debug_assert!(self.running.is_empty());
        self.in_flight = false;
        self.next()
    }

    fn next(&mut self) -> bool {
        if self.in_flight || self.waiting.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.running, &mut self.waiting);
        self.in_flight = true;
        true
    }
}

/// The syncs of a description, which several backends may share.
#[derive(Default)]
pub(super) struct SharedSync(Mutex<State>);

#[derive(Default)]
struct State {
    is_running: bool,
    /// How many have begun.
    begun: u64,
    /// The last one that has completed, counted as in `begun`.
    ended: u64,
    /// Backends that wait for the next one.
    waiting: Vec<Waker>,
}

/// What a backend that needs a sync has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Start it. No other one runs until [`SharedSync::ended`] or [`SharedSync::given_up`].
    Start,
    /// Ask again for this sync when woken.
    Wait(u64),
    /// Another backend's sync, which began after the request, has completed. If it failed, the
    /// volume is poisoned.
    Served,
}

impl SharedSync {
    /// Asks for a sync that has not begun yet.
    pub(super) fn ask(&self, waker: impl FnOnce() -> Waker) -> Turn {
        let mut state = self.lock();
        let needed = state.begun + 1;
        state.turn(needed, waker)
    }

    /// Asks again, after [`Turn::Wait`].
    pub(super) fn ask_again(&self, needed: u64, waker: impl FnOnce() -> Waker) -> Turn {
        self.lock().turn(needed, waker)
    }

    /// Notes that the running sync has completed. If it failed, the volume must be poisoned before.
    pub(super) fn ended(&self) {
        self.stop(|state| state.ended = state.begun);
    }

    /// Notes that the outcome of the running sync will not be known. It serves no other backend.
    pub(super) fn given_up(&self) {
        self.stop(|_| ());
    }

    fn stop(&self, note: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        state.is_running = false;
        note(&mut state);
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No call that changes the state can panic within.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn turn(&mut self, needed: u64, waker: impl FnOnce() -> Waker) -> Turn {
        if self.ended >= needed {
            return Turn::Served;
        }
        if !self.is_running {
            self.is_running = true;
            self.begun += 1;
            return Turn::Start;
        }
        let waker = waker();
        if !self.waiting.iter().any(|other| other.will_wake(&waker)) {
            self.waiting.push(waker);
        }
        Turn::Wait(needed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::task::Wake;

    use super::*;

    #[test]
    fn latecomers_share_the_next_one() {
        let mut sync = GroupSync::default();
        assert!(sync.join(1));
        assert!(!sync.join(2) && !sync.join(3), "one at a time");
        assert_eq!((sync.served(), sync.served()), (Some(1), None));
        assert!(sync.completed());
        assert_eq!((sync.served(), sync.served(), sync.served()), (Some(3), Some(2), None));
        assert!(!sync.completed());
    }
    /// Counts how often it is woken.
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    #[test]
    fn backends_of_one_description_share_the_next_sync() {
        let syncs = SharedSync::default();
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = || Waker::from(Arc::clone(&count));
        assert_eq!(syncs.ask(waker), Turn::Start);
        // Their data may have been written after the first sync began.
        assert_eq!((syncs.ask(waker), syncs.ask(waker)), (Turn::Wait(2), Turn::Wait(2)));
        assert_eq!(count.0.load(Relaxed), 0);
        syncs.ended();
        assert_eq!(count.0.load(Relaxed), 1, "one waker is called once");
        assert_eq!(syncs.ask_again(2, waker), Turn::Start);
        assert_eq!(syncs.ask_again(2, waker), Turn::Wait(2));
        syncs.ended();
        assert_eq!(syncs.ask_again(2, waker), Turn::Served);
        assert_eq!(syncs.ask(waker), Turn::Start, "a new need");
    }

    #[test]
    fn a_sync_without_an_outcome_serves_no_other_backend() {
        let syncs = SharedSync::default();
        let waker = || Waker::noop().clone();
        assert_eq!((syncs.ask(waker), syncs.ask(waker)), (Turn::Start, Turn::Wait(2)));
        syncs.given_up();
        assert_eq!((syncs.ask_again(2, waker), syncs.ask(waker)), (Turn::Start, Turn::Wait(3)));
        syncs.given_up();
        assert_eq!(syncs.ask_again(2, waker), Turn::Start);
    }
}
