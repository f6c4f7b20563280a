//! The server: accepts, negotiates within bounds, and hands connections to the engine.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use rustls::ServerConfig as TlsConfig;
use sheave_core::{Error, ErrorKind, Volume};
use sheave_proto::{ExportInfo, Exports, TlsMode};
use sheave_shard::{Assignment, Clock, Engine, EngineConfig, STOP_GRACE, Served};
use sheave_telemetry::{Registry, VolumeStats};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::handshake::{Agreed, negotiate};
use crate::listener::{Listener, Stream};
use crate::logged::LoggedSession;
use crate::session::NbdSession;
use crate::tls::TlsStream;

/// Stopping that takes no longer is not worth a line.
const STOP_AT_ONCE: Duration = Duration::from_millis(200);

/// A volume under a name.
pub struct Export {
    /// What clients ask for.
    pub name: String,
    /// What people are told about it.
    pub description: String,
    /// The volume.
    pub volume: Arc<dyn Volume>,
}

/// Bounds on what clients can take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Time from the connection to the end of the handshake, in milliseconds.
    pub handshake_timeout_ms: u64,
    /// Connections that have not negotiated yet; one more is closed at once.
    pub negotiating_max: usize,
    /// Connections in all; one more is closed at once.
    pub connections_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { handshake_timeout_ms: 10_000, negotiating_max: 128, connections_max: 16_384 }
    }
}

/// What a server is made of.
pub struct ServerConfig {
    /// A single one is also the default export; among several there is none.
    pub exports: Vec<Export>,
    /// With it, clients must use TLS (proto.md: FORCEDTLS).
    pub tls: Option<Arc<TlsConfig>>,
    /// How connections are run.
    pub engine: EngineConfig,
    /// Bounds.
    pub limits: Limits,
}

/// A running server.
pub struct Server {
    shared: Arc<Shared>,
    stopping: watch::Sender<bool>,
    listeners: JoinSet<()>,
}

struct Shared {
    exports: ExportList,
    tls: Option<TlsAcceptor>,
    engine: Engine,
    limits: Limits,
    negotiating: Arc<Semaphore>,
    refused: AtomicUsize,
}

struct ExportList(Vec<(Export, Arc<VolumeStats>)>);

impl Server {
    /// Starts the engine. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// When two exports share a name, or the engine cannot be had.
    pub fn start(config: ServerConfig, registry: &Registry) -> Result<Self, Error> {
        let ServerConfig { exports, tls, engine, limits } = config;
        let mut list: Vec<(Export, Arc<VolumeStats>)> = Vec::with_capacity(exports.len());
        for export in exports {
            let fail =
                |what| Error::new(ErrorKind::Invalid, "export", format!("{}: {what}", export.name));
            if list.iter().any(|(other, _)| other.name == export.name) {
                return Err(fail("two volumes have this name; give each its own by --name"));
            }
            let (info, size) = (export.volume.info(), export.volume.size());
            sheave_proto::check_exportable(info, size).map_err(fail)?;
            let stats = registry.volume(&export.name);
            list.push((export, stats));
        }
        let engine = Engine::start(engine, Clock::start())?;
        let shared = Arc::new(Shared {
            exports: ExportList(list),
            tls: tls.map(TlsAcceptor::from),
            engine,
            limits,
            negotiating: Arc::new(Semaphore::new(limits.negotiating_max)),
            refused: AtomicUsize::new(0),
        });
        Ok(Self { shared, stopping: watch::Sender::new(false), listeners: JoinSet::new() })
    }

    /// Accepts clients of this listener from now on.
    pub fn listen(&mut self, listener: Listener) {
        let (shared, mut stopping) = (Arc::clone(&self.shared), self.stopping.subscribe());
        self.listeners.spawn(async move {
            let mut clients = JoinSet::new();
            loop {
                tokio::select! {
                    () = stopped(&mut stopping) => break,
                    Some(_) = clients.join_next() => {}
                    accepted = listener.accept() => match accepted {
                        Ok(stream) => shared.admit(stream, &mut clients),
                        Err(error) => back_off(&listener, &error).await,
                    },
                }
            }
            clients.shutdown().await;
        });
    }

