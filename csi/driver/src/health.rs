//! Liveness and readiness over HTTP, for a kubelet's probes.
//!
//! `/healthz` says whether a restart of the plugin would help: its socket does not answer. What is
//! wrong with daemon, pools or storage is none of that. `/readyz` says whether it can work: it is
//! registered, and its daemon answers.

use std::path::Path;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderName, StatusCode};
use axum::routing::get;
use sheave_control::{VolumesClient, channel};
use sheave_csi_proto::v1::GetPluginInfoRequest;
use sheave_csi_proto::v1::identity_client::IdentityClient;
use tokio::time::timeout;
use tonic::transport::Channel;

use crate::control;
use crate::metrics::Metrics;
use crate::registration::Registered;

/// How soon the plugin's own socket must answer. A node that has too much to do gains nothing from
/// a restart of the plugin.
const LIVE_TIMEOUT: Duration = Duration::from_secs(15);

/// What scrapers read (OpenMetrics).
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the probes ask.
#[derive(Clone)]
pub(crate) struct Health {
    identity: IdentityClient<Channel>,
    volumes: VolumesClient,
    metrics: Metrics,
    /// `None` where no kubelet is to register the plugin.
    registered: Option<Registered>,
}

impl Health {
    /// Of the plugin whose own socket is at this path.
    pub(crate) fn new(
        socket: &Path,
        volumes: VolumesClient,
        metrics: Metrics,
        registered: Option<Registered>,
    ) -> Self {
        let identity = IdentityClient::new(channel(socket));
        Self { identity, volumes, metrics, registered }
    }

    /// The pages `/healthz` and `/readyz`, and `/metrics`.
    pub(crate) fn router(self) -> Router {
        let pages = Router::new().route("/healthz", get(live)).route("/readyz", get(ready));
        pages.route("/metrics", get(metrics)).with_state(self)
    }

    async fn live(&self) -> Result<(), &'static str> {
        let mut identity = self.identity.clone();
        let asked = timeout(LIVE_TIMEOUT, identity.get_plugin_info(GetPluginInfoRequest {}));
        match asked.await {
            Ok(Ok(_)) => Ok(()),
            _ => Err("the plugin's own socket does not answer"),
        }
    }

    pub(crate) async fn ready(&self) -> Result<(), &'static str> {
        self.live().await?;
        if self.registered.as_ref().is_some_and(|registered| !registered.get()) {
            return Err("kubelet has not registered the plugin yet");
        }
        control::probe(&self.volumes).await.map_err(|_| "the daemon does not answer")
    }
}

async fn live(State(health): State<Health>) -> (StatusCode, &'static str) {
    page(health.live().await)
}

async fn metrics(State(health): State<Health>) -> ([(HeaderName, &'static str); 1], String) {
    ([(CONTENT_TYPE, METRICS_TYPE)], health.metrics.text())
}

async fn ready(State(health): State<Health>) -> (StatusCode, &'static str) {
    page(health.ready().await)
}

fn page(outcome: Result<(), &'static str>) -> (StatusCode, &'static str) {
    match outcome {
        Ok(()) => (StatusCode::OK, "ok\n"),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why),
    }
}
