//! Calls of a random order, repeated and interrupted.

use std::env;
use std::io::Write as _;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::co::Rng;

/// How many there are, or as many as fit in this time, unless `SHEAVE_CALLS` says.
const COUNT: u64 = 1000;
const TIMEOUT: Duration = Duration::from_secs(60);
/// The fewest that show anything.
const COUNT_MIN: u64 = 20;

/// As many calls as a test makes. The same seed chooses the same ones, `SHEAVE_SEED` or a new one,
/// which standard error has.
#[derive(Debug)]
pub struct Calls {
    rng: Rng,
    begun: Instant,
    count: u64,
    timeout: Option<Duration>,
    /// How many were begun.
    pub made: u64,
    /// How many were killed.
    pub killed: u64,
}

impl Default for Calls {
    fn default() -> Self {
        Self::new()
    }
}

impl Calls {
    /// No calls yet.
    ///
    /// # Panics
    /// When `SHEAVE_CALLS` or `SHEAVE_SEED` is no number.
    #[must_use]
    pub fn new() -> Self {
        let number = |name| env::var(name).ok().map(|text| text.parse().expect("a number"));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos();
        let seed = number("SHEAVE_SEED").unwrap_or(now as u64);
        let _ = writeln!(std::io::stderr(), "SHEAVE_SEED={seed}");
        let (count, timeout) = match number("SHEAVE_CALLS") {
            Some(count) => (count, None),
            None => (COUNT, Some(TIMEOUT)),
        };
        Self { rng: Rng::new(seed), begun: Instant::now(), count, timeout, made: 0, killed: 0 }
    }

    /// Whether there is one more.
    pub fn more(&mut self) -> bool {
        let is_late = self.timeout.is_some_and(|timeout| self.begun.elapsed() >= timeout);
        let is_over = self.made >= self.count || is_late;
        let is_enough = self.made >= self.count.min(COUNT_MIN) && self.killed > 0;
        if is_over && is_enough {
            let (made, killed, after) = (self.made, self.killed, self.begun.elapsed());
            let _ = writeln!(std::io::stderr(), "{made} calls, {killed} killed, in {after:?}");
            return false;
        }
        assert!(self.made < 20 * self.count, "{} calls, and none was killed", self.made);
        self.made += 1;
        true
    }

    /// A number below `n`.
    pub fn choose(&mut self, n: u64) -> u64 {
        self.rng.below(n)
    }

    /// One of these.
    pub fn one_of<T: Copy, const N: usize>(&mut self, all: [T; N]) -> T {
        all[self.rng.below(N as u64) as usize]
    }

    /// So long, in one of `n` cases.
    pub fn sometimes(&mut self, n: u64, below: Duration) -> Option<Duration> {
        (self.rng.below(n) == 0).then(|| below.mul_f64(self.rng.below(1000) as f64 / 1000.0))
    }
}