    /// The engine, for people.
    #[must_use]
    pub fn engine(&self) -> String {
        let text = self.shared.engine.to_string();
        // In which mode a ring runs is a matter for those who look into the node.
        match text.split_once(" (") {
            Some((ring, _)) if ring.starts_with("io_uring") => ring.to_owned(),
            _ => text,
        }
    }

    /// Stops accepting, lets requests in flight end (within a bound), closes everything.
    pub async fn stop(mut self) {
        self.stopping.send_replace(true);
        while self.listeners.join_next().await.is_some() {}
        let Some(Shared { engine, exports, .. }) = Arc::into_inner(self.shared) else {
            return tracing::warn!("a client was still being negotiated with");
        };
        let mut stopped = tokio::task::spawn_blocking(move || engine.stop());
        let outcome = match tokio::time::timeout(STOP_AT_ONCE, &mut stopped).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let (busy, wait_s) = (exports.connections(), STOP_GRACE.as_secs());
                tracing::info!("waiting up to {wait_s} s for {busy} connections that are busy");
                stopped.await
            }
        };
        if let Err(error) = outcome {
            tracing::error!(%error, "the engine did not stop in order");
        }
    }
}

impl Shared {
    /// Negotiates with a new client, if there is room for it.
    fn admit(self: &Arc<Self>, stream: Stream, clients: &mut JoinSet<()>) {
        let peer = stream.peer();
        let full = self.engine.connections() >= self.limits.connections_max;
        let Some(permit) = Arc::clone(&self.negotiating).try_acquire_owned().ok().filter(|_| !full)
        else {
            let refused = self.refused.fetch_add(1, Relaxed) + 1;
            return tracing::warn!(peer, refused, "too many connections, one more was closed");
        };
        let shared = Arc::clone(self);
        clients.spawn(async move {
            let timeout_ms = shared.limits.handshake_timeout_ms;
            let mode = if shared.tls.is_some() { TlsMode::Forced } else { TlsMode::Off };
            let talk = negotiate(stream, &peer, &shared.exports, shared.tls.as_ref(), mode);
            match tokio::time::timeout(Duration::from_millis(timeout_ms), talk).await {
                Err(_) => tracing::info!(peer, timeout_ms, "handshake timed out"),
                Ok(Err(error)) => tracing::info!(peer, %error, "handshake failed"),
                Ok(Ok(None)) => {}
                Ok(Ok(Some(agreed))) => shared.hand_over(peer, agreed),
            }
            drop(permit);
        });
    }

    fn hand_over(&self, peer: String, agreed: Agreed) {
        let Agreed { socket, negotiated, tls, early } = agreed;
        let (export, stats) = &self.exports.0[negotiated.export];
        let (name, style) = (export.name.as_str(), negotiated.style);
        tracing::debug!(peer, export = name, ?style, tls = negotiated.tls, "connection opened");
        let session = NbdSession::new(negotiated, tls.map(TlsStream::new), early);
        let session = LoggedSession::new(session, peer.clone(), export.name.clone());
        let served = self.engine.serve(Assignment {
            socket,
            session: Box::new(session),
            served: Served { volume: Arc::clone(&export.volume), stats: Arc::clone(stats) },
            name: None,
        });
        if let Err(error) = served {
            tracing::warn!(peer, export = name, %error, "connection refused");
        }
    }
}

impl ExportList {
    /// Connections being served.
    fn connections(&self) -> i64 {
        self.0.iter().map(|(_, stats)| stats.snapshot().gauges.connections).sum()
    }
}

impl Exports for ExportList {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn export(&self, index: usize) -> Option<ExportInfo<'_>> {
        self.0.get(index).map(|(export, _)| ExportInfo {
            name: &export.name,
            description: &export.description,
            size: export.volume.size(),
            info: export.volume.info(),
            tls_only: false,
        })
    }
}

async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // An error means that the server is gone, which is as good.
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// Accepting fails for want of descriptors or memory, which takes a while to mend.
async fn back_off(listener: &Listener, error: &io::Error) {
    tracing::warn!(%error, listener = listener.name(), "cannot accept");
    tokio::time::sleep(Duration::from_millis(100)).await;
}
