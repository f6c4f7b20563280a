//! Writes that have completed and that no flush covers yet: what a server may lose when it ends.
//!
//! The newest state of each range is kept and nothing else, so entries never overlap and may be
//! sent again in any order.

use std::collections::BTreeMap;

use sheave_core::{ByteRange, Op, Payload, Segment};

/// Memory of an entry besides its payload, in bytes.
const ENTRY_BYTES: u64 = 128;

/// What was done to a range.
#[derive(Clone, Debug)]
enum What {
    Data(Payload),
    Zeroes { no_hole: bool },
    Trim,
}

#[derive(Clone, Debug)]
struct Entry {
    end: u64,
    what: What,
    /// When it was added; see [`Mark`].
    turn: u64,
}

impl Entry {
    /// What of it begins at `at`, of an entry that begins at `start`.
    fn cut(&self, start: u64, at: u64, end: u64) -> Self {
        let what = match &self.what {
            What::Data(data) => What::Data(data.slice((at - start) as usize, (end - at) as usize)),
            other => other.clone(),
        };
        Self { end, what, turn: self.turn }
    }
}

/// Everything that had been added at some time: what a flush that is sent then covers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    turn: u64,
    bytes: u64,
}

/// Completed writes.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    entries: BTreeMap<u64, Entry>,
    turn: u64,
    /// An upper bound of the memory that entries hold: also what newer ones have covered counts
    /// until the next flush, since a cut payload holds the whole buffer.
    bytes: u64,
    /// Of [`Self::bytes`], what flushes have covered so far.
    covered_bytes: u64,
}

impl Kept {
    /// Keeps a completed write, trim or zeroing of this part of its op.
    pub(crate) fn add(&mut self, op: &Op, range: ByteRange) {
        let what = match op {
            Op::Write { data, .. } => What::Data(data.clone()),
            Op::WriteZeroes { no_hole, .. } => What::Zeroes { no_hole: *no_hole },
            Op::Trim { .. } => What::Trim,
            _ => return,
        };
        self.forget(range);
        self.turn += 1;
        self.bytes += ENTRY_BYTES + held_bytes(&what);
        self.entries.insert(range.start(), Entry { end: range.end(), what, turn: self.turn });
    }

    /// The range has newer content that is stable.
    pub(crate) fn forget(&mut self, range: ByteRange) {
        let (from, to) = (range.start(), range.end());
        if let Some((&start, entry)) = self.entries.range_mut(..from).next_back()
            && entry.end > from
        {
            let whole = entry.clone();
            *entry = whole.cut(start, start, from);
            if whole.end > to {
                self.entries.insert(to, whole.cut(start, to, whole.end));
                self.bytes += ENTRY_BYTES;
            }
        }
        while let Some((&start, _)) = self.entries.range(from..to).next() {
            let Some(entry) = self.entries.remove(&start) else { return };
            if entry.end > to {
                self.entries.insert(to, entry.cut(start, to, entry.end));
            }
        }
    }

    /// What a flush that is sent now covers.
    pub(crate) fn mark(&self) -> Mark {
        Mark { turn: self.turn, bytes: self.bytes }
    }

    /// A flush has succeeded. Gives back the payloads that it covers.
    pub(crate) fn flushed(&mut self, mark: Mark, mut recycle: impl FnMut(Payload)) {
        let covered = self.entries.extract_if(.., |_, entry| entry.turn <= mark.turn);
        for (_, entry) in covered {
            if let What::Data(data) = entry.what {
                recycle(data);
            }
        }
        // Flushes may end in another order than they were sent in.
        self.covered_bytes = self.covered_bytes.max(mark.bytes);
        if self.entries.is_empty() {
            self.covered_bytes = self.bytes;
        }
    }

    /// An upper bound of the memory that is held, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes - self.covered_bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The ops that bring a server that has lost everything to the newest state; none is longer
    /// than the server takes.
    pub(crate) fn ops(&self, len_max: impl Fn(&Op) -> u64) -> Vec<Op> {
        let mut ops = Vec::new();
        for (&start, entry) in &self.entries {
            let mut at = start;
            while at < entry.end {
                let mut op = op_of(entry, start, at, entry.end);
                let end = entry.end.min(at.saturating_add(len_max(&op)));
                if end < entry.end {
                    op = op_of(entry, start, at, end);
                }
                ops.push(op);
                at = end;
            }
        }
        ops
    }
}

