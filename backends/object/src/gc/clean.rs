//! Cleaning: what is needed of objects that are mostly garbage moves to a new object.
//!
//! Blocks are looked up and moved between two checkpoints: no checkpoint is begun from the first
//! look at the map until the object with the moved blocks is committed. So a block that was
//! written after the look is above the leaves whenever the log is folded, and is not moved.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::task::{Context, Poll};

use sheave_core::{ErrorKind, Result};

use super::Counts;
use crate::budget::Share;
use crate::extents::Span;
use crate::fetch::Fetcher;
use crate::format::{
    Author, Built, Coding, HEADER_BYTES, Header, ObjectBuilder, ObjectId, Run, keys,
};
use crate::ids::{BLOCK_BYTES, Lba, Lsn, Place, Seq};
use crate::map::{Found, Leaf};
use crate::together::{Boxed, boxed};
use crate::upload::Feed;

/// Moved blocks that follow one another are one run of so many bytes at most.
const RUN_BYTES_MAX: usize = 1 << 20;

/// When objects are cleaned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cleaning {
    /// When more is stored, for 100 bytes that are needed.
    pub(crate) space_percent: u64,
    /// Bytes of blocks that move to one object. Less garbage is not worth it.
    pub(crate) move_bytes: u64,
}

impl Cleaning {
    pub(crate) const DEFAULT: Self = Self { space_percent: 133, move_bytes: 32 << 20 };
}

/// The cleaning of an opening. One object with moves is under way at a time.
pub(crate) struct Cleaner {
    feed: Arc<dyn Feed>,
    fetcher: Fetcher,
    cleaning: Cleaning,
    step: Step,
    /// Checkpoints that were begun before what is under way was looked up.
    begun: u64,
    /// Objects that have been cleaned. The counts still say that they are needed until a
    /// checkpoint has their blocks in new leaves.
    cleaned: BTreeSet<Seq>,
    /// The counts have changed, so there may be something to clean.
    is_due: bool,
    is_off: bool,
}

enum Step {
    Idle,
    Gathering(Boxed<'static, Result<Gathered>>),
    /// They wait for their place in the log.
    Gathered(Box<Gathered>),
    /// The object of this number has them.
    Moving(Seq),
}

/// Blocks that are needed, in the order of their addresses.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    pieces: Vec<Piece>,
    bytes: u64,
    /// Objects of which all blocks that are needed are there.
    cleaned: Vec<Seq>,
    /// Of the memory for objects, for the blocks and the object that they are read from.
    #[expect(dead_code, reason = "it is held")]
    share: Option<Share>,
}

#[derive(Debug)]
struct Piece {
    lba: Lba,
    from: Seq,
    data: Vec<u8>,
}

impl Cleaner {
    pub(crate) fn new(feed: Arc<dyn Feed>, fetcher: Fetcher, cleaning: Cleaning) -> Self {
        let (step, cleaned) = (Step::Idle, BTreeSet::new());
        let (begun, is_due, is_off) = (0, true, false);
        Self { feed, fetcher, cleaning, step, begun, cleaned, is_due, is_off }
    }

    /// The counts have changed.
    pub(crate) fn look_again(&mut self) {
        self.is_due = true;
    }

    /// Nothing is cleaned any more.
    pub(crate) fn stop(&mut self) {
        self.cancel();
        self.is_off = true;
    }

    /// Forgets what was looked up, since a checkpoint is to begin.
    pub(crate) fn cancel(&mut self) {
        if matches!(self.step, Step::Gathering(_) | Step::Gathered(_)) {
            (self.step, self.is_due) = (Step::Idle, true);
        }
    }

    /// Whether no checkpoint may begin now.
    pub(crate) fn holds(&self) -> bool {
        !matches!(self.step, Step::Idle)
    }

