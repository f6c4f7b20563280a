//! The statistics of all serving processes of this user.

use std::fs;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::{Deserialize, Serialize};
use sheave_core::printable;
use sheave_telemetry::{Registry, VolumeSnapshot};
use sheave_volumes::{ObjectStatus, object_statuses};

use super::exports::ExportEntry;
use super::runtime_dir::RuntimeDir;

/// The form of [`ServerSnapshot`]; changes whenever an older reader would misread it.
const VERSION: u32 = 1;
/// How long a server may take to begin, and between two pieces.
const READ_TIMEOUT: Duration = Duration::from_secs(2);
/// The longest snapshot that is read.
const SNAPSHOT_MAX: u64 = 64 << 20;

/// The answer of a serving process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ServerSnapshot {
    version: u32,
    /// The process.
    pub(crate) pid: u32,
    /// Name and version of its program.
    pub(crate) program: String,
    /// The time for which it has counted, by its own monotonic clock.
    pub(crate) uptime_ms: u64,
    /// Its counters.
    pub(crate) volumes: Vec<VolumeSnapshot>,
    /// Its exports; older releases do not send them.
    #[serde(default)]
    pub(crate) exports: Vec<ExportEntry>,
    /// Its object volumes; older releases do not send them.
    #[serde(default)]
    pub(crate) objects: Vec<ObjectStatus>,
}

impl ServerSnapshot {
    /// The snapshot of this process.
    pub(crate) fn of(registry: &Registry, uptime: Duration) -> Self {
        Self {
            version: VERSION,
            pid: process::id(),
            program: concat!("sheave ", env!("CARGO_PKG_VERSION")).to_owned(),
            uptime_ms: uptime.as_millis().try_into().unwrap_or(u64::MAX),
            volumes: registry.snapshot(),
            exports: Vec::new(),
            objects: object_statuses(),
        }
    }

    /// The same with these exports.
    pub(crate) fn with_exports(self, exports: Vec<ExportEntry>) -> Self {
        Self { exports, ..self }
    }

    /// One line of JSON.
    pub(crate) fn to_json(&self) -> String {
        let text = serde_json::to_string(self).expect("its keys are strings, its numbers finite");
        text + "\n"
    }

    /// The reverse of [`Self::to_json`].
    fn from_json(text: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let Head { version } = serde_json::from_str(text).context("not statistics of sheave")?;
        ensure!(
            version == VERSION,
            "it tells statistics in version {version}, this program knows version {VERSION}; \
             use the same release as the server"
        );
        serde_json::from_str(text).context("not statistics of sheave")
    }

    pub(crate) fn uptime(&self) -> Duration {
        Duration::from_millis(self.uptime_ms)
    }
}

/// The answers of all serving processes of this user.
#[derive(Debug, Default)]
pub(crate) struct Servers {
    /// In the order of their process ids.
    pub(crate) snapshots: Vec<ServerSnapshot>,
    /// One message for each that runs but did not answer.
    pub(crate) failures: Vec<anyhow::Error>,
}

impl Servers {
    /// Queries all of them. Sockets of dead processes are removed.
    ///
    /// # Errors
    /// When there is none, or none answers.
    pub(crate) fn read() -> Result<Self> {
        Self::read_in(&RuntimeDir::locate())
    }

    pub(crate) fn read_in(dir: &RuntimeDir) -> Result<Self> {
        let mut servers = Self::default();
        for (pid, path) in sockets(dir)? {
            match ask(&path) {
                Ok(Some(snapshot)) => servers.snapshots.push(snapshot),
                Ok(None) => {}
                Err(error) => {
                    let error = error.context(format!("no statistics from process {pid}"));
                    servers.failures.push(error);
                }
            }
        }
        if !servers.snapshots.is_empty() {
            return Ok(servers);
        }
        Err(servers.failures.pop().unwrap_or_else(|| {
            anyhow!(
                "no server of this user runs (looked in {}); start one with `sheave serve VOLUME`, \
                 or set SHEAVE_RUNTIME_DIR to what it was started with",
                printable(&dir.path())
            )
        }))
    }

    /// The object volumes of all of them.
    pub(crate) fn objects(&self) -> impl Iterator<Item = &ObjectStatus> {
        self.snapshots.iter().flat_map(|server| &server.objects)
    }

    /// Keeps one volume; servers without it disappear.
    ///
    /// # Errors
    /// When no server has it.
    pub(crate) fn retain_volume(&mut self, name: &str) -> Result<()> {
        let volumes = self.snapshots.iter().flat_map(|server| &server.volumes);
        let names: Vec<_> = volumes.map(|volume| format!("{:?}", volume.name)).collect();
        for server in &mut self.snapshots {
            server.volumes.retain(|volume| volume.name == name);
            server.exports.retain(|export| export.name == name);
            // Their names are not those of exports.
            server.objects.clear();
        }
        self.snapshots.retain(|server| !server.volumes.is_empty());
        if !self.snapshots.is_empty() {
            return Ok(());
        }
        let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        bail!("volume {name:?} is not served; volumes served: {there}")
    }
}

/// The state of a socket file.
pub(super) enum Probe {
    /// A process listens.
    Answers(UnixStream),
    /// Nothing, or the socket of a process that is gone.
    Dead,
}

