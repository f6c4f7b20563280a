//! What waits for a store that is away: a retry whose pause ends early when the store has answered
//! another request.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use slab::Slab;

/// Counts the answers of a store.
#[derive(Debug, Default)]
pub(crate) struct Answers(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    count: u64,
    waiting: Slab<Waker>,
}

impl Answers {
    /// The store has answered: all that waits goes on.
    pub(crate) fn note(&self) {
        let mut inner = self.inner();
        inner.count += 1;
        let waiting = std::mem::take(&mut inner.waiting);
        drop(inner);
        waiting.into_iter().for_each(|(_, waker)| waker.wake());
    }

    /// Waits for the end of a pause, or for the next answer. True: the answer came first.
    pub(crate) async fn before(&self, pause: impl Future<Output = ()>) -> bool {
        let mut next = Next { answers: self, seen: self.inner().count, key: None };
        let mut pause = pin!(pause);
        poll_fn(|cx| match pause.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(false),
            Poll::Pending => Pin::new(&mut next).poll(cx).map(|()| true),
        })
        .await
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The answer behind those that were seen.
struct Next<'a> {
    answers: &'a Answers,
    seen: u64,
    /// Its waker, as long as no other answer has come.
    key: Option<usize>,
}

impl Future for Next<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.answers.inner();
        if inner.count != self.seen {
            return Poll::Ready(());
        }
        match self.key {
            Some(key) => inner.waiting[key].clone_from(cx.waker()),
            None => self.key = Some(inner.waiting.insert(cx.waker().clone())),
        }
        Poll::Pending
    }
}

impl Drop for Next<'_> {
    fn drop(&mut self) {
        let mut inner = self.answers.inner();
        if let Some(key) = self.key.filter(|_| inner.count == self.seen) {
            inner.waiting.remove(key);
        }
    }
}
