//! Time, as the engine sees it. No rule of safety needs it: it spaces retries only.

use std::future::Future;
use std::pin::Pin;

/// A clock that a simulation can replace.
pub trait Clock: Send + Sync {
    /// Milliseconds since some fixed moment; never goes back.
    fn now_ms(&self) -> u64;

    /// Ends after this time.
    fn sleep(&self, ms: u64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}
