//! Runs a server from start to end.

use std::cell::Cell;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use sheave_core::Error;
use sheave_nbd::{Export, Limits, LiveExports, Server, ServerConfig, TlsConfig};
use sheave_shard::EngineConfig;
use sheave_telemetry::Registry;
use tokio::task::spawn_blocking;

use super::prepare::{Held, Prepared};
use super::settings::{Fixed, Settings};
use super::tls_watch::TlsWatch;
use crate::commands::NO_PROC;
use crate::commands::serve::Args;
use crate::process::{Asked, HangUp, Insisted, Signals, default_shards};
use crate::systemd::{Notify, Passed};
use crate::telemetry::{MetricsServer, StatsSocket};

/// The most names of exports in a line of the log.
const NAMES_LOGGED: usize = 10;

/// Serves until a signal ends it.
///
/// # Errors
/// When it cannot be started, or a second signal ended it.
pub(crate) async fn serve(args: Args, settings: Settings, passed: Vec<Passed>) -> Result<()> {
    let Settings { fixed, request } = settings;
    let notify = Notify::from_env();
    let reloads = args.config.is_some() || request.tls.is_some() || notify.is_service();
    if !sheave_local::are_holders_visible() {
        tracing::warn!("{NO_PROC}");
    }
    // First, so that a signal never leaves a socket behind.
    let mut signals = Signals::catch(if reloads { HangUp::Reload } else { HangUp::End })?;
    let prepared = tokio::select! {
        // A disk may take its time.
        prepared = spawn_blocking(move || request.prepare(&[])) => prepared??,
        signal = signals.end(|| {}) => {
            tracing::info!("ending: {signal}");
            return Ok(());
        }
    };
    let registry = Arc::new(Registry::new());
    let mut server = start(&fixed, &prepared, &registry)?;
    let _metrics = match &fixed.metrics {
        Some(address) => Some(MetricsServer::start(address, Arc::clone(&registry))?),
        None => None,
    };
    let _stats = show_statistics(registry, server.live_exports());
    // Last, since a client may ask for statistics next.
    let (exports, engine) = (summary(&prepared.exports), server.engine());
    for listener in fixed.addresses.listen(passed)? {
        tracing::info!(exports, listener = listener.name(), engine, "serving");
        server.listen(listener);
    }
    notify.ready();
    let mut state = State::new(args, fixed, prepared);
    let ended = state.until_end(&mut server, &mut signals, &notify).await;
    tracing::info!("ending: {ended}");
    notify.stopping("ending connections");
    drop(state);
    tokio::select! {
        () = server.stop() => Ok(()),
        signal = signals.insisted(|| {}) => {
            let what = "ended it before all connections were done";
            let why = format!("a second signal, {signal}, {what}");
            Err(Insisted(why).into())
        }
    }
}

fn start(fixed: &Fixed, prepared: &Prepared, registry: &Arc<Registry>) -> Result<Server> {
    let shards = fixed.shards.and_then(|shards| usize::try_from(shards).ok());
    let engine = EngineConfig {
        choice: fixed.engine.into(),
        shards: shards.unwrap_or_else(default_shards),
        poll_us: fixed.poll_us,
    };
    let (exports, tls) = (prepared.exports.clone(), prepared.tls.clone());
    let config = ServerConfig { exports, tls, engine, limits: Limits::default() };
    Ok(Server::start(config, registry)?)
}

