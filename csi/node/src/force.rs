//! Unstaging a volume whose storage hangs, where its class prefers the loss of data to waiting: its
//! I/O is failed, and its device ended.
//!
//! Unmounting writes back what is dirty, so it waits as long as the storage hangs. A policy of the
//! volume says for how long; there is none by default.

use std::fs;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, Builder, sleep};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::disk::sys_path;
use crate::mountinfo::Number;
use crate::state::State;
use crate::{Engine, Error, Kind, Problem, Result};

/// A device that has requests hangs if it has answered none for so long.
const HANGS_AFTER: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(50);
/// How often it is looked at again whether the storage hangs, once the time is over.
const RETRY: Duration = Duration::from_secs(2);

impl Engine {
    /// Does the `work` that takes a volume down. If it fails or waits for longer than the volume's
    /// policy allows, and the storage hangs, the device is ended by force, and the work is done
    /// with `true`: the volume's filesystem is dead. Returns what was lost then.
    pub(crate) fn patiently(
        &self,
        state: &State,
        work: impl Fn(bool) -> Result<()>,
    ) -> Result<Option<Problem>> {
        let Some(patience) = state.patience() else { return work(false).map(|()| None) };
        let (ended, is_ended) = channel::<()>();
        thread::scope(|scope| {
            let watch = Builder::new().name("node-force".to_owned());
            let watch = watch.spawn_scoped(scope, move || self.force(state, patience, &is_ended));
            let watch = watch.map_err(|error| Error::of_io("start a thread", &error))?;
            let done = work(false);
            drop(ended);
            match (done, watch.join().unwrap_or_default()) {
                (Err(_), Some(lost)) => work(true).map(|()| Some(lost)),
                (done, lost) => done.map(|()| lost),
            }
        })
    }

    /// Ends the device once `patience` is over and its storage hangs, unless the work has ended.
    fn force(&self, state: &State, patience: Duration, is_ended: &Receiver<()>) -> Option<Problem> {
        let mut wait = patience;
        loop {
            let has_ended = is_ended.recv_timeout(wait) != Err(RecvTimeoutError::Timeout);
            // With no time left, work may fail at once: programs that wait for the storage use it.
            if has_ended && !wait.is_zero() {
                return None;
            }
            if let Some(why) = self.hangs(state) {
                let lost = lost(&why, state);
                tracing::warn!(volume = %sheave_core::printable(&state.volume), "{lost}");
                match self.volumes.detach_by_force(&state.volume) {
                    Ok(()) => return Some(Problem::unflushed(&lost)),
                    Err(error) => tracing::warn!(
                        volume = %sheave_core::printable(&state.volume), %error, "not ended"
                    ),
                }
            }
            if has_ended {
                return None;
            }
            wait = RETRY;
        }
    }

    /// Why the storage of a volume hangs, if it does.
    fn hangs(&self, state: &State) -> Option<String> {
        let device = self.volumes.device(&state.volume).ok()??;
        if let Some(why) = device.waiting {
            return Some(why);
        }
        let number = state.device.as_ref()?.number;
        waiting(number).map(|count| format!("{count} requests wait for its storage"))
    }
}

fn lost(why: &str, state: &State) -> String {
    format!(
        "{why}, and unstaging has waited for {} s: its I/O is failed as its class asks \
         (force-unstage-after), and what programs have written since their last fsync may be lost; \
         its filesystem is checked when it is staged next",
        state.force_after_s.unwrap_or_default()
    )
}

/// How many requests of a device wait, if none was answered for some time.
pub(crate) fn waiting(device: Number) -> Option<u64> {
    let begun = Instant::now();
    let (_, before) = counts(device)?;
    loop {
        let (in_flight, answered) = counts(device)?;
        if in_flight == 0 || answered != before {
            return None;
        }
        if begun.elapsed() >= HANGS_AFTER {
            return Some(in_flight);
        }
        sleep(POLL);
    }
}

/// Requests of a device: in flight, and answered since it was made (the kernel's
/// Documentation/block/stat.rst).
fn counts(device: Number) -> Option<(u64, u64)> {
    let text = fs::read_to_string(sys_path(device).join("stat")).ok()?;
    let fields: Vec<u64> = text.split_whitespace().map_while(|word| word.parse().ok()).collect();
    // Reads, writes, discards and flushes; kernels before 5.5 count fewer kinds.
    let answered = [0, 4, 11, 15].iter().filter_map(|index| fields.get(*index)).sum();
    Some((*fields.get(8)?, answered))
}

/// Seconds since the node was started.
pub(crate) fn uptime_s() -> u64 {
    u64::try_from(clock_gettime(ClockId::Boottime).tv_sec).unwrap_or_default()
}

/// An answer about a volume that was ended by force.
pub(crate) fn ended_by_force(volume: &str, lost: &Problem) -> Error {
    Error::new(Kind::Unavailable, lost.message.clone()).of(volume).and("it is unstaged now")
}
