//! What a signal that ends a command does to a copy.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::{fs, process, thread};

use anyhow::Context as _;
use indicatif::ProgressBar;
use sheave_bench::signals;
use sheave_core::printable;
use signal_hook::iterator::Signals;

use crate::log;

/// What stays of a copy that ends now.
#[derive(Debug, Default)]
pub(super) enum Leftover {
    /// It has not touched anything.
    #[default]
    Nothing,
    /// A file that must go.
    Partial(PathBuf),
    /// What existed before, partly overwritten; its name.
    Existing(String),
    /// The whole copy.
    Done,
}

/// What the signals and the copy both know.
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

    /// Changes what stays, or acts on it. A signal waits until that is done.
    pub(super) fn leaves<T>(&self, change: impl FnOnce(&mut Leftover) -> T) -> T {
        // A panic elsewhere does not make it wrong.
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
