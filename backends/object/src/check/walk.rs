//! Walks through the map: what refers to which object.

use std::collections::BTreeMap;
use std::sync::Arc;

use sheave_core::Result;

use super::objects::Pass;
use super::{MISSING, READS_MAX};
use crate::extents::Span;
use crate::fetch::Fetcher;
use crate::format::{LeafRef, Run, keys};
use crate::ids::{Blocks, Lba, Place};
use crate::map::{Found, Leaf, Map};
use crate::together::{all, boxed};

/// A piece of the map.
type Piece = (Span, Found);

impl Pass<'_> {
    /// Goes through all blocks of a map. Frames of objects that exist are verified.
    ///
    /// # Errors
    /// Those of the store.
    pub(super) async fn walk(&mut self, map: &Map, size: Blocks, fetcher: &Fetcher) -> Result<()> {
        let pieces = map.cover(Span { start: 0, blocks: size });
        let mut rest = &pieces[..];
        while !rest.is_empty() {
            let (some, leaves) = split(rest);
            rest = &rest[some.len()..];
            let leaves = self.load(some, &leaves, fetcher).await?;
            for &(span, found) in some {
                match found {
                    Found::Zero => {}
                    Found::At(place) => self.refer(span, place, fetcher).await?,
                    Found::In(leaf) => {
                        let Some(leaf) = leaves.get(&leaf.number) else { continue };
                        for Run { span, place } in leaf.within(span) {
                            self.refer(span, place, fetcher).await?;
                        }
                    }
                }
            }
        }
        self.frames.verify(fetcher, &mut self.faults).await
    }

    /// Loads leaves; what those that cannot be loaded have of these pieces is lost.
    async fn load(
        &mut self,
        pieces: &[Piece],
        leaves: &[LeafRef],
        fetcher: &Fetcher,
    ) -> Result<BTreeMap<u64, Arc<Leaf>>> {
        let loads = leaves.iter().map(|leaf| boxed(fetcher.load(*leaf))).collect();
        let mut loaded = BTreeMap::new();
        for (leaf, outcome) in leaves.iter().zip(all(loads).await) {
            let object = self.object_of(leaf.place.seq);
            self.needed.insert(object);
            let error = match outcome {
                Ok(content) => {
                    loaded.insert(leaf.number, content);
                    continue;
                }
                Err(error) => error,
            };
            let key = keys::log(object.epoch, object.seq);
            let why = super::faults::fault_of(self.requests, &key, error)?;
            for (span, _) in pieces.iter().filter(|(_, found)| *found == Found::In(*leaf)) {
                self.faults.add_blocks(object, &*why, *span);
            }
        }
        Ok(loaded)
    }

    /// Blocks of the volume are in an object.
    async fn refer(&mut self, span: Span, place: Place, fetcher: &Fetcher) -> Result<()> {
        let Some((object, part)) = fetcher.part_of(place, span.blocks) else { return Ok(()) };
        self.needed.insert(object);
        self.live_blocks += span.blocks;
        if self.is_own(object) && !self.listed.contains_key(&object) {
            self.faults.add_blocks(object, MISSING, span);
            return Ok(());
        }
        self.frames.take(fetcher, (object, part), Lba(span.start), &mut self.faults).await
    }
}

/// The first pieces that are in a few leaves, and these leaves.
fn split(pieces: &[Piece]) -> (&[Piece], Vec<LeafRef>) {
    let mut leaves = Vec::new();
    for (at, (_, found)) in pieces.iter().enumerate() {
        let Found::In(leaf) = found else { continue };
        if leaves.last() == Some(leaf) {
            continue;
        }
        if leaves.len() == READS_MAX {
            return (&pieces[..at], leaves);
        }
        leaves.push(*leaf);
    }
    (pieces, leaves)
}
