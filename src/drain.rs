//! The end of object volumes: their stores get what only the journal of this node has.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _};
use std::time::{Duration, Instant};

use sheave_bench::signals::Interrupt;
use sheave_core::printable;
use sheave_volumes::object_statuses;

use crate::log;
use crate::systemd::Notify;

/// How long the end waits where no option says it.
pub(crate) const TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);
/// How often the end looks for a signal, and for what is left.
pub(crate) const POLL: Duration = Duration::from_millis(100);
/// How often a line is written about what is left.
const LINE_PERIOD_ON_TERMINAL: Duration = Duration::from_secs(1);
const LINE_PERIOD_IN_LOG: Duration = Duration::from_secs(5);

/// The option of commands that end with object volumes.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct DrainArgs {
    /// Seconds that the end waits at most until the stores of object volumes have everything; what
    /// finds no time stays safe in the journal of this node [default: 30]
    #[arg(long = "drain-timeout", value_name = "SECONDS")]
    timeout_s: Option<u64>,
}

impl DrainArgs {
    pub(crate) fn timeout(self) -> Duration {
        self.timeout_s.map_or(TIMEOUT_DEFAULT, Duration::from_secs)
    }
}

/// Closes the object volumes of this process and waits for their stores, `within` at most or until
/// a signal comes. Those that are still in use are left open for a successor, if there is one.
pub(crate) fn close_object_volumes(within: Duration, has_successor: bool) {
    let mut left = match has_successor {
        true => sheave_object::finish_closing(Duration::ZERO),
        false => sheave_object::close_all(Duration::ZERO),
    };
    if left.is_empty() {
        return;
    }
    // The signal that has ended the command is dealt with; the next one ends the wait. Without a
    // handler it ends the process.
    let interrupt = Interrupt::default();
    let _ = interrupt.catch();
    let notify = Notify::from_env();
    notify.stopping("writing object volumes to their stores");
    let begun = Instant::now();
    let mut progress = Progress::new(begun);
    while !left.is_empty() && !interrupt.is_set() {
        let Some(rest) = within.checked_sub(begun.elapsed()).filter(|rest| !rest.is_zero()) else {
            break;
        };
        left = sheave_object::finish_closing(rest.min(POLL));
        notify.alive();
        if let Some(line) = progress.line(&left, Instant::now()) {
            log::last_line(&line);
        }
    }
    for (name, bytes) in &left {
        let statuses = object_statuses();
        let status = statuses.iter().find(|status| status.name == *name);
        let why = status.and_then(|status| status.waits_for.as_deref());
        let left = what_is_left(name, *bytes, why);
        log::last_line(&format!("{left}, which the next opening of the volume here takes up"));
    }
}

/// A line on a volume whose store lacks something.
pub(crate) fn what_is_left(name: &str, bytes: u64, waits_for: Option<&str>) -> String {
    let why = waits_for.map(|why| format!(" ({})", printable(why))).unwrap_or_default();
    let name = printable(name);
    format!(
        "sheave: {name}: {bytes} bytes are not in its store yet{why}; they are safe in the \
         journal of this node"
    )
}

/// Lines on what is left, now and then.
pub(crate) struct Progress {
    period: Duration,
    /// When the last line was written, and what each volume lacked then, in bytes.
    last: Instant,
    lacked: BTreeMap<String, u64>,
}

impl Progress {
    pub(crate) fn new(now: Instant) -> Self {
        let period = match io::stderr().is_terminal() {
            true => LINE_PERIOD_ON_TERMINAL,
            false => LINE_PERIOD_IN_LOG,
        };
        Self { period, last: now, lacked: BTreeMap::new() }
    }

    /// A line, if it is time for one.
    pub(crate) fn line(&mut self, left: &[(String, u64)], now: Instant) -> Option<String> {
        let passed = now.duration_since(self.last);
        let is_first = self.lacked.is_empty();
        if !is_first && passed < self.period {
            return None;
        }
        let lacked: BTreeMap<String, u64> = left.iter().cloned().collect();
        let before = std::mem::replace(&mut self.lacked, lacked);
        self.last = now;
        if is_first || left.is_empty() {
            return None;
        }
        let bytes: u64 = left.iter().map(|(_, bytes)| bytes).sum();
        let was: u64 = before.values().sum();
        let rate = (was.saturating_sub(bytes) as f64 / passed.as_secs_f64()) as u64;
        let what = match left {
            [(name, _)] => printable(name).to_string(),
            more => format!("{} object volumes", more.len()),
        };
        Some(format!("sheave: {what}: {bytes} bytes are not in the store yet, {rate} B/s"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_what_is_left_and_how_fast_it_goes() {
        let begun = Instant::now();
        let mut progress = Progress::new(begun);
        let period = progress.period;
        let left = |mib: u64| [("dir:///a".to_owned(), mib << 20)];
        assert_eq!(progress.line(&left(100), begun), None);
        assert_eq!(progress.line(&left(90), begun + period / 2), None);
        let line = progress.line(&left(80), begun + period).expect("a line");
        let rate = ((20_u64 << 20) as f64 / period.as_secs_f64()) as u64;
        let want = format!("83886080 bytes are not in the store yet, {rate} B/s");
        assert_eq!(line, format!("sheave: dir:///a: {want}"));
        assert_eq!(progress.line(&[], begun + 2 * period), None, "all is there");
    }
}