/// Connects without waiting, even if the server is stopped and its backlog full.
pub(super) fn probe(path: &Path) -> Result<Probe> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) => Ok(Probe::Answers(UnixStream::from(socket))),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(Probe::Dead),
        Err(Errno::AGAIN) => bail!("it does not answer; it may be stopped or overloaded"),
        Err(errno) => Err(io::Error::from(errno).into()),
    }
}

/// The name of a process's socket.
pub(super) fn socket_name(pid: u32) -> String {
    format!("serve-{pid}.sock")
}

/// The sockets in a directory, in the order of their processes.
fn sockets(dir: &RuntimeDir) -> Result<Vec<(u32, PathBuf)>> {
    if !dir.exists()? {
        return Ok(Vec::new());
    }
    let what = || format!("cannot read directory {}", printable(&dir.path()));
    let mut found = Vec::new();
    for entry in fs::read_dir(dir.path()).with_context(what)? {
        let entry = entry.with_context(what)?;
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix("serve-")?.strip_suffix(".sock"));
        if let Some(pid) = pid.and_then(|pid| pid.parse().ok()) {
            found.push((pid, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// Queries one server; `None` if it is gone.
fn ask(path: &Path) -> Result<Option<ServerSnapshot>> {
    let Probe::Answers(stream) = probe(path)? else {
        // Another reader may have been faster, and then there is nothing to remove.
        let _ = fs::remove_file(path);
        return Ok(None);
    };
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(READ_TIMEOUT))?;
    let mut text = String::new();
    match stream.take(SNAPSHOT_MAX).read_to_string(&mut text) {
        Ok(0) => Ok(None),
        Ok(_) => ServerSnapshot::from_json(&text).map(Some),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            bail!("it did not answer in {} s; it may be stopped", READ_TIMEOUT.as_secs())
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    fn snapshot(pid: u32, volumes: &[&str]) -> ServerSnapshot {
        let registry = Registry::new();
        for name in volumes {
            registry.volume(name);
        }
        ServerSnapshot { pid, ..ServerSnapshot::of(&registry, Duration::from_secs(1)) }
    }

    /// Listens as process `pid` would and sends `text` once.
    fn tell(dir: &Path, pid: u32, text: String) -> thread::JoinHandle<()> {
        let listener = UnixListener::bind(dir.join(socket_name(pid))).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(text.as_bytes()).unwrap();
        })
    }

    #[test]
    fn all_living_servers_are_read_and_dead_sockets_removed() {
        let dir = tempfile::tempdir().unwrap();
        let told = [snapshot(20, &["b"]), snapshot(3, &["a"])];
        let servers = told.clone().map(|server| tell(dir.path(), server.pid, server.to_json()));
        let dead = dir.path().join(socket_name(7));
        drop(UnixListener::bind(&dead).unwrap());
        fs::write(dir.path().join("serve-x.sock"), "not ours").unwrap();

        let read = Servers::read_in(&RuntimeDir::at(dir.path())).unwrap();
        let [twenty, three] = told;
        assert_eq!(read.snapshots, [three, twenty]);
        assert!(read.failures.is_empty());
        assert!(!dead.exists());
        assert!(dir.path().join("serve-x.sock").exists());
        servers.into_iter().for_each(|server| server.join().unwrap());
    }

    #[test]
    fn without_a_server_the_error_tells_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path(), &dir.path().join("missing")] {
            let error = Servers::read_in(&RuntimeDir::at(path)).unwrap_err().to_string();
            assert!(error.contains("start one with `sheave serve VOLUME`"), "{error}");
        }
    }

    #[test]
    fn a_server_of_another_release_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let good = tell(dir.path(), 1, snapshot(1, &[]).to_json());
        let newer = tell(dir.path(), 2, "{\"version\": 2, \"all\": \"new\"}".to_owned());
        let garbage = tell(dir.path(), 3, "hello".to_owned());
        let read = Servers::read_in(&RuntimeDir::at(dir.path())).unwrap();
        assert_eq!(read.snapshots.len(), 1);
        let failures: Vec<_> = read.failures.iter().map(|error| format!("{error:#}")).collect();
        assert!(failures[0].starts_with("no statistics from process 2: it tells"), "{failures:?}");
        assert!(failures[1].contains("process 3: not statistics of sheave"), "{failures:?}");
        [good, newer, garbage].into_iter().for_each(|server| server.join().unwrap());
    }

    #[test]
    fn a_server_that_does_not_answer_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let _stopped = UnixListener::bind(dir.path().join(socket_name(1))).unwrap();
        let error = Servers::read_in(&RuntimeDir::at(dir.path())).unwrap_err();
        assert!(format!("{error:#}").contains("did not answer in 2 s"), "{error:#}");
    }

    #[test]
    fn a_volume_is_found_wherever_it_is_served() {
        let snapshots = vec![snapshot(1, &["a", "b"]), snapshot(2, &["b"]), snapshot(3, &["c"])];
        let mut servers = Servers { snapshots, ..Servers::default() };
        let error = servers.retain_volume("d").unwrap_err().to_string();
        assert!(error.ends_with("volumes served: \"a\", \"b\", \"b\", \"c\""), "{error}");

        let snapshots = vec![snapshot(1, &["a", "b"]), snapshot(2, &["b"]), snapshot(3, &["c"])];
        let mut servers = Servers { snapshots, ..Servers::default() };
        servers.retain_volume("b").unwrap();
        let left: Vec<_> = servers.snapshots.iter().map(|s| (s.pid, s.volumes.len())).collect();
        assert_eq!(left, [(1, 1), (2, 1)]);
    }
}
