//! Bounds on every answer: its time, since sidecars and kubelet wait for 10 s and more, and the
//! length of its message.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::timeout;
use tonic::Status;
use tonic::codegen::http::{Request, Response};
use tonic::codegen::{BoxFuture, Service};
use tonic::server::NamedService;

use crate::checks;

/// How soon every call is answered, whatever the daemon and the pools' storage do. The daemon and
/// the node engine answer within 8 s, and say more.
const ANSWER_WITHIN: Duration = Duration::from_secs(9);

/// A service whose calls are answered in time.
#[derive(Clone, Debug)]
pub(crate) struct Bounded<S> {
    service: S,
    answer_within: Duration,
}

impl<S> Bounded<S> {
    /// Around this service.
    pub(crate) fn new(service: S) -> Self {
        Self { service, answer_within: ANSWER_WITHIN }
    }
}

impl<S: NamedService> NamedService for Bounded<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B, R> Service<Request<B>> for Bounded<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    S::Error: 'static,
    R: Default + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<S::Response, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let called = timeout(self.answer_within, self.service.call(request));
        let seconds = self.answer_within.as_secs();
        Box::pin(async move {
            let answered = called.await.unwrap_or_else(|_| {
                let why = format!(
                    "no answer within {seconds} s: the daemon, or the pool's storage, hangs; the \
                     outcome is not known, so try again"
                );
                Ok(Status::deadline_exceeded(why).into_http())
            });
            answered.map(shortened)
        }) as Pin<Box<dyn Future<Output = _> + Send>>
    }
}

/// The same answer; of an error, with a message that is short and without details (the
/// specification, "Error Scheme").
fn shortened<R: Default>(answer: Response<R>) -> Response<R> {
    let Some(status) = Status::from_header_map(answer.headers()) else { return answer };
    let message = checks::message(status.message());
    if status.details().is_empty() && message.len() == status.message().len() {
        return answer;
    }
    Status::new(status.code(), message).into_http()
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::{Pending, pending};

    use super::*;

    struct Hangs;

    impl Service<Request<()>> for Hangs {
        type Response = Response<()>;
        type Error = Infallible;
        type Future = Pending<Result<Response<()>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<()>) -> Self::Future {
            pending()
        }
    }

    #[tokio::test]
    async fn rule_33_a_call_that_hangs_is_answered_as_open() {
        let mut bounded = Bounded { service: Hangs, answer_within: Duration::from_millis(1) };
        let answer = bounded.call(Request::new(())).await.expect("an answer");
        let status = Status::from_header_map(answer.headers()).expect("a status");
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
        assert!(status.message().contains("try again"), "{status}");
    }

    #[test]
    fn rule_14_an_answer_has_a_short_message_and_no_details() {
        let long = Status::with_details(tonic::Code::NotFound, "ü".repeat(4000), vec![1].into());
        let answer: Response<()> = shortened(long.into_http());
        let status = Status::from_header_map(answer.headers()).expect("a status");
        assert_eq!((status.code(), status.message().len()), (tonic::Code::NotFound, 1024));
        assert!(status.details().is_empty());
        let kept: Response<()> = shortened(Status::aborted("wait").into_http());
        let status = Status::from_header_map(kept.headers()).expect("a status");
        assert_eq!(status.message(), "wait");
    }
}
