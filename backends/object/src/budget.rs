//! The budgets of bytes that all volumes of a process share: for objects on their way to stores,
//! and for objects that are cleaned.

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::format::{Form, OBJECT_BYTES_MAX};
use crate::ids::BLOCK_BYTES;
use crate::upload::{AHEAD, BATCH_BYTES_MAX, WINDOW};

/// Bytes of objects under way in this process: those of one volume that uploads at full speed.
const BUDGET_BYTES: u64 =
    (WINDOW + AHEAD) as u64 * Form::Sealed.run_bytes(BATCH_BYTES_MAX / BLOCK_BYTES);

/// Bytes of objects that are read to be cleaned, and of what is moved: those of two volumes.
const CLEANING_BYTES: u64 = 2 * (OBJECT_BYTES_MAX + BATCH_BYTES_MAX);

/// A share of a budget.
#[derive(Debug)]
pub(crate) struct Share {
    of: &'static Mutex<Budget>,
    bytes: u64,
}

#[derive(Debug)]
struct Budget {
    left: u64,
    waiting: Vec<Waker>,
}

static BUDGET: Mutex<Budget> = Mutex::new(Budget { left: BUDGET_BYTES, waiting: Vec::new() });
static CLEANING: Mutex<Budget> = Mutex::new(Budget { left: CLEANING_BYTES, waiting: Vec::new() });

impl Share {
    /// Waits until the budget has room, or the object is the oldest of its volume. That one takes
    /// no share, since other volumes may have all of it, whose stores are away.
    pub(crate) async fn take(bytes: u64, is_oldest: &AtomicBool) -> Self {
        poll_fn(|cx| match is_oldest.load(Relaxed) {
            true => Poll::Ready(Self { of: &BUDGET, bytes: 0 }),
            false => Self::poll(&BUDGET, bytes, cx),
        })
        .await
    }

    /// Waits until there is room to clean objects with so many bytes.
    pub(crate) async fn to_clean(bytes: u64) -> Self {
        let bytes = bytes.min(CLEANING_BYTES);
        poll_fn(|cx| Self::poll(&CLEANING, bytes, cx)).await
    }

    fn poll(of: &'static Mutex<Budget>, bytes: u64, cx: &Context<'_>) -> Poll<Self> {
        let mut budget = of.lock().unwrap_or_else(PoisonError::into_inner);
        match budget.left.checked_sub(bytes) {
            Some(left) => {
                budget.left = left;
                Poll::Ready(Self { of, bytes })
            }
            None => {
                // All objects of a volume wait in one task.
                if !budget.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                    budget.waiting.push(cx.waker().clone());
                }
                Poll::Pending
            }
        }
    }
}

/// Leaves nothing of the budget until it is dropped, as volumes do whose stores are away.
#[cfg(test)]
pub(crate) async fn take_whole_budget() -> impl Drop {
    Share::take(BUDGET_BYTES, &AtomicBool::new(false)).await
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut budget = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        budget.left += self.bytes;
        let waiting = std::mem::take(&mut budget.waiting);
        drop(budget);
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_room_waits_until_a_share_is_dropped() {
        static OF: Mutex<Budget> = Mutex::new(Budget { left: 10, waiting: Vec::new() });
        let cx = Context::from_waker(Waker::noop());
        let Poll::Ready(first) = Share::poll(&OF, 6, &cx) else { panic!("there is room") };
        assert!(Share::poll(&OF, 5, &cx).is_pending());
        assert!(Share::poll(&OF, 4, &cx).is_ready(), "and dropped");
        drop(first);
        assert!(Share::poll(&OF, 10, &cx).is_ready());
    }
}
