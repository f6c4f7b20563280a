//! Limits bytes and ops per second over all connections of a volume.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sheave_core::{Backend, ByteRange, Layer, Nanos, Op, OpKind, Result, Volume};

use super::gate::{Decision, Gate, Policy};

/// The burst of an idle volume, as a time at its limit.
const BURST_NS: Nanos = 50_000_000;
/// How often waiting ops check for changed limits.
const RECHECK_NS: Nanos = 10_000_000;

/// Limits per second; 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Bytes read and written per second.
    pub bytes_per_second: u64,
    /// Ops of any kind per second.
    pub ops_per_second: u64,
}

/// Limits that can change while the volume is in use; the caller keeps a clone of the [`Arc`].
///
/// Ops that wait obey new limits within 10 ms: a higher one releases them earlier, a lower one
/// later, and without a limit they go at once. The layer of a volume without limits costs about 90
/// instructions for each op, with limits about 450.
#[derive(Debug, Default)]
pub struct Limits {
    bytes_per_second: AtomicU64,
    ops_per_second: AtomicU64,
}

impl Limits {
    /// These limits.
    #[must_use]
    pub fn new(limits: RateLimits) -> Self {
        let RateLimits { bytes_per_second, ops_per_second } = limits;
        Self {
            bytes_per_second: AtomicU64::new(bytes_per_second),
            ops_per_second: AtomicU64::new(ops_per_second),
        }
    }

    /// Changes them, also while the volume is open and busy.
    pub fn set(&self, limits: RateLimits) {
        self.bytes_per_second.store(limits.bytes_per_second, Relaxed);
        self.ops_per_second.store(limits.ops_per_second, Relaxed);
    }

    /// The limits now.
    #[must_use]
    pub fn get(&self) -> RateLimits {
        RateLimits {
            bytes_per_second: self.bytes_per_second.load(Relaxed),
            ops_per_second: self.ops_per_second.load(Relaxed),
        }
    }
}

/// A volume with limits for all its connections together.
///
/// Ops that come too early wait in order. After idling, a volume may do what its limit allows in 50
/// ms at once. An op larger than the limit of one second is not refused; later ops wait for it.
pub struct RateLimit {
    inner: Arc<dyn Volume>,
    meter: Arc<SharedMeter>,
}

impl RateLimit {
    /// Wraps a volume.
    pub fn new(inner: Arc<dyn Volume>, limits: Arc<Limits>) -> Self {
        // As after idling: a new volume may begin with a burst.
        let mut meter = Meter::default();
        meter.obey(limits.get(), 0);
        Self { inner, meter: Arc::new(SharedMeter { limits, meter: Mutex::new(meter) }) }
    }
}

impl Layer for RateLimit {
    fn inner(&self) -> &Arc<dyn Volume> {
        &self.inner
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        Ok(Box::new(Gate::new(self.inner.backend()?, Arc::clone(&self.meter))))
    }

    fn takes_registered(&self, kind: OpKind, range: ByteRange) -> bool {
        self.inner.takes_registered(kind, range)
    }
}

/// The meter of all backends of a volume.
struct SharedMeter {
    limits: Arc<Limits>,
    meter: Mutex<Meter>,
}

impl SharedMeter {
    fn lock(&self) -> MutexGuard<'_, Meter> {
        // Numbers, valid in any state.
        self.meter.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Policy for Arc<SharedMeter> {
    type Turn = Turn;

    const RECHECK_NS: Nanos = RECHECK_NS;

    fn is_open(&self) -> bool {
        self.limits.get() == RateLimits::default()
    }

    fn decide(&mut self, op: Op, now: Nanos) -> (Turn, Decision) {
        let limits = self.limits.get();
        if limits == RateLimits::default() {
            return (Turn::default(), Decision::Submit(op));
        }
        let bytes = match &op {
            Op::Read { range, .. } | Op::Write { range, .. } => range.len(),
            _ => 0,
        };
        let mut meter = self.lock();
        meter.obey(limits, now);
        (meter.reserve(now, bytes), Decision::Submit(op))
    }

    fn due(&self, turn: &Turn) -> Nanos {
        if *turn == Turn::default() { 0 } else { self.lock().due(turn) }
    }

    fn note_time(&mut self, now: Nanos) {
        let limits = self.limits.get();
        self.lock().obey(limits, now);
    }
}

/// Assigns turns: each op may go when all earlier ones are paid for.
#[derive(Default)]
struct Meter {
    bytes: Bucket,
    ops: Bucket,
}

/// The amounts that have to be paid for before an op may go. Later ops have greater ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    bytes: NanoUnits,
    ops: NanoUnits,
}

/// Billionths of a byte or an op: a rate of 1/s pays for one in a nanosecond.
type NanoUnits = u128;

