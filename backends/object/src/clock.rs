//! Time, as the engine sees it. No rule of safety needs it: it only spaces retries.

use std::future::Future;
use std::pin::Pin;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

/// A clock that a simulation can replace.
pub trait Clock: Send + Sync {
    /// Milliseconds since some fixed moment; never goes back.
    fn now_ms(&self) -> u64;

    /// Ends after this time.
    fn sleep(&self, ms: u64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// The clock of the system. It needs no runtime: a sleep, which only a failed request begins, takes
/// a thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_ms(&self) -> u64 {
        static BEGIN: OnceLock<Instant> = OnceLock::new();
        BEGIN.get_or_init(Instant::now).elapsed().as_millis() as u64
    }

    fn sleep(&self, ms: u64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(crate::threads::run_wait(move || thread::sleep(Duration::from_millis(ms))))
    }
}
