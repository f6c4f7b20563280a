//! Bounds how much goes on at a time, in the order of arrival.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// Lets so many in at a time.
#[derive(Debug)]
pub(crate) struct Gate(Mutex<State>);

#[derive(Debug)]
struct State {
    free: usize,
    waiting: VecDeque<Arc<Mutex<Turn>>>,
}

/// The turn of one that waits.
#[derive(Debug, Default)]
struct Turn {
    has_come: bool,
    waker: Option<Waker>,
}

/// One that is in, until this is dropped.
#[derive(Debug)]
pub(crate) struct Permit<'a>(&'a Gate);

impl Gate {
    pub(crate) fn new(max: usize) -> Self {
        Self(Mutex::new(State { free: max, waiting: VecDeque::new() }))
    }

    /// Waits for its turn.
    pub(crate) async fn enter(&self) -> Permit<'_> {
        let turn = {
            let mut state = lock(&self.0);
            if state.free > 0 {
                state.free -= 1;
                return Permit(self);
            }
            let turn = Arc::<Mutex<Turn>>::default();
            state.waiting.push_back(Arc::clone(&turn));
            turn
        };
        let mut waiting = Waiting { gate: self, turn, is_over: false };
        poll_fn(|cx| {
            let mut turn = lock(&waiting.turn);
            match turn.has_come {
                true => Poll::Ready(()),
                false => {
                    turn.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await;
        waiting.is_over = true;
        Permit(self)
    }

    fn leave(&self) {
        let mut state = lock(&self.0);
        match state.waiting.pop_front() {
            None => state.free += 1,
            Some(next) => {
                drop(state);
                let mut turn = lock(&next);
                turn.has_come = true;
                let waker = turn.waker.take();
                drop(turn);
                waker.into_iter().for_each(Waker::wake);
            }
        }
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// Gives its turn to the next one if it is dropped before it is in.
struct Waiting<'a> {
    gate: &'a Gate,
    turn: Arc<Mutex<Turn>>,
    is_over: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let mut state = lock(&self.gate.0);
        let before = state.waiting.len();
        state.waiting.retain(|turn| !Arc::ptr_eq(turn, &self.turn));
        let has_come = state.waiting.len() == before;
        drop(state);
        if has_come {
            self.gate.leave();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Context;

    use super::*;

    #[test]
    fn they_enter_in_their_order_and_none_is_lost() {
        let gate = Gate::new(2);
        let mut cx = Context::from_waker(Waker::noop());
        let mut entries: Vec<_> = (0..5).map(|_| Box::pin(gate.enter())).collect();
        let mut polled: Vec<_> =
            entries.iter_mut().map(|entry| entry.as_mut().poll(&mut cx)).collect();
        assert_eq!(polled.iter().filter(|polled| polled.is_ready()).count(), 2);
        // The third gets the turn of the first, and gives it up; the fourth gives up waiting.
        drop(polled.remove(0));
        drop(entries.remove(2));
        drop(entries.remove(2));
        assert!(entries[2].as_mut().poll(&mut cx).is_ready());
        drop(polled);
        let mut again = pin!(gate.enter());
        assert!(again.as_mut().poll(&mut cx).is_ready());
    }
}
