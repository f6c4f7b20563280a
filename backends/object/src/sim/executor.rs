//! Runs tasks in an order that a seed determines, one step of one task at a time.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, Wake};

use crate::memory_store::Random;

/// Tasks, of which any that can go on may be the next.
pub(super) struct Executor {
    random: Arc<Random>,
    tasks: Vec<Task>,
}

struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    ready: Arc<Ready>,
}

struct Ready(AtomicBool);

impl Wake for Ready {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Relaxed);
    }
}

impl Executor {
    pub(super) fn new(random: Arc<Random>) -> Self {
        Self { random, tasks: Vec::new() }
    }

    pub(super) fn spawn(&mut self, future: impl Future<Output = ()> + 'static) {
        let ready = Arc::new(Ready(AtomicBool::new(true)));
        self.tasks.push(Task { future: Box::pin(future), ready });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// One step of one of the tasks that can go on.
    pub(super) fn turn(&mut self) {
        let ready: Vec<_> =
            (0..self.tasks.len()).filter(|at| self.tasks[*at].ready.0.load(Relaxed)).collect();
        if ready.is_empty() {
            return;
        }
        let at = ready[self.random.below(ready.len() as u64) as usize];
        let task = &mut self.tasks[at];
        task.ready.0.store(false, Relaxed);
        let waker = Arc::clone(&task.ready).into();
        if task.future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
            self.tasks.swap_remove(at);
        }
    }
}

/// Lets a future go on for so many turns. `None` if it has not ended then.
pub(super) async fn killed_after<T>(turns: u64, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    let mut left = turns;
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending if left == 0 => Poll::Ready(None),
        Poll::Pending => {
            left -= 1;
            Poll::Pending
        }
    })
    .await
}