/// A budget that grows with time. Ops wait for an amount and not for a time, so that a new rate
/// holds for waiting ops, too.
#[derive(Default)]
struct Bucket {
    /// Units per second since `since`; 0 is no limit.
    rate: u64,
    since: Nanos,
    /// The amount that was paid for at `since`.
    paid: NanoUnits,
    /// The amount that has been admitted, or will be.
    promised: NanoUnits,
}

impl Meter {
    fn obey(&mut self, limits: RateLimits, now: Nanos) {
        self.bytes.set_rate(limits.bytes_per_second, now);
        self.ops.set_rate(limits.ops_per_second, now);
    }

    fn reserve(&mut self, now: Nanos, bytes: u64) -> Turn {
        Turn { bytes: self.bytes.reserve(now, bytes), ops: self.ops.reserve(now, 1) }
    }

    fn due(&self, turn: &Turn) -> Nanos {
        self.bytes.due(turn.bytes).max(self.ops.due(turn.ops))
    }
}

impl Bucket {
    fn set_rate(&mut self, rate: u64, now: Nanos) {
        if rate == self.rate {
            return;
        }
        // Without a limit nothing was owed.
        self.paid = if self.rate == 0 { self.promised } else { self.paid_at(now) };
        self.since = now;
        self.rate = rate;
    }

    fn paid_at(&self, now: Nanos) -> NanoUnits {
        let elapsed_ns = now.saturating_sub(self.since);
        self.paid + NanoUnits::from(self.rate) * NanoUnits::from(elapsed_ns)
    }

    fn reserve(&mut self, now: Nanos, amount: u64) -> NanoUnits {
        if self.rate == 0 {
            return 0;
        }
        let burst = NanoUnits::from(self.rate) * NanoUnits::from(BURST_NS);
        let start = self.promised.max(self.paid_at(now).saturating_sub(burst));
        let cost = NanoUnits::from(amount) * 1_000_000_000;
        self.promised = start.saturating_add(cost);
        start
    }

    fn due(&self, turn: NanoUnits) -> Nanos {
        let owed = turn.saturating_sub(self.paid);
        if self.rate == 0 || owed == 0 {
            return 0;
        }
        let wait_ns = owed.div_ceil(NanoUnits::from(self.rate));
        self.since.saturating_add(Nanos::try_from(wait_ns).unwrap_or(Nanos::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Nanos = 1_000_000_000;

    fn bucket(rate: u64) -> Bucket {
        Bucket { rate, ..Bucket::default() }
    }

    fn release(bucket: &mut Bucket, now: Nanos, amount: u64) -> Nanos {
        let turn = bucket.reserve(now, amount);
        bucket.due(turn)
    }

    #[test]
    fn a_bucket_lets_a_burst_through_and_then_its_rate() {
        let mut bucket = bucket(1000);
        let now = 10 * SECOND;
        let releases: Vec<_> = (0..60).map(|_| release(&mut bucket, now, 1)).collect();
        // A thousandth of a second each, and 50 ms worth of them at once.
        assert_eq!(releases.iter().filter(|release| **release <= now).count(), 51);
        assert_eq!(releases[59], now + 9_000_000);
        assert_eq!(release(&mut bucket, now + SECOND, 1), now + 950_000_000);
    }

    #[test]
    fn an_op_beyond_any_rate_does_not_overflow() {
        let mut bucket = bucket(1);
        assert_eq!(release(&mut bucket, 1, u64::MAX), 0);
        assert_eq!(release(&mut bucket, 2, 1), Nanos::MAX);
    }

    #[test]
    fn a_new_rate_holds_for_what_waits() {
        let mut bucket = bucket(10);
        let now = 100 * SECOND;
        release(&mut bucket, now, 100);
        let turn = bucket.reserve(now, 1);
        assert_eq!(bucket.due(turn), now + 10 * SECOND - BURST_NS);
        // After one second 90.5 units are owed less the burst of half a unit.
        bucket.set_rate(90, now + SECOND);
        let raised = bucket.due(turn);
        assert!((now + 2 * SECOND - BURST_NS..=now + 2 * SECOND).contains(&raised), "{raised}");
        bucket.set_rate(1, now + SECOND);
        assert!(bucket.due(turn) > now + 90 * SECOND);
        bucket.set_rate(0, now + SECOND);
        assert_eq!(bucket.due(turn), 0, "without a limit it goes at once");
    }

    #[test]
    fn a_limit_after_none_begins_without_debt_or_credit() {
        let mut bucket = bucket(10);
        let now = 100 * SECOND;
        let turns: Vec<_> = (0..50).map(|_| bucket.reserve(now, 1)).collect();
        bucket.set_rate(0, now);
        bucket.set_rate(10, now + 60 * SECOND);
        let later = now + 60 * SECOND;
        assert!(turns.iter().all(|turn| bucket.due(*turn) <= later), "they were free to go");
        let releases: Vec<_> = (0..3).map(|_| release(&mut bucket, later, 1)).collect();
        assert_eq!(releases, [0, later + SECOND / 10, later + SECOND / 5]);
    }
}
