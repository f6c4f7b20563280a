//! The roots of an opening: they name checkpoints and snapshots, and have other changes.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use sheave_core::{Error, ErrorKind, Result};

use super::{Checkpoints, Created, Making, Step, fenced};
use crate::ask::{ChangeAsk, SnapshotAsk};
use crate::format::{Committed, keys};
use crate::head::{Head, Refusal};
use crate::ids::Seq;

/// The most snapshots that one checkpoint is made for: a root has room for so many, whatever else
/// it has.
const SHARED_MAX: usize = 3;

/// A root that is under way.
pub(super) struct Naming {
    head: Head,
    created: Pin<Box<dyn Future<Output = Result<Created>> + Send>>,
    /// To be called when it is there.
    done: Vec<Box<dyn FnOnce() + Send>>,
}

impl Checkpoints {
    /// The checkpoint is committed, and all before it. A root names it; if the volume is closing,
    /// that is the closed one.
    pub(crate) fn made(&mut self, committed: Committed, is_closing: bool) {
        let Step::Making(making) = std::mem::replace(&mut self.step, Step::Idle) else { return };
        let Making { directory, covered, settled, counts } = *making;
        assert!(committed.seq >= directory.seq, "only what is committed is named");
        self.counts.adopt(counts, directory, &settled.leaves);
        #[cfg(test)]
        if !crate::open::rules::get().deletes_behind_root {
            self.sweep.plan(&self.counts, &self.head.snapshots, &self.lineage);
        }
        self.feed.settle(settled);
        let mut head = self.head.clone();
        (head.root.committed, head.root.directory) = (committed, Some(directory));
        head.root.snapshots = head.root.snapshots.behind_checkpoint();
        (head.covered, head.reach) = (covered, self.lineage.reach_of(directory.seq));
        let wanted = std::mem::take(&mut self.wanted);
        let done = self.add_snapshots(&mut head, wanted);
        if is_closing && done.is_empty() {
            self.head = head;
            return;
        }
        self.put_root(head, done);
    }

    /// Adds snapshots of what the checkpoint has that the root names. Returns what is to be called
    /// when the root is there.
    fn add_snapshots(
        &self,
        head: &mut Head,
        wanted: impl IntoIterator<Item = SnapshotAsk>,
    ) -> Vec<Box<dyn FnOnce() + Send>> {
        let mut done = Vec::<Box<dyn FnOnce() + Send>>::new();
        for SnapshotAsk { name, at_ms, done: tell, .. } in wanted {
            match head.add(&name, at_ms) {
                Ok(snapshot) => done.push(Box::new(move || tell(Ok(snapshot)))),
                Err(refusal) => tell(Err(self.refused("snapshot", refusal))),
            }
        }
        done
    }

    /// Begins snapshots of what is committed. Those that find no room in this root or checkpoint
    /// stay in the list.
    pub(crate) fn begin_snapshots(
        &mut self,
        committed: Committed,
        list: &mut VecDeque<SnapshotAsk>,
    ) {
        let mut wanted = Vec::new();
        while wanted.len() < SHARED_MAX
            && let Some(ask) = list.pop_front_if(|ask| ask.lsn <= committed.lsn)
        {
            match self.head.check_name(&ask.name) {
                Ok(()) => wanted.push(ask),
                Err(refusal) => (ask.done)(Err(self.refused("snapshot", refusal))),
            }
        }
        if wanted.is_empty() {
            return;
        }
        // Nothing was written since the last checkpoint. One that this opening has only found in
        // the log may need other leaves than those that are counted, and these die by the counts.
        let is_there = self.head.has_all(committed.lsn) && self.is_counted();
        if is_there && self.head.has_room(wanted.len()) {
            let mut head = self.head.clone();
            let done = self.add_snapshots(&mut head, wanted);
            return self.put_root(head, done);
        }
        self.wanted = wanted;
        match self.is_impossible {
            true => self.refuse_wanted("the map of the volume is too large, or damaged"),
            false => self.begin(committed),
        }
    }

    /// The snapshots that are wanted are not made.
    pub(super) fn refuse_wanted(&mut self, why: &str) {
        for ask in std::mem::take(&mut self.wanted) {
            let why = format!("no snapshot can be made: {why}");
            (ask.done)(Err(self.refused("snapshot", (ErrorKind::Unsupported, why))));
        }
    }

    /// Takes a change for the next root.
    pub(crate) fn change(&mut self, ask: ChangeAsk) {
        self.changes.push_back(ask);
    }

    /// Makes a root with the changes that wait, if nothing is under way. When the lists of the root
    /// are full, a checkpoint comes first.
    pub(crate) fn begin_changes(&mut self, committed: Committed) {
        if !self.is_idle() || self.changes.is_empty() {
            return;
        }
        if !self.head.has_room(1) && !self.is_impossible && committed.seq > Seq(0) {
            return self.begin(committed);
        }
        let (mut head, mut done) = (self.head.clone(), Vec::<Box<dyn FnOnce() + Send>>::new());
        for ChangeAsk { change, done: tell } in std::mem::take(&mut self.changes) {
            let mut changed = head.clone();
            let outcome = change(&mut changed).and_then(|()| match changed.root.fits(0) {
                true => Ok(changed),
                false => Err((ErrorKind::Busy, "its root has no room for that".to_owned())),
            });
            match outcome {
                Ok(changed) => {
                    head = changed;
                    done.push(Box::new(move || tell(Ok(()))));
                }
                Err(refusal) => tell(Err(self.refused("change", refusal))),
            }
        }
        if !done.is_empty() {
            self.put_root(head, done);
        }
    }

    fn put_root(&mut self, mut head: Head, done: Vec<Box<dyn FnOnce() + Send>>) {
        head.root.number += 1;
        let (requests, body) = (self.requests.clone(), head.root.encode());
        let key = keys::root(head.root.number);
        let created = Box::pin(async move { requests.create(&key, body.into()).await });
        self.step = Step::Naming(Box::new(Naming { head, created, done }));
    }

    /// Goes on with the root that is under way.
    pub(super) fn poll_naming(&mut self, cx: &mut Context<'_>) -> Result<()> {
        let Step::Naming(naming) = &mut self.step else { return Ok(()) };
        let Poll::Ready(created) = naming.created.as_mut().poll(cx) else { return Ok(()) };
        if let Created::Theirs(_) = created? {
            let key = keys::root(naming.head.root.number);
            return Err(fenced(&self.requests, "checkpoint", &key));
        }
        let Step::Naming(naming) = std::mem::replace(&mut self.step, Step::Idle) else {
            return Ok(());
        };
        let Naming { head, done, .. } = *naming;
        self.head = head;
        self.plan_sweep();
        self.sweep.plan_roots(self.head.root.number);
        done.into_iter().for_each(|done| done());
        Ok(())
    }

    fn refused(&self, op: &'static str, (kind, why): Refusal) -> Error {
        self.requests.error(kind, op, "", &why)
    }
}
