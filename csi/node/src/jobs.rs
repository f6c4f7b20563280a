//! Work on volumes: at most one call each, in a thread of its own, so that a caller is answered in
//! time however long the work takes.
//!
//! A call for a volume that is being worked on is refused at once. Work goes on after its caller
//! has left. If it fails for good, the next equal call has that answer; if it ends well, the next
//! call finds it done.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Error, Kind, Result};

/// An answer that was not fetched is forgotten after this: kubelet asks again within 122 s.
const KEPT: Duration = Duration::from_secs(300);

/// Work that is going on, and its results. `T` is what work results in.
pub(crate) struct Jobs<T> {
    jobs: Mutex<HashMap<String, Arc<Job<T>>>>,
}

struct Job<T> {
    /// What was asked for, with all arguments.
    call: String,
    /// What it is called in messages.
    verb: &'static str,
    /// When it ended, and how.
    result: Mutex<Option<(Instant, Result<T>)>>,
    ended: Condvar,
}

/// Leaves a result even if the work panics.
struct Ending<T> {
    job: Arc<Job<T>>,
    result: Option<Result<T>>,
}

impl<T: Clone + Send + 'static> Jobs<T> {
    pub(crate) fn new() -> Self {
        Self { jobs: Mutex::default() }
    }

    /// Does work on a volume, and waits for its result at most so long.
    ///
    /// # Errors
    /// [`Kind::Pending`] when work on the volume is going on or does not end in time, else what the
    /// work, or an equal call before it, has failed with.
    pub(crate) fn run(
        &self,
        volume: &str,
        verb: &'static str,
        call: String,
        patience: Duration,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let job = Job::new(verb, call);
        {
            let mut jobs = lock(&self.jobs);
            jobs.retain(|_, job| !job.is_forgotten());
            if let Some(before) = jobs.get(volume) {
                let ended = lock(&before.result);
                match &*ended {
                    None => return Err(before.pending(volume)),
                    Some((_, Err(error))) if error.kind().is_final() && before.call == job.call => {
                        let error = error.clone();
                        drop(ended);
                        jobs.remove(volume);
                        return Err(error);
                    }
                    Some(_) => {}
                }
            }
            jobs.insert(volume.to_owned(), Arc::clone(&job));
        }
        let mut ending = Ending { job: Arc::clone(&job), result: None };
        let thread = thread::Builder::new().name(format!("node-{verb}"));
        // Without a thread the closure is dropped, which ends the job.
        let spawned = thread.spawn(move || ending.do_work(work));
        let result = match spawned {
            Ok(_) => job.wait(patience),
            Err(error) => {
                Some(Err(Error::of_io("start a thread", &error).with_kind(Kind::Exhausted)))
            }
        };
        let Some(result) = result else { return Err(job.pending(volume)) };
        let mut jobs = lock(&self.jobs);
        // Another call may have come since.
        if jobs.get(volume).is_some_and(|last| Arc::ptr_eq(last, &job)) {
            jobs.remove(volume);
        }
        result
    }
}

impl<T: Clone> Job<T> {
    fn new(verb: &'static str, call: String) -> Arc<Self> {
        let (result, ended) = (Mutex::default(), Condvar::new());
        Arc::new(Self { call, verb, result, ended })
    }

    fn wait(&self, patience: Duration) -> Option<Result<T>> {
        let result = lock(&self.result);
        let waited = self.ended.wait_timeout_while(result, patience, |result| result.is_none());
        let (result, _) = waited.unwrap_or_else(PoisonError::into_inner);
        result.as_ref().map(|(_, result)| result.clone())
    }

    fn is_forgotten(&self) -> bool {
        let result = lock(&self.result);
        result.as_ref().is_some_and(|(ended, _)| ended.elapsed() >= KEPT)
    }

    fn pending(&self, volume: &str) -> Error {
        // Without its time: an orchestrator joins events of the same text.
        let why = format!("volume {volume}: {} is going on; ask again", self.verb);
        Error::new(Kind::Pending, why)
    }
}

impl<T> Ending<T> {
    fn do_work(&mut self, work: impl FnOnce() -> Result<T>) {
        self.result = Some(work());
    }
}

impl<T> Drop for Ending<T> {
    fn drop(&mut self) {
        let panicked = || Err(Error::new(Kind::Unavailable, "the work on the volume panicked"));
        let result = self.result.take().unwrap_or_else(panicked);
        *lock(&self.job.result) = Some((Instant::now(), result));
        self.job.ended.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn run(
        jobs: &Jobs<u64>,
        call: &str,
        patience: Duration,
        work: impl FnOnce() -> Result<u64> + Send + 'static,
    ) -> Result<u64, Kind> {
        let result = jobs.run("fast/1", "stage", call.to_owned(), patience, work);
        result.map_err(|error| error.kind())
    }

    #[test]
    fn rule_11_a_second_call_is_refused_at_once_and_the_first_goes_on() {
        let jobs = Jobs::new();
        let (release, held) = mpsc::channel::<()>();
        let (done, is_done) = mpsc::channel();
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
    fn rule_11_a_failure_that_nobody_has_heard_of_is_the_next_equal_calls() {
        let outcome = |kind, call| {
            let jobs = Jobs::new();
            let (release, held) = mpsc::channel::<()>();
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
        let jobs = Jobs::new();
        assert_eq!(run(&jobs, "a", LONG, || panic!("for the test")), Err(Kind::Unavailable));
        assert_eq!(run(&jobs, "a", LONG, || Ok(6)), Ok(6));
    }
}
