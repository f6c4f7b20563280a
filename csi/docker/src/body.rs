//! Bodies of calls, of a bounded length.

use std::time::Duration;

use axum::body::Body;
use axum::http::StatusCode;
use http_body_util::BodyExt as _;
use tokio::time::timeout;

/// Bytes of a call. Docker's have some hundreds.
const LEN_MAX: usize = 2 << 20;
/// How many more bytes are received and thrown away, and for how long: a client reads no answer
/// before it has sent all.
const DISCARDED_MAX: usize = 64 << 20;
const DISCARD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a body may take, which a client sends behind its head at once.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Receives a body.
///
/// # Errors
/// The status of the answer and one line for a person.
pub(crate) async fn receive(body: Body) -> Result<Vec<u8>, (StatusCode, String)> {
    timeout(TIMEOUT, collect(body)).await.unwrap_or_else(|_| {
        let why = format!("the request was not sent within {} s", TIMEOUT.as_secs());
        Err((StatusCode::REQUEST_TIMEOUT, why))
    })
}

async fn collect(mut body: Body) -> Result<Vec<u8>, (StatusCode, String)> {
    let mut received = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            (StatusCode::BAD_REQUEST, format!("the request was not received: {error}"))
        })?;
        let Ok(data) = frame.into_data() else { continue };
        if received.len() + data.len() > LEN_MAX {
            // What is still not sent then breaks the connection.
            let _ = timeout(DISCARD_TIMEOUT, discard(body)).await;
            let why = format!(
                "the request has more than {LEN_MAX} bytes; write fewer or shorter options"
            );
            return Err((StatusCode::PAYLOAD_TOO_LARGE, why));
        }
        received.extend_from_slice(&data);
    }
    Ok(received)
}

async fn discard(mut body: Body) {
    let mut discarded = 0;
    while discarded < DISCARDED_MAX
        && let Some(Ok(frame)) = body.frame().await
    {
        discarded += frame.data_ref().map_or(0, |data| data.len());
    }
}
