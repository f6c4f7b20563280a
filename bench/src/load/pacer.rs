//! When requests are due, at a given rate.

/// Spreads requests evenly over time.
#[derive(Debug)]
pub(crate) struct Pacer {
    interval_ns: u64,
    due_ns: u64,
}

impl Pacer {
    /// One for a rate that is more than 0.
    pub(crate) fn new(per_second: f64) -> Self {
        // A float becomes the nearest integer that exists; a rate of 0 was refused.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
        let interval_ns = (1e9 / per_second) as u64;
        Self { interval_ns: interval_ns.max(1), due_ns: 0 }
    }

    /// When the next request is due; 0 before the first.
    pub(crate) fn due_ns(&self) -> u64 {
        self.due_ns
    }

    /// The time at which a request was due, if one is. Latency counts from there, so that a
    /// server that stalls is charged for the requests that had to wait.
    pub(crate) fn take(&mut self, now_ns: u64) -> Option<u64> {
        if self.due_ns == 0 {
            self.due_ns = now_ns;
        }
        let due_ns = self.due_ns;
        (due_ns <= now_ns).then(|| {
            self.due_ns += self.interval_ns;
            due_ns
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pacer_charges_the_server_for_its_stalls() {
        let mut pacer = Pacer::new(1000.0);
        assert_eq!(pacer.take(5_000_000), Some(5_000_000));
        assert_eq!(pacer.take(5_500_000), None);
        assert_eq!(pacer.take(8_100_000), Some(6_000_000));
        assert_eq!(pacer.take(8_100_000), Some(7_000_000));
        assert_eq!(pacer.take(8_100_000), Some(8_000_000));
        assert_eq!(pacer.take(8_100_000), None);
    }
}
