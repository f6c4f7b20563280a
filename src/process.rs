//! Shared code of the commands that serve until a signal.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::task::Poll;

use anyhow::Context as _;
use sheave_bench::signals;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// More shards than this gain nothing for one node's volumes.
const SHARDS_MAX: usize = 4;

/// Threads for connections, unless their number is given.
pub(crate) fn default_shards() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(SHARDS_MAX)
}

/// The runtime of the control thread.
///
/// # Errors
/// When the kernel gives no descriptors for it.
pub(crate) fn runtime() -> anyhow::Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("runtime")
}

/// The request that a signal makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// End in order; the signal's name.
    End(&'static str),
    /// Reload.
    Reload,
}

/// The meaning of SIGHUP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HangUp {
    /// End, since the terminal is gone. Ignored if this process was started with SIGHUP ignored.
    End,
    /// Reload.
    Reload,
}

/// A second signal has ended the process, which waits for nothing more.
#[derive(Debug)]
pub(crate) struct Insisted(pub(crate) String);

impl fmt::Display for Insisted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Insisted {}

/// The signals of a process that serves, caught from now on and queued.
pub(crate) struct Signals {
    /// With their numbers, those that end the process first.
    caught: Vec<(i32, Signal)>,
    hang_up: HangUp,
}

impl Signals {
    /// # Errors
    /// When they cannot be caught.
    pub(crate) fn catch(hang_up: HangUp) -> anyhow::Result<Self> {
        let mut numbers = signals::ending();
        if hang_up == HangUp::Reload && !numbers.contains(&signals::HANG_UP) {
            numbers.push(signals::HANG_UP);
        }
        numbers.extend(signals::MEANINGLESS);
        let catch = |number| Ok((number, signal(SignalKind::from_raw(number))?));
        let caught: io::Result<_> = numbers.into_iter().map(catch).collect();
        Ok(Self { caught: caught.context("catch signals")?, hang_up })
    }

    /// Waits for the next one with a meaning. Others are only logged.
    pub(crate) async fn next(&mut self) -> Asked {
        loop {
            let number = self.receive().await;
            let name = signals::name(number);
            if signals::MEANINGLESS.contains(&number) {
                tracing::info!("{name} has no meaning here and is ignored");
            } else if number == signals::HANG_UP && self.hang_up == HangUp::Reload {
                return Asked::Reload;
            } else {
                return Asked::End(name);
            }
        }
    }

    /// Waits for a signal to end, and returns its name. Calls `reload` for each signal to reload
    /// before.
    pub(crate) async fn end(&mut self, reload: impl Fn()) -> &'static str {
        loop {
            match self.next().await {
                Asked::End(name) => return name,
                Asked::Reload => reload(),
            }
        }
    }

    /// Waits for a second signal to end, after which the process ends at once. SIGHUP does not: a
    /// closed terminal may send two, and a service manager may send it right behind another
    /// (SendSIGHUP= in systemd.kill(5)).
    pub(crate) async fn insisted(&mut self, reload: impl Fn()) -> &'static str {
        let hang_up = signals::name(signals::HANG_UP);
        loop {
            let name = self.end(&reload).await;
            if name != hang_up {
                return name;
            }
        }
    }

    async fn receive(&mut self) -> i32 {
        poll_fn(|cx| {
            let arrived = self
                .caught
                .iter_mut()
                .find_map(|(number, signal)| signal.poll_recv(cx).is_ready().then_some(*number));
            arrived.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}
