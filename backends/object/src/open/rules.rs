//! Rules that a simulation takes out, to see that it notices.

use std::cell::Cell;

/// Which rules hold in this thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// A claim comes before the fence.
    pub(crate) claims_first: bool,
    /// A claim is void if a higher root exists.
    pub(crate) lists_again: bool,
    /// Claims are never deleted.
    pub(crate) keeps_claims: bool,
    /// A clone looks for its snapshot again when that is pinned.
    pub(crate) clones_look_again: bool,
    /// A snapshot is marked before its pins are listed.
    pub(crate) marks_first: bool,
    /// What is dead is deleted when a root names the checkpoint by which it is.
    pub(crate) deletes_behind_root: bool,
    /// Objects that snapshots need stay.
    pub(crate) keeps_snapshots: bool,
    /// Deaths and snapshots are of checkpoints by which the objects are counted.
    pub(crate) counts_named: bool,
    /// No checkpoint is begun while blocks are looked up and moved.
    pub(crate) moves_between: bool,
}

impl Rules {
    pub(crate) const ALL: Self = Self {
        claims_first: true,
        lists_again: true,
        keeps_claims: true,
        clones_look_again: true,
        marks_first: true,
        deletes_behind_root: true,
        keeps_snapshots: true,
        counts_named: true,
        moves_between: true,
    };
}

thread_local! {
    static RULES: Cell<Rules> = const { Cell::new(Rules::ALL) };
}

pub(crate) fn get() -> Rules {
    RULES.get()
}

pub(crate) fn set(rules: Rules) {
    RULES.set(rules);
}
