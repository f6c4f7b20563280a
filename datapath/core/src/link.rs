//! The state of a volume's connection to the server that has its data.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

/// Whether the server can be reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum LinkState {
    /// Connected.
    #[default]
    Up,
    /// Connected again, and repeating writes that the server may have lost.
    Replaying,
    /// Not connected; ops wait.
    Down,
    /// Given up for good; ops fail.
    Failed,
}

impl LinkState {
    /// All states, in the order of their discriminants.
    pub const ALL: [Self; 4] = [Self::Up, Self::Replaying, Self::Down, Self::Failed];

    /// The name used in statistics and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Replaying => "replaying",
            Self::Down => "down",
            Self::Failed => "failed",
        }
    }
}

/// Gauges that the volume writes and that may be read at any time.
#[derive(Debug, Default)]
pub struct Link {
    state: AtomicU8,
    reconnects: AtomicU64,
    waiting_bytes: AtomicU64,
    kept_bytes: AtomicU64,
}

/// The values of a [`Link`] at some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkGauges {
    /// Whether the server can be reached.
    pub state: LinkState,
    /// How often connections were re-established.
    pub reconnects: u64,
    /// Bytes of the ranges of ops that the server has not answered.
    pub waiting_bytes: u64,
    /// Memory of completed writes that no flush covers yet.
    pub kept_bytes: u64,
}

impl Link {
    /// Sets all gauges.
    pub fn set(&self, gauges: LinkGauges) {
        self.state.store(gauges.state as u8, Relaxed);
        self.reconnects.store(gauges.reconnects, Relaxed);
        self.waiting_bytes.store(gauges.waiting_bytes, Relaxed);
        self.kept_bytes.store(gauges.kept_bytes, Relaxed);
    }

    /// The current values. They may be of different times.
    #[must_use]
    pub fn get(&self) -> LinkGauges {
        let state = usize::from(self.state.load(Relaxed));
        LinkGauges {
            state: LinkState::ALL.get(state).copied().unwrap_or_default(),
            reconnects: self.reconnects.load(Relaxed),
            waiting_bytes: self.waiting_bytes.load(Relaxed),
            kept_bytes: self.kept_bytes.load(Relaxed),
        }
    }
}