    /// Looks for objects that are to be cleaned, of those that were made behind the one with the
    /// directory of the newest snapshot: what a snapshot keeps would be stored twice.
    /// `begun` checkpoints were begun before.
    pub(crate) fn begin(&mut self, counts: &Counts, behind: Seq, begun: u64) {
        if self.holds() || self.is_off || !std::mem::take(&mut self.is_due) {
            return;
        }
        let victims = counts.victims(behind, &self.cleaned, self.cleaning);
        if victims.is_empty() {
            return;
        }
        let (feed, fetcher) = (Arc::clone(&self.feed), self.fetcher.clone());
        self.begun = begun;
        let move_bytes = self.cleaning.move_bytes;
        let gathering = async move {
            let most = victims.iter().map(|(_, bytes)| *bytes).max().unwrap_or_default();
            let share = Share::to_clean(most + move_bytes).await;
            let gathered = gather(&*feed, &fetcher, &victims, move_bytes).await?;
            Ok(Gathered { share: Some(share), ..gathered })
        };
        self.step = Step::Gathering(boxed(gathering));
    }

    /// Goes on with that. Whether it is done: blocks are ready, or there may be more to look for.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when an object that is needed is missing or damaged, and those of the
    /// store.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Result<bool> {
        let Step::Gathering(gathering) = &mut self.step else { return Ok(false) };
        let Poll::Ready(outcome) = gathering.as_mut().poll(cx) else { return Ok(false) };
        self.step = Step::Idle;
        let gathered = outcome?;
        self.cleaned.extend(&gathered.cleaned);
        self.is_due = true;
        if !gathered.pieces.is_empty() {
            self.step = Step::Gathered(Box::new(gathered));
        }
        Ok(true)
    }

    /// Whether blocks wait for their place in the log.
    pub(crate) fn is_ready(&self) -> bool {
        matches!(self.step, Step::Gathered(_))
    }

    /// Takes them for the object of that number.
    pub(crate) fn take(&mut self, seq: Seq) -> Option<Gathered> {
        match std::mem::replace(&mut self.step, Step::Idle) {
            Step::Gathered(gathered) => {
                self.step = Step::Moving(seq);
                Some(*gathered)
            }
            other => {
                self.step = other;
                None
            }
        }
    }

    /// Whether the object of this number has moves. It is committed then; so many checkpoints were
    /// begun before.
    ///
    /// # Panics
    /// When one was begun since the blocks were looked up: they could come back later although they
    /// were overwritten.
    pub(crate) fn moved(&mut self, seq: Seq, begun: u64) -> bool {
        let is_it = matches!(self.step, Step::Moving(moving) if moving == seq);
        if is_it {
            assert_eq!(self.begun, begun, "no checkpoint begins while blocks are moved");
            (self.step, self.is_due) = (Step::Idle, true);
        }
        is_it
    }
}

impl Gathered {
    /// The most bytes of their frames.
    pub(crate) fn bytes_max(&self, coding: &Coding) -> u64 {
        self.pieces.iter().map(|piece| coding.bytes(piece.blocks())).sum()
    }

    /// The object that has them. It has no writes; `before` is the last one before it.
    pub(crate) fn build(self, author: &Author, seq: Seq, before: Lsn) -> Built {
        let coding = &author.coding;
        let of = |piece: &Piece| coding.entries(piece.lba, piece.blocks());
        let entries = self.pieces.iter().map(of).sum();
        let bytes = self.bytes_max(coding) as usize;
        let mut builder = ObjectBuilder::new(author, seq, entries, bytes);
        for Piece { lba, from, data } in self.pieces {
            builder.moved(lba, &data, from);
        }
        builder.finish(before.next(), before)
    }

    fn push(&mut self, lba: Lba, from: Seq, data: Vec<u8>) {
        self.bytes += data.len() as u64;
        self.pieces.push(Piece { lba, from, data });
    }

