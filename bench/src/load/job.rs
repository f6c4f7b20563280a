//! What all connections of a load share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::Instant;

use super::ledger::Ledger;
use super::pattern::{self, Fault, Generation};
use super::picker::Order;

/// What to do to a server.
#[derive(Clone, Debug)]
pub(crate) struct Workload {
    /// How many of 100 requests are reads; the others are writes.
    pub(crate) read_percent: u8,
    /// Which blocks.
    pub(crate) order: Order,
    /// Bytes per request.
    pub(crate) block_size: usize,
    /// Requests in flight per connection.
    pub(crate) queue_depth: usize,
    /// Requests per second and connection; without it as many as there is room for.
    pub(crate) rate_per_connection: Option<f64>,
    /// A flush follows that many writes of a connection.
    pub(crate) flush_every: Option<u64>,
}

/// Where a load is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Phase {
    /// It runs, nothing counts.
    Warmup,
    /// It runs and counts.
    Measure,
    /// Nothing more is issued.
    Stop,
}

/// A load: constants, the phase, and what the volume must hold.
#[derive(Debug)]
pub(crate) struct Job {
    /// What to do.
    pub(crate) workload: Workload,
    /// What writes write, unless the load verifies.
    pub(crate) payload: Vec<u8>,
    /// Makes a load verify.
    pub(crate) ledger: Option<Arc<Ledger>>,
    seed: u64,
    phase: AtomicU8,
    epoch: Instant,
}

impl Job {
    /// A load that has not begun.
    pub(crate) fn new(workload: Workload, ledger: Option<Arc<Ledger>>, seed: u64) -> Self {
        let mut state = seed;
        let mut payload = vec![0; workload.block_size];
        for chunk in payload.chunks_mut(8) {
            let random = pattern::next_random(&mut state).to_le_bytes();
            chunk.copy_from_slice(&random[..chunk.len()]);
        }
        let phase = AtomicU8::new(Phase::Warmup as u8);
        Self { workload, payload, ledger, seed, phase, epoch: Instant::now() }
    }

    /// Where it is.
    pub(crate) fn phase(&self) -> Phase {
        match self.phase.load(Relaxed) {
            0 => Phase::Warmup,
            1 => Phase::Measure,
            _ => Phase::Stop,
        }
    }

    /// Goes on to the next phase.
    pub(crate) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Relaxed);
    }

    /// Nanoseconds since the load was made.
    pub(crate) fn now_ns(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// A block's address in the volume.
    pub(crate) fn offset_of(&self, block: u64) -> u64 {
        block * self.workload.block_size as u64
    }

    /// Claims a block for a write. Loads that do not verify have nothing to claim.
    pub(crate) fn claim(&self, block: u64) -> Option<Generation> {
        self.ledger.as_ref().map_or(Some(0), |ledger| ledger.claim(index(block)))
    }

    /// The oldest generation that a read of the block may see from now on.
    pub(crate) fn oldest(&self, block: u64) -> Generation {
        self.ledger.as_ref().map_or(0, |ledger| ledger.oldest(index(block)))
    }

    /// A write has ended well.
    pub(crate) fn acknowledge(&self, block: u64, generation: Generation) {
        if let Some(ledger) = &self.ledger {
            ledger.acknowledge(index(block), generation);
        }
    }

    /// Fills the payload of a verifying write.
    pub(crate) fn fill(&self, data: &mut [u8], block: u64, generation: Generation) {
        if self.ledger.is_some() {
            pattern::fill(data, self.offset_of(block), generation, self.seed);
        }
    }

    /// Checks what a verifying read got; `None` if there is nothing to check.
    pub(crate) fn check(
        &self,
        data: &[u8],
        block: u64,
        oldest: Generation,
    ) -> Option<Result<(), Fault>> {
        let ledger = self.ledger.as_ref()?;
        let allowed = ledger.allowed(index(block), oldest);
        Some(pattern::check(data, self.offset_of(block), allowed, self.seed))
    }
}

fn index(block: u64) -> usize {
    usize::try_from(block).expect("the blocks of a ledger fit into memory")
}
