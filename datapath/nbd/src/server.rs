//! The server: accepts, negotiates within bounds, and hands connections to the engine.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustls::ServerConfig as TlsConfig;
use sheave_core::Error;
use sheave_shard::{Assignment, Clock, Ending, Engine, EngineConfig, STOP_GRACE, Served};
use sheave_telemetry::Registry;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use crate::accept_errors::AcceptErrors;
use crate::acceptor::{Acceptor, ClientSlot};
use crate::admission::Bounds;
use crate::connections::Connection;
use crate::exports::{Export, ExportSet, ExportState, LiveExport, LiveExports};
use crate::handshake::{Agreed, Failure, negotiate};
use crate::listener::Listener;
use crate::session::NbdSession;
use crate::stream::Stream;
use crate::tls::TlsStream;

/// A stop that takes longer is logged.
const STOP_AT_ONCE: Duration = Duration::from_millis(200);
/// How often to check whether connections have ended.
const SEE_OFF_PERIOD: Duration = Duration::from_millis(50);

/// Bounds for clients. Clients beyond them wait in the listen queue. One address, IPv6 network
/// (/64) or local user gets at most seven eighths of the slots.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Time from the connection to the end of the handshake, in milliseconds.
    pub handshake_timeout_ms: u64,
    /// Connections that have not negotiated yet. When there are more, a client that has been silent
    /// for three seconds is evicted.
    pub negotiating_max: usize,
    /// Connections in all.
    pub connections_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { handshake_timeout_ms: 10_000, negotiating_max: 1152, connections_max: 16_384 }
    }
}

/// The configuration of a server.
pub struct ServerConfig {
    /// The only one that a client may use is its default export; among several there is none.
    pub exports: Vec<Export>,
    /// With it, clients must use TLS (proto.md: FORCEDTLS).
    pub tls: Option<Arc<TlsConfig>>,
    /// The engine that runs connections.
    pub engine: EngineConfig,
    /// Bounds.
    pub limits: Limits,
}

/// A running server.
pub struct Server {
    shared: Arc<Shared>,
    stopping: watch::Sender<bool>,
    /// Tasks of listeners, and of connections that a reload ends.
    tasks: JoinSet<()>,
}

struct Shared {
    live: LiveExports,
    registry: Arc<Registry>,
    engine: Engine,
    /// Keys of connections in the engine.
    next_id: AtomicU64,
    handshake_timeout: Duration,
    acceptor: Arc<Acceptor>,
}

impl Server {
    /// Starts the engine. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// When two exports share a name, or the engine cannot be started.
    pub fn start(config: ServerConfig, registry: &Arc<Registry>) -> Result<Self, Error> {
        let ServerConfig { exports, tls, engine, limits } = config;
        let live = LiveExports::new(ExportSet::new(exports, None, registry)?, tls);
        let engine = Engine::start(engine, Clock::start())?;
        let shared = Arc::new(Shared {
            live,
            registry: Arc::clone(registry),
            engine,
            next_id: AtomicU64::new(0),
            handshake_timeout: Duration::from_millis(limits.handshake_timeout_ms),
            acceptor: Acceptor::new(Bounds {
                negotiating: limits.negotiating_max,
                connections: limits.connections_max,
            }),
        });
        Ok(Self { shared, stopping: watch::Sender::new(false), tasks: JoinSet::new() })
    }

    /// Accepts clients of this listener from now on.
    pub fn listen(&mut self, listener: Listener) {
        let (shared, mut stopping) = (Arc::clone(&self.shared), self.stopping.subscribe());
        self.tasks.spawn(async move {
            let mut clients = JoinSet::new();
            tokio::select! {
                () = stopped(&mut stopping) => {}
                () = shared.accept(&listener, &mut clients) => {}
            }
            clients.shutdown().await;
        });
    }

    /// The exports, with their clients.
    #[must_use]
    pub fn live_exports(&self) -> LiveExports {
        self.shared.live.clone()
    }

