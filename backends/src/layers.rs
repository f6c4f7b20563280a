//! Layers: volumes around a volume, each with one job.

mod block_size;
mod fault_rule;
mod faults;
mod gate;
mod patch;
mod range_locks;
mod rate_limit;
mod read_only;

pub use block_size::BlockSize;
pub(crate) use fault_rule::FaultRule;
pub(crate) use faults::Faults;
pub(crate) use rate_limit::RateLimit;
pub use rate_limit::{Limits, RateLimits};
pub(crate) use read_only::{ReadOnly, refusal};