/// The names of exports for the log, a limited number.
fn summary(exports: &[Export]) -> String {
    let shown = exports.iter().take(NAMES_LOGGED).map(|export| export.name.as_str());
    let shown = shown.collect::<Vec<_>>().join(", ");
    match exports.len().saturating_sub(NAMES_LOGGED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Without the socket it serves nevertheless.
fn show_statistics(registry: Arc<Registry>, exports: LiveExports) -> Option<StatsSocket> {
    StatsSocket::start(registry, exports)
        .inspect_err(|error| tracing::warn!("no statistics for `sheave stats`: {error:#}"))
        .ok()
}

/// The present state, with which a reload compares.
struct State {
    args: Arc<Args>,
    fixed: Fixed,
    held: Vec<Held>,
    tls: Option<TlsWatch>,
}

impl State {
    fn new(args: Args, fixed: Fixed, prepared: Prepared) -> Self {
        let mut state = Self { args: Arc::new(args), fixed, held: Vec::new(), tls: None };
        state.hold(prepared);
        state
    }

    fn hold(&mut self, prepared: Prepared) {
        self.held = prepared.held;
        self.tls = prepared.tls_files.map(|(files, stamps)| TlsWatch::new(files, stamps));
    }

    /// Reloads at signals and takes changed certificates. Returns the signal that asks for the end.
    async fn until_end(
        &mut self,
        server: &mut Server,
        signals: &mut Signals,
        notify: &Notify,
    ) -> &'static str {
        loop {
            tokio::select! {
                asked = signals.next() => match asked {
                    Asked::End(signal) => return signal,
                    Asked::Reload => {
                        notify.reloading("reading the configuration");
                        if let Some(signal) = self.reload(server, signals).await {
                            return signal;
                        }
                        notify.ready();
                    }
                },
                changed = watched(&mut self.tls) => take_tls(changed, &server.live_exports()),
            }
        }
    }

    /// Reloads, and again for a signal that came meanwhile. Returns the signal that ended it.
    async fn reload(&mut self, server: &mut Server, signals: &mut Signals) -> Option<&'static str> {
        loop {
            let again = Cell::new(false);
            tokio::select! {
                () = self.reload_once(server) => {}
                // The end does not wait for a disk that does not answer.
                signal = signals.end(|| again.set(true)) => return Some(signal),
            }
            if !again.get() {
                return None;
            }
        }
    }

    /// Reads and opens all that is requested now. Nothing is changed.
    ///
    /// # Errors
    /// Names what cannot be read or opened.
    async fn prepare(&self) -> Result<(Fixed, Prepared)> {
        let (args, held) = (Arc::clone(&self.args), self.held.clone());
        let prepared = spawn_blocking(move || {
            let Settings { fixed, request } = Settings::read(&args)?;
            Ok((fixed, request.prepare(&held)?))
        });
        prepared.await.context("reload")?
    }

    /// Applies the present configuration, or logs why it cannot.
    async fn reload_once(&mut self, server: &mut Server) {
        let prepared = self.prepare().await;
        let replaced =
            prepared.and_then(|(fixed, prepared)| self.replace(&fixed, prepared, server));
        let (summary, changed) = match replaced {
            Ok(replaced) => replaced,
            Err(error) => {
                return tracing::error!("not reloaded, and all stays as it was: {error:#}");
            }
        };
        let held = self.held.clone();
        let taken_up = spawn_blocking(move || held.iter().for_each(Held::take_up));
        if let Err(error) = taken_up.await {
            tracing::error!(%error, "limits and sizes were not taken up");
        }
        let Summary { exports, opened, closed, ended } = summary;
        tracing::info!(exports, opened, closed, ended_connections = ended, "reloaded");
        if !changed.is_empty() {
            let keys = changed.join(", ");
            tracing::warn!("changed, but a restart is needed for it: {keys}");
        }
    }

    /// Applies prepared exports, in one step. Also returns the keys that need a restart.
    ///
    /// # Errors
    /// When they cannot be exported. Nothing is changed then.
    fn replace(
        &mut self,
        fixed: &Fixed,
        prepared: Prepared,
        server: &mut Server,
    ) -> Result<(Summary, Vec<&'static str>)> {
        let ended = server.replace(prepared.exports.clone(), prepared.tls.clone())?;
        let exports = prepared.held.len();
        let opened = prepared.held.iter().filter(|held| held.is_new()).count();
        let closed = self.held.len() + opened - exports;
        self.hold(prepared);
        Ok((Summary { exports, opened, closed, ended }, self.fixed.changed(fixed)))
    }
}

/// The result of a reload.
struct Summary {
    exports: usize,
    /// Volumes.
    opened: usize,
    closed: usize,
    /// Connections.
    ended: usize,
}

/// Waits for another certificate; for ever without one.
async fn watched(tls: &mut Option<TlsWatch>) -> Result<Arc<TlsConfig>, Error> {
    match tls {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

fn take_tls(changed: Result<Arc<TlsConfig>, Error>, exports: &LiveExports) {
    match changed {
        Ok(tls) => {
            exports.set_tls(tls);
            tracing::info!("TLS files have changed, and new connections use them");
        }
        Err(error) => {
            tracing::warn!("TLS files have changed and are not used, the old ones are: {error}");
        }
    }
}
