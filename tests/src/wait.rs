//! How long tests wait.

use std::thread;
use std::time::{Duration, Instant};

/// Longest wait for anything that must come. A slow machine with other work needs a small part of
/// it, and a test that passes never waits so long.
pub const PATIENCE: Duration = Duration::from_secs(120);

const POLL: Duration = Duration::from_millis(10);

/// Looks again and again, for [`PATIENCE`] at most; answers whether it came true.
#[must_use]
pub fn eventually(mut is_true: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if is_true() {
            return true;
        }
        if start.elapsed() > PATIENCE {
            return false;
        }
        thread::sleep(POLL);
    }
}
