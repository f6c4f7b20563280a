//! Bodies at the speed of a connection.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

/// Bytes that are sent at once.
const PIECE_BYTES: usize = 64 << 10;
/// Shorter waits are made up for by the next: the clock has steps of 1 ms.
const WAIT_MIN: Duration = Duration::from_micros(500);

/// When bytes have passed a connection of limited bandwidth.
#[derive(Clone, Copy, Debug)]
struct Pace {
    begun: Instant,
    bandwidth: Option<u64>,
}

impl Pace {
    /// `None` if it is over, or nearly.
    fn when(&self, passed: u64) -> Option<Instant> {
        let bandwidth = self.bandwidth?;
        let ends = self.begun + Duration::from_secs_f64(passed as f64 / bandwidth as f64);
        (ends > Instant::now() + WAIT_MIN).then_some(ends)
    }
}

/// Why a body could not be read.
#[derive(Debug)]
pub(crate) enum ReadError {
    TooLong,
    /// The client has gone.
    Gone,
}

/// Reads all of a body.
pub(crate) async fn read(
    mut body: Incoming,
    max: u64,
    bandwidth: Option<u64>,
) -> Result<Bytes, ReadError> {
    let pace = Pace { begun: Instant::now(), bandwidth };
    let expected = body.size_hint().exact().unwrap_or_default();
    if expected > max {
        return Err(ReadError::TooLong);
    }
    let mut bytes = Vec::with_capacity(expected as usize);
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| ReadError::Gone)?.into_data() else { continue };
        if (bytes.len() + data.len()) as u64 > max {
            return Err(ReadError::TooLong);
        }
        bytes.extend_from_slice(&data);
        if let Some(when) = pace.when(bytes.len() as u64) {
            sleep_until(when).await;
        }
    }
    Ok(bytes.into())
}

/// The body of an answer.
#[derive(Debug)]
pub(crate) struct Sent {
    rest: Bytes,
    /// Bytes of it that are not sent: the connection ends before.
    lost: u64,
    pace: Pace,
    passed: u64,
    wait: Option<Pin<Box<Sleep>>>,
}

impl Sent {
    pub(crate) fn new(body: Bytes, bandwidth: Option<u64>) -> Self {
        let pace = Pace { begun: Instant::now(), bandwidth };
        Self { rest: body, lost: 0, pace, passed: 0, wait: None }
    }

    /// Half of it only.
    pub(crate) fn truncated(mut self) -> Self {
        let kept = self.rest.len() / 2;
        self.lost = (self.rest.len() - kept) as u64;
        self.rest.truncate(kept);
        self
    }
}

impl Body for Sent {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if self.rest.is_empty() {
            let cut = || Err(io::Error::other("the connection ends here"));
            return Poll::Ready((self.lost > 0).then(cut));
        }
        let len = PIECE_BYTES.min(self.rest.len());
        if self.wait.is_none() {
            // A piece has arrived when its last byte has passed.
            let when = self.pace.when(self.passed + len as u64);
            self.wait = when.map(|when| Box::pin(sleep_until(when)));
        }
        if let Some(wait) = &mut self.wait {
            std::task::ready!(wait.as_mut().poll(cx));
            self.wait = None;
        }
        self.passed += len as u64;
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(len)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.lost == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64 + self.lost)
    }
}
