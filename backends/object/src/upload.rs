//! Makes log objects of what was written, and commits them in the order of their numbers.
//!
//! An object is built once and tried with the same bytes until its creation is known. Up to
//! [`WINDOW`] of them are on their way, and the next one is built meanwhile; what is committed is
//! the run without gaps. All volumes of a process share one budget of bytes, beside which each may
//! have one object under way.

mod plan;

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use bytes::Bytes;
use sheave_core::{Error, Result};

use crate::ask::{Ask, SnapshotAsk};
use crate::budget::Share;
use crate::checkpoint::{Cadence, Checkpoints, compute, fenced};
use crate::extents::Span;
use crate::fetch::Fetcher;
use crate::format::{
    Author, Built, Coding, Committed, ENTRIES_MAX, ObjectId, Placed, Root, State, keys,
};
use crate::gate::Gate;
use crate::gc::{Cleaner, Counts};
use crate::head::Head;
use crate::ids::{BLOCK_BYTES, Lsn, Seq};
use crate::lineage::Lineage;
use crate::map::{self, Found, Frozen, Leaf};
use crate::retry::{Listener, Patience, Requests, Settled};
use crate::store::StoreError;

pub use plan::{JournalPlace, Plan, Sealed, SealedEntry};

/// Objects on their way to the store at the same time. A checkpoint, which is short, may be beside
/// them.
pub const WINDOW: usize = 8;
/// Objects that are begun beyond that: they are built while others are on their way, so that the
/// way to the store is never empty.
pub(crate) const AHEAD: usize = 1;
/// Bytes of blocks that an object is made of.
pub const BATCH_BYTES_MAX: u64 = 32 << 20;
/// Entries of a batch: few enough that checkpoints have room for copies of them.
pub const BATCH_ENTRIES_MAX: usize = 16 << 10;
/// Entries of the object of a batch. They may be more, where blocks are compressed, but for each
/// further one there is a block.
pub(crate) const OBJECT_ENTRIES_MAX: usize =
    BATCH_ENTRIES_MAX + (BATCH_BYTES_MAX / BLOCK_BYTES) as usize;

const _: () = assert!(OBJECT_ENTRIES_MAX <= ENTRIES_MAX);
/// Bytes that the map of a volume takes in memory, where nothing else is asked for.
pub(crate) const MAP_BYTES_DEFAULT: u64 = 256 << 20;
/// What the shard's side of a volume gives and takes.
pub trait Feed: Send + Sync {
    /// The next batch. It has at most [`BATCH_BYTES_MAX`] bytes of blocks and [`BATCH_ENTRIES_MAX`]
    /// entries; it ends at an LSN, and the next one begins behind it.
    fn poll_sealed(&self, cx: &mut Context<'_>) -> Poll<Next>;

    /// The next thing that is asked beside that.
    fn poll_ask(&self, cx: &mut Context<'_>) -> Poll<Ask> {
        let _ = cx;
        Poll::Pending
    }

    /// Makes the object of a batch that is not committed. Its blocks are read from the journal and
    /// checked, which takes a while: not on a thread that others wait for.
    fn build(&self, plan: Plan) -> Pin<Box<dyn Future<Output = Result<Built>> + Send + '_>>;

    /// An object is made, and on its way to the store. Its upload ends when this has ended, too.
    fn made(&self, id: ObjectId, body: Bytes) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let _ = (id, body);
        Box::pin(async {})
    }

    /// All up to an object is committed: its last write, and where its blocks are.
    fn committed(&self, committed: Committed, placed: &[Placed]);

    /// An object with moved blocks is committed, and all up to it.
    fn moved(&self, placed: &[Placed]);

    /// Where committed blocks are: the map of all that was reported as committed.
    fn cover(&self, span: Span) -> Vec<(Span, Found)>;

    /// The map of all that was reported as committed, and of nothing else. It ends with
    /// [`Feed::settle`].
    fn freeze(&self) -> Frozen;

    /// This has become of what was frozen.
    fn settle(&self, settled: map::Settled);

    /// Does work that may take a tenth of a second, not on a thread that others wait for.
    fn compute(
        &self,
        work: Box<dyn FnOnce() + Send>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async { work() })
    }

    /// An object of so many bytes is deleted: nothing needs it any more.
    fn swept(&self, bytes: u64) {
        let _ = bytes;
    }

    /// A leaf of the map, if it is in memory.
    fn leaf(&self, number: u64) -> Option<Arc<Leaf>>;

    /// Nothing will be committed any more: `Fenced` when another opener has the volume, `Corrupt`
    /// when the journal is damaged, and the errors of the store.
    fn stopped(&self, error: Error);

    /// The last word of the store: `None` if it has done what it was asked.
    fn store_says(&self, error: Option<&StoreError>);
}

