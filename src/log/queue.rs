//! Lines on their way from threads that must not wait to a writer that may.

use std::io::{self, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::format;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};

/// Bytes of lines that wait. The writer may hold as many again.
const PENDING_BYTES_MAX: usize = 1 << 20;
/// At the end, the wait stops when the reader takes no line for this long.
const STALL_TIMEOUT: Duration = Duration::from_millis(300);

/// Lines that wait to be written, in their order.
pub(super) struct Queue {
    state: Mutex<State>,
    /// Notified of any change of the state.
    changed: Condvar,
}

struct State {
    /// Whole lines.
    pending: Vec<u8>,
    /// Lines that found no room, all of them later than those that are pending.
    lost_count: u64,
    has_writer: bool,
    /// The writer has lines that it has taken.
    is_writing: bool,
    /// Lines that the writer has written or given up, ever.
    done_count: u64,
}

impl State {
    fn is_written(&self) -> bool {
        self.pending.is_empty() && self.lost_count == 0 && !self.is_writing
    }
}

impl Queue {
    pub(super) const fn new() -> Self {
        let state = State {
            pending: Vec::new(),
            lost_count: 0,
            has_writer: false,
            is_writing: false,
            done_count: 0,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Adds a line, or loses it when there is no room. Never waits for the writer.
    pub(super) fn push(&self, line: &[u8]) {
        let mut state = self.lock();
        let fits = state.pending.len() + line.len() <= PENDING_BYTES_MAX;
        // After a lost line the following ones are lost, too, until the report has its place.
        if state.lost_count == 0 && fits && state.pending.try_reserve(line.len()).is_ok() {
            state.pending.extend_from_slice(line);
        } else {
            state.lost_count += 1;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Starts the writer unless there is one. `start` returns whether it runs.
    pub(super) fn start_writer(&'static self, start: impl FnOnce(Writer) -> bool) {
        let mut state = self.lock();
        if !state.has_writer {
            state.has_writer = start(self.writer());
        }
    }

    /// A writer for this thread if there is none.
    pub(super) fn no_writer(&'static self) -> Option<Writer> {
        (!self.lock().has_writer).then(|| self.writer())
    }

    fn writer(&'static self) -> Writer {
        Writer { queue: self, lost_count: 0, is_cut: false }
    }

    /// Whether every line is written or given up.
    pub(super) fn is_written(&self) -> bool {
        self.lock().is_written()
    }

    /// Waits until every line is written, `timeout` has passed, or the reader takes nothing.
    pub(super) fn wait(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        let mut done_count = state.done_count;
        let mut stalled = Instant::now() + STALL_TIMEOUT;
        while !state.is_written() {
            // A writer that has not begun has no reader that it waits for, but no CPU.
            if state.done_count != done_count || !state.is_writing {
                done_count = state.done_count;
                stalled = Instant::now() + STALL_TIMEOUT;
            }
            let left = deadline.min(stalled).saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.changed.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for lines and takes all of them, and the number of lines lost behind them.
    fn take(&self) -> (Vec<u8>, u64) {
        let mut state = self.lock();
        while state.is_written() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.is_writing = true;
        (std::mem::take(&mut state.pending), std::mem::take(&mut state.lost_count))
    }

    fn count_done(&self) {
        self.lock().done_count += 1;
        self.changed.notify_all();
    }

    /// The state is valid after any panic.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes lines out of a queue and writes them. Only this waits for the reader.
pub(super) struct Writer {
    queue: &'static Queue,
    /// Lines lost since the last report.
    lost_count: u64,
    /// The last line was written in part.
    is_cut: bool,
}

impl Writer {
    /// Writes lines for as long as the process lives.
    pub(super) fn run(mut self, mut out: impl Write) -> ! {
        loop {
            self.run_once(&mut out);
        }
    }

    /// Waits for lines and writes all of them.
    pub(super) fn run_once(&mut self, out: &mut impl Write) {
        let (lines, lost_count) = self.queue.take();
        // One call per line: a pipe does not mix lines of several processes up to 4096 bytes.
        for line in lines.split_inclusive(|&byte| byte == b'\n') {
            if self.report(out).and_then(|()| self.put(out, line)).is_err() {
                self.lost_count += 1;
            }
            self.queue.count_done();
        }
        self.lost_count += lost_count;
        // If it cannot be written now, the next line is preceded by it.
        let _ = self.report(out);
        self.queue.lock().is_writing = false;
        self.queue.changed.notify_all();
    }

    /// Reports the number of lost lines, if any, in the form of other lines.
    fn report(&mut self, out: &mut impl Write) -> io::Result<()> {
        if self.lost_count == 0 {
            return Ok(());
        }
        let mut text = String::new();
        // A clock that cannot be formatted is left out.
        let _ = SystemTime.format_time(&mut format::Writer::new(&mut text));
        let (count, why) = (self.lost_count, "standard error was full or could not be written");
        text += &format!("  WARN {count} lines of this log were lost: {why}\n");
        self.put(out, text.as_bytes())?;
        self.lost_count = 0;
        Ok(())
    }

    fn put(&mut self, out: &mut impl Write, line: &[u8]) -> io::Result<()> {
        if self.is_cut {
            out.write_all(b"\n")?;
            self.is_cut = false;
        }
        let mut rest = line;
        while !rest.is_empty() {
            match out.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    rest = &rest[count..];
                    self.is_cut = !rest.is_empty();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
