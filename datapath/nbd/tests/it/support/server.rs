//! A server on a thread of its own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sheave_core::Volume;
use sheave_nbd::{Access, Export, Limits, Listener, Server, ServerConfig};
use sheave_shard::{EngineChoice, EngineConfig};
use sheave_telemetry::{Registry, VolumeSnapshot};
use sheave_volumes::OpenOptions;
use tempfile::TempDir;
use tokio::sync::oneshot;

use super::GIVEN_UP;

/// How to start a server.
pub(crate) struct Setup {
    pub(crate) engine: EngineChoice,
    pub(crate) shards: usize,
    pub(crate) limits: Limits,
    pub(crate) tls: Option<Arc<rustls::ServerConfig>>,
    pub(crate) volumes: Vec<(String, Arc<dyn Volume>)>,
}

/// A server that serves its volumes over a unix socket and a TCP port. Stops when it is dropped.
pub(crate) struct Running {
    pub(crate) socket: PathBuf,
    pub(crate) address: SocketAddr,
    pub(crate) registry: Arc<Registry>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    _dir: Option<TempDir>,
}

impl Setup {
    /// Serves what a VOLUME text describes.
    pub(crate) fn new(engine: EngineChoice, volume: &str) -> Self {
        let volume = sheave_volumes::open(volume, &OpenOptions::default()).unwrap();
        Self::of(engine, volume)
    }

    /// Serves a volume.
    pub(crate) fn of(engine: EngineChoice, volume: Arc<dyn Volume>) -> Self {
        let volumes = vec![("disk".to_owned(), volume)];
        Self { engine, shards: 2, limits: Limits::default(), tls: None, volumes }
    }

    pub(crate) fn and(mut self, name: &str, volume: Arc<dyn Volume>) -> Self {
        self.volumes.push((name.to_owned(), volume));
        self
    }

    pub(crate) fn start(self) -> Running {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("s");
        let registry = Arc::new(Registry::new());
        let (stop, stopped) = oneshot::channel();
        let (started, start) = mpsc::channel();
        let (path, counters) = (socket.clone(), Arc::clone(&registry));
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut server = self.server(&counters);
                server.listen(Listener::unix(&path).unwrap());
                let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
                started.send(tcp.local_addr().unwrap()).unwrap();
                server.listen(Listener::from_tcp(tcp).unwrap());
                let _ = stopped.await;
                server.stop().await;
            });
        });
        let address = start.recv().expect("the server starts");
        let (stop, thread) = (Some(stop), Some(thread));
        Running { socket, address, registry, stop, thread, _dir: Some(dir) }
    }

    fn server(self, registry: &Arc<Registry>) -> Server {
        let engine = EngineConfig { choice: self.engine, shards: self.shards, poll_us: 20 };
        let exports = self
            .volumes
            .into_iter()
            .map(|(name, volume)| Export {
                description: name.clone(),
                name,
                volume,
                access: Access::default(),
                connections_max: None,
            })
            .collect();
        let config = ServerConfig { exports, tls: self.tls, engine, limits: self.limits };
        Server::start(config, registry).unwrap()
    }
}

impl Running {
    /// Begins to stop it.
    pub(crate) fn begin_stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }

    /// Stops it and returns the time that took.
    pub(crate) fn stop(&mut self) -> Duration {
        let begun = Instant::now();
        self.begin_stop();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server ends well");
        }
        begun.elapsed()
    }

    /// Another view of it, which does not stop it.
    pub(crate) fn peek(&self) -> Self {
        let (socket, registry) = (self.socket.clone(), Arc::clone(&self.registry));
        Self { socket, address: self.address, registry, stop: None, thread: None, _dir: None }
    }

    /// Its counters of a volume.
    pub(crate) fn counted(&self, name: &str) -> VolumeSnapshot {
        let all = self.registry.snapshot();
        all.into_iter().find(|volume| volume.name == name).expect("a volume of that name")
    }

    /// Connections in their transmission phase.
    pub(crate) fn connections(&self) -> i64 {
        self.registry.snapshot().iter().map(|volume| volume.gauges.connections).sum()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Its threads end with the process.
            return;
        }
        let took = self.stop();
        assert!(took < GIVEN_UP, "stopping took {took:?}");
    }
}
