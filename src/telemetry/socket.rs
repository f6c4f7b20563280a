//! The socket at which a serving process sends its statistics.

use std::fs;
use std::os::unix::net::UnixListener as StdListener;
use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::net::SocketType;
use sheave_core::printable;
use sheave_nbd::{AcceptErrors, LiveExports};
use sheave_telemetry::Registry;
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};

use super::exports::ExportEntry;
use super::runtime_dir::{RuntimeDir, listen_at};
use super::servers::{Probe, ServerSnapshot, probe, socket_name};

/// The most readers at a time; more wait to be accepted.
const READERS_MAX: usize = 8;
/// How long a reader may take.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Sends one JSON snapshot to each client of `serve-PID.sock`. Dropping it removes the socket.
#[derive(Debug)]
pub(crate) struct StatsSocket {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl StatsSocket {
    /// Listens in the runtime directory of this user, on the current tokio runtime.
    ///
    /// # Errors
    /// When the directory or the socket cannot be made.
    pub(crate) fn start(registry: Arc<Registry>, exports: LiveExports) -> Result<Self> {
        Self::start_with(&RuntimeDir::locate(), registry, Some(exports))
    }

    /// The same in this directory, for a process without exports.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub(crate) fn start_in(dir: &RuntimeDir, registry: Arc<Registry>) -> Result<Self> {
        Self::start_with(dir, registry, None)
    }

    fn start_with(
        dir: &RuntimeDir,
        registry: Arc<Registry>,
        exports: Option<LiveExports>,
    ) -> Result<Self> {
        let started = Instant::now();
        let path = dir.path().join(socket_name(process::id()));
        let what = || format!("statistics socket {}", printable(&path));
        dir.create().with_context(what)?;
        if let Probe::Answers(_) = probe(&path).with_context(what)? {
            bail!("{} is in use; set SHEAVE_RUNTIME_DIR to another directory", what());
        }
        let listener = listen_at(&path, SocketType::STREAM)
            .with_context(|| format!("cannot make {}", what()))?;
        let listener = StdListener::from(listener);
        listener.set_nonblocking(true).with_context(what)?;
        let listener = UnixListener::from_std(listener).with_context(what)?;
        let task = tokio::spawn(answer(listener, registry, exports, started));
        Ok(Self { path, task })
    }

    #[cfg(test)]
    fn path(&self) -> &std::path::Path {
        &self.path
    }
}

impl Drop for StatsSocket {
    fn drop(&mut self) {
        self.task.abort();
        // An error means that it is gone already.
        let _ = fs::remove_file(&self.path);
    }
}

async fn answer(
    listener: UnixListener,
    registry: Arc<Registry>,
    exports: Option<LiveExports>,
    started: Instant,
) {
    let mut readers = JoinSet::new();
    let mut errors = AcceptErrors::new("statistics socket");
    loop {
        tokio::select! {
            accepted = listener.accept(), if readers.len() < READERS_MAX => match accepted {
                Ok((stream, _)) => {
                    let exports = exports.iter().flat_map(LiveExports::snapshot);
                    let snapshot = ServerSnapshot::of(&registry, started.elapsed())
                        .with_exports(exports.map(ExportEntry::from).collect());
                    readers.spawn(send(stream, snapshot));
                }
                Err(error) => {
                    let wait = errors.failed(&error, |cx| listener.poll_accept(cx));
                    tokio::time::sleep(wait).await;
                }
            },
            Some(_) = readers.join_next() => {}
        }
    }
}

async fn send(mut stream: UnixStream, snapshot: ServerSnapshot) {
    let text = snapshot.to_json();
    let sent = tokio::time::timeout(SEND_TIMEOUT, stream.write_all(text.as_bytes())).await;
    if !matches!(sent, Ok(Ok(()))) {
        tracing::debug!("statistics socket: a reader left before the end");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use sheave_core::OpKind;
    use sheave_telemetry::Stage;
    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::telemetry::Servers;

    #[tokio::test]
    async fn tells_each_reader_a_snapshot_and_goes_with_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let runtime_dir = RuntimeDir::at(&dir.path().join("made"));
        let registry = Arc::new(Registry::new());
        let recorder = registry.volume("disk").recorder();
        recorder.record(OpKind::Read, Stage::Total, 20_000);
        let socket = StatsSocket::start_in(&runtime_dir, Arc::clone(&registry)).unwrap();
        let mode = fs::metadata(socket.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        for expected in 1..=3 {
            let reading = runtime_dir.clone();
            let read = move || Servers::read_in(&reading);
            let servers = tokio::task::spawn_blocking(read).await.unwrap().unwrap();
            assert_eq!((servers.snapshots.len(), servers.failures.len()), (1, 0));
            let server = &servers.snapshots[0];
            assert_eq!(server.pid, process::id());
            assert_eq!(server.volumes[0].op(OpKind::Read).unwrap().count(), expected);
            recorder.record(OpKind::Read, Stage::Total, 20_000);
        }
        drop(socket);
        assert_eq!(fs::read_dir(runtime_dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn readers_that_do_not_read_hold_up_no_more_than_themselves() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Arc::new(Registry::new());
        // More than a socket's buffer holds, so that sending waits for the reader.
        let recorder = registry.volume(&"v".repeat(4 << 20)).recorder();
        recorder.record(OpKind::Read, Stage::Total, 20_000);
        let socket = StatsSocket::start_in(&RuntimeDir::at(dir.path()), registry).unwrap();
        let mut idle = Vec::new();
        for _ in 1..READERS_MAX {
            idle.push(UnixStream::connect(socket.path()).await.unwrap());
        }
        let mut text = String::new();
        let mut reader = UnixStream::connect(socket.path()).await.unwrap();
        let reading = reader.read_to_string(&mut text);
        tokio::time::timeout(SEND_TIMEOUT / 2, reading).await.unwrap().unwrap();
        assert!(text.ends_with("}\n"));
    }

    #[tokio::test]
    async fn replaces_a_dead_socket_but_not_a_living_one() {
        let dir = tempfile::tempdir().unwrap();
        let runtime_dir = RuntimeDir::at(dir.path());
        let path = dir.path().join(socket_name(process::id()));
        drop(StdListener::bind(&path).unwrap());
        let _socket = StatsSocket::start_in(&runtime_dir, Arc::default()).unwrap();
        let error = StatsSocket::start_in(&runtime_dir, Arc::default()).unwrap_err();
        assert!(format!("{error:#}").contains("is in use"), "{error:#}");
        assert!(path.exists());
    }
}
