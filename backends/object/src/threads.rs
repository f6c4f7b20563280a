//! Threads for calls that wait, such as those of a directory's files: their ends wake futures of
//! any executor.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

/// Threads of one kind, made when they are needed, which then stay.
struct Threads {
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

/// Reads do not wait for writes, which wait for the disk.
static READS: Threads = Threads::new("object-read", 4);
static WRITES: Threads = Threads::new("object-write", 4);
static WAITS: Threads = Threads::new("object-wait", 64);

/// Runs a call that reads.
pub(crate) fn run_read<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = T> + Send {
    READS.run(call)
}

/// Runs a call that writes or deletes.
pub(crate) fn run_write<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = T> + Send {
    WRITES.run(call)
}

/// Runs a call that does nothing but wait.
pub(crate) fn run_wait<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = T> + Send {
    WAITS.run(call)
}

impl Threads {
    const fn new(name: &'static str, max: usize) -> Self {
        let queue = Queue { calls: VecDeque::new(), idle: 0, all: 0 };
        Self { name, max, queue: Mutex::new(queue), is_wanted: Condvar::new() }
    }

    /// Runs the call in one of the threads, also if the future is dropped.
    fn run<T: Send + 'static>(
        &'static self,
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

    fn push(&'static self, call: Box<dyn FnOnce() + Send>) {
        let mut queue = lock(&self.queue);
        queue.calls.push_back(call);
        if queue.idle < queue.calls.len() && queue.all < self.max {
            let begun = thread::Builder::new().name(self.name.to_owned()).spawn(|| self.work());
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
            queue = self.is_wanted.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
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
    fn calls_run_at_the_same_time_and_a_read_does_not_wait_for_writes() {
        let all = Arc::new(Barrier::new(WRITES.max + 1));
        let wait = |all: &Arc<Barrier>| {
            let all = Arc::clone(all);
            run_write(move || all.wait().is_leader())
        };
        let writes: Vec<_> = (0..WRITES.max).map(|_| wait(&all)).collect();
        assert_eq!(block_on(run_read(|| 7)), 7);
        all.wait();
        let leaders = writes.into_iter().map(block_on).filter(|is_leader| *is_leader).count();
        assert!(leaders <= 1);
    }
}
