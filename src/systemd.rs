//! The service manager that started this process, if one did: sockets that it passes
//! (sd_listen_fds(3)), and the state that it is notified of (sd_notify(3)).

use std::convert::Infallible;
use std::env;
use std::ffi::OsStr;
use std::fmt::Display;
use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::process;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use listenfd::ListenFd;
use rustix::net::getpeername;
use rustix::net::sockopt::socket_acceptconn;
use tokio::time::MissedTickBehavior;

/// The manager reads at once, unless it is stuck.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// Notifies the manager of this process's state; does nothing if the manager did not ask for it.
#[derive(Debug, Default)]
pub(crate) struct Notify {
    to: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

/// A listening socket that the manager passed.
#[derive(Debug)]
pub(crate) enum Passed {
    /// Of TCP.
    Tcp(TcpListener),
    /// A unix socket.
    Unix(UnixListener),
}

/// The sockets that the manager listens on for this process. To be called while there is one
/// thread, since it changes the environment.
///
/// # Errors
/// When one is not a listening stream socket of TCP or of the unix family.
pub(crate) fn passed_sockets() -> Result<Vec<Passed>> {
    let mut passed = ListenFd::from_env();
    (0..passed.len()).map(|index| take(&mut passed, index)).collect()
}

fn take(passed: &mut ListenFd, index: usize) -> Result<Passed> {
    check_taken(passed, index)
        .with_context(|| format!("socket {} passed by the service manager", index + 1))
}

fn check_taken(passed: &mut ListenFd, index: usize) -> Result<Passed> {
    // Each refuses sockets of other kinds and leaves them for the next.
    if let Ok(Some(socket)) = passed.take_unix_listener(index) {
        check_listens(&socket)?;
        return Ok(Passed::Unix(socket));
    }
    if let Ok(Some(socket)) = passed.take_tcp_listener(index) {
        check_listens(&socket)?;
        return Ok(Passed::Tcp(socket));
    }
    bail!(
        "not a stream socket of TCP or of the unix family; in the socket unit, use \
         ListenStream=HOST:PORT or ListenStream=/PATH, not ListenDatagram= or others"
    )
}

fn check_listens(socket: impl AsFd) -> Result<()> {
    if socket_acceptconn(&socket).context("cannot tell whether it listens")? {
        return Ok(());
    }
    if getpeername(&socket).is_ok() {
        bail!("it is the connection of one client; set Accept=no in the socket unit");
    }
    bail!(
        "it does not listen; use ListenStream= and Accept=no in the socket unit, or call listen(2) \
         before passing it"
    )
}

/// The unix socket that the manager listens on for the daemon, if there is one. To be called while
/// there is one thread, since it changes the environment.
///
/// # Errors
/// When the manager passes anything else.
pub(crate) fn passed_socket() -> Result<Option<UnixListener>> {
    let mut passed = ListenFd::from_env();
    match passed.len() {
        0 => Ok(None),
        1 => match take(&mut passed, 0)? {
            Passed::Unix(socket) => Ok(Some(socket)),
            Passed::Tcp(_) => bail!(
                "the service manager passes a TCP socket; it should be the control socket, so use \
                 ListenStream=/PATH in the socket unit"
            ),
        },
        count => {
            bail!("the service manager passes {count} sockets; it should be the control socket")
        }
    }
}

impl Notify {
    /// Reads the environment. If the manager cannot be reached, logs a warning and does nothing.
    pub(crate) fn from_env() -> Self {
        let Some(address) = env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty())
        else {
            return Self::default();
        };
        let number = |name| env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let for_us = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|&micros| micros > 0 && for_us);
        match connect(&address) {
            Ok(to) => Self { to: Some(to), watchdog: watchdog.map(Duration::from_micros) },
            Err(error) => {
                tracing::warn!("cannot notify the service manager at {address:?}: {error}");
                Self::default()
            }
        }
    }

    /// Whether a service manager supervises this process.
    pub(crate) fn is_service(&self) -> bool {
        self.to.is_some()
    }

    /// Ready: this process serves clients, even if another process did before.
    pub(crate) fn ready(&self) {
        self.tell(&format!("READY=1\nMAINPID={}\nSTATUS=serving", process::id()));
    }

    /// This process ends, and that one is the service's main process from now on.
    pub(crate) fn succeeded_by(&self, pid: i32) {
        self.tell(&format!("MAINPID={pid}"));
    }

    /// Reloading, or a successor is about to take over.
    pub(crate) fn reloading(&self, status: &str) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let micros = now.tv_sec * 1_000_000 + now.tv_nsec / 1000;
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={micros}\nSTATUS={status}"));
    }

    /// Stopping, and what it waits for.
    pub(crate) fn stopping(&self, status: &str) {
        self.tell(&format!("STOPPING=1\nSTATUS={status}"));
    }

    /// Feeds the watchdog once.
    pub(crate) fn alive(&self) {
        self.tell("WATCHDOG=1");
    }

    /// Feeds the watchdog as long as this process is alive: the runtime of the control API must run
    /// this task, and `check`, which queries the engine on a thread of the runtime, must succeed.
    pub(crate) async fn keep_alive<E: Display + Send + 'static>(
        &self,
        check: impl Fn(Duration) -> Result<(), E> + Send + Sync + 'static,
    ) -> Infallible {
        let Some(limit) = self.watchdog else { return std::future::pending().await };
        let check = Arc::new(check);
        // Several checks fit into the limit, so one may fail or be slow.
        let mut ticks = tokio::time::interval(limit / 4);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let check = Arc::clone(&check);
            let mut checked = tokio::task::spawn_blocking(move || check(limit / 4));
            let outcome = match tokio::time::timeout(limit / 2, &mut checked).await {
                Ok(outcome) => outcome,
                Err(_) => {
                    tracing::warn!("watchdog: all threads for calls are busy");
                    checked.await
                }
            };
            match outcome {
                Ok(Ok(())) => self.alive(),
                Ok(Err(error)) => tracing::warn!("watchdog: {error}"),
                Err(error) => tracing::warn!("watchdog: {error}"),
            }
        }
    }

    fn tell(&self, state: &str) {
        let Some((socket, address)) = &self.to else { return };
        if let Err(error) = socket.send_to_addr(state.as_bytes(), address) {
            tracing::warn!("the service manager does not take {state:?}: {error}");
        }
    }
}

