//! A runtime for calls of a test.

use std::thread;

use tokio::runtime::{Builder, Handle};

/// Starts a runtime in a thread of its own, as a plugin has it, until the test's process ends.
///
/// # Panics
/// When it cannot be started.
#[must_use]
pub fn start_runtime() -> Handle {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let handle = runtime.handle().clone();
    thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
    handle
}
