//! Work on volumes: at most one call each, in a thread of its own, so that a caller is answered in
//! time however long the work takes.
//!
//! A call for a volume that is being worked on is refused at once. Work goes on after its caller
//! has left. If it fails for good, the next equal call has that answer; if it ends well, the next
//! call finds it done.

use std::collections::HashMap;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Error, Kind, Result};

/// An answer that was not fetched is forgotten after this: kubelet asks again within 122 s.
const KEPT: Duration = Duration::from_secs(300);

/// Work that is going on, and the failures of work whose caller had left.
#[derive(Default)]
pub(crate) struct Jobs {
    jobs: Mutex<HashMap<String, Arc<Job>>>,
}

struct Job {
    /// What was asked for, with all arguments.
    call: String,
    /// What it is called in messages.
    verb: &'static str,
    /// When it ended, and how.
    end: Mutex<Option<(Instant, Result<()>)>>,
}

/// Ends a job, also when its work panics.
struct Ending {
    job: Arc<Job>,
    end: Result<()>,
}

impl Jobs {
    /// Does work on a volume, and waits for its result at most so long.
    ///
    /// # Errors
    /// [`Kind::Pending`] when work on the volume is going on or does not end in time, else what the
    /// work, or an equal call before it, has failed with.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        volume: &str,
        verb: &'static str,
        call: String,
        patience: Duration,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let job = self.begin(volume, verb, call)?;
        let (sender, result) = channel();
        let mut ending = Ending { job: Arc::clone(&job), end: Err(panicked()) };
        let thread = thread::Builder::new().name(format!("node-{verb}"));
        // Without a thread the closure is dropped, which ends the job.
        let spawned = thread.spawn(move || {
            let result = work();
            ending.end = result.as_ref().map(|_| ()).map_err(Clone::clone);
            drop(ending);
            // The caller may have left.
            let _ = sender.send(result);
        });
        let result = match spawned.map(|_| result.recv_timeout(patience)) {
            Ok(Ok(result)) => result,
            Ok(Err(RecvTimeoutError::Timeout)) => return Err(job.pending(volume)),
            Ok(Err(RecvTimeoutError::Disconnected)) => Err(panicked()),
            Err(error) => Err(Error::of_io("start a thread", &error).with_kind(Kind::Exhausted)),
        };
        let mut jobs = lock(&self.jobs);
        // Another call may have come since.
        if jobs.get(volume).is_some_and(|last| Arc::ptr_eq(last, &job)) {
            jobs.remove(volume);
        }
        result
    }

    /// Begins a job, unless there is one, or an equal call has failed for good.
    fn begin(&self, volume: &str, verb: &'static str, call: String) -> Result<Arc<Job>> {
        let mut jobs = lock(&self.jobs);
        jobs.retain(|_, job| !job.is_forgotten());
        if let Some(before) = jobs.get(volume) {
            let end = lock(&before.end).clone();
            match end {
                None => return Err(before.pending(volume)),
                Some((_, Err(error))) if error.kind().is_final() && before.call == call => {
                    jobs.remove(volume);
                    return Err(error);
                }
                Some(_) => {}
            }
        }
        let job = Arc::new(Job { call, verb, end: Mutex::default() });
        jobs.insert(volume.to_owned(), Arc::clone(&job));
        Ok(job)
    }
}

impl Job {
    fn is_forgotten(&self) -> bool {
        lock(&self.end).as_ref().is_some_and(|(ended, _)| ended.elapsed() >= KEPT)
    }

    fn pending(&self, volume: &str) -> Error {
        // Without its time: an orchestrator joins events of the same text.
        let why = format!("volume {volume}: {} is going on; ask again", self.verb);
        Error::new(Kind::Pending, why)
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        let end = std::mem::replace(&mut self.end, Ok(()));
        *lock(&self.job.end) = Some((Instant::now(), end));
    }
}

fn panicked() -> Error {
    Error::new(Kind::Unavailable, "the work on the volume panicked")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn run(
        jobs: &Jobs,
        call: &str,
        patience: Duration,
        work: impl FnOnce() -> Result<u64> + Send + 'static,
    ) -> Result<u64, Kind> {
        let result = jobs.run("fast/1", "stage", call.to_owned(), patience, work);
        result.map_err(|error| error.kind())
    }

    #[test]
    fn rule_11_a_second_call_is_refused_at_once_and_the_first_goes_on() {
        let jobs = Jobs::default();
        let (release, held) = channel::<()>();
        let (done, is_done) = channel();
        let first = run(&jobs, "a", Duration::ZERO, move || {
            let _ = held.recv();
            let _ = done.send(());
            Ok(1)
        });
        assert_eq!(first, Err(Kind::Pending));
        let begun = Instant::now();
        assert_eq!(run(&jobs, "a", LONG, || Ok(2)), Err(Kind::Pending));
        assert!(begun.elapsed() < LONG / 2, "it was not waited for");
        // Another volume is free.
        let other = jobs.run("fast/2", "stage", "a".to_owned(), LONG, || Ok(3));
        assert_eq!(other.expect("another volume"), 3);
        drop(release);
        is_done.recv().expect("the first call goes on");
        let begun = Instant::now();
        let again = loop {
            match run(&jobs, "a", LONG, || Ok(4)) {
                Err(Kind::Pending) if begun.elapsed() < LONG => thread::yield_now(),
                again => break again,
            }
        };
        assert_eq!(again, Ok(4), "a new call, which finds all done");
    }

    #[test]
    fn rule_11_a_failure_that_was_not_fetched_answers_the_next_equal_call() {
        let outcome = |kind, call| {
            let jobs = Jobs::default();
            let (release, held) = channel::<()>();
            let first = run(&jobs, "a", Duration::ZERO, move || {
                let _ = held.recv();
                Err(Error::new(kind, "x"))
            });
            assert_eq!(first, Err(Kind::Pending));
            drop(release);
            let begun = Instant::now();
            loop {
                match run(&jobs, call, LONG, || Ok(5)) {
                    Err(Kind::Pending) if begun.elapsed() < LONG => thread::yield_now(),
                    other => break other,
                }
            }
        };
        assert_eq!(outcome(Kind::Refused, "a"), Err(Kind::Refused));
        assert_eq!(outcome(Kind::Refused, "b"), Ok(5), "another call");
        assert_eq!(outcome(Kind::Unavailable, "a"), Ok(5), "it is tried again");
    }

    #[test]
    fn work_that_panics_ends() {
        let jobs = Jobs::default();
        assert_eq!(run(&jobs, "a", LONG, || panic!("for the test")), Err(Kind::Unavailable));
        assert_eq!(run(&jobs, "a", LONG, || Ok(6)), Ok(6));
    }
}
