//! The thread of a program: starts it, logs what it prints, starts it again and ends it.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use sheave_core::printable;

use crate::lines::Lines;
use crate::program::{ProgramOptions, Shared};
use crate::start::Start;

/// A program that has run for this long has started successfully. So has one that ends earlier
/// while no connection waits: it has served the one that it was started for.
const STEADY: Duration = Duration::from_secs(1);
/// The pause after the second failure in a row; each further one doubles it.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// How long a program may take to end when it is asked to.
const GRACE: Duration = Duration::from_secs(10);
/// The most bytes of output that are read at a time.
const OUTPUT_LEN: usize = 16 << 10;

pub(crate) struct Watch {
    shared: Arc<Shared>,
    /// Hangs up when the program has to end.
    stopped: OwnedFd,
    options: ProgramOptions,
    /// The command, for messages.
    name: String,
    /// Failures in a row.
    failures: u32,
    /// The earliest time of the next start.
    not_before: Instant,
}

/// The result of a wait.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Waited {
    Stopped,
    Ready,
    TimedOut,
}

impl Watch {
    pub(crate) fn new(shared: Arc<Shared>, stopped: OwnedFd, options: ProgramOptions) -> Self {
        let name = printable(&options.command).to_string();
        Self { shared, stopped, options, name, failures: 0, not_before: Instant::now() }
    }

    /// Runs the program whenever a connection waits for it, until it has to end.
    pub(crate) fn run(mut self) {
        while self.wait_until_needed() {
            let begun = Instant::now();
            match Running::start(&self.options, &self.shared) {
                Ok(running) => {
                    tracing::debug!(program = self.name, "started");
                    if !self.attend(running, begun) {
                        return;
                    }
                }
                Err(error) => {
                    self.ended(false, Duration::ZERO, format!("cannot be started: {error}"))
                }
            }
        }
    }

    /// Waits for a connection, after the pause; false when the program has to end.
    fn wait_until_needed(&self) -> bool {
        let pause = self.not_before.saturating_duration_since(Instant::now());
        if !pause.is_zero() && self.wait(None, Some(pause)) == Waited::Stopped {
            return false;
        }
        self.wait(Some(self.shared.socket.listener.as_fd()), None) == Waited::Ready
    }

    /// Waits until the program has to end or `other` is readable.
    fn wait(&self, other: Option<BorrowedFd<'_>>, patience: Option<Duration>) -> Waited {
        let until = patience.map(|patience| Instant::now() + patience);
        loop {
            let mut fds = vec![PollFd::new(&self.stopped, PollFlags::IN)];
            fds.extend(other.map(|other| PollFd::from_borrowed_fd(other, PollFlags::IN)));
            poll_until(&mut fds, until);
            if !fds[0].revents().is_empty() {
                return Waited::Stopped;
            }
            if fds.get(1).is_some_and(|other| !other.revents().is_empty()) {
                return Waited::Ready;
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Waited::TimedOut;
            }
        }
    }

    /// Watches a program until it has ended; false if it ended on request.
    fn attend(&mut self, mut running: Running, begun: Instant) -> bool {
        if running.wait(Some(self.stopped.as_fd()), None, &self.name) == Waited::Stopped {
            running.end(&self.name);
            return false;
        }
        let (status, last_line) = running.reap(&self.name);
        let lived = begun.elapsed();
        let words = match last_line {
            Some(line) => format!("{line} ({status})"),
            None => status.to_string(),
        };
        self.ended(status.success(), lived, words);
        true
    }

    /// Notes the end of a program.
    fn ended(&mut self, is_success: bool, lived: Duration, words: String) {
        let has_served = lived >= STEADY || !self.has_waiting();
        self.failures = if has_served { 0 } else { self.failures.saturating_add(1) };
        let pause = match self.failures {
            // A program may end with its last client, and be started for the next one.
            0 | 1 => Duration::ZERO,
            more => PAUSE_MAX.min(PAUSE_MIN * (1 << (more - 2).min(16))),
        };
        self.not_before = Instant::now() + pause;
        match is_success {
            true => tracing::debug!(program = self.name, "ended: {words}"),
            false => tracing::warn!(
                program = self.name,
                "ended: {words}; it is started again when a connection needs it"
            ),
        }
        self.shared.set_last_words(words);
        // Waiting connections would see another failure. Their owner gets the reason.
        if !has_served && (!is_success || self.failures > 2) {
            self.refuse_waiting();
        }
    }

