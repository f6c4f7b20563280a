//! HTTP/1.1 for Docker: each call is a POST with a JSON object, and so is its answer.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, State};
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::serve::{IncomingStream, Listener};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use crate::answering::Answering;
use crate::body::receive;
use crate::{Caller, Plugin};

/// What Docker accepts.
const TYPE: &str = "application/vnd.docker.plugins.v1.2+json";

/// How long it waits, at its end, for clients that have sent no whole call.
const END_TIMEOUT: Duration = Duration::from_secs(3);
/// How often it looks whether the calls have ended that it has then.
const END_POLL: Duration = Duration::from_millis(20);

/// Serves a plugin until `ended`. Calls that it has then are answered.
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
    for<'a> Caller: Connected<IncomingStream<'a, L>>,
{
    let router = Router::new().fallback(answer).with_state(Arc::clone(&plugin));
    let router = router.into_make_service_with_connect_info::<Caller>();
    let (end, mut begun) = watch::channel(false);
    let graceful = async move {
        ended.await;
        let _ = end.send(true);
    };
    let all_answered = async move {
        let _ = begun.wait_for(|begun| *begun).await;
        sleep(END_TIMEOUT).await;
        while plugin.calls() > 0 {
            sleep(END_POLL).await;
        }
    };
    tokio::select! {
        served = axum::serve(listener, router).with_graceful_shutdown(graceful) => served,
        () = all_answered => Ok(()),
    }
}

async fn answer(
    State(plugin): State<Arc<Plugin>>,
    ConnectInfo(caller): ConnectInfo<Caller>,
    uri: Uri,
    body: Body,
) -> Response {
    let body = match receive(body).await {
        Ok(body) => body,
        Err((status, why)) => {
            let text = text(json!({ "Err": why }));
            return (status, [(header::CONTENT_TYPE, TYPE)], text).into_response();
        }
    };
    let answering = Answering::new(Arc::clone(&plugin), caller);
    let call = Arc::clone(&answering.call);
    // They block, and wait for each other.
    let called = spawn_blocking(move || {
        let path = uri.path();
        let called = plugin.call(&call, path, &body);
        if let Err(error) = &called {
            tracing::warn!(call = path, "failed: {error}");
        }
        called
    });
    let (status, value) = match called.await {
        Ok(Ok(value)) => (StatusCode::OK, value),
        Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, json!({ "Err": error.to_string() })),
        Err(_) => {
            let why = "the plugin has a bug: a call panicked; its log says where";
            (StatusCode::INTERNAL_SERVER_ERROR, json!({ "Err": why }))
        }
    };
    let text = text(value);
    let length = text.len().to_string();
    let headers = [(header::CONTENT_TYPE, TYPE), (header::CONTENT_LENGTH, &length)];
    (status, headers, answering.body(text)).into_response()
}

fn text(mut value: Value) -> String {
    if let Value::Object(fields) = &mut value {
        fields.entry("Err").or_insert_with(|| "".into());
    }
    value.to_string()
}
