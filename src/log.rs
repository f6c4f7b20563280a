//! The log of a process that serves: lines wait in a bounded queue, and one thread writes them to
//! standard error.
//!
//! So a reader that is slow, stopped or gone, or a full disk, delays and ends nothing but the log.
//! A line that finds no room, or that cannot be written, is lost; the log says how many as soon as
//! there is room again.
//!
//! tracing-appender has such a writer, too. It bounds the number of lines and not their bytes,
//! starts its thread at once, which is too early for a daemon ([`sheave_daemon::protect`]), and
//! prints to standard output when it cannot be stopped.

mod queue;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::env;
use std::io::{self, IsTerminal as _, Write};
use std::panic::{self, PanicHookInfo};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use sheave_core::printable;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use self::queue::Queue;

/// How long the end of the process waits for its last lines, at most. It waits less when the reader
/// takes nothing at all.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a line may wait for its reader where this must be the thread that waits.
const NO_THREAD_TIMEOUT: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

static QUEUE: Queue = Queue::new();

/// Collects events and panics from now on; `SHEAVE_LOG` selects events. They are written when there
/// is a writer: [`start_writer`].
pub(crate) fn start() {
    let wanted = env::var_os("SHEAVE_LOG").unwrap_or_default();
    let wanted = wanted.to_string_lossy();
    let filter = filter(&wanted);
    let is_usable = filter.is_some();
    tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|| EnvFilter::new("info")))
        .with_writer(|| Lines)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        // Its own reporting uses a macro that panics when standard error fails.
        .log_internal_errors(false)
        .init();
    panic::set_hook(Box::new(log_panic));
    if !is_usable {
        tracing::error!(
            "SHEAVE_LOG={wanted:?} is not used; write error, warn, info, debug or trace"
        );
    }
}

/// Writes the log from now on, on a thread that inherits the protection of this one. If no thread
/// can be made, the log is written when the process ends.
pub(crate) fn start_writer() {
    QUEUE.start_writer(|writer| {
        let thread = thread::Builder::new().name("log".to_owned());
        thread.spawn(move || writer.run(Stderr { timeout: None })).is_ok()
    });
}

/// Writes a line that is the process's last, behind the log if there is one, and waits for both for
/// a bounded time. Characters that a terminal acts on are escaped.
pub(crate) fn last_line(line: &str) {
    QUEUE.push(format!("{}\n", printable(line)).as_bytes());
    finish();
}

/// Waits until the log is written, for a bounded time.
pub(crate) fn finish() {
    finish_within(FINISH_TIMEOUT);
}

/// Waits until the log is written, at most until `by`.
pub(crate) fn finish_within(timeout: Duration) {
    if !QUEUE.is_written() {
        start_writer();
        if let Some(mut writer) = QUEUE.no_writer() {
            writer.run_once(&mut Stderr { timeout: Some(NO_THREAD_TIMEOUT) });
        }
        QUEUE.wait(timeout);
    }
}

/// The filter of `SHEAVE_LOG`, if it is set. A single word that is no level is refused: it would be
/// taken for a module's name, and silence all others.
fn filter(wanted: &str) -> Option<EnvFilter> {
    if wanted.is_empty() {
        return Some(EnvFilter::new("info"));
    }
    let is_level = |rule: &str| !rule.is_empty() && rule.parse::<LevelFilter>().is_ok();
    let is_rule = |rule: &str| rule.contains('=') || is_level(rule);
    wanted.split(',').all(is_rule).then(|| EnvFilter::try_new(wanted).ok()).flatten()
}

/// A panic may end the process, so unlike other lines its line is waited for.
fn log_panic(info: &PanicHookInfo<'_>) {
    QUEUE.push((panic_text(info) + "\n").as_bytes());
    finish();
}

fn panic_text(info: &PanicHookInfo<'_>) -> String {
    let thread = thread::current();
    let name = thread.name().unwrap_or("<unnamed>");
    let what = info.payload_as_str().unwrap_or("a value that is no text");
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    let mut text = format!("thread '{name}' panicked at {place}: {what}");
    // If RUST_BACKTRACE is set.
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        text += &format!("\n{backtrace}");
    }
    text
}

/// Takes events, each in one piece.
struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        QUEUE.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard error without the lock of [`io::Stderr`], which a stuck writer would hold.
struct Stderr {
    /// How long it may be full.
    timeout: Option<Timespec>,
}

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        loop {
            let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
            if poll(&mut fds, self.timeout.as_ref())? == 0 {
                // Later lines do not wait again.
                self.timeout = Some(Timespec::default());
                return Err(io::ErrorKind::TimedOut.into());
            }
            match rustix::io::write(&stderr, bytes) {
                // Another process that shares it has made it non-blocking again.
                Err(Errno::AGAIN) => {}
                written => return Ok(written?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_panic_is_one_line_with_its_thread_and_place() {
        let (send, receive) = mpsc::channel();
        panic::set_hook(Box::new(move |info| drop(send.send(panic_text(info)))));
        let thread = thread::Builder::new().name("shard-7".to_owned());
        let ended = thread.spawn(|| panic!("on purpose, {}", 7)).unwrap().join();
        drop(panic::take_hook());
        assert!(ended.is_err());
        let text = receive.recv().unwrap();
        assert!(text.starts_with("thread 'shard-7' panicked at src/log.rs:"), "{text}");
        assert!(text.lines().next().unwrap().ends_with(": on purpose, 7"), "{text}");
    }

    #[test]
    fn a_log_level_that_is_none_is_not_taken() {
        for good in ["", "debug", "WARN", "off", "info,sheave_nbd=trace"] {
            assert!(filter(good).is_some(), "{good}");
        }
        for bad in ["verbose", "debug,", "sheave_nbd=loud", "info verbose"] {
            assert!(filter(bad).is_none(), "{bad}");
        }
    }
}