    /// Brings them in order. What follows one another is one piece.
    fn sort(&mut self) {
        self.pieces.sort_unstable_by_key(|piece| piece.lba);
        let mut joined = Vec::<Piece>::with_capacity(self.pieces.len());
        for piece in std::mem::take(&mut self.pieces) {
            let last = joined.last_mut().filter(|last| {
                let is_next = last.lba.0 + last.blocks() == piece.lba.0 && last.from == piece.from;
                is_next && last.data.len() + piece.data.len() <= RUN_BYTES_MAX
            });
            match last {
                Some(last) => last.data.extend(piece.data),
                None => joined.push(piece),
            }
        }
        self.pieces = joined;
    }
}

impl Piece {
    fn blocks(&self) -> u64 {
        self.data.len() as u64 / BLOCK_BYTES
    }
}

/// Reads objects one after another, and takes the blocks that are needed, of so many bytes.
async fn gather(
    feed: &dyn Feed,
    fetcher: &Fetcher,
    victims: &[(Seq, u64)],
    move_bytes: u64,
) -> Result<Gathered> {
    let mut gathered = Gathered::default();
    for &(seq, bytes) in victims {
        let object = fetcher.object_of(seq);
        let damaged = |why: &str| {
            let why = format!("{why}; nothing is deleted or cleaned any more");
            let key = keys::log(object.epoch, object.seq);
            fetcher.requests().error(ErrorKind::Corrupt, "clean", &key, &why)
        };
        let body = fetcher.stored(object, 0..bytes).await?;
        let body = body.ok_or_else(|| damaged("the object is missing"))?;
        let spans = spans_of(object, &body).ok_or_else(|| damaged("its index is damaged"))?;
        for Run { span, place } in look_up(feed, fetcher, seq, &spans).await? {
            let Some((_, part)) = fetcher.part_of(place, span.blocks) else { continue };
            if gathered.bytes + span.bytes() > move_bytes && gathered.bytes > 0 {
                gathered.sort();
                return Ok(gathered);
            }
            let range = part.bytes();
            let stored = body.get(range.start as usize..range.end as usize);
            let stored = stored.ok_or_else(|| damaged("it ends too early"))?;
            let data = fetcher.decode((object, part), Lba(span.start), stored);
            let data = data.map_err(|wrong| damaged(&wrong.to_string()))?;
            gathered.push(Lba(span.start), seq, data);
        }
        gathered.cleaned.push(seq);
    }
    gathered.sort();
    Ok(gathered)
}

/// The blocks that an object has, in the order of their addresses; `None` if its index is damaged.
fn spans_of(object: ObjectId, body: &[u8]) -> Option<Vec<Span>> {
    let header = Header::decode(body).ok().filter(|header| header.id == object)?;
    let entries = header.decode_index(body.get(HEADER_BYTES..header.index_end())?).ok()?;
    let placed = entries.iter().filter_map(|entry| entry.placed(object.seq));
    let placed = placed.filter(|placed| placed.place != Place::Zero);
    let mut spans: Vec<_> =
        placed.map(|placed| Span { start: placed.lba.0, blocks: placed.blocks }).collect();
    spans.sort_unstable();
    Some(spans)
}

/// Which of these blocks the map has in an object.
async fn look_up(
    feed: &dyn Feed,
    fetcher: &Fetcher,
    object: Seq,
    spans: &[Span],
) -> Result<Vec<Run>> {
    let is_it = |place: Place| matches!(place, Place::Object { seq, .. } if seq == object);
    let mut runs = Vec::new();
    let mut last = None::<(u64, Arc<Leaf>)>;
    for &span in spans {
        for (span, found) in feed.cover(span) {
            match found {
                Found::Zero => {}
                Found::At(place) if is_it(place) => runs.push(Run { span, place }),
                Found::At(_) => {}
                Found::In(leaf) => {
                    let leaf = match last.take().filter(|(number, _)| *number == leaf.number) {
                        Some((_, content)) => (leaf.number, content),
                        None => (leaf.number, fetcher.load(leaf).await?),
                    };
                    runs.extend(leaf.1.within(span).filter(|run| is_it(run.place)));
                    last = Some(leaf);
                }
            }
        }
    }
    Ok(runs)
}
