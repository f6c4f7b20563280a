//! The thread that makes lost connections again. It exists only while they are missing.

use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crate::connect::connect_all;
use crate::volume::Shared;

/// The pause after the first failure; it doubles with each.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const STACK_LEN: usize = 512 << 10;

/// Starts a thread that connects for this epoch, after so many failures in a row.
///
/// # Errors
/// When there is no thread to be had.
pub(crate) fn start(shared: &Arc<Shared>, epoch: u64, failures: u32) -> std::io::Result<()> {
    let shared = Arc::downgrade(shared);
    thread::Builder::new()
        .name("reconnect".to_owned())
        .stack_size(STACK_LEN)
        .spawn(move || run(&shared, epoch, failures))
        .map(drop)
}

fn run(shared: &Weak<Shared>, epoch: u64, mut failures: u32) {
    let begun = Instant::now();
    let mut said = String::new();
    loop {
        let Some(options) = options(shared, epoch) else { return };
        thread::sleep(pause(failures).min(options.pause_max));
        match connect_all(&options) {
            Ok(connections) => {
                if let Some(shared) = shared.upgrade() {
                    let waited = begun.elapsed();
                    tracing::info!(server = %options.name, ?waited, "connected again");
                    shared.with(|state| state.arrived(epoch, connections));
                }
                return;
            }
            Err(error) => {
                let why = error.to_string();
                if why != said {
                    tracing::warn!("cannot connect again, trying on: {why}");
                    said = why;
                }
            }
        }
        failures = failures.saturating_add(1);
        if let Some(shared) = shared.upgrade() {
            shared.with(|state| state.expire(epoch));
        }
    }
}

/// How to connect, if that is still wanted.
fn options(shared: &Weak<Shared>, epoch: u64) -> Option<Arc<crate::RemoteOptions>> {
    let shared = shared.upgrade()?;
    shared.with(|state| state.wants(epoch)).then(|| Arc::clone(&shared.options))
}

fn pause(failures: u32) -> Duration {
    match failures {
        0 => Duration::ZERO,
        count => PAUSE_MIN.saturating_mul(1 << (count - 1).min(16)),
    }
}
