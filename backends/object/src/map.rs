//! The map of committed blocks: a fold of the log objects in the order of their numbers.

use crate::extents::{Extents, Piece, Span};
use crate::format::{Entry, Placed};
use crate::ids::{Place, Seq};

/// Where the committed blocks of a volume are. Blocks that it does not have are zeroes.
#[derive(Clone, Debug, Default)]
pub struct Map {
    extents: Extents<Place>,
}

impl Map {
    /// Takes the next blocks of the log.
    pub fn fold(&mut self, placed: &Placed) {
        let span = Span { start: placed.lba.0, blocks: placed.blocks };
        match placed.place {
            Place::Zero => self.extents.remove(span),
            place @ Place::Object { .. } => self.extents.insert(span, place),
        }
    }

    /// Takes the entries of the next object.
    pub fn fold_object(&mut self, seq: Seq, entries: &[Entry]) {
        for entry in entries {
            let placed = match *entry {
                Entry::Fence => continue,
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
        self.extents.cover(span)
    }

    /// Blocks that are not zeroes.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.extents.blocks()
    }

    /// Its runs, in the order of their addresses.
    pub fn iter(&self) -> impl Iterator<Item = (Span, &Place)> {
        self.extents.iter()
    }
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
