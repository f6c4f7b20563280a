//! Flushes, and what they wait for: syncs of the journal, or the bucket.

use sheave_core::Result;

use super::{Flush, Front, Mail, News, Sync};
use crate::format::Durability;
use crate::ids::Lsn;

/// Flushes that wait.
#[derive(Default)]
pub(super) struct Flushes {
    /// For the journal.
    of_journal: Vec<Flush>,
    /// For the bucket.
    of_bucket: Vec<Flush>,
    /// The last write of the newest batch that was sealed for flushes.
    sealed_upto: Lsn,
}

impl Flushes {
    /// Forgets those of a user.
    pub(super) fn leave(&mut self, user: usize) {
        self.of_journal.retain(|flush| flush.user != user);
        self.of_bucket.retain(|flush| flush.user != user);
    }

    /// Takes all: user and job.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = (usize, usize)> {
        let all = self.of_journal.drain(..).chain(self.of_bucket.drain(..));
        all.map(|flush| (flush.user, flush.job))
    }
}

impl Front {
    /// All up to this record is to be made durable for a job by a flush: true if it already is.
    /// Else the job has news later.
    ///
    /// # Errors
    /// When the volume has failed.
    pub(crate) fn flush(
        &mut self,
        op: &'static str,
        (user, job): (usize, usize),
        needs: Option<Lsn>,
    ) -> Result<bool> {
        self.check(op)?;
        let needs = needs.unwrap_or_else(|| self.log.written());
        let (is_done, flushes) = match self.durability {
            Durability::Local => (needs <= self.log.durable(), &mut self.flushes.of_journal),
            Durability::Remote => (!self.recent.lacks(needs), &mut self.flushes.of_bucket),
            Durability::Unsafe => return Ok(true),
        };
        if !is_done {
            flushes.push(Flush { user, job, needs });
            self.seal_for_flushes();
        }
        Ok(is_done)
    }

    /// What flushes wait for.
    pub(crate) fn durability(&self) -> Durability {
        self.durability
    }

    /// Flushes that begin from now on wait for that.
    pub(crate) fn set_durability(&mut self, durability: Durability) {
        self.durability = durability;
    }

    /// A sync to start now, if flushes wait for one and none goes on. One at a time, since the
    /// kernel reports a failed write-back once to a file description.
    pub(crate) fn begin_sync(&mut self) -> Option<Sync> {
        let is_wanted = !self.flushes.of_journal.is_empty();
        if self.is_syncing || !is_wanted || self.failure.is_some() {
            return None;
        }
        let (upto, segments) = (self.log.written(), self.log.unsynced());
        if segments.is_empty() {
            // The bucket has what is not synced, and no segment holds it any more.
            self.end_sync(upto, Ok(()));
            return None;
        }
        self.is_syncing = true;
        Some(Sync { upto, segments })
    }

    /// A sync that a backend has begun is done, or has failed.
    pub(crate) fn synced(&mut self, upto: Lsn, outcome: Result<(), &str>) {
        self.is_syncing = false;
        self.end_sync(upto, outcome);
        self.wake_flushes();
    }

    pub(super) fn end_sync(&mut self, upto: Lsn, outcome: Result<(), &str>) {
        if let Err(why) = outcome {
            return self.poison(&format!("the journal could not be flushed ({why})"));
        }
        if self.failure.is_some() {
            return;
        }
        self.log.synced(upto);
        self.look_for_room();
        let durable = self.log.durable();
        let of_journal = &mut self.flushes.of_journal;
        let done = of_journal.extract_if(.., |flush| flush.needs <= durable).collect();
        self.end_flushes(done);
    }

    /// Wakes a user whose flush waits, so that it starts the next sync.
    pub(super) fn wake_flushes(&mut self) {
        if let Some(flush) = self.flushes.of_journal.first().filter(|_| !self.is_syncing) {
            let user = flush.user;
            self.notify(user);
        }
    }

    /// The bucket has more than before.
    pub(super) fn has_committed(&mut self) {
        let (flushes, recent) = (&mut self.flushes.of_bucket, &self.recent);
        let done = flushes.extract_if(.., |flush| !recent.lacks(flush.needs)).collect();
        self.end_flushes(done);
        self.seal_for_flushes();
    }

    fn end_flushes(&mut self, done: Vec<Flush>) {
        for Flush { user, job, .. } in done {
            self.post(user, Mail { job, news: News::Synced });
        }
    }

    /// Seals what flushes wait for. One object at a time is made for them, and what comes meanwhile
    /// shares the next one: not each flush makes an object.
    fn seal_for_flushes(&mut self) {
        let Some(needs) = self.flushes.of_bucket.iter().map(|flush| flush.needs).max() else {
            return;
        };
        let is_under_way = self.flushes.sealed_upto > self.log.committed();
        if !is_under_way && self.recent.has_unsealed_upto(needs) {
            self.seal();
            self.flushes.sealed_upto = self.recent.sealed_upto().unwrap_or_default();
        }
    }
}