/// What is to be done next.
#[derive(Debug)]
pub enum Next {
    /// Commit these.
    Batch(Sealed),
    /// Close the volume: all that was written was in a batch, and no more will be.
    Drained,
}

/// Commits what an opening writes.
#[derive(Debug)]
pub struct Upload {
    requests: Requests,
    /// The open root, with its checkpoint and all snapshots.
    head: Head,
    counts: Counts,
    coding: Coding,
    /// With the opening itself.
    lineage: Lineage,
    fetcher: Fetcher,
    cadence: Cadence,
}

impl Upload {
    /// For the opening that has made this open root. `coding` is for new frames.
    #[must_use]
    pub(crate) fn new(
        requests: Requests,
        (head, counts): (Head, Counts),
        coding: Coding,
        lineage: Lineage,
        fetcher: Fetcher,
    ) -> Self {
        assert_eq!(head.root.state, State::Open, "no object comes before its open root");
        let cadence = Cadence::of_bytes(MAP_BYTES_DEFAULT);
        Self { requests, head, counts, coding, lineage, fetcher, cadence }
    }

    /// The same with checkpoints at other times.
    pub(crate) fn with_cadence(self, cadence: Cadence) -> Self {
        Self { cadence, ..self }
    }

    /// Uploads until the feed is drained, and then closes the volume.
    ///
    /// # Errors
    /// As for [`Feed::stopped`], which has had it.
    pub async fn run(self, feed: Arc<dyn Feed>) -> Result<()> {
        let Self { requests, head, counts, coding, lineage, fetcher, cadence } = self;
        let root = head.root.clone();
        let heard = requests.heard_by(Arc::new(Heard(Arc::clone(&feed))));
        let requests = heard.with_patience(Patience::Endless);
        let cleaner = Cleaner::new(Arc::clone(&feed), fetcher.clone(), cadence.cleaning);
        let checkpoints = Checkpoints::new(
            (requests.clone(), fetcher),
            (head, counts),
            lineage,
            cadence,
            Arc::clone(&feed),
        );
        let makers = (checkpoints, cleaner);
        let flights = Flights::new(requests, (&root, coding), Arc::clone(&feed), makers);
        let ended = match flights.run().await {
            Ok((checkpoints, committed)) => checkpoints.close(committed).await,
            Err(error) => Err(error),
        };
        ended.inspect_err(|error| feed.stopped(error.clone()))
    }
}

/// Hears the store's answers for a feed.
struct Heard(Arc<dyn Feed>);

impl Listener for Heard {
    fn store_says(&self, error: Option<&StoreError>) {
        self.0.store_says(error);
    }
}

/// The objects under way.
struct Flights {
    requests: Requests,
    author: Author,
    feed: Arc<dyn Feed>,
    committed: Committed,
    /// In the order of their numbers, without gaps behind the committed ones.
    flights: VecDeque<Flight>,
    /// Lets [`WINDOW`] of them go to the store.
    way: Arc<Gate>,
    /// The last write that is in an object, committed or under way.
    begun: Lsn,
    is_drained: bool,
    checkpoints: Checkpoints,
    cleaner: Cleaner,
    /// Blocks have moved since the last checkpoint was begun.
    has_moved: bool,
    /// Snapshots that are to be begun, in the order in which they were asked for.
    snapshots: VecDeque<SnapshotAsk>,
}

/// An object under way.
struct Flight {
    future: InFlight,
    is_oldest: Arc<AtomicBool>,
    /// Its header and index, once it is built.
    head: Arc<OnceLock<Bytes>>,
    /// What it is, once it is made.
    made: Option<Built>,
}

impl Flight {
    fn is_made(&self) -> bool {
        self.made.is_some()
    }
}

type InFlight = Pin<Box<dyn Future<Output = Result<Built>> + Send>>;

impl Flights {
    fn new(
        requests: Requests,
        (root, coding): (&Root, Coding),
        feed: Arc<dyn Feed>,
        (checkpoints, cleaner): (Checkpoints, Cleaner),
    ) -> Self {
        let Root { volume, previous, author, committed, .. } = *root;
        let (reach, incarnation) = (root.reach(), author.incarnation);
        let author = Author { volume, reach, previous, incarnation, coding };
        Self {
            requests,
            author,
            feed,
            committed,
            flights: VecDeque::with_capacity(WINDOW + AHEAD + 1),
            way: Arc::new(Gate::new(WINDOW)),
            begun: committed.lsn,
            is_drained: false,
            checkpoints,
            cleaner,
            has_moved: false,
            snapshots: VecDeque::new(),
        }
    }

