//! How connections end.

use std::time::Duration;

/// How long connections may finish what they have begun when the engine stops.
pub const STOP_GRACE: Duration = Duration::from_secs(5);

/// How connections end that others outlive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Requests in flight are answered; no more are taken.
    InOrder,
    /// Whatever is in flight.
    AtOnce,
}