    /// Offers these exports and this certificate from now on. Exports whose volume is offered
    /// already keep their connections, even under another name. Connections of volumes that are not
    /// offered any more, and those of clients that may not use theirs any more, finish their
    /// requests in flight and are closed, after [`STOP_GRACE`] at the latest. Returns their number.
    ///
    /// # Errors
    /// When two exports share a name, or one cannot be offered. Nothing is changed then.
    pub fn replace(
        &mut self,
        exports: Vec<Export>,
        tls: Option<Arc<TlsConfig>>,
    ) -> Result<usize, Error> {
        let Shared { live, registry, engine, .. } = &*self.shared;
        let before = live.current().exports;
        let now = ExportSet::new(exports, Some(&before), registry)?;
        let refused = before.not_allowed(&now);
        live.replace(now, tls);
        drop(before);
        engine.end(refused.iter().map(|one| one.id).collect(), Ending::InOrder);
        let count = refused.len();
        let ended = refused.iter().map(Arc::downgrade).collect();
        drop(refused);
        // Tasks of earlier reloads that have ended.
        while self.tasks.try_join_next().is_some() {}
        let (shared, stopping) = (Arc::clone(&self.shared), self.stopping.subscribe());
        self.tasks.spawn(shared.see_off(ended, stopping));
        Ok(count)
    }

    /// A description of the engine, for people.
    #[must_use]
    pub fn engine(&self) -> String {
        let text = self.shared.engine.to_string();
        // The mode of a ring is a detail for `sheave doctor`.
        match text.split_once(" (") {
            Some((ring, _)) if ring.starts_with("io_uring") => ring.to_owned(),
            _ => text,
        }
    }

    /// Stops accepting, lets requests in flight complete (within a bound), closes everything.
    pub async fn stop(mut self) {
        self.stopping.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
        let Some(Shared { engine, live, .. }) = Arc::into_inner(self.shared) else {
            return tracing::warn!("a client was still being negotiated with");
        };
        let mut stopped = stop_apart(engine);
        let outcome = match tokio::time::timeout(STOP_AT_ONCE, &mut stopped).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let (busy, wait_s) = (live.current().exports.connections(), STOP_GRACE.as_secs());
                if busy > 0 {
                    tracing::info!("waiting up to {wait_s} s for {busy} connections that are busy");
                }
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
            let next = self.acceptor.next(listener, &mut errors);
            tokio::pin!(next);
            let (stream, slot) = loop {
                tokio::select! {
                    accepted = &mut next => break accepted,
                    Some(_) = clients.join_next() => {}
                }
            };
            let id = slot.id();
            let task = clients.spawn(Arc::clone(self).serve(stream, slot));
            self.acceptor.attach(id, task);
        }
    }

    /// Negotiates with a client and hands it over.
    async fn serve(self: Arc<Self>, stream: Stream, mut slot: ClientSlot) {
        let peer = stream.peer();
        let state = self.live.current();
        let talk = negotiate(stream, &peer, &state, &self.acceptor);
        let error = match tokio::time::timeout(self.handshake_timeout, talk).await {
            Ok(Ok(Some(agreed))) => return self.hand_over(peer, &state, agreed, slot),
            Ok(Ok(None)) => return slot.leaves_in_order(),
            Ok(Err(Failure::Left)) => {
                return tracing::debug!(peer, "the client left without a byte");
            }
            Ok(Err(Failure::Failed(error))) => error.to_string(),
            Err(_) => format!("timed out after {} ms", self.handshake_timeout.as_millis()),
        };
        match self.acceptor.fault() {
            Some(more) => tracing::info!(peer, error, more, "handshake failed"),
            None => tracing::debug!(peer, error, "handshake failed"),
        }
    }

    /// Hands a negotiated client to the engine, unless its export has been removed meanwhile.
    fn hand_over(&self, peer: String, state: &ExportState, agreed: Agreed, mut slot: ClientSlot) {
        if !slot.establish() {
            return tracing::debug!(peer, "evicted for another client");
        }
        let Agreed { socket, negotiated, tls, early, client } = agreed;
        let Some(chosen) = state.exports.get(negotiated.export) else { return };
        let name = chosen.export.name.as_str();
        let now = self.live.current().exports;
        // A renamed export is not the one that the client asked for.
        let is_same =
            |now: &&LiveExport| now.export.name == name && now.export.access.permits(&client);
        let Some(now) = now.counterpart(chosen).filter(is_same) else {
            return tracing::info!(peer, export = name, "removed during the handshake");
        };
        if !now.has_room() {
            return tracing::info!(peer, export = name, "no room for another connection");
        }
        let (style, certificate) = (negotiated.style, client.names.first().cloned());
        let is_tls = negotiated.tls;
        tracing::debug!(
            peer,
            export = name,
            ?style,
            tls = is_tls,
            certificate,
            "connection opened"
        );
        let id = self.next_id.fetch_add(1, Relaxed);
        let attached = chosen.users.attach(id, Some(slot), peer.clone(), client, name);
        let session = NbdSession::new(negotiated, tls.map(TlsStream::new), early, Some(attached));
        let (volume, stats) = (Arc::clone(&chosen.export.volume), Arc::clone(&chosen.users.stats));
        let served = self.engine.serve(Assignment {
            socket,
            session: Box::new(session),
            served: Served::new(volume, stats),
            key: Some(id),
        });
        if let Err(error) = served {
            tracing::warn!(peer, export = name, %error, "connection refused");
        }
    }

    /// Waits until these connections have ended, then forgets counters of volumes that nothing uses
    /// any more.
    async fn see_off(
        self: Arc<Self>,
        mut ended: Vec<Weak<Connection>>,
        mut stopping: watch::Receiver<bool>,
    ) {
        let begun = Instant::now();
        let mut is_cut = false;
        loop {
            ended.retain(|one| one.strong_count() > 0);
            if ended.is_empty() {
                return self.registry.forget_unused();
            }
            if !is_cut && begun.elapsed() > STOP_GRACE {
                is_cut = true;
                let left: HashSet<_> =
                    ended.iter().filter_map(Weak::upgrade).map(|one| one.id).collect();
                let (count, grace_s) = (left.len(), STOP_GRACE.as_secs());
                tracing::info!(count, grace_s, "connections closed that took too long to end");
                self.engine.end(left, Ending::AtOnce);
            }
            tokio::select! {
                () = stopped(&mut stopping) => return,
                () = tokio::time::sleep(SEE_OFF_PERIOD) => {}
            }
        }
    }
}

