//! Limits bytes and ops per second over all connections of a volume.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};

use sheave_core::{Backend, Nanos, Op, Result, Volume, VolumeInfo};

use super::gate::{End, Gate, Keeper};

/// What an idle volume may do at once, as a time at its limit.
const BURST_NS: Nanos = 50_000_000;

/// Limits; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RateLimits {
    /// Bytes read and written per second.
    pub(crate) bytes_per_second: Option<NonZeroU64>,
    /// Ops of any kind per second.
    pub(crate) ops_per_second: Option<NonZeroU64>,
}

/// A volume that no connection, nor all together, can use faster than its limits.
///
/// Ops that come too early wait in order. An op larger than what one second allows is not refused;
/// those after it pay for it by waiting.
pub(crate) struct RateLimit {
    inner: Arc<dyn Volume>,
    meter: Arc<Mutex<Meter>>,
}

impl RateLimit {
    /// Wraps a volume.
    pub(crate) fn new(inner: Arc<dyn Volume>, limits: RateLimits) -> Self {
        let bucket = |rate: Option<_>| rate.map(|per_second| Bucket { per_second, busy_until: 0 });
        let meter =
            Meter { bytes: bucket(limits.bytes_per_second), ops: bucket(limits.ops_per_second) };
        Self { inner, meter: Arc::new(Mutex::new(meter)) }
    }
}

impl Volume for RateLimit {
    fn info(&self) -> &VolumeInfo {
        self.inner.info()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn grow(&self) -> Result<u64> {
        self.inner.grow()
    }

    fn has_lost(&self) -> bool {
        self.inner.has_lost()
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        Ok(Box::new(Gate::new(self.inner.backend()?, Arc::clone(&self.meter))))
    }
}

impl Keeper for Arc<Mutex<Meter>> {
    fn decide(&mut self, op: Op, now: Nanos) -> (Nanos, End) {
        let bytes = match &op {
            Op::Read { range, .. } | Op::Write { range, .. } => range.len(),
            _ => 0,
        };
        // Two numbers, valid in any state.
        let mut meter = self.lock().unwrap_or_else(PoisonError::into_inner);
        (meter.reserve(now, bytes), End::Submit(op))
    }
}

/// Hands out times: each op gets the time at which all before it are paid for.
struct Meter {
    bytes: Option<Bucket>,
    ops: Option<Bucket>,
}

struct Bucket {
    per_second: NonZeroU64,
    /// When everything that was let through is paid for.
    busy_until: Nanos,
}

impl Meter {
    fn reserve(&mut self, now: Nanos, bytes: u64) -> Nanos {
        let reserve = |bucket: &mut Option<Bucket>, amount| {
            bucket.as_mut().map_or(0, |bucket| bucket.reserve(now, amount))
        };
        let (bytes, ops) = (reserve(&mut self.bytes, bytes), reserve(&mut self.ops, 1));
        bytes.max(ops)
    }
}

impl Bucket {
    fn reserve(&mut self, now: Nanos, amount: u64) -> Nanos {
        let start = self.busy_until.max(now.saturating_sub(BURST_NS));
        let cost_ns = u128::from(amount) * 1_000_000_000 / u128::from(self.per_second.get());
        self.busy_until = start.saturating_add(u64::try_from(cost_ns).unwrap_or(Nanos::MAX));
        start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_lets_a_burst_through_and_then_its_rate() {
        let mut bucket = Bucket { per_second: NonZeroU64::new(1000).unwrap(), busy_until: 0 };
        let now = 10_000_000_000;
        let releases: Vec<_> = (0..60).map(|_| bucket.reserve(now, 1)).collect();
        // A thousandth of a second each, and 50 ms worth of them at once.
        assert_eq!(releases.iter().filter(|release| **release <= now).count(), 51);
        assert_eq!(releases[59], now + 9_000_000);
        assert_eq!(bucket.reserve(now + 1_000_000_000, 1), now + 950_000_000);
    }

    #[test]
    fn an_op_beyond_any_rate_does_not_overflow() {
        let mut bucket = Bucket { per_second: NonZeroU64::MIN, busy_until: 0 };
        assert_eq!(bucket.reserve(1, u64::MAX), 0);
        assert_eq!(bucket.reserve(2, 1), Nanos::MAX);
    }
}
