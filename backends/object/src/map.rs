//! The map of committed blocks: a fold of the log objects in the order of their numbers.
//!
//! It has three layers. What is committed goes to the upper one. A checkpoint takes that one as it
//! is, without a copy, merges it with the lower one while ops go on, and puts the result in the
//! place of both.

use std::sync::Arc;

use crate::extents::{Extents, Piece, Span};
use crate::format::{Entry, Placed, Run};
use crate::ids::{Place, Seq};

/// Where the committed blocks of a volume are. Blocks that it does not have are zeroes.
#[derive(Clone, Debug, Default)]
pub struct Map {
    /// What is folded since the last checkpoint began.
    upper: Extents<Place>,
    /// What was folded before, while a checkpoint of it is made.
    frozen: Arc<Extents<Place>>,
    lower: Arc<Layer>,
}

/// The map as it was when a checkpoint began.
#[derive(Clone, Debug)]
pub struct Frozen {
    frozen: Arc<Extents<Place>>,
    lower: Arc<Layer>,
}

/// Runs of blocks in the order of their addresses, packed.
#[derive(Clone, Debug, Default)]
struct Layer {
    runs: Vec<Run>,
}

impl Map {
    /// The map that a directory has.
    #[must_use]
    pub fn of_runs(runs: Vec<Run>) -> Self {
        Self { lower: Arc::new(Layer { runs }), ..Self::default() }
    }

    /// Takes the next blocks of the log.
    pub fn fold(&mut self, placed: &Placed) {
        let span = Span { start: placed.lba.0, blocks: placed.blocks };
        self.upper.insert(span, placed.place);
    }

    /// Takes the entries of the next object.
    pub fn fold_object(&mut self, seq: Seq, entries: &[Entry]) {
        for entry in entries {
            let placed = match *entry {
                Entry::Fence | Entry::Directory { .. } => continue,
                Entry::Zero { lba, blocks } => Placed { lba, blocks, place: Place::Zero },
                Entry::Write { lba, blocks: run, frame } => {
                    let place = Place::Object { seq, frame, skip: 0, run };
                    Placed { lba, blocks: u64::from(run), place }
                }
            };
            self.fold(&placed);
        }
    }

    /// The pieces of a range, all of it in order; zeroes have no place.
    #[must_use]
    pub fn cover(&self, span: Span) -> Vec<(Span, Option<Place>)> {
        let mut out = Vec::new();
        for (span, place) in self.upper.cover(span) {
            match place {
                Some(place) => out.push((span, blocks_at(place))),
                None => {
                    for (span, place) in self.frozen.cover(span) {
                        match place {
                            Some(place) => out.push((span, blocks_at(place))),
                            None => self.lower.cover(span, &mut out),
                        }
                    }
                }
            }
        }
        out
    }

    /// The map as it is now, for a checkpoint, which ends with [`Map::settle`].
    ///
    /// # Panics
    /// When a checkpoint has begun and not ended.
    pub fn freeze(&mut self) -> Frozen {
        assert!(self.frozen.is_empty(), "one checkpoint at a time");
        self.frozen = Arc::new(std::mem::take(&mut self.upper));
        Frozen { frozen: Arc::clone(&self.frozen), lower: Arc::clone(&self.lower) }
    }

    /// The checkpoint has merged what was frozen to this. Returns what it replaces, to be dropped
    /// without a lock.
    pub fn settle(&mut self, merged: Vec<Run>) -> Frozen {
        let frozen = std::mem::take(&mut self.frozen);
        let merged = Arc::new(Layer { runs: merged });
        Frozen { frozen, lower: std::mem::replace(&mut self.lower, merged) }
    }
}

impl Frozen {
    /// Its runs.
    #[must_use]
    pub fn merge(&self) -> Vec<Run> {
        let mut runs = Vec::with_capacity(self.lower.runs.len() + self.frozen.len());
        let mut end = 0;
        for (span, place) in self.frozen.iter() {
            self.lower.within(Span { start: end, blocks: span.start - end }, &mut runs);
            if *place != Place::Zero {
                runs.push(Run { span, place: *place });
            }
            end = span.end();
        }
        self.lower.within(Span { start: end, blocks: u64::MAX - end }, &mut runs);
        runs.shrink_to_fit();
        runs
    }
}

