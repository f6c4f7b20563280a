//! How connections end.

use std::time::Duration;

/// How long connections may finish requests in flight when the engine stops.
pub const STOP_GRACE: Duration = Duration::from_secs(5);

/// How to end connections while the engine runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Requests in flight are answered; no more are taken.
    InOrder,
    /// Requests in flight are cut off.
    AtOnce,
}