fn op_of(entry: &Entry, start: u64, at: u64, end: u64) -> Op {
    let range = ByteRange::within(at, end - at, end).expect("a part of a range");
    match entry.cut(start, at, end).what {
        What::Data(data) => Op::Write { range, data, fua: false },
        What::Zeroes { no_hole } => Op::WriteZeroes { range, fua: false, no_hole, fast: false },
        What::Trim => Op::Trim { range, fua: false },
    }
}

/// Memory that a payload holds: all of each of its buffers, of which it may use a part.
fn held_bytes(what: &What) -> u64 {
    let What::Data(data) = what else { return 0 };
    let pages = |segment: &Segment| match segment {
        Segment::Data(buf) => buf.capacity() as u64,
        Segment::Zero(_) => 0,
    };
    data.segments().iter().map(pages).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sheave_core::{Buf, PAGE_SIZE};

    use super::*;

    const SIZE: u64 = 64;

    #[derive(Clone, Debug)]
    enum Step {
        Write(u64, u64, bool),
        Zero(u64, u64),
        Flush,
        /// A flush of what was there at the last mark.
        LateFlush,
        Mark,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let range = || (0..SIZE, 1..20_u64).prop_map(|(at, len)| (at, len.min(SIZE - at)));
        let step = prop_oneof![
            6 => (range(), any::<bool>()).prop_map(|((at, len), fua)| Step::Write(at, len, fua)),
            2 => range().prop_map(|(at, len)| Step::Zero(at, len)),
            1 => Just(Step::Flush),
            1 => Just(Step::Mark),
            1 => Just(Step::LateFlush),
        ];
        prop::collection::vec(step, 1..60)
    }

    /// Runs an op on bytes.
    fn apply(op: &Op, disk: &mut [u8]) {
        let range = op.range().unwrap();
        let place = &mut disk[range.start() as usize..range.end() as usize];
        match op {
            Op::Write { data, .. } => data.copy_out(place),
            _ => place.fill(0),
        }
    }

    proptest! {
        /// A server that loses all that was not flushed has the newest bytes again when the kept
        /// ops are sent again, in any order.
        #[test]
        fn what_is_kept_restores_the_newest_state(steps in steps(), reverse: bool) {
            let (mut kept, mut now) = (Kept::default(), vec![0; SIZE as usize]);
            // What is stable whatever comes, and the same at the last mark.
            let mut stable = now.clone();
            let mut marked = (kept.mark(), now.clone());
            for (number, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Write(at, len, fua) => {
                        let range = ByteRange::within(at, len, SIZE).unwrap();
                        let bytes = vec![number as u8 + 1; len as usize];
                        let data = Payload::from(Buf::from_bytes(&bytes));
                        let op = Op::Write { range, data, fua };
                        apply(&op, &mut now);
                        if fua {
                            apply(&op, &mut stable);
                            apply(&op, &mut marked.1);
                            kept.forget(range);
                        } else {
                            kept.add(&op, range);
                        }
                    }
                    Step::Zero(at, len) => {
                        let range = ByteRange::within(at, len, SIZE).unwrap();
                        let op =
                            Op::WriteZeroes { range, fua: false, no_hole: false, fast: false };
                        apply(&op, &mut now);
                        kept.add(&op, range);
                    }
                    Step::Flush => {
                        stable.clone_from(&now);
                        kept.flushed(kept.mark(), |_| ());
                        prop_assert!(kept.is_empty() && kept.bytes() == 0);
                        marked = (kept.mark(), now.clone());
                    }
                    Step::Mark => marked = (kept.mark(), now.clone()),
                    Step::LateFlush => {
                        stable.clone_from(&marked.1);
                        kept.flushed(marked.0, |_| ());
                    }
                }
                let mut disk = stable.clone();
                let mut ops = kept.ops(|_| 7);
                if reverse {
                    ops.reverse();
                }
                for op in &ops {
                    prop_assert!(op.range().unwrap().len() <= 7);
                    apply(op, &mut disk);
                }
                prop_assert_eq!(&disk, &now);
            }
        }
    }

    #[test]
    fn rewriting_one_block_counts_until_it_is_flushed() {
        let mut kept = Kept::default();
        let range = ByteRange::within(0, 512, SIZE * 512).unwrap();
        for _ in 0..10 {
            let data = Payload::from(Buf::zeroed(512));
            kept.add(&Op::Write { range, data, fua: false }, range);
        }
        assert_eq!(kept.bytes(), 10 * (PAGE_SIZE as u64 + ENTRY_BYTES));
        kept.flushed(kept.mark(), |_| ());
        assert_eq!(kept.bytes(), 0);
    }
}
