//! When a checkpoint is made, and which one the roots name.
//!
//! A checkpoint is a log object with the map of what was committed when it was begun. When it is
//! committed itself, a root names it. An opening then reads it, and the objects behind what it has:
//! at most [`tail_max`] of them, since no object is begun that is further away.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use sheave_core::{Error, ErrorKind, Result};

use crate::format::{
    Author, Built, Committed, Directory, DirectoryPlace, Root, State, checkpoint, keys,
};
use crate::ids::{Lsn, Seq};
use crate::lineage::Lineage;
use crate::retry::{Requests, Settled};
use crate::upload::{Feed, WINDOW};

/// A checkpoint is made after so many objects.
pub(crate) const INTERVAL: u64 = 16;

/// The most objects behind what the newest checkpoint has, that one included, where checkpoints
/// come after so many objects.
pub(crate) const fn tail_max(interval: u64) -> u64 {
    interval + WINDOW as u64 + 1
}

/// The checkpoints of an opening.
pub(crate) struct Checkpoints {
    requests: Requests,
    /// The newest root of the opening.
    root: Root,
    lineage: Lineage,
    interval: u64,
    /// The checkpoint that the root names has all up to this object.
    covered: Seq,
    step: Step,
    /// The map was too large for an object.
    is_impossible: bool,
}

enum Step {
    Idle,
    /// Its object is under way.
    Making(Made),
    /// The root that names it is under way.
    Naming(Made, Box<Root>, Pin<Box<dyn Future<Output = Result<Settled>> + Send>>),
}

/// A checkpoint, and up to which object it has all.
#[derive(Clone, Copy)]
struct Made {
    place: DirectoryPlace,
    covered: Seq,
}

impl Checkpoints {
    /// For the opening that has made this root, whose checkpoint has all up to an object. The
    /// lineage has the opening itself.
    pub(crate) fn new(requests: Requests, root: Root, covered: Seq, lineage: Lineage) -> Self {
        let (step, interval) = (Step::Idle, INTERVAL);
        Self { requests, root, lineage, interval, covered, step, is_impossible: false }
    }

    /// The same with a checkpoint after so many objects.
    pub(crate) fn every(self, interval: u64) -> Self {
        Self { interval, ..self }
    }

    /// Whether an object of this number may be begun now: else it would have to be read by an
    /// opening that comes before the next checkpoint.
    pub(crate) fn allows(&self, seq: Seq) -> bool {
        self.is_impossible || seq.0 <= self.covered.0 + tail_max(self.interval)
    }

    /// Whether the object of this number is to be a checkpoint of what is committed. It waits for
    /// most of what is under way, since it cannot have that.
    pub(crate) fn is_due(&self, committed: Seq, next: Seq) -> bool {
        let is_far = next.0 > self.covered.0 + self.interval;
        let is_worth_it = committed.0 >= self.covered.0 + self.interval * 3 / 4;
        self.is_idle() && !self.is_impossible && is_far && is_worth_it
    }

    /// Whether there is something behind the last checkpoint, but itself.
    pub(crate) fn is_due_at_end(&self, committed: Seq) -> bool {
        let of_itself = u64::from(self.root.directory.is_some());
        self.is_idle() && !self.is_impossible && committed.0 > self.covered.0 + of_itself
    }

    /// Whether nothing of a checkpoint is under way.
    pub(crate) fn is_idle(&self) -> bool {
        matches!(self.step, Step::Idle)
    }

    /// The object of a checkpoint of what is committed; `before` is the last write of the objects
    /// before it. `None` if the map is too large.
    pub(crate) fn begin(
        &mut self,
        author: &Author,
        committed: Committed,
        (seq, before): (Seq, Lsn),
        feed: &dyn Feed,
    ) -> Option<Built> {
        let epochs = self.lineage.up_to(committed.seq);
        let runs = feed.freeze().merge();
        let directory = Directory { covered: committed, epochs, runs };
        let made = checkpoint(author, seq, before, &directory);
        feed.settle(directory.runs);
        let Some((built, place)) = made else {
            self.is_impossible = true;
            tracing::warn!(
                volume = self.requests.name(),
                "the map has become too large for a checkpoint; to open the volume takes longer"
            );
            return None;
        };
        self.step = Step::Making(Made { place, covered: committed.seq });
        Some(built)
    }

    /// Whether the object of this number is the checkpoint that is under way.
    pub(crate) fn is_making(&self, seq: Seq) -> bool {
        matches!(&self.step, Step::Making(made) if made.place.seq == seq)
    }

    /// The checkpoint is committed, and all before it. A root names it; if the volume is closing,
    /// that is the closed one.
    pub(crate) fn made(&mut self, committed: Committed, is_closing: bool) {
        let Step::Making(made) = std::mem::replace(&mut self.step, Step::Idle) else { return };
        assert!(committed.seq >= made.place.seq, "only what is committed is named");
        let mut root = self.root.clone();
        (root.committed, root.directory) = (committed, Some(made.place));
        if is_closing {
            (self.root, self.covered) = (root, made.covered);
            return;
        }
        root.number += 1;
        let (requests, body) = (self.requests.clone(), root.encode());
        let key = keys::root(root.number);
        let naming = Box::pin(async move { requests.create(&key, body.into()).await });
        self.step = Step::Naming(made, Box::new(root), naming);
    }

    /// Goes on with the root that names a checkpoint.
    ///
    /// # Errors
    /// [`ErrorKind::Fenced`] when another opener has the volume, and those of the store.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Result<()> {
        let Step::Naming(made, root, naming) = &mut self.step else { return Ok(()) };
        let Poll::Ready(settled) = naming.as_mut().poll(cx) else { return Ok(()) };
        if let Settled::Theirs(_) = settled? {
            return Err(fenced(&self.requests, "checkpoint", &keys::root(root.number)));
        }
        (self.root, self.covered) = (Root::clone(root), made.covered);
        self.step = Step::Idle;
        Ok(())
    }

    /// Makes the closed root.
    ///
    /// # Errors
    /// As for [`Self::poll`].
    pub(crate) async fn close(self, committed: Committed) -> Result<()> {
        assert!(self.is_idle(), "nothing is under way");
        let Self { requests, mut root, .. } = self;
        root.number += 1;
        root.state = State::Closed;
        root.committed = committed;
        root.last.is_closed = true;
        let key = keys::root(root.number);
        match requests.create(&key, root.encode().into()).await? {
            Settled::Mine => Ok(()),
            Settled::Theirs(_) => Err(fenced(&requests, "close", &key)),
        }
    }
}

/// The error of an opening that is not the last one any more.
pub(crate) fn fenced(requests: &Requests, op: &'static str, key: &str) -> Error {
    let why = "another node has taken over the volume; what this one has not uploaded stays in its \
         journal";
    requests.error(ErrorKind::Fenced, op, key, why)
}
