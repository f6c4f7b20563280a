//! Between fork and exec a child of this process has all its files, with their locks, so a search
//! for the holders of a file finds the child. Therefore a process is started only while no file is
//! being locked.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The longest wait for turns of the other kind. Either kind takes milliseconds, unless a file
/// server does not answer.
const PATIENCE: Duration = Duration::from_secs(1);

static TURNS: Mutex<Turns> = Mutex::new(Turns { held: [0; 2], wanted: [0; 2] });
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

/// The number of turns of each kind.
struct Turns {
    held: [usize; 2],
    wanted: [usize; 2],
}

/// While turns of one kind are held, none of the other kind is given out. While some of the other
/// kind are wanted, no more of this kind, so neither kind waits for an endless row of the other.
pub(super) struct Turn(Kind);

impl Turn {
    pub(super) fn take(kind: Kind) -> Self {
        let (begun, own, other) = (Instant::now(), kind as usize, 1 - kind as usize);
        let mut turns = turns();
        turns.wanted[own] += 1;
        let must_wait = |turns: &Turns| {
            turns.held[other] > 0 || (turns.held[own] > 0 && turns.wanted[other] > 0)
        };
        while must_wait(&turns) && begun.elapsed() < PATIENCE {
            turns = CHANGED
                .wait_timeout(turns, PATIENCE.saturating_sub(begun.elapsed()))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        turns.wanted[own] -= 1;
        turns.held[own] += 1;
        Self(kind)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        turns().held[self.0 as usize] -= 1;
        CHANGED.notify_all();
    }
}

fn turns() -> MutexGuard<'static, Turns> {
    // Counts are valid in any state.
    TURNS.lock().unwrap_or_else(PoisonError::into_inner)
}
