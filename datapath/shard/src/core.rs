//! State that the connections, queues and volumes of a shard share.

use std::sync::Arc;

use sheave_core::Nanos;
use sheave_ring::Ring;

use crate::Clock;
use crate::doorbell::Doorbell;
use crate::inline::InlineWrites;
use crate::pool::Pool;

/// The ring, buffers and clock of one shard thread.
pub(crate) struct Core {
    pub(crate) ring: Ring,
    pub(crate) pool: Pool,
    pub(crate) inline: InlineWrites,
    pub(crate) clock: Clock,
    /// When this turn began.
    pub(crate) now: Nanos,
}

impl Core {
    /// For the shard that this bell wakes.
    pub(crate) fn new(ring: Ring, clock: Clock, bell: Arc<Doorbell>) -> Self {
        let (pool, inline, now) = (Pool::default(), InlineWrites::new(bell), clock.now());
        Self { ring, pool, inline, clock, now }
    }
}
