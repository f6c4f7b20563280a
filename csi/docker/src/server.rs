//! HTTP/1.1 for Docker: each call is a POST with a JSON object, and so is its answer.

use std::io;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::serve::Listener;
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::Plugin;

/// What Docker accepts.
const TYPE: &str = "application/vnd.docker.plugins.v1.2+json";

/// Serves a plugin until `ended`.
///
/// # Errors
/// When the server fails.
pub async fn serve<L: Listener>(
    plugin: Arc<Plugin>,
    listener: L,
    ended: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()>
where
    L::Addr: std::fmt::Debug,
{
    let router = Router::new().fallback(answer).with_state(plugin);
    axum::serve(listener, router).with_graceful_shutdown(ended).await
}

async fn answer(State(plugin): State<Arc<Plugin>>, uri: Uri, body: Bytes) -> Response {
    // They block, and wait for each other.
    let called = spawn_blocking(move || {
        let path = uri.path();
        let called = plugin.call(path, &body);
        if let Err(error) = &called {
            tracing::warn!(call = path, "failed: {error}");
        }
        called
    });
    let (status, mut value) = match called.await {
        Ok(Ok(value)) => (StatusCode::OK, value),
        Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, json!({ "Err": error.to_string() })),
        Err(_) => {
            let why = "the plugin has a bug: a call panicked; its log says where";
            (StatusCode::INTERNAL_SERVER_ERROR, json!({ "Err": why }))
        }
    };
    if let Value::Object(fields) = &mut value {
        fields.entry("Err").or_insert_with(|| "".into());
    }
    (status, [(header::CONTENT_TYPE, TYPE)], value.to_string()).into_response()
}
