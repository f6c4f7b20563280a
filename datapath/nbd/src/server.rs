//! The server: accepts, negotiates within bounds, and hands connections to the engine.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig as TlsConfig;
use sheave_core::{Error, ErrorKind, Volume};
use sheave_proto::{ExportInfo, Exports, TlsMode};
use sheave_shard::{Assignment, Clock, Engine, EngineConfig, STOP_GRACE, Served};
use sheave_telemetry::{Registry, VolumeStats};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::accept_errors::AcceptErrors;
use crate::admission::Bounds;
use crate::gate::{Gate, Place};
use crate::handshake::{Agreed, Failure, negotiate};
use crate::listener::Listener;
use crate::logged::LoggedSession;
use crate::session::NbdSession;
use crate::stream::Stream;
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

/// Bounds on what clients can take. Clients beyond them wait in the listen queue. One address, IPv6
/// network (/64) or local user gets at most seven eighths of the places.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Time from the connection to the end of the handshake, in milliseconds.
    pub handshake_timeout_ms: u64,
    /// Connections that have not negotiated yet. When there are more, one that has been silent for
    /// three seconds makes room.
    pub negotiating_max: usize,
    /// Connections in all.
    pub connections_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { handshake_timeout_ms: 10_000, negotiating_max: 1152, connections_max: 16_384 }
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
    handshake_timeout: Duration,
    gate: Arc<Gate>,
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
        let mut names = HashSet::with_capacity(exports.len());
        for export in exports {
            let fail =
                |what| Error::new(ErrorKind::Invalid, "export", format!("{}: {what}", export.name));
            if !names.insert(export.name.clone()) {
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
            handshake_timeout: Duration::from_millis(limits.handshake_timeout_ms),
            gate: Gate::new(Bounds {
                negotiating: limits.negotiating_max,
                connections: limits.connections_max,
            }),
        });
        Ok(Self { shared, stopping: watch::Sender::new(false), listeners: JoinSet::new() })
    }

    /// Accepts clients of this listener from now on.
    pub fn listen(&mut self, listener: Listener) {
        let (shared, mut stopping) = (Arc::clone(&self.shared), self.stopping.subscribe());
        self.listeners.spawn(async move {
            let mut clients = JoinSet::new();
            tokio::select! {
                () = stopped(&mut stopping) => {}
                () = shared.accept(&listener, &mut clients) => {}
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
    /// Accepts and negotiates until it is dropped.
    async fn accept(self: &Arc<Self>, listener: &Listener, clients: &mut JoinSet<()>) {
        let mut errors = AcceptErrors::new(listener.name());
        loop {
            // Kept while tasks end, so that this listener does not lose its turn.
            let next = self.gate.next(listener, &mut errors);
            tokio::pin!(next);
            let (stream, place) = loop {
                tokio::select! {
                    accepted = &mut next => break accepted,
                    Some(_) = clients.join_next() => {}
                }
            };
            let id = place.id();
            let task = clients.spawn(Arc::clone(self).serve(stream, place));
            self.gate.attach(id, task);
        }
    }

    /// Negotiates with a client and hands it over.
    async fn serve(self: Arc<Self>, stream: Stream, mut place: Place) {
        let peer = stream.peer();
        let mode = if self.tls.is_some() { TlsMode::Forced } else { TlsMode::Off };
        let talk = negotiate(stream, &peer, &self.exports, self.tls.as_ref(), mode);
        let error = match tokio::time::timeout(self.handshake_timeout, talk).await {
            Ok(Ok(Some(agreed))) => return self.hand_over(peer, agreed, place),
            Ok(Ok(None)) => return place.leaves_in_order(),
            Ok(Err(Failure::Left)) => {
                return tracing::debug!(peer, "the client left without a byte");
            }
            Ok(Err(Failure::Failed(error))) => error.to_string(),
            Err(_) => format!("timed out after {} ms", self.handshake_timeout.as_millis()),
        };
        match self.gate.fault() {
            Some(more) => tracing::info!(peer, error, more, "handshake failed"),
            None => tracing::debug!(peer, error, "handshake failed"),
        }
    }

    fn hand_over(&self, peer: String, agreed: Agreed, mut place: Place) {
        if !place.establish() {
            return tracing::debug!(peer, "its place was given away");
        }
        let Agreed { socket, negotiated, tls, early } = agreed;
        let (export, stats) = &self.exports.0[negotiated.export];
        let (name, style) = (export.name.as_str(), negotiated.style);
        tracing::debug!(peer, export = name, ?style, tls = negotiated.tls, "connection opened");
        let session = NbdSession::new(negotiated, tls.map(TlsStream::new), early);
        let session = LoggedSession::new(session, peer.clone(), export.name.clone(), place);
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