/// A path, or a name without a file behind `@`.
fn connect(address: &OsStr) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match address.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(address)?,
        _ => return Err(io::ErrorKind::Unsupported.into()),
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(SEND_TIMEOUT))?;
    Ok((socket, address))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use super::*;

    /// A generous limit.
    const LONG: Duration = Duration::from_secs(20);

    fn manager(watchdog_ms: u64) -> (UnixDatagram, Notify, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_read_timeout(Some(LONG)).unwrap();
        let to = Some(connect(path.as_os_str()).unwrap());
        let watchdog = Some(Duration::from_millis(watchdog_ms));
        (manager, Notify { to, watchdog }, dir)
    }

    fn told(manager: &UnixDatagram) -> String {
        let mut text = [0; 200];
        let count = manager.recv(&mut text).unwrap();
        String::from_utf8(text[..count].to_vec()).unwrap()
    }

    #[test]
    fn a_manager_is_reached_by_path_and_by_name() {
        let (manager, notify, _dir) = manager(1);
        notify.ready();
        let pid = process::id();
        assert_eq!(told(&manager), format!("READY=1\nMAINPID={pid}\nSTATUS=serving"));
        notify.succeeded_by(7);
        assert_eq!(told(&manager), "MAINPID=7");

        let name = format!("sheave-test-{}", process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        let to = connect(OsStr::new(&format!("@{name}"))).unwrap();
        Notify { to: Some(to), watchdog: None }.stopping("waiting");
        assert_eq!(told(&manager), "STOPPING=1\nSTATUS=waiting");

        assert!(connect(OsStr::new("vsock:2:1")).is_err());
        // An absent manager is no reason to end.
        drop(manager);
        Notify { to: Some(connect(OsStr::new("@sheave-nobody")).unwrap()), watchdog: None }.ready();
    }

    #[tokio::test]
    async fn a_watchdog_is_fed_only_while_the_check_succeeds() {
        let (manager, notify, _dir) = manager(200);
        let fine = Arc::new(AtomicBool::new(true));
        let check = {
            let fine = Arc::clone(&fine);
            move |within| {
                assert_eq!(within, Duration::from_millis(50));
                if fine.load(Relaxed) { Ok(()) } else { Err("stuck") }
            }
        };
        let kept = tokio::spawn(async move { notify.keep_alive(check).await });
        let watched = tokio::task::spawn_blocking(move || {
            for _ in 0..3 {
                assert_eq!(told(&manager), "WATCHDOG=1");
            }
            fine.store(false, Relaxed);
            // One may have been in flight, of about ten.
            manager.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            let _ = manager.recv(&mut [0; 20]);
            assert!(manager.recv(&mut [0; 20]).is_err(), "fed although stuck");
            fine.store(true, Relaxed);
            manager.set_read_timeout(Some(LONG)).unwrap();
            assert_eq!(told(&manager), "WATCHDOG=1");
        });
        watched.await.unwrap();
        kept.abort();
    }
}
