//! Cleans up after a copy that a signal ends.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::{fs, process, thread};

use anyhow::Context as _;
use indicatif::ProgressBar;
use sheave_bench::signals;
use sheave_core::printable;
use signal_hook::iterator::Signals;

use crate::log;

/// The state that a copy would leave behind now.
#[derive(Debug, Default)]
pub(super) enum Leftover {
    /// Nothing was changed.
    #[default]
    Nothing,
    /// A file to be removed.
    Partial(PathBuf),
    /// A partly overwritten target, by its name.
    Existing(String),
    /// The whole copy.
    Done,
}

/// State shared by signals and copy.
#[derive(Clone, Debug, Default)]
pub(super) struct Interruption(Arc<Mutex<Leftover>>);

impl Interruption {
    /// Catches the signals from here on.
    pub(super) fn watch(progress: ProgressBar) -> anyhow::Result<Self> {
        let interruption = Self::default();
        signals::ignore_meaningless().context("catch signals")?;
        let mut signals = Signals::new(signals::ending()).context("catch signals")?;
        let watched = interruption.clone();
        thread::spawn(move || {
            if signals.forever().next().is_some() {
                watched.leaves(|leftover| end(leftover, &progress));
            }
        });
        Ok(interruption)
    }

    /// Runs `change` on the state; a signal waits until that is done.
    pub(super) fn leaves<T>(&self, change: impl FnOnce(&mut Leftover) -> T) -> T {
        // Valid in any state.
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Cleans up and ends the process. The caller holds the lock, so `leftover` is true.
fn end(leftover: &Leftover, progress: &ProgressBar) -> ! {
    let told = match leftover {
        Leftover::Nothing => "nothing was left behind".to_owned(),
        Leftover::Partial(path) => match fs::remove_file(path) {
            Ok(()) => "nothing was left behind".to_owned(),
            Err(error) => format!("{} cannot be removed: {error}", printable(&path)),
        },
        Leftover::Existing(name) => format!("{name} is incomplete"),
        Leftover::Done => "the copy is whole".to_owned(),
    };
    // Last, since a terminal may have been stopped.
    progress.abandon();
    log::last_line(&format!("sheave: copy: interrupted; {told}"));
    process::exit(1)
}
