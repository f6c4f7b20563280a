//! Deletes what is dead in the checkpoint that the newest root names, and old roots.
//!
//! What is not deleted when the process ends is so later: the checkpoint still has it as dead, and
//! an old root stays where it was.

use std::collections::VecDeque;
use std::task::{Context, Poll};

use sheave_core::Result;

use super::Counts;
use crate::format::{ROOT_BYTES_MAX, Root, Snapshot, State, keys};
use crate::ids::Seq;
use crate::lineage::Lineage;
use crate::retry::{Patience, Requests};
use crate::together::{Boxed, boxed};

/// Deletions under way. They are short beside the objects that are.
const DELETIONS_MAX: usize = 4;
/// How long one is tried. What fails is tried again with the next root.
const PATIENCE_MS: u64 = 30_000;
/// Old roots of earlier openings are looked for in pages of so many, as long as one has some. The
/// last openings have looked at those behind them.
const PAGE_ROOTS: usize = 96;
const PAGES_MAX: usize = 32;

/// The deletions of an opening.
pub(crate) struct Sweep {
    requests: Requests,
    /// Roots that stay beside the claims.
    roots_kept: u64,
    due: VecDeque<Garbage>,
    under_way: Vec<(Garbage, Boxed<'static, Result<()>>)>,
    /// The first root of this opening.
    root_first: u64,
    /// Its first one that is not deleted.
    root_next: u64,
    /// With this root, the old ones of earlier openings are looked for.
    looks_with: u64,
    looking: Option<Boxed<'static, Result<Vec<String>>>>,
    has_failed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Garbage {
    Object(Seq, u64, String),
    Root(String),
}

impl Sweep {
    /// For the opening that has made this root as its first one.
    pub(crate) fn new(requests: &Requests, root: &Root, roots_kept: u64) -> Self {
        // The store's refusals are none of what a write waits for.
        let requests = requests.unheard().with_patience(Patience::Ms(PATIENCE_MS));
        Self {
            requests,
            roots_kept,
            due: VecDeque::new(),
            under_way: Vec::new(),
            root_first: root.number,
            root_next: root.number,
            looks_with: root.number,
            looking: None,
            has_failed: false,
        }
    }

    /// A root has been made that names the checkpoint of these counts. So what is dead there is
    /// deleted, but for what the snapshots of that root need.
    pub(crate) fn plan(&mut self, counts: &Counts, snapshots: &[Snapshot], lineage: &Lineage) {
        self.due.retain(|garbage| matches!(garbage, Garbage::Root(_)));
        for (seq, bytes) in counts.garbage(snapshots) {
            let is_it = |(garbage, _): &(Garbage, _)| garbage.seq() == Some(seq);
            if let Some(epoch) = lineage.epoch_of(seq)
                && !self.under_way.iter().any(is_it)
            {
                self.due.push_back(Garbage::Object(seq, bytes, keys::log(epoch, seq)));
            }
        }
    }

    /// Nothing but what is under way is deleted any more.
    pub(crate) fn stop(&mut self) {
        self.due.clear();
        self.looking = None;
    }

    /// This root of the opening is the newest one: older ones go.
    pub(crate) fn plan_roots(&mut self, newest: u64) {
        // All between are the opening's own, and none is a claim.
        while self.root_next.saturating_add(self.roots_kept) <= newest {
            self.due.push_back(Garbage::Root(keys::root(self.root_next)));
            self.root_next += 1;
        }
        if self.looks_with <= newest {
            let below = self.root_first.min((newest + 1).saturating_sub(self.roots_kept));
            self.looking = Some(boxed(old_roots(self.requests.clone(), below)));
            // Once more when all of them are old.
            let last = self.root_first + self.roots_kept;
            self.looks_with = if newest < last { last } else { u64::MAX };
        }
    }

    /// Goes on. Returns the objects that are deleted now, with their bytes.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Vec<(Seq, u64)> {
        let mut deleted = Vec::new();
        loop {
            self.poll_looking(cx);
            while self.under_way.len() < DELETIONS_MAX
                && let Some(garbage) = self.due.pop_front()
            {
                let (requests, key) = (self.requests.clone(), garbage.key().to_owned());
                let deletion = boxed(async move { requests.delete(&key).await });
                self.under_way.push((garbage, deletion));
            }
            let before = self.under_way.len();
            let mut outcomes = Vec::new();
            self.under_way.retain_mut(|(garbage, deletion)| match deletion.as_mut().poll(cx) {
                Poll::Pending => true,
                Poll::Ready(outcome) => {
                    outcomes.push((garbage.clone(), outcome));
                    false
                }
            });
            for (garbage, outcome) in outcomes {
                match (garbage, outcome) {
                    (Garbage::Object(seq, bytes, _), Ok(())) => deleted.push((seq, bytes)),
                    (Garbage::Root(_), Ok(())) => {}
                    (_, Err(why)) => self.failed(&why.to_string()),
                }
            }
            if self.under_way.len() == before {
                return deleted;
            }
        }
    }

    fn poll_looking(&mut self, cx: &mut Context<'_>) {
        let Some(looking) = &mut self.looking else { return };
        let Poll::Ready(outcome) = looking.as_mut().poll(cx) else { return };
        self.looking = None;
        match outcome {
            Ok(roots) => self.due.extend(roots.into_iter().map(Garbage::Root)),
            Err(why) => self.failed(&why.to_string()),
        }
    }

    /// A store may refuse deletions. What is garbage stays then, and all else goes on.
    fn failed(&mut self, why: &str) {
        self.due.clear();
        if !std::mem::replace(&mut self.has_failed, true) {
            let volume = self.requests.name();
            tracing::warn!(volume, "what the volume does not need any more stays stored: {why}");
        }
    }
}

impl Garbage {
    fn seq(&self) -> Option<Seq> {
        match self {
            Self::Object(seq, ..) => Some(*seq),
            Self::Root(_) => None,
        }
    }

    fn key(&self) -> &str {
        match self {
            Self::Object(.., key) | Self::Root(key) => key,
        }
    }
}

/// The keys of the roots below one that are to be deleted: not claims, and no tombstones.
async fn old_roots(requests: Requests, below: u64) -> Result<Vec<String>> {
    let (mut old, mut after) = (Vec::new(), keys::root(below));
    for _ in 0..PAGES_MAX {
        let listed = requests.list(keys::ROOTS, &after, PAGE_ROOTS).await?;
        let Some(last) = listed.last() else { break };
        after.clone_from(&last.key);
        let before = old.len();
        for object in listed {
            let Some(bytes) = requests.get(&object.key, 0..ROOT_BYTES_MAX).await? else { continue };
            let root = Root::decode(&bytes);
            if root.is_ok_and(|root| matches!(root.state, State::Open | State::Closed)) {
                old.push(object.key);
            }
        }
        if old.len() == before {
            break;
        }
    }
    Ok(old)
}
