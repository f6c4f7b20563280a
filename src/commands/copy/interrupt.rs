//! What SIGINT, SIGTERM and a lost terminal do to a copy.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::{fs, process, thread};

use anyhow::Context as _;
use indicatif::ProgressBar;
use sheave_core::printable;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

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
        let mut caught = vec![SIGINT, SIGTERM];
        // What nohup starts is to outlive its terminal.
        if !is_ignored(SIGHUP) {
            caught.push(SIGHUP);
        }
        let mut signals = Signals::new(caught).context("catch signals")?;
        let watched = interruption.clone();
        thread::spawn(move || {
            if signals.forever().next().is_some() {
                progress.abandon();
                watched.leaves(|leftover| end(leftover));
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

/// Ends the process; whoever holds the lock before has made `leftover` true.
fn end(leftover: &Leftover) -> ! {
    let told = match leftover {
        Leftover::Nothing => "nothing was left behind".to_owned(),
        Leftover::Partial(path) => match fs::remove_file(path) {
            Ok(()) => "nothing was left behind".to_owned(),
            Err(error) => format!("{} cannot be removed: {error}", printable(&path)),
        },
        Leftover::Existing(name) => format!("{name} is incomplete"),
        Leftover::Done => "the copy is whole".to_owned(),
    };
    eprintln!("sheave: copy: interrupted; {told}");
    process::exit(1)
}

/// Whether whoever started this process made it ignore the signal.
fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