/// Stops the engine in a thread of its own; in this one if there is no memory for another.
fn stop_apart(engine: Engine) -> oneshot::Receiver<()> {
    let (done, stopped) = oneshot::channel();
    let job = Arc::new(Mutex::new(Some((engine, done))));
    let stop = |job: &Mutex<Option<(Engine, oneshot::Sender<()>)>>| {
        let job = job.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((engine, done)) = job {
            engine.stop();
            // The receiver lives longer than this.
            let _ = done.send(());
        }
    };
    let theirs = Arc::clone(&job);
    let spawned = thread::Builder::new().name("stop".to_owned()).spawn(move || stop(&theirs));
    if spawned.is_err() {
        stop(&job);
    }
    stopped
}

async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // An error means that the server is gone.
    let _ = stopping.wait_for(|stop| *stop).await;
}

#[cfg(test)]
mod tests {
    use sheave_shard::EngineChoice;
    use tokio::runtime::Builder;
    use tokio::task::yield_now;

    use super::*;

    #[test]
    fn replacements_leave_nothing_behind() {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let engine = EngineConfig { choice: EngineChoice::Threads, shards: 1, poll_us: 0 };
            let (exports, limits) = (Vec::new(), Limits::default());
            let config = ServerConfig { exports, tls: None, engine, limits };
            let mut server = Server::start(config, &Arc::new(Registry::new())).unwrap();
            for _ in 0..50 {
                assert_eq!(server.replace(Vec::new(), None).unwrap(), 0);
                yield_now().await;
            }
            assert!(server.tasks.len() < 5, "{} tasks", server.tasks.len());
            server.stop().await;
        });
    }
}
