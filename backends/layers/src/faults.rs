//! Makes ops fail or wait by rule, for tests and rehearsals of failure.

use std::sync::{Arc, Mutex, PoisonError};

use sheave_core::{Backend, Error, Layer, Nanos, Op, OpKind, Result, Volume};

use super::FaultRule;
use super::gate::{Decision, Gate, Policy};

/// A volume with faults by [`FaultRule`]s.
///
/// All rules are applied to every op, in order: delays add up, and the first error fails the op.
/// Counters and random numbers are the volume's, shared by all its connections; the same seed and
/// the same order of ops give the same faults.
pub struct Faults {
    inner: Arc<dyn Volume>,
    plan: Arc<FaultPlan>,
}

impl Faults {
    /// Wraps a volume.
    pub fn new(inner: Arc<dyn Volume>, rules: Vec<FaultRule>, seed: u64) -> Self {
        let tallies = vec![Tally::default(); rules.len()];
        let state = Mutex::new(State { tallies, random: SplitMix64(seed) });
        Self { inner, plan: Arc::new(FaultPlan { rules, state }) }
    }
}

impl Layer for Faults {
    fn inner(&self) -> &Arc<dyn Volume> {
        &self.inner
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        Ok(Box::new(Gate::new(self.inner.backend()?, Arc::clone(&self.plan))))
    }
}

impl Policy for Arc<FaultPlan> {
    /// A time.
    type Turn = Nanos;

    fn decide(&mut self, op: Op, now: Nanos) -> (Nanos, Decision) {
        let (delay_ns, error) = self.strike(&op);
        (now.saturating_add(delay_ns), error.map_or(Decision::Submit(op), Decision::Fail))
    }

    fn due(&self, turn: &Nanos) -> Nanos {
        *turn
    }

    fn may_fail_writes(&self) -> bool {
        // The data of a delayed or failed write must not be in the volume before.
        self.rules.iter().any(|rule| rule.covers(OpKind::Write))
    }
}

struct FaultPlan {
    rules: Vec<FaultRule>,
    state: Mutex<State>,
}

struct State {
    /// One per rule.
    tallies: Vec<Tally>,
    random: SplitMix64,
}

#[derive(Clone, Default)]
struct Tally {
    matched: u64,
    struck: u64,
}

impl FaultPlan {
    /// The fault of an op: its delay, and the error with which it then fails.
    fn strike(&self, op: &Op) -> (Nanos, Option<Error>) {
        // Counters, valid in any state.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { tallies, random } = &mut *state;
        let mut delay_ns: Nanos = 0;
        for (rule, tally) in self.rules.iter().zip(tallies) {
            if !rule.matches(op) {
                continue;
            }
            tally.matched += 1;
            let spared = tally.matched <= rule.after || tally.struck >= rule.count;
            if spared || (rule.probability < 1.0 && random.unit() >= rule.probability) {
                continue;
            }
            tally.struck += 1;
            delay_ns = rule.delay_ns.saturating_add(delay_ns);
            if let Some(kind) = rule.error {
                let why = format!("failed on purpose by fault={}", rule.text);
                return (delay_ns, Some(Error::new(kind, op.kind().name(), why)));
            }
        }
        (delay_ns, None)
    }
}

/// Sebastiano Vigna's SplitMix64, from its published constants.
struct SplitMix64(u64);

impl SplitMix64 {
    /// The next number from 0 up to, not including, 1.
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        // 53 bits are what an f64 holds exactly.
        (bits >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(rules: &[&str], seed: u64) -> FaultPlan {
        let rules: Vec<FaultRule> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        let tallies = vec![Tally::default(); rules.len()];
        FaultPlan { rules, state: Mutex::new(State { tallies, random: SplitMix64(seed) }) }
    }

    #[test]
    fn after_and_count_bound_a_rule() {
        let plan = plan(&["flush:error=EIO:after=2:count=3"], 1);
        let struck: Vec<bool> = (0..8).map(|_| plan.strike(&Op::Flush).1.is_some()).collect();
        assert_eq!(struck, [false, false, true, true, true, false, false, false]);
    }

    #[test]
    fn delays_add_up_until_an_error() {
        let plan = plan(&["any:delay=1ms", "flush:delay=2ms:error=EIO", "any:delay=9ms"], 1);
        let (delay_ns, error) = plan.strike(&Op::Flush);
        assert_eq!(delay_ns, 3_000_000);
        let message = error.unwrap().to_string();
        assert!(message.contains("fault=flush:delay=2ms:error=EIO"), "{message}");
    }

    #[test]
    fn one_seed_one_run_and_probability_holds() {
        let run = |seed| -> Vec<bool> {
            let plan = plan(&["flush:error=EIO:probability=0.25"], seed);
            (0..10_000).map(|_| plan.strike(&Op::Flush).1.is_some()).collect()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
        let share = run(7).iter().filter(|struck| **struck).count();
        assert!((2300..2700).contains(&share), "{share} of 10000");
    }
}
