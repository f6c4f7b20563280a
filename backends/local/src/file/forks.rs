//! Between fork and exec a child of this process has all its files, with their locks: who asks then
//! who has a file finds the child. So processes that are started often, such as those that wait for
//! devices, are started while no file is being locked.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Either takes milliseconds. One that takes longer, at a file server that is away perhaps, is not
/// waited for.
const PATIENCE: Duration = Duration::from_secs(1);

static TURNS: Mutex<[usize; 2]> = Mutex::new([0, 0]);
static CHANGED: Condvar = Condvar::new();

/// Starts a process while no file is being locked.
pub fn start_process<T>(start: impl FnOnce() -> T) -> T {
    let _turn = Turn::take(Kind::Start);
    start()
}

#[derive(Clone, Copy)]
pub(super) enum Kind {
    Start = 0,
    Lock = 1,
}

/// While somebody has one of a kind, nobody has one of the other.
pub(super) struct Turn(Kind);

impl Turn {
    pub(super) fn take(kind: Kind) -> Self {
        let (begun, other) = (Instant::now(), 1 - kind as usize);
        let mut turns = turns();
        while turns[other] > 0 && begun.elapsed() < PATIENCE {
            turns = CHANGED
                .wait_timeout(turns, PATIENCE.saturating_sub(begun.elapsed()))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        turns[kind as usize] += 1;
        Self(kind)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        turns()[self.0 as usize] -= 1;
        CHANGED.notify_all();
    }
}

fn turns() -> MutexGuard<'static, [usize; 2]> {
    // A count is changed at once.
    TURNS.lock().unwrap_or_else(PoisonError::into_inner)
}
