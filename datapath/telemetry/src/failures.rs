//! Errors of a volume's storage: how many of each kind, and the last one.
//!
//! Only failed requests take this path, so a lock is fast enough.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sheave_core::{Error, ErrorKind, Nanos, OpKind};

/// The least time between two lines of the log about one op and kind.
const LOG_EVERY_NS: Nanos = 60_000_000_000;

/// Storage errors of one op and kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailureCount {
    /// The op.
    pub op: OpKind,
    /// The kind of error.
    pub kind: ErrorKind,
    /// The number of errors.
    pub count: u64,
}

/// The last storage error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastFailure {
    /// The op.
    pub op: OpKind,
    /// The kind of error.
    pub kind: ErrorKind,
    /// The error's text, with the system's own.
    pub text: String,
    /// When: seconds since 1970, UTC.
    pub unix_s: u64,
}

/// What to log about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Its text: it is the first of its op and kind.
    First,
    /// Its text, and how many there were since the last line, this one included.
    Again(u64),
    /// Nothing: there was a line within the last minute.
    Quiet,
}

/// The storage errors of one volume.
pub(crate) struct Failures {
    volume: Mutex<Arc<str>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// At most one for each op and kind.
    seen: Vec<Seen>,
    last: Option<LastFailure>,
}

struct Seen {
    total: FailureCount,
    /// Since the last line.
    unlogged: u64,
    /// `None` if another process has counted them.
    logged_at: Option<Nanos>,
}

impl Failures {
    pub(crate) fn new(volume: Arc<str>) -> Self {
        Self { volume: Mutex::new(volume), state: Mutex::default() }
    }

    pub(crate) fn volume(&self) -> Arc<str> {
        Arc::clone(&self.volume.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn rename(&self, volume: Arc<str>) {
        *self.volume.lock().unwrap_or_else(PoisonError::into_inner) = volume;
    }

    /// Counts an error. `now` is the engine's time, `unix_s` the time of day.
    pub(crate) fn note(&self, op: OpKind, error: &Error, now: Nanos, unix_s: u64) -> Notice {
        let (kind, text) = (error.kind(), error.to_string());
        let mut state = self.lock();
        state.last = Some(LastFailure { op, kind, text, unix_s });
        let seen = state.seen(op, kind);
        seen.total.count += 1;
        seen.unlogged += 1;
        let is_due = seen.logged_at.is_none_or(|at| now.saturating_sub(at) >= LOG_EVERY_NS);
        if !is_due {
            return Notice::Quiet;
        }
        let count = std::mem::take(&mut seen.unlogged);
        match seen.logged_at.replace(now) {
            None => Notice::First,
            Some(_) => Notice::Again(count),
        }
    }

    /// Adds the counts of another process.
    pub(crate) fn add(&self, counts: &[FailureCount], last: Option<&LastFailure>) {
        let mut state = self.lock();
        for FailureCount { op, kind, count } in counts {
            let seen = state.seen(*op, *kind);
            seen.total.count = seen.total.count.saturating_add(*count);
        }
        if state.last.is_none() {
            state.last = last.cloned();
        }
    }

    pub(crate) fn snapshot(&self) -> (Vec<FailureCount>, Option<LastFailure>) {
        let state = self.lock();
        (state.seen.iter().map(|seen| seen.total).collect(), state.last.clone())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Counters, valid in any state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn seen(&mut self, op: OpKind, kind: ErrorKind) -> &mut Seen {
        let is_it = |seen: &Seen| seen.total.op == op && seen.total.kind == kind;
        let at = self.seen.iter().position(is_it).unwrap_or_else(|| {
            let total = FailureCount { op, kind, count: 0 };
            self.seen.push(Seen { total, unlogged: 0, logged_at: None });
            self.seen.len() - 1
        });
        &mut self.seen[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_errors_make_a_line_a_minute() {
        let failures = Failures::new("disk".into());
        let full = Error::new(ErrorKind::NoSpace, "write", "a.img: no space");
        let mut lines = Vec::new();
        for number in 0..1_000_000_u64 {
            // Three minutes.
            let now = 1 + number * 180_000;
            match failures.note(OpKind::Write, &full, now, 7) {
                Notice::Quiet => {}
                line => lines.push(line),
            }
        }
        let again = Notice::Again(333_333);
        assert!(lines[0] == Notice::First && lines.len() == 3, "{lines:?}");
        assert!(matches!(lines[1], Notice::Again(333_334)), "{lines:?}, not {again:?}");
        let broken = Error::new(ErrorKind::Io, "read", "a.img: broken");
        assert_eq!(failures.note(OpKind::Read, &broken, 5, 8), Notice::First, "of another kind");

        let (counts, last) = failures.snapshot();
        let last = last.unwrap();
        assert_eq!((last.op, last.unix_s, &*last.text), (OpKind::Read, 8, "read: a.img: broken"));
        assert_eq!(counts.iter().map(|seen| seen.count).collect::<Vec<_>>(), [1_000_000, 1]);

        let successor = Failures::new("disk".into());
        successor.add(&counts, Some(&last));
        assert_eq!(successor.snapshot(), (counts, Some(last)));
        assert_eq!(successor.note(OpKind::Read, &broken, 9, 9), Notice::First, "in its own log");
    }
}
