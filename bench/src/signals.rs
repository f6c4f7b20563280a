//! What signals mean to commands that run long: the one list of them.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGXFSZ};
use signal_hook::{flag, low_level};

/// Signals that end any command in order.
const END: [i32; 3] = [SIGINT, SIGTERM, SIGQUIT];
/// The terminal is gone, or a service is to read its configuration again.
pub const HANG_UP: i32 = SIGHUP;
/// Signals without a meaning. Ignored they end nothing, as they do by default.
pub const MEANINGLESS: [i32; 2] = [SIGUSR1, SIGUSR2];

/// Signals that end a command in order. [`HANG_UP`] is the last of them; it is missing if this
/// process was started to ignore it: what nohup(1) starts outlives its terminal.
#[must_use]
pub fn ending() -> Vec<i32> {
    let hang_up = (!is_ignored(HANG_UP)).then_some(HANG_UP);
    END.into_iter().chain(hang_up).collect()
}

/// The name of a signal, such as SIGTERM.
#[must_use]
pub fn name(signal: i32) -> &'static str {
    low_level::signal_name(signal).unwrap_or("an unknown signal")
}

/// Ignores [`MEANINGLESS`] signals from here on, in this process but not in its children.
///
/// # Errors
/// When they cannot be caught.
pub fn ignore_meaningless() -> io::Result<()> {
    MEANINGLESS.into_iter().try_for_each(ignore)
}

/// Makes a write beyond the limit of a file's size (RLIMIT_FSIZE) fail with EFBIG, from here on, in
/// place of ending the process. That file may be a volume, whose clients say where to write, or the
/// log.
///
/// # Errors
/// When the signal cannot be caught.
pub fn ignore_file_limit() -> io::Result<()> {
    ignore(SIGXFSZ)
}

/// Ignores a signal by a flag that is never read: a handler ends at execve(2), unlike SIG_IGN.
fn ignore(signal: i32) -> io::Result<()> {
    flag::register(signal, Arc::default()).map(drop)
}

/// Whether a signal has asked for the end. Before [`Interrupt::catch`] none is noticed.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Notices the signals that [end](ending) a command from here on; ignores meaningless ones.
    /// The second signal ends the process at once with status 1: a server or terminal that does
    /// not answer must not keep it. A second SIGHUP does not, since a closed terminal may send two.
    ///
    /// # Errors
    /// When signals cannot be caught.
    pub fn catch(&self) -> Result<()> {
        self.register().and_then(|()| ignore_meaningless()).context("catch signals")
    }

    fn register(&self) -> io::Result<()> {
        for signal in ending() {
            if signal != HANG_UP {
                // Before the flag is registered, or the first signal would already end the process.
                flag::register_conditional_shutdown(signal, 1, Arc::clone(&self.0))?;
            }
            flag::register(signal, Arc::clone(&self.0))?;
        }
        Ok(())
    }

    /// A signal has come.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Relaxed)
    }
}

/// Whether this process was started to ignore the signal (proc_pid_status(5)).
fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
