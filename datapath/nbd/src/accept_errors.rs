//! What a listener does when accept(2) fails.

use std::io;
use std::os::fd::OwnedFd;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

/// The least time between two lines of the log.
const LINE_INTERVAL: Duration = Duration::from_secs(60);
/// The wait after a failure that does not go away at once.
const RETRY: Duration = Duration::from_millis(100);

/// Keeps one descriptor in reserve, so that clients can be closed when the table of descriptors is
/// full. Without it they would wait in the listen queue for a server that cannot accept them.
pub struct AcceptErrors {
    /// The listener's name in the log.
    name: String,
    reserve: Option<OwnedFd>,
    logged: Option<Instant>,
    failures: u64,
    closed: u64,
}

impl AcceptErrors {
    /// `name` is for the log.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        let (reserve, logged) = (reserve(), None);
        Self { name: name.into(), reserve, logged, failures: 0, closed: 0 }
    }

    /// Handles a failed accept and returns the time to wait before the next. With a full table of
    /// descriptors, one client is accepted by `poll_accept`, without waiting, and closed. Logs at
    /// most one line a minute.
    pub fn failed<T>(
        &mut self,
        error: &io::Error,
        poll_accept: impl FnOnce(&mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Duration {
        if is_of_the_client(error) {
            tracing::debug!(listener = self.name, %error, "a client left before it was accepted");
            return Duration::ZERO;
        }
        self.failures += 1;
        let mut wait = RETRY;
        if is_table_full(error) && self.reserve.take().is_some() {
            match poll_accept(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Ok(_)) => {
                    self.closed += 1;
                    wait = Duration::ZERO;
                }
                Poll::Ready(Err(_)) => {}
                // The reserve is used up.
                Poll::Pending => wait = Duration::ZERO,
            }
        }
        if self.reserve.is_none() {
            self.reserve = reserve();
        }
        self.log(error);
        wait
    }

    fn log(&mut self, error: &io::Error) {
        if self.logged.is_some_and(|at| at.elapsed() < LINE_INTERVAL) {
            return;
        }
        self.logged = Some(Instant::now());
        let (listener, closed) = (&self.name, std::mem::take(&mut self.closed));
        let failures = std::mem::take(&mut self.failures);
        let advice = match is_table_full(error) {
            true => "; raise the limit of open files (`ulimit -Hn`, LimitNOFILE=)",
            false => "",
        };
        tracing::warn!(listener, %error, failures, closed, "cannot accept all clients{advice}");
    }
}

/// Whether this process (`EMFILE`) or the system (`ENFILE`) has no descriptor left.
pub(crate) fn is_table_full(error: &io::Error) -> bool {
    [Errno::MFILE, Errno::NFILE]
        .iter()
        .any(|full| error.raw_os_error() == Some(full.raw_os_error()))
}

/// accept(2): errors of the new connection, which is gone, and of a firewall.
fn is_of_the_client(error: &io::Error) -> bool {
    let known = [
        Errno::CONNABORTED,
        Errno::INTR,
        Errno::PERM,
        Errno::PROTO,
        Errno::NOPROTOOPT,
        Errno::NETDOWN,
        Errno::NETUNREACH,
        Errno::HOSTDOWN,
        Errno::HOSTUNREACH,
        Errno::NONET,
    ];
    known.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

fn reserve() -> Option<OwnedFd> {
    eventfd(0, EventfdFlags::CLOEXEC).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> io::Error {
        Errno::MFILE.into()
    }

    fn never(_: &mut Context<'_>) -> Poll<io::Result<()>> {
        panic!("nothing to accept, or nothing to accept it with");
    }

    #[test]
    fn a_full_table_closes_clients_and_logs_once_a_minute() {
        let mut errors = AcceptErrors::new("test");
        for _ in 0..3 {
            assert_eq!(errors.failed(&full(), |_| Poll::Ready(Ok(()))), Duration::ZERO);
            assert!(errors.reserve.is_some(), "taken back");
        }
        assert_eq!((errors.failures, errors.closed), (2, 2), "counted since the line");
        errors.logged = Instant::now().checked_sub(LINE_INTERVAL);
        errors.failed(&full(), |_| Poll::Ready(Ok(())));
        assert_eq!((errors.failures, errors.closed), (0, 0));
    }

    #[test]
    fn without_a_reserve_it_waits() {
        let mut errors = AcceptErrors::new("test");
        errors.reserve = None;
        assert_eq!(errors.failed(&full(), never), RETRY);
        assert_eq!(errors.failed(&full(), |_| Poll::Ready(Err::<(), _>(full()))), RETRY);
        assert_eq!(errors.failed(&Errno::NOMEM.into(), never), RETRY);
    }

    #[test]
    fn clients_that_are_gone_are_no_failures() {
        let mut errors = AcceptErrors::new("test");
        let gone = Errno::CONNABORTED.into();
        assert_eq!(errors.failed(&gone, never), Duration::ZERO);
        assert_eq!((errors.failures, errors.logged), (0, None));
    }
}