impl Layer {
    /// Appends the runs that have blocks of `span`, cut to it.
    fn within(&self, span: Span, out: &mut Vec<Run>) {
        let first = self.runs.partition_point(|run| run.span.end() <= span.start);
        for run in &self.runs[first..] {
            let common = run.span.common(span);
            if common.is_empty() {
                return;
            }
            let place = run.place.advance(common.start - run.span.start);
            out.push(Run { span: common, place });
        }
    }

    /// Appends all of `span` in order; zeroes have no place.
    fn cover(&self, span: Span, out: &mut Vec<(Span, Option<Place>)>) {
        let mut runs = Vec::new();
        self.within(span, &mut runs);
        let mut at = span.start;
        for Run { span, place } in runs {
            if span.start > at {
                out.push((Span { start: at, blocks: span.start - at }, None));
            }
            at = span.end();
            out.push((span, Some(place)));
        }
        if at < span.end() {
            out.push((Span { start: at, blocks: span.end() - at }, None));
        }
    }
}

/// A place, if there are blocks at it.
fn blocks_at(place: Place) -> Option<Place> {
    (place != Place::Zero).then_some(place)
}

impl Piece for Place {
    fn after(&self, blocks: u64) -> Self {
        self.advance(blocks)
    }

    fn continues(&self, blocks: u64, next: &Self) -> bool {
        match (*self, *next) {
            (Self::Zero, Self::Zero) => true,
            (
                Self::Object { seq, frame, skip, run },
                Self::Object { seq: of, frame: at, skip: behind, run: _ },
            ) => {
                let is_same_run = (seq, frame) == (of, at);
                is_same_run && u64::from(skip) + blocks == u64::from(behind) && behind < run
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::Lba;

    const BLOCKS: u64 = 40;

    #[derive(Clone, Debug)]
    enum Step {
        Fold { lba: u64, blocks: u64, is_zero: bool },
        Freeze,
        Settle,
    }

    fn step() -> impl Strategy<Value = Step> {
        let fold = (0..BLOCKS, 1..BLOCKS / 2, any::<bool>()).prop_map(|(lba, blocks, is_zero)| {
            Step::Fold { lba, blocks: blocks.min(BLOCKS - lba), is_zero }
        });
        prop_oneof![6 => fold, 1 => Just(Step::Freeze), 1 => Just(Step::Settle)]
    }

    fn blocks_of(map: &Map) -> Vec<Option<Place>> {
        let mut found = Vec::new();
        for (span, place) in map.cover(Span { start: 0, blocks: BLOCKS }) {
            assert_eq!(span.start, found.len() as u64);
            found.extend((0..span.blocks).map(|skip| place.map(|place| place.advance(skip))));
        }
        found
    }

    proptest! {
        #[test]
        fn a_map_answers_like_an_array_and_a_checkpoint_has_what_it_was(
            steps in prop::collection::vec(step(), 1..60),
        ) {
            let (mut map, mut model) = (Map::default(), vec![None; BLOCKS as usize]);
            let mut frozen: Option<(Frozen, Vec<Option<Place>>)> = None;
            for (seq, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Fold { lba, blocks, is_zero } => {
                        let place = match is_zero {
                            true => Place::Zero,
                            false => {
                                let (seq, run) = (Seq(seq as u64 + 1), blocks as u32);
                                Place::Object { seq, frame: 152, skip: 0, run }
                            }
                        };
                        map.fold(&Placed { lba: Lba(lba), blocks, place });
                        for skip in 0..blocks {
                            model[(lba + skip) as usize] = blocks_at(place.advance(skip));
                        }
                    }
                    Step::Freeze if frozen.is_none() => {
                        frozen = Some((map.freeze(), model.clone()));
                    }
                    Step::Freeze => {}
                    Step::Settle => {
                        let Some((frozen, was)) = frozen.take() else { continue };
                        let merged = frozen.merge();
                        prop_assert_eq!(blocks_of(&Map::of_runs(merged.clone())), was);
                        map.settle(merged);
                    }
                }
                prop_assert_eq!(blocks_of(&map), model.clone());
            }
        }
    }
}
