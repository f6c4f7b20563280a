//! An op on its way to the server and back.

use sheave_core::{Buf, ByteRange, Nanos, Op, Tag};

use crate::kept::Mark;

/// Whose op it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// A backend's, by its key, under its tag.
    User(usize, Tag),
    /// A backend's that is gone: it ends, and no completion comes of it.
    Gone,
    /// The volume's: a flush that makes room for more writes.
    Volume,
    /// The volume's: a write that the server may have lost.
    Replay,
    /// The volume's: a read that shows that the server answers, before a suspect is sent.
    Probe,
}

/// From how many breaks on a request is a suspect: the server may die of it.
const SUSPECT_FROM: u32 = 2;
/// So many breaks are enough. Those from [`SUSPECT_FROM`] on came when the request was the only one
/// with a server that had answered just before.
pub(crate) const BREAKS_MAX: u32 = 10;

/// The writes that had completed when a flush was sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Covered {
    pub(crate) kept: Mark,
    /// How many that were not kept.
    pub(crate) unkept: u64,
}

/// An op that was accepted and has not ended.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) owner: Owner,
    pub(crate) op: Op,
    /// Its place in the order in which ops were accepted.
    pub(crate) number: u64,
    /// When it was accepted, and when it was sent last.
    pub(crate) accepted: Nanos,
    pub(crate) sent_at: Nanos,
    /// Bytes from the start of its range that the server has done: an op may be longer than the
    /// server takes.
    pub(crate) done: u64,
    /// The part of its range that was sent.
    pub(crate) sent: Option<ByteRange>,
    /// Memory of a read that was sent.
    pub(crate) into: Option<Buf>,
    /// What a flush that was sent covers.
    pub(crate) mark: Option<Covered>,
    /// Connections that broke while the server owed an answer to it.
    pub(crate) breaks: u32,
}

impl Job {
    pub(crate) fn new(owner: Owner, op: Op, number: u64, accepted: Nanos) -> Self {
        let (sent, into, mark) = (None, None, None);
        let (sent_at, done, breaks) = (accepted, 0, 0);
        Self { owner, op, number, accepted, sent_at, done, sent, into, mark, breaks }
    }

    /// Whether it goes alone and last, since connections have broken while it was with the server.
    pub(crate) fn is_suspect(&self) -> bool {
        self.breaks >= SUSPECT_FROM
    }

    /// The next part of its range, at most `len_max` bytes; a flush has none.
    pub(crate) fn next_part(&self, len_max: u64) -> Option<ByteRange> {
        let range = self.op.range()?;
        Some(range.part(self.done, (range.len() - self.done).min(len_max)))
    }

    /// The op that asks for this part of the range.
    pub(crate) fn part(&self, part: Option<ByteRange>) -> Op {
        let Some(part) = part.filter(|part| Some(*part) != self.op.range()) else {
            return self.op.clone();
        };
        let mut op = self.op.clone();
        match &mut op {
            Op::Write { range, data, .. } => {
                *data = data.slice((part.start() - range.start()) as usize, part.len() as usize);
                *range = part;
            }
            Op::Read { range, .. }
            | Op::Trim { range, .. }
            | Op::WriteZeroes { range, .. }
            | Op::Cache { range }
            | Op::BlockStatus { range, .. } => *range = part,
            Op::Flush => {}
        }
        op
    }

    /// Nothing of it is with the server any more.
    pub(crate) fn taken_back(&mut self) {
        // What still arrives from the old connection goes to the old memory.
        (self.sent, self.into, self.mark) = (None, None, None);
    }
}