    /// Whether a connection waits for a program.
    fn has_waiting(&self) -> bool {
        let mut fds = [PollFd::new(&self.shared.socket.listener, PollFlags::IN)];
        poll_until(&mut fds, Some(Instant::now()));
        !fds[0].revents().is_empty()
    }

    /// Closes the connections that wait.
    fn refuse_waiting(&self) {
        // No other process accepts now, so this cannot block.
        while self.has_waiting() && self.shared.socket.listener.accept().is_ok() {}
    }
}

/// A program that has been started.
struct Running {
    child: Child,
    /// Readable when the child has ended.
    pidfd: OwnedFd,
    output: Option<File>,
    lines: Lines,
}

impl Running {
    fn start(options: &ProgramOptions, shared: &Shared) -> io::Result<Self> {
        let (output, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        fcntl_setfl(&output, fcntl_getfl(&output)? | OFlags::NONBLOCK)?;
        let ProgramOptions { command, directory, launch } = options.clone();
        let socket = shared.socket.listener.try_clone()?.into();
        let mut child = launch(Start { command, directory, socket, output: theirs })?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let pidfd = pidfd.inspect_err(|_| {
            let _ = child.kill().and_then(|()| child.wait().map(drop));
        })?;
        let lines = Lines::new(Instant::now());
        Ok(Self { child, pidfd, output: Some(output.into()), lines })
    }

    /// Logs its output until it has ended, `until` is reached, or `stopped` hangs up.
    fn wait(
        &mut self,
        stopped: Option<BorrowedFd<'_>>,
        until: Option<Instant>,
        name: &str,
    ) -> Waited {
        loop {
            let mut fds = vec![PollFd::new(&self.pidfd, PollFlags::IN)];
            fds.extend(stopped.map(|stopped| PollFd::from_borrowed_fd(stopped, PollFlags::IN)));
            let output_at = fds.len();
            fds.extend(self.output.iter().map(|output| PollFd::new(output, PollFlags::IN)));
            poll_until(&mut fds, until);
            let is_set = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
            let (has_ended, is_stopped) = (is_set(0), stopped.is_some() && is_set(1));
            if is_set(output_at) {
                self.read_output(name);
            }
            match until {
                _ if is_stopped => return Waited::Stopped,
                _ if has_ended => return Waited::Ready,
                Some(until) if Instant::now() >= until => return Waited::TimedOut,
                _ => {}
            }
        }
    }

    /// Reads once, so that endless output does not block other events.
    fn read_output(&mut self, name: &str) -> bool {
        let Some(output) = &mut self.output else { return false };
        let mut bytes = [0; OUTPUT_LEN];
        match output.read(&mut bytes) {
            Ok(0) => self.output = None,
            Ok(len) => {
                let log = |line: &str| tracing::info!(program = name, "{line}");
                self.lines.take(&bytes[..len], Instant::now(), log);
                return true;
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.output = None,
        }
        false
    }

    /// Takes the exit status of a program that has ended, and its last line. Remaining processes of
    /// its group are killed: they could accept connections that are for the next program.
    fn reap(mut self, name: &str) -> (ExitStatus, Option<String>) {
        // The number of the group is not reused before the child is waited for.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let status = self.child.wait().expect("a child that has not been waited for");
        // The rest of the pipe, which is bounded.
        while self.read_output(name) {}
        let log = |line: &str| tracing::info!(program = name, "{line}");
        self.lines.finish(Instant::now(), log);
        (status, self.lines.take_last())
    }

    /// Ends it by SIGTERM, and if that is not enough by SIGKILL.
    fn end(mut self, name: &str) {
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::TERM);
        if self.wait(None, Some(Instant::now() + GRACE), name) == Waited::TimedOut {
            tracing::warn!(program = name, "does not end within {GRACE:?} and is killed");
        }
        let (status, _) = self.reap(name);
        tracing::debug!(program = name, "ended with its volume: {status}");
    }
}

/// Waits until one of `fds` is ready; at most until then. May return early.
fn poll_until(fds: &mut [PollFd<'_>], until: Option<Instant>) {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    let left = left.and_then(|left| Timespec::try_from(left).ok());
    // Interrupted, or out of memory for a moment.
    if poll(fds, left.as_ref()).is_err() {
        fds.iter_mut().for_each(PollFd::clear_revents);
    }
}

#[cfg(test)]
mod tests;
