//! Threads that carry out writes to the page cache while inline writes are disabled: one for each
//! volume that needs it.
//!
//! io_uring gives each such write to a worker of its own, which is woken for it; the file's lock
//! lets only one of them go on at a time anyway. One thread takes all that have gathered, so a wake
//! serves many writes.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use sheave_core::{IoDone, IoRequest, IoToken};
use sheave_ring::plain;

use crate::doorbell::Doorbell;

/// The shard learns of completions after each batch, and within one that takes longer than this.
const REPORT_EVERY: Duration = Duration::from_micros(200);

/// A volume's writer. Dropped, it carries out what it has and ends.
pub(crate) struct Writer {
    queue: Arc<Queue>,
}

/// What the writers of a shard have carried out.
pub(crate) struct Written {
    bell: Arc<Doorbell>,
    done: Mutex<Vec<(u32, IoDone)>>,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    more: Condvar,
}

#[derive(Default)]
struct Waiting {
    /// At most what the volume has in flight ([`crate::IN_FLIGHT_MAX`] for each of its users).
    requests: Vec<(IoRequest, IoToken)>,
    sleeps: bool,
    ended: bool,
}

impl Writer {
    /// Starts the writer of that volume of the shard.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub(crate) fn start(volume: u32, written: &Arc<Written>) -> io::Result<Self> {
        let queue = Arc::<Queue>::default();
        let (own, written) = (Arc::clone(&queue), Arc::clone(written));
        let run = move || own.run(volume, &written);
        thread::Builder::new().name("writer".to_owned()).spawn(run)?;
        Ok(Self { queue })
    }

    /// Adds a write.
    pub(crate) fn push(&self, request: IoRequest, token: IoToken) {
        let mut waiting = self.queue.lock();
        waiting.requests.push((request, token));
        if std::mem::take(&mut waiting.sleeps) {
            drop(waiting);
            self.queue.more.notify_one();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.queue.lock().ended = true;
        self.queue.more.notify_one();
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, volume: u32, written: &Written) {
        let (mut batch, mut done) = (Vec::new(), Vec::new());
        while self.take(&mut batch) {
            let mut reported = Instant::now();
            for (request, token) in batch.drain(..) {
                let result = plain::carry_out(&request);
                done.push((volume, IoDone { token, request, result }));
                if reported.elapsed() > REPORT_EVERY {
                    written.add(&mut done);
                    reported = Instant::now();
                }
            }
            written.add(&mut done);
        }
    }

    /// Waits for writes and takes all of them. False when the volume is gone.
    fn take(&self, into: &mut Vec<(IoRequest, IoToken)>) -> bool {
        let mut waiting = self.lock();
        while waiting.requests.is_empty() && !waiting.ended {
            waiting.sleeps = true;
            waiting = self.more.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::swap(&mut waiting.requests, into);
        !into.is_empty()
    }
}

impl Written {
    pub(crate) fn new(bell: Arc<Doorbell>) -> Self {
        Self { bell, done: Mutex::default() }
    }

    fn add(&self, done: &mut Vec<(u32, IoDone)>) {
        if !done.is_empty() {
            self.done.lock().unwrap_or_else(PoisonError::into_inner).append(done);
            self.bell.ring();
        }
    }

    /// Moves all completions to `into`.
    pub(crate) fn take(&self, into: &mut impl Extend<(u32, IoDone)>) {
        into.extend(self.done.lock().unwrap_or_else(PoisonError::into_inner).drain(..));
    }
}

#[cfg(test)]
mod tests {
    use sheave_core::Buf;

    use super::*;

    #[test]
    fn all_writes_complete_also_those_of_a_volume_that_goes() {
        let written = Arc::new(Written::new(Arc::new(Doorbell::new().unwrap())));
        let writer = Writer::start(7, &written).unwrap();
        let file = Arc::new(tempfile::tempfile().unwrap());
        for at in 0..100 {
            let from = Buf::zeroed(10).into();
            let write = IoRequest::Write { file: Arc::clone(&file), at, from, dsync: false };
            writer.push(write, IoToken(at));
        }
        drop(writer);
        let mut done = Vec::new();
        while done.len() < 100 {
            written.bell.wait(std::iter::empty(), Some(Duration::from_secs(60)));
            written.take(&mut done);
        }
        let tokens = done.iter().map(|(_, done)| done.token.0);
        assert!(tokens.eq(0..100), "in order");
        assert!(done.iter().all(|(volume, done)| {
            *volume == 7 && done.result.as_ref().is_ok_and(|&count| count == 10)
        }));
        assert_eq!(file.metadata().unwrap().len(), 109);
    }
}
