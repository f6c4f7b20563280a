//! Where a process may be killed, in tests.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

static LEFT: AtomicI64 = AtomicI64::new(0);
static DIE: OnceLock<fn() -> !> = OnceLock::new();

/// For tests: this process calls `die` at its nth step from now, counted from 0. Once a process.
pub fn on_step(n: i64, die: fn() -> !) {
    LEFT.store(n, Relaxed);
    // A second call would be a mistake of the test, which then sees no death.
    let _ = DIE.set(die);
}

/// A step of what must survive a kill: between two of them at most one file changes. It does
/// nothing outside of tests.
pub fn step() {
    if let Some(die) = DIE.get()
        && LEFT.fetch_sub(1, Relaxed) == 0
    {
        die();
    }
}