    /// Runs until the feed is drained and all is committed, with a checkpoint of it.
    async fn run(mut self) -> Result<(Checkpoints, Committed)> {
        poll_fn(|cx| self.poll(cx)).await?;
        Ok((self.checkpoints, self.committed))
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        loop {
            self.poll_flights(cx)?;
            self.commit();
            self.checkpoints.poll(cx)?;
            self.take_asks(cx);
            if self.clean(cx) {
                continue;
            }
            let was_idle = self.checkpoints.is_idle();
            self.begin_checkpoint();
            let has_begun = was_idle && !self.checkpoints.is_idle();
            self.checkpoints.poll(cx)?;
            // It has ended at once: the next one may begin.
            let has_ended = has_begun && self.checkpoints.is_idle();
            if has_ended || self.put_checkpoint() {
                continue;
            }
            let most = WINDOW + AHEAD + usize::from(self.checkpoints.has_object());
            let may_begin = self.flights.len() < most && self.checkpoints.allows(self.next_seq());
            if self.is_drained || !may_begin || self.is_at_snapshot() {
                break;
            }
            match self.feed.poll_sealed(cx) {
                Poll::Pending => break,
                Poll::Ready(Next::Drained) => self.is_drained = true,
                Poll::Ready(Next::Batch(sealed)) => self.begin(sealed),
            }
        }
        let is_idle = self.checkpoints.is_idle() && self.snapshots.is_empty();
        match self.is_drained && self.flights.is_empty() && is_idle {
            true => Poll::Ready(Ok(())),
            false => Poll::Pending,
        }
    }

    /// The number of the next object.
    fn next_seq(&self) -> Seq {
        Seq(self.committed.seq.0 + 1 + self.flights.len() as u64)
    }

    fn take_asks(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready(ask) = self.feed.poll_ask(cx) {
            match ask {
                Ask::Snapshot(ask) => self.snapshots.push_back(ask),
                Ask::Change(ask) => self.checkpoints.change(ask),
            }
        }
    }

    /// All that the next snapshot is to have is in an object, committed or under way. No other one
    /// is begun before its checkpoint, which has just what is committed then.
    fn is_at_snapshot(&self) -> bool {
        self.snapshots.front().is_some_and(|ask| ask.lsn <= self.begun)
    }

    /// Goes on with the cleaning. Whether it has begun an object.
    fn clean(&mut self, cx: &mut Context<'_>) -> bool {
        if self.is_at_snapshot() || self.is_drained {
            return false;
        }
        let next = self.next_seq();
        loop {
            self.checkpoints.clean(&mut self.cleaner, next);
            match self.cleaner.poll(cx) {
                // It has found nothing: the next object may have something.
                Ok(true) if !self.cleaner.is_ready() => {}
                Ok(_) => break,
                Err(error) => {
                    // What is needed is damaged, or not to be had: none of it is touched any more.
                    self.cleaner.stop();
                    self.checkpoints.stop(&error.to_string());
                    break;
                }
            }
        }
        let (seq, before) = (next, self.begun);
        let may_begin = self.flights.len() < WINDOW + AHEAD && self.checkpoints.allows(seq);
        if !may_begin || !self.cleaner.is_ready() {
            return false;
        }
        let Some(gathered) = self.cleaner.take(seq) else { return false };
        let author = self.author.clone();
        let bytes_max = gathered.bytes_max(&author.coding);
        self.launch(seq, bytes_max, move |feed| {
            Box::pin(async move {
                Ok(compute(&*feed, move || gathered.build(&author, seq, before)).await)
            })
        });
        true
    }

    /// Whether a checkpoint may begin now. The blocks that are gathered wait for one that does not
    /// wait for them.
    fn may_begin_checkpoint(&mut self) -> bool {
        #[cfg(test)]
        if !crate::open::rules::get().moves_between {
            return true;
        }
        let is_closing = self.is_drained && self.flights.is_empty();
        let is_urgent = self.is_at_snapshot() || self.checkpoints.is_urgent(self.next_seq());
        if is_closing || is_urgent {
            self.cleaner.cancel();
        }
        !self.cleaner.holds()
    }

