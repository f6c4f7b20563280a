//! The budget of bytes that all volumes of a process share for objects on their way to stores.

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::task::{Poll, Waker};

use crate::format::Form;
use crate::ids::BLOCK_BYTES;
use crate::upload::{AHEAD, BATCH_BYTES_MAX, WINDOW};

/// Bytes of objects under way in this process: those of one volume that uploads at full speed.
const BUDGET_BYTES: u64 =
    (WINDOW + AHEAD) as u64 * Form::Sealed.run_bytes(BATCH_BYTES_MAX / BLOCK_BYTES);

/// A share of the budget.
pub(crate) struct Share {
    bytes: u64,
}

struct Budget {
    left: u64,
    waiting: Vec<Waker>,
}

static BUDGET: Mutex<Budget> = Mutex::new(Budget { left: BUDGET_BYTES, waiting: Vec::new() });

impl Share {
    /// Waits until the budget has room, or the object is the oldest of its volume. That one takes
    /// no share, since other volumes may have all of it, whose stores are away.
    pub(crate) async fn take(bytes: u64, is_oldest: &AtomicBool) -> Self {
        poll_fn(|cx| {
            if is_oldest.load(Relaxed) {
                return Poll::Ready(Self { bytes: 0 });
            }
            let mut budget = BUDGET.lock().unwrap_or_else(PoisonError::into_inner);
            match budget.left.checked_sub(bytes) {
                Some(left) => {
                    budget.left = left;
                    Poll::Ready(Self { bytes })
                }
                None => {
                    // All objects of a volume wait in one task.
                    if !budget.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                        budget.waiting.push(cx.waker().clone());
                    }
                    Poll::Pending
                }
            }
        })
        .await
    }
}

/// Leaves nothing of the budget until it is dropped, as volumes do whose stores are away.
#[cfg(test)]
pub(crate) async fn take_whole_budget() -> impl Drop {
    Share::take(BUDGET_BYTES, &AtomicBool::new(false)).await
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut budget = BUDGET.lock().unwrap_or_else(PoisonError::into_inner);
        budget.left += self.bytes;
        let waiting = std::mem::take(&mut budget.waiting);
        drop(budget);
        waiting.into_iter().for_each(Waker::wake);
    }
}
