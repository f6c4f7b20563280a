//! One `fdatasync` at a time, for all jobs that wait for one.
//!
//! Two at once on one description would race for the error of a failed write-back, which the kernel
//! reports once. So a job that comes while one runs waits for the next, together with all others
//! that do. Under load this also makes flushes cheap.

use sheave_core::{Result, memory};

/// Jobs that wait for a sync of a backend's file.
#[derive(Default)]
pub(super) struct GroupSync {
    /// Jobs that the sync in flight serves.
    running: Vec<usize>,
    /// Jobs that came after it began.
    waiting: Vec<usize>,
    in_flight: bool,
}

impl GroupSync {
    /// Adds a job. True: start a sync now.
    pub(super) fn join(&mut self, key: usize) -> bool {
        self.waiting.push(key);
        self.next()
    }

    /// Makes room for so many jobs in all.
    pub(super) fn make_room(&mut self, count: usize) -> Result<()> {
        memory::attempt(|| self.waiting.try_reserve(count - self.waiting.len()))?;
        memory::attempt(|| self.running.try_reserve(count - self.running.len()))
    }

    /// Takes the next job that the completed sync has served.
    pub(super) fn served(&mut self) -> Option<usize> {
        self.running.pop()
    }

    /// Notes that the sync has completed and all jobs that it served are taken. True: start the
    /// next one now.
    pub(super) fn completed(&mut self) -> bool {
        debug_assert!(self.running.is_empty());
        self.in_flight = false;
        self.next()
    }

    fn next(&mut self) -> bool {
        if self.in_flight || self.waiting.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.running, &mut self.waiting);
        self.in_flight = true;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latecomers_share_the_next_one() {
        let mut sync = GroupSync::default();
        assert!(sync.join(1));
        assert!(!sync.join(2) && !sync.join(3), "one at a time");
        assert_eq!((sync.served(), sync.served()), (Some(1), None));
        assert!(sync.completed());
        assert_eq!((sync.served(), sync.served(), sync.served()), (Some(3), Some(2), None));
        assert!(!sync.completed());
    }
}
