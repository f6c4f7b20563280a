//! Futures that run at the same time.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

use sheave_core::Result;

pub(crate) type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

pub(crate) fn boxed<'a, T>(future: impl Future<Output = T> + Send + 'a) -> Boxed<'a, T> {
    Box::pin(future)
}

/// Runs futures at the same time, and returns what each gives, in their order.
pub(crate) async fn all<T>(mut futures: Vec<Boxed<'_, T>>) -> Vec<T> {
    let mut answers: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    poll_fn(|cx| {
        for (future, answer) in futures.iter_mut().zip(&mut answers) {
            if answer.is_none()
                && let Poll::Ready(value) = future.as_mut().poll(cx)
            {
                *answer = Some(value);
            }
        }
        match answers.iter().all(Option::is_some) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
    answers.into_iter().flatten().collect()
}

/// Runs the futures that `next` gives, at most so many at the same time, and passes what each of
/// them gives to `take`, in the order in which they end.
///
/// # Errors
/// The first one of `take`: the futures that run then are dropped.
pub(crate) async fn each<'a, T>(
    futures_max: usize,
    mut next: impl FnMut() -> Option<Boxed<'a, T>>,
    mut take: impl FnMut(T) -> Result<()>,
) -> Result<()> {
    let mut running = Vec::<Boxed<'a, T>>::with_capacity(futures_max);
    poll_fn(|cx| {
        loop {
            while running.len() < futures_max
                && let Some(future) = next()
            {
                running.push(future);
            }
            let before = running.len();
            let mut outcome = Ok(());
            running.retain_mut(|future| match future.as_mut().poll(cx) {
                Poll::Pending => true,
                Poll::Ready(value) => {
                    if outcome.is_ok() {
                        outcome = take(value);
                    }
                    false
                }
            });
            match outcome {
                Ok(()) if running.len() < before => {}
                Ok(()) if before > 0 => return Poll::Pending,
                ended => return Poll::Ready(ended),
            }
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::memory_store::yield_now;
    use crate::threads::block_on;

    #[test]
    fn no_more_futures_run_than_may_and_all_of_them_end() {
        let counters = Mutex::new((0_usize, 0_usize));
        let mut left = 20_usize;
        let mut ended = Vec::new();
        let next = || {
            left = left.checked_sub(1)?;
            let (number, counters) = (left, &counters);
            Some(boxed(async move {
                {
                    let mut counters = counters.lock().unwrap();
                    counters.0 += 1;
                    counters.1 = counters.1.max(counters.0);
                }
                for _ in 0..number % 5 {
                    yield_now().await;
                }
                counters.lock().unwrap().0 -= 1;
                number
            }))
        };
        let take = |number| {
            ended.push(number);
            Ok(())
        };
        block_on(each(3, next, take)).unwrap();
        ended.sort_unstable();
        assert_eq!(ended, (0..20).collect::<Vec<_>>());
        assert_eq!(*counters.lock().unwrap(), (0, 3), "running now, and at most");
    }
}
