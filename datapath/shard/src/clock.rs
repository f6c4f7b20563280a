//! The one clock of the data path.

use std::time::{Duration, Instant};

use sheave_core::Nanos;

/// Monotonic nanoseconds since the clock was made.
#[derive(Clone, Copy)]
pub struct Clock {
    start: Instant,
}

impl Clock {
    /// A clock that begins at 1, so that zero can mean "never".
    #[must_use]
    pub fn start() -> Self {
        Self { start: Instant::now() - Duration::from_nanos(1) }
    }

    /// Now.
    #[must_use]
    pub fn now(&self) -> Nanos {
        // 2^64 ns are 584 years.
        self.start.elapsed().as_nanos() as Nanos
    }

    /// The time from now until `due`, if that is still to come.
    pub(crate) fn until(&self, due: Nanos) -> Duration {
        Duration::from_nanos(due.saturating_sub(self.now()))
    }
}