    fn begin_checkpoint(&mut self) {
        if !self.may_begin_checkpoint() {
            return;
        }
        self.checkpoints.begin_changes(self.committed);
        if self.is_at_snapshot() {
            if self.flights.is_empty() && self.checkpoints.is_idle() {
                self.checkpoints.begin_snapshots(self.committed, &mut self.snapshots);
            }
            return;
        }
        match self.is_drained && self.flights.is_empty() {
            true => self.checkpoints.begin_last(self.committed),
            false => self.checkpoints.begin_if_due(self.committed, self.next_seq()),
        }
        if self.flights.is_empty() && self.checkpoints.is_idle() {
            self.checkpoints.begin_if_useful(self.committed, self.has_moved);
        }
        self.has_moved &= self.checkpoints.is_idle();
    }

    /// The next object is a checkpoint, if one is ready.
    fn put_checkpoint(&mut self) -> bool {
        if !self.checkpoints.is_ready() {
            return false;
        }
        // It has the heads of all objects before it, so they must be built.
        let heads = self.flights.iter().map(|flight| flight.head.get().cloned()).collect();
        let Some(heads) = heads else { return false };
        let built = self.checkpoints.build(&self.author, self.next_seq(), self.begun, heads);
        let Some(mut built) = built else { return false };
        let key = keys::log(built.header.id.epoch, built.header.id.seq);
        let body = std::mem::take(&mut built.body);
        let requests = self.requests.clone();
        let future = Box::pin(async move {
            match requests.create(&key, body).await? {
                Settled::Mine => Ok(built),
                Settled::Theirs(_) => Err(fenced(&requests, "checkpoint", &key)),
            }
        });
        let (is_oldest, head) = Default::default();
        self.flights.push_back(Flight { future, is_oldest, head, made: None });
        true
    }

    fn poll_flights(&mut self, cx: &mut Context<'_>) -> Result<()> {
        for (index, flight) in self.flights.iter_mut().enumerate() {
            flight.is_oldest.store(index == 0, Relaxed);
            if !flight.is_made()
                && let Poll::Ready(built) = flight.future.as_mut().poll(cx)
            {
                flight.made = Some(built?);
            }
        }
        Ok(())
    }

    /// Commits the run of objects that are made.
    fn commit(&mut self) {
        while let Some(Flight { made: Some(built), head, .. }) =
            self.flights.pop_front_if(|flight| flight.is_made())
        {
            self.committed = Committed { seq: built.header.id.seq, lsn: built.header.lsn_last };
            self.checkpoints.count(&built);
            if self.checkpoints.is_making(self.committed.seq) {
                self.checkpoints.made(self.committed, self.is_drained);
                self.cleaner.look_again();
                continue;
            }
            self.checkpoints.committed(head.get().cloned().unwrap_or_default());
            match self.cleaner.moved(self.committed.seq, self.checkpoints.begun()) {
                true => {
                    self.feed.moved(&built.placed);
                    self.has_moved = true;
                }
                false => self.feed.committed(self.committed, &built.placed),
            }
        }
    }

    fn begin(&mut self, sealed: Sealed) {
        let (seq, author) = (self.next_seq(), self.author.clone());
        self.begun = sealed.lsn_last;
        let bytes_max = sealed.bytes_max(&author.coding);
        let plan = Plan { author, seq, sealed };
        self.launch(seq, bytes_max, move |feed| Box::pin(async move { feed.build(plan).await }));
    }

    /// Begins an object, the next one.
    fn launch(
        &mut self,
        seq: Seq,
        bytes_max: u64,
        build: impl FnOnce(Arc<dyn Feed>) -> InFlight + Send + 'static,
    ) {
        let feed = Arc::clone(&self.feed);
        let (requests, way) = (self.requests.clone(), Arc::clone(&self.way));
        let is_oldest = Arc::new(AtomicBool::new(false));
        let head = Arc::<OnceLock<Bytes>>::default();
        let (needs_no_share, has_head) = (Arc::clone(&is_oldest), Arc::clone(&head));
        let key = keys::log(self.author.reach.epoch, seq);
        let flight = async move {
            let share = Share::take(bytes_max, &needs_no_share).await;
            let mut built = build(Arc::clone(&feed)).await?;
            has_head.get_or_init(|| built.head());
            let body = std::mem::take(&mut built.body);
            let kept = feed.made(built.header.id, body.clone());
            let permit = way.enter().await;
            match requests.create(&key, body).await? {
                Settled::Mine => {}
                Settled::Theirs(_) => return Err(fenced(&requests, "upload", &key)),
            }
            drop(permit);
            kept.await;
            drop(share);
            Ok(built)
        };
        let future = Box::pin(flight);
        self.flights.push_back(Flight { future, is_oldest, head, made: None });
    }
}
