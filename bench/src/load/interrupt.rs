//! Ctrl-C, which ends a load early.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Whether the user wants a load to end now. The default is that nobody asks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Catches SIGINT and SIGTERM from here on. The second one ends the process at once: a server
    /// that does not answer must not keep us.
    ///
    /// # Errors
    /// When they cannot be caught.
    pub(crate) fn catch(&self) -> Result<()> {
        for signal in [SIGINT, SIGTERM] {
            // In this order, or the first signal would already end us.
            flag::register_conditional_shutdown(signal, 1, Arc::clone(&self.0))
                .and_then(|_| flag::register(signal, Arc::clone(&self.0)))
                .context("catch signals")?;
        }
        Ok(())
    }

    /// A signal has come.
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Relaxed)
    }
}
