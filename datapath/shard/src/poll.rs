//! Whether to poll before sleeping.
//!
//! Waking a thread on another virtual CPU costs tens of microseconds each way, so a busy shard
//! polls for a short time before it sleeps. A slow or idle shard must not pay for that, so it polls
//! only while recent polls have found something.

use sheave_core::Nanos;

/// A poll that found something adds 1; one that did not takes `MISS_COST`.
const SCORE_MAX: i32 = 16;
const MISS_COST: i32 = 4;
/// While polling does not pay, a trial precedes one sleep in this many.
const TRIAL_EVERY: u32 = 32;
/// A trial is made only if the last pause was shorter than this many poll limits.
const TRIAL_GAP_LIMITS_MAX: Nanos = 4;

/// Decides by the results of recent polls.
pub(crate) struct AdaptivePoll {
    limit_ns: Nanos,
    score: i32,
    sleeps: u32,
    last_pause_ns: Nanos,
}

impl AdaptivePoll {
    /// Polls at most `limit_ns` before a sleep; never if that is 0.
    pub(crate) fn new(limit_ns: Nanos) -> Self {
        Self { limit_ns, score: 0, sleeps: 0, last_pause_ns: Nanos::MAX }
    }

    /// How long to poll now.
    pub(crate) fn budget(&mut self) -> Nanos {
        if self.limit_ns == 0 || self.score > 0 {
            return self.limit_ns;
        }
        self.sleeps = self.sleeps.wrapping_add(1);
        let brisk = self.last_pause_ns < self.limit_ns * TRIAL_GAP_LIMITS_MAX;
        if brisk && self.sleeps.is_multiple_of(TRIAL_EVERY) { self.limit_ns } else { 0 }
    }

    /// Notes how long a pause was, and whether a poll found the event that ended it.
    pub(crate) fn paused(&mut self, pause_ns: Nanos, budget_ns: Nanos, hit: bool) {
        self.last_pause_ns = pause_ns;
        if budget_ns == 0 {
            return;
        }
        let step = if hit { 1 } else { -MISS_COST };
        self.score = (self.score + step).clamp(0, SCORE_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT_NS: Nanos = 50_000;

    /// Runs pauses of one length and returns how many polls were made.
    fn polls(poll: &mut AdaptivePoll, pause_ns: Nanos, count: u32) -> u32 {
        (0..count)
            .filter(|_| {
                let budget_ns = poll.budget();
                poll.paused(pause_ns, budget_ns, pause_ns <= budget_ns);
                budget_ns > 0
            })
            .count() as u32
    }

    #[test]
    fn a_busy_connection_polls_and_a_slow_one_does_not() {
        let mut poll = AdaptivePoll::new(LIMIT_NS);
        polls(&mut poll, 10_000, 2 * TRIAL_EVERY);
        assert_eq!(polls(&mut poll, 10_000, 100), 100);
        assert!(polls(&mut poll, 1_000_000, 1000) <= SCORE_MAX as u32 / MISS_COST as u32);
    }

    #[test]
    fn zero_means_never() {
        assert_eq!(polls(&mut AdaptivePoll::new(0), 10, 1000), 0);
    }

    #[test]
    fn pauses_just_above_the_limit_cost_a_trial_now_and_then() {
        let mut poll = AdaptivePoll::new(LIMIT_NS);
        assert!(polls(&mut poll, LIMIT_NS + 1, 3200) <= 3200 / TRIAL_EVERY + 1);
    }
}
