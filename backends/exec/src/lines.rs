//! The output of a program, line by line, with bounds.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::time::{Duration, Instant};

use sheave_core::printable;

/// The longest line that is kept, in bytes; the rest of a longer one is dropped.
const LINE_LEN_MAX: usize = 1024;
/// The most lines that are logged in one [`PERIOD`].
const LINES_MAX: u32 = 100;
const PERIOD: Duration = Duration::from_secs(10);

/// Splits output into lines, and decides which of them to log.
#[derive(Debug)]
pub(crate) struct Lines {
    /// The line that has not ended.
    partial: Vec<u8>,
    /// The last line that was not empty.
    last: Option<String>,
    period_begun: Instant,
    /// Lines in this period.
    count: u32,
}

impl Lines {
    pub(crate) fn new(now: Instant) -> Self {
        Self { partial: Vec::new(), last: None, period_begun: now, count: 0 }
    }

    /// Takes output, and calls `log` with each line to be logged.
    pub(crate) fn take(&mut self, bytes: &[u8], now: Instant, mut log: impl FnMut(&str)) {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            let (text, is_end) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            let room = LINE_LEN_MAX - self.partial.len();
            self.partial.extend_from_slice(&text[..text.len().min(room)]);
            if is_end {
                self.end_line(now, &mut log);
            }
        }
    }

    /// The output has ended.
    pub(crate) fn finish(&mut self, now: Instant, mut log: impl FnMut(&str)) {
        self.end_line(now, &mut log);
    }

    /// The last line since the previous call.
    pub(crate) fn take_last(&mut self) -> Option<String> {
        self.last.take()
    }

    fn end_line(&mut self, now: Instant, log: &mut impl FnMut(&str)) {
        let line = printable(OsStr::from_bytes(self.partial.trim_ascii_end())).to_string();
        self.partial.clear();
        if line.is_empty() {
            return;
        }
        if now.duration_since(self.period_begun) >= PERIOD {
            if self.count > LINES_MAX {
                log(&format!("… and {} more lines, which are not shown", self.count - LINES_MAX));
            }
            (self.period_begun, self.count) = (now, 0);
        }
        self.count = self.count.saturating_add(1);
        if self.count <= LINES_MAX {
            log(&line);
        }
        self.last = Some(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(lines: &mut Lines, bytes: &[u8], now: Instant) -> Vec<String> {
        let mut logged = Vec::new();
        lines.take(bytes, now, |line| logged.push(line.to_owned()));
        logged
    }

    #[test]
    fn lines_are_put_together_and_cut() {
        let now = Instant::now();
        let mut lines = Lines::new(now);
        assert!(take(&mut lines, b"one", now).is_empty());
        assert_eq!(
            take(&mut lines, b" line\r\n\n\x1b[2Jtwo\nth", now),
            ["one line", "\\u{1b}[2Jtwo"]
        );
        let long = vec![b'x'; 5 << 20];
        assert!(take(&mut lines, &long, now).is_empty());
        let logged = take(&mut lines, b"y\n", now);
        assert_eq!(logged[0].len(), LINE_LEN_MAX);
        assert!(logged[0].starts_with("thx"));
        assert_eq!(lines.take_last().unwrap(), logged[0]);
        assert_eq!(lines.take_last(), None);
        take(&mut lines, b"end", now);
        lines.finish(now, |line| assert_eq!(line, "end"));
        assert_eq!(lines.take_last().unwrap(), "end");
    }

    #[test]
    fn a_flood_is_counted_and_not_logged() {
        let now = Instant::now();
        let mut lines = Lines::new(now);
        let flood = b"again\n".repeat(5000);
        assert_eq!(take(&mut lines, &flood, now).len(), LINES_MAX as usize);
        let logged = take(&mut lines, b"later\n", now + PERIOD);
        assert_eq!(logged, ["… and 4900 more lines, which are not shown", "later"]);
    }
}
