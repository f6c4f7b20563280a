//! Threads for calls that wait, such as those of a directory's files: their ends wake futures of
//! any executor.
//!
//! A store that hangs keeps its threads, as a journal's disk does. So each store has its own, and
//! each journal.

use std::collections::VecDeque;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

/// How long a thread waits for another call before it ends.
const IDLE: Duration = Duration::from_secs(10);

/// Threads of one kind, made when they are needed.
pub(crate) struct Threads {
    name: &'static str,
    max: usize,
    queue: Mutex<Queue>,
    is_wanted: Condvar,
}

struct Queue {
    calls: VecDeque<Box<dyn FnOnce() + Send>>,
    /// Threads that wait for a call.
    idle: usize,
    all: usize,
}

impl Threads {
    /// Up to `max` threads of that name.
    pub(crate) fn new(name: &'static str, max: usize) -> Arc<Self> {
        let queue = Queue { calls: VecDeque::new(), idle: 0, all: 0 };
        Arc::new(Self { name, max, queue: Mutex::new(queue), is_wanted: Condvar::new() })
    }

    /// Runs the call in one of the threads, also if the future is dropped.
    pub(crate) fn run<T: Send + 'static>(
        self: &Arc<Self>,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> impl Future<Output = T> + Send {
        let end = Arc::new(Mutex::new(End { value: None, waker: None }));
        let in_thread = Arc::clone(&end);
        self.push(Box::new(move || {
            let value = call();
            let mut end = lock(&in_thread);
            end.value = Some(value);
            let waker = end.waker.take();
            drop(end);
            waker.into_iter().for_each(Waker::wake);
        }));
        poll_fn(move |cx| {
            let mut end = lock(&end);
            match end.value.take() {
                Some(value) => Poll::Ready(value),
                None => {
                    end.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
    }

    fn push(self: &Arc<Self>, call: Box<dyn FnOnce() + Send>) {
        let mut queue = lock(&self.queue);
        queue.calls.push_back(call);
        if queue.idle < queue.calls.len() && queue.all < self.max {
            let threads = Arc::clone(self);
            let thread = thread::Builder::new().name(self.name.to_owned());
            let begun = thread.spawn(move || threads.work());
            match begun {
                Ok(_) => queue.all += 1,
                // The threads that there are do it.
                Err(_) if queue.all > 0 => {}
                // Without any, this one does, although it should not wait.
                Err(_) => {
                    let call = queue.calls.pop_back();
                    drop(queue);
                    call.into_iter().for_each(|call| call());
                    return;
                }
            }
        }
        self.is_wanted.notify_one();
    }

    fn work(&self) {
        let mut queue = lock(&self.queue);
        loop {
            while let Some(call) = queue.calls.pop_front() {
                drop(queue);
                call();
                queue = lock(&self.queue);
            }
            queue.idle += 1;
            let waited = self.is_wanted.wait_timeout(queue, IDLE);
            let (woken, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            queue = woken;
            queue.idle -= 1;
            if timeout.timed_out() && queue.calls.is_empty() {
                queue.all -= 1;
                return;
            }
        }
    }
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Threads").field("name", &self.name).finish_non_exhaustive()
    }
}

struct End<T> {
    value: Option<T>,
    waker: Option<Waker>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a future to its end in this thread.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Arc::new(Unpark(thread::current())).into();
    let mut cx = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut cx) {
            return value;
        }
        thread::park();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn threads_that_hang_hold_up_no_others() {
        let hung = Threads::new("hung", 4);
        let all = Arc::new(Barrier::new(hung.max + 1));
        let wait = |all: &Arc<Barrier>| {
            let all = Arc::clone(all);
            hung.run(move || all.wait().is_leader())
        };
        let waiting: Vec<_> = (0..hung.max).map(|_| wait(&all)).collect();
        let behind = hung.run(|| 8);
        assert_eq!(block_on(Threads::new("other", 1).run(|| 7)), 7);
        all.wait();
        let leaders = waiting.into_iter().map(block_on).filter(|is_leader| *is_leader).count();
        assert!(leaders <= 1);
        assert_eq!(block_on(behind), 8);
    }
}
