//! What the commands that serve until they are told to stop have in common.

use std::io::{self, IsTerminal as _};

use anyhow::Context as _;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// More shards than this gain nothing for one node's volumes.
const SHARDS_MAX: usize = 4;

/// Threads for connections, unless somebody says how many.
pub(crate) fn default_shards() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(SHARDS_MAX)
}

/// The control thread's runtime.
///
/// # Errors
/// When the kernel gives no descriptors for it.
pub(crate) fn runtime() -> anyhow::Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("runtime")
}

/// The signals that end the process in good order, caught from here on.
pub(crate) struct EndSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl EndSignals {
    /// # Errors
    /// When they cannot be caught.
    pub(crate) fn catch() -> io::Result<Self> {
        let interrupt = signal(SignalKind::interrupt())?;
        Ok(Self { interrupt, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for one and names it.
    pub(crate) async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

/// The signal that asks for a successor.
///
/// # Errors
/// When it cannot be caught.
pub(crate) fn hang_up() -> io::Result<Signal> {
    signal(SignalKind::hangup())
}

/// Events go to standard error; `SHEAVE_LOG` says which.
pub(crate) fn start_log() {
    let wanted = std::env::var_os("SHEAVE_LOG").unwrap_or_default();
    let wanted = wanted.to_string_lossy();
    let filter = log_filter(&wanted);
    let is_usable = filter.is_some();
    tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|| EnvFilter::new("info")))
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
    if !is_usable {
        tracing::error!(
            "SHEAVE_LOG={wanted:?} is not used; write error, warn, info, debug or trace"
        );
    }
}

/// What `SHEAVE_LOG` asks for, if that is anything. A mere word that is no level would be taken for
/// the name of a part of the program, and silence all others.
fn log_filter(wanted: &str) -> Option<EnvFilter> {
    if wanted.is_empty() {
        return Some(EnvFilter::new("info"));
    }
    let is_level = |rule: &str| !rule.is_empty() && rule.parse::<LevelFilter>().is_ok();
    let is_rule = |rule: &str| rule.contains('=') || is_level(rule);
    wanted.split(',').all(is_rule).then(|| EnvFilter::try_new(wanted).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_level_that_is_none_is_not_taken() {
        for good in ["", "debug", "WARN", "off", "info,sheave_nbd=trace"] {
            assert!(log_filter(good).is_some(), "{good}");
        }
        for bad in ["verbose", "debug,", "sheave_nbd=loud", "info verbose"] {
            assert!(log_filter(bad).is_none(), "{bad}");
        }
    }
}
