//! Time, as the engine sees it. No rule of safety needs it: it only spaces retries.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

/// A clock that a simulation can replace.
pub trait Clock: Send + Sync {
    /// Milliseconds since some fixed moment; never goes back.
    fn now_ms(&self) -> u64;

    /// Ends after this time.
    fn sleep(&self, ms: u64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// The clock of the system. It needs no runtime: one thread, which is there as long as anything
/// sleeps, wakes all sleepers.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_ms(&self) -> u64 {
        static BEGIN: OnceLock<Instant> = OnceLock::new();
        BEGIN.get_or_init(Instant::now).elapsed().as_millis() as u64
    }

    fn sleep(&self, ms: u64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(Sleep { until: Instant::now() + Duration::from_millis(ms), number: None })
    }
}

/// What sleeps, in the order in which it is woken.
struct Sleepers {
    by_end: BTreeMap<(Instant, u64), Waker>,
    number_next: u64,
    has_thread: bool,
}

static SLEEPERS: Mutex<Sleepers> =
    Mutex::new(Sleepers { by_end: BTreeMap::new(), number_next: 0, has_thread: false });
/// Another sleeper is the first one.
static HAS_CHANGED: Condvar = Condvar::new();

struct Sleep {
    until: Instant,
    /// Tells it from others that end at the same time.
    number: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.until <= Instant::now() {
            return Poll::Ready(());
        }
        let mut sleepers = sleepers();
        let number = self.number.unwrap_or(sleepers.number_next);
        if self.number.replace(number).is_none() {
            sleepers.number_next += 1;
        }
        let key = (self.until, number);
        sleepers.by_end.insert(key, cx.waker().clone());
        if !sleepers.has_thread {
            let thread = thread::Builder::new().name("object-clock".to_owned());
            sleepers.has_thread = thread.spawn(wake_sleepers).is_ok();
        } else if sleepers.by_end.first_key_value().is_some_and(|(first, _)| *first == key) {
            HAS_CHANGED.notify_one();
        }
        if sleepers.has_thread {
            return Poll::Pending;
        }
        // Without a thread this one waits, although it should not.
        drop(sleepers);
        thread::sleep(self.until.saturating_duration_since(Instant::now()));
        Poll::Ready(())
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            sleepers().by_end.remove(&(self.until, number));
        }
    }
}

/// Wakes sleepers until there is none.
fn wake_sleepers() {
    let mut waiting = sleepers();
    while let Some((&(until, _), _)) = waiting.by_end.first_key_value() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let due = waiting.by_end.pop_first();
            drop(waiting);
            due.into_iter().for_each(|(_, waker)| waker.wake());
            waiting = sleepers();
        } else {
            let woken = HAS_CHANGED.wait_timeout(waiting, left);
            waiting = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
    waiting.has_thread = false;
}

fn sleepers() -> MutexGuard<'static, Sleepers> {
    SLEEPERS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::block_on;
    use crate::together::{all, boxed};

    #[test]
    fn sleepers_are_woken_when_their_time_comes_and_not_before() {
        let (begun, given_up) = (Instant::now(), SystemClock.sleep(600_000));
        let sleep = |ms| async move {
            SystemClock.sleep(ms).await;
            (ms, begun.elapsed())
        };
        // One that is given up holds up no others.
        let given_up = async move {
            assert!(!crate::answers::Answers::default().before(SystemClock.sleep(5)).await);
            drop(given_up);
            (0, begun.elapsed())
        };
        let mut sleeps: Vec<_> = [60, 20, 40, 20].map(|ms| boxed(sleep(ms))).into();
        sleeps.push(boxed(given_up));
        for (ms, slept) in block_on(all(sleeps)) {
            let slept = slept.as_millis() as u64;
            assert!((ms..ms + 10_000).contains(&slept), "{slept} for {ms}");
        }
    }
}
