//! What all calls have in common: a bound on the time of the answer, since sidecars and kubelet
//! wait for 10 s and more; a bound on the length of its message; a place in the metrics, and in the
//! log if it failed.

use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use sheave_core::printable;
use tokio::time::timeout;
use tonic::service::Routes;
use tonic::{Code, Status};

use crate::{Metrics, checks};

/// How soon every call is answered, whatever the daemon and the pools' storage do. The daemon and
/// the node engine answer within 8 s, and say more.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(9);

/// Bounds and times calls.
#[derive(Clone)]
pub(crate) struct Calls {
    metrics: Metrics,
    answer_timeout: Duration,
}

impl Calls {
    /// Calls are counted in these metrics.
    pub(crate) fn new(metrics: Metrics) -> Self {
        Self { metrics, answer_timeout: ANSWER_TIMEOUT }
    }

    /// The same services with these bounds.
    pub(crate) fn around(self, services: Routes) -> Routes {
        services.into_axum_router().layer(from_fn_with_state(self, answer)).into()
    }
}

async fn answer(State(calls): State<Calls>, request: Request, next: Next) -> Response {
    let (begun, path) = (Instant::now(), request.uri().path().to_owned());
    let answer = match timeout(calls.answer_timeout, next.run(request)).await {
        Ok(answer) => shortened(answer),
        Err(_) => {
            let why = format!(
                "no answer within {} s: the daemon, or the pool's storage, hangs; the outcome is \
                 not known, so try again",
                calls.answer_timeout.as_secs()
            );
            Status::deadline_exceeded(why).into_http()
        }
    };
    // The status of a call that succeeded follows the answer.
    let failed = Status::from_header_map(answer.headers());
    calls.metrics.note(&path, failed.as_ref().map_or(Code::Ok, Status::code), begun);
    if let Some(status) = failed {
        log(&path, &status);
    }
    answer
}

/// Logs a call that failed. Messages have no secrets.
fn log(path: &str, status: &Status) {
    let rpc = path.rsplit('/').next().unwrap_or_default();
    let (rpc, code, message) = (printable(rpc), status.code(), printable(status.message()));
    match code {
        // It is answered so while the first call goes on, and of what is not announced.
        Code::Aborted | Code::Unimplemented => tracing::debug!(%rpc, ?code, "{message}"),
        _ => tracing::warn!(%rpc, ?code, "{message}"),
    }
}

/// The same answer; of an error, with a short message and without details (the specification,
/// "Error Scheme").
fn shortened(answer: Response) -> Response {
    let Some(status) = Status::from_header_map(answer.headers()) else { return answer };
    let message = checks::message(status.message());
    if status.details().is_empty() && message == status.message() {
        return answer;
    }
    Status::new(status.code(), message).into_http()
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use axum::Router;
    use axum::body::Body;
    use axum::routing::get;
    use tonic::codegen::Service as _;

    use super::*;

    #[tokio::test]
    async fn rule_33_a_call_that_hangs_is_answered_as_open() {
        let metrics = Metrics::default();
        let hangs = Router::new().route("/csi.v1.Node/Hangs", get(pending::<()>));
        let calls = Calls { metrics: metrics.clone(), answer_timeout: Duration::from_millis(1) };
        let request = Request::builder().uri("/csi.v1.Node/Hangs").body(Body::empty());
        let call = calls.around(hangs.into()).call(request.expect("a request"));
        let status = Status::from_header_map(call.await.expect("an answer").headers());
        let status = status.expect("a status");
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert!(status.message().contains("try again"), "{status}");
        let counted = "rpc=\"Hangs\",code=\"DeadlineExceeded\"} 1";
        assert!(metrics.text().contains(counted), "{}", metrics.text());
    }

    #[test]
    fn rule_14_an_answer_has_a_short_message_and_no_details() {
        let long = Status::with_details(Code::NotFound, "ü".repeat(4000), vec![1].into());
        let answer = shortened(long.into_http());
        let status = Status::from_header_map(answer.headers()).expect("a status");
        assert_eq!(status.code(), Code::NotFound);
        assert!(status.message().len() <= 1024 && status.message().ends_with("ü…"), "{status}");
        assert!(status.details().is_empty());
        let kept = shortened(Status::aborted("wait").into_http());
        let status = Status::from_header_map(kept.headers()).expect("a status");
        assert_eq!(status.message(), "wait");
    }
}
