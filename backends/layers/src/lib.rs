//! Layers: volumes around a volume, each with one task.
#![forbid(unsafe_code)]

mod block_size;
mod fault_rule;
mod faults;
mod gate;
mod jobs;
mod patch;
mod range_locks;
mod rate_limit;
mod read_only;

pub use block_size::BlockSize;
pub use fault_rule::FaultRule;
pub use faults::Faults;
pub use jobs::{Jobs, Plan};
pub use rate_limit::{Limits, RateLimit, RateLimits};
pub use read_only::ReadOnly;

use sheave_core::Nanos;

/// How long until an op is submitted again for which a backend below had no room.
const RETRY_NS: Nanos = 100_000;
