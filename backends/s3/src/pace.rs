//! How long a request may take.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

/// For a request without a body: the way there and back, and the work of the store.
const BASE: Duration = Duration::from_secs(20);
/// The rate of a body, at first.
const BYTES_PER_SECOND: u64 = 1 << 20;
/// The rate is halved so often, at most: to 16 KiB/s.
const HALVINGS_MAX: u32 = 6;

/// Limits of time that follow the rate of the line. A body that found too little time finds twice
/// as much next time, so a slow line makes progress, and a dead one is soon noticed on a fast one.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    halvings: AtomicU32,
}

impl Pace {
    /// For a request with a body of so many bytes, in either direction.
    pub(crate) fn limit(&self, bytes: u64) -> Duration {
        let rate = BYTES_PER_SECOND >> self.halvings.load(Relaxed);
        BASE + Duration::from_millis(bytes.saturating_mul(1000) / rate)
    }

    /// A request of so many bytes has taken so long, or has found too little time.
    pub(crate) fn learn(&self, bytes: u64, took: Option<Duration>) {
        let halvings = self.halvings.load(Relaxed);
        let next = match took {
            // The store does not answer; it is not the line.
            None if bytes == 0 => halvings,
            None => (halvings + 1).min(HALVINGS_MAX),
            // It would have found the time at twice the rate.
            Some(took) if took < self.limit(bytes) / 2 => halvings.saturating_sub(1),
            Some(_) => halvings,
        };
        // Another request may have learned at the same time; either is right.
        self.halvings.store(next, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_line_gets_more_time_until_it_is_fast_again() {
        let pace = Pace::default();
        let object = 32 << 20;
        assert_eq!(pace.limit(object), Duration::from_secs(52));
        assert_eq!(pace.limit(0), BASE);
        pace.learn(0, None);
        assert_eq!(pace.limit(object), Duration::from_secs(52), "the line was not slow");
        for _ in 0..20 {
            pace.learn(object, None);
        }
        assert_eq!(pace.limit(object), BASE + Duration::from_secs(2048));
        pace.learn(object, Some(Duration::from_secs(1500)));
        assert_eq!(pace.limit(object), BASE + Duration::from_secs(2048), "it needed most of it");
        for _ in 0..20 {
            pace.learn(object, Some(Duration::from_secs(1)));
        }
        assert_eq!(pace.limit(object), Duration::from_secs(52));
    }
}
