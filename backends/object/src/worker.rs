//! The thread that works for all object volumes of the process, on tokio: it takes batches to the
//! bucket, fetches blocks from it, syncs the journal, and closes volumes.

pub(crate) mod again;

use std::fs::File;
use std::future::{Future, poll_fn};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use sheave_core::{Error, ErrorKind, Result};
use tokio::runtime::{Builder, Handle};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

use crate::BLOCK_BYTES;
use crate::ask::Ask;
use crate::clock::{Clock as _, SystemClock};
use crate::door;
use crate::extents::Span;
use crate::fetch::Fetcher;
use crate::format::record::Record;
use crate::format::{Built, Committed, ObjectId, Placed};
use crate::front::{Front, NextBatch, Sync};
use crate::ids::Lba;
use crate::journal::{JournalDir, Segment, SegmentFile};
use crate::map::{Found, Frozen, Leaf, Settled};
use crate::recent::{Batch, Fresh};
use crate::status::SILENT_MS;
use crate::store::StoreError;
use crate::upload::{Feed, Next, Plan, Sealed, SealedEntry, Upload};
use crate::volume::Engine;

/// Unsealed writes are sealed after so many ticks.
const SEAL_TICKS: u32 = 2;
/// The map takes so many runs of a committed object at a time, so that ops wait for a short time.
const FOLD_RUNS: usize = 256;

/// Rouses the worker for a volume.
#[derive(Debug, Default)]
pub(crate) struct Rouse(Notify);

impl Rouse {
    pub(crate) fn rouse(&self) {
        self.0.notify_one();
    }
}

/// Random bytes without end: salts for the segments of a journal, incarnations.
///
/// # Errors
/// When the system has no random bytes.
pub(crate) fn salts() -> Result<Box<dyn FnMut() -> [u8; 16] + Send>> {
    let failed = |error| Error::from_io("open", "/dev/urandom", error);
    let mut file = File::open("/dev/urandom").map_err(failed)?;
    let mut salt = [0; 16];
    file.read_exact(&mut salt).map_err(failed)?;
    Ok(Box::new(move || {
        // Once it has given bytes, it always does (random(4)).
        file.read_exact(&mut salt).expect("random bytes");
        salt
    }))
}

/// Begins to work for a volume that has been opened.
///
/// # Errors
/// When there is no thread.
pub(crate) fn start(engine: &Arc<Engine>, upload: Upload, fetcher: Fetcher) -> Result<()> {
    let worker = worker()?;
    let uploads = worker.spawn(upload.run(Arc::new(BucketFeed(Arc::clone(engine)))));
    let door = worker.spawn(door::attend(Arc::clone(engine), fetcher.requests().clone()));
    let kept = keep(Arc::clone(engine), fetcher, uploads);
    worker.spawn(async move {
        kept.await;
        door.abort();
    });
    Ok(())
}

/// Begins to work for a snapshot that has been opened, of which nothing is uploaded.
///
/// # Errors
/// When there is no thread.
pub(crate) fn start_reading(engine: &Arc<Engine>, fetcher: Fetcher) -> Result<()> {
    let worker = worker()?;
    let feed = BucketFeed(Arc::clone(engine));
    let closed = worker.spawn(async move {
        // It has no batch, and is drained when it is closed.
        drop(poll_fn(|cx| feed.poll_sealed(cx)).await);
        Ok(())
    });
    worker.spawn(keep(Arc::clone(engine), fetcher, closed));
    Ok(())
}

/// The thread's runtime, which is begun when the first volume is opened.
fn worker() -> Result<Handle> {
    static WORKER: Mutex<Option<Handle>> = Mutex::new(None);
    let mut worker = WORKER.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(worker) = &*worker {
        return Ok(worker.clone());
    }
    let failed = |error| Error::from_io("open", "the thread of object volumes", error);
    let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let handle = runtime.handle().clone();
    let run = move || runtime.block_on(std::future::pending::<()>());
    std::thread::Builder::new().name("object".to_owned()).spawn(run).map_err(failed)?;
    *worker = Some(handle.clone());
    Ok(handle)
}

/// Does for a volume what is due, until it is closed.
async fn keep(engine: Arc<Engine>, fetcher: Fetcher, uploads: JoinHandle<Result<()>>) {
    let mut uploads = std::pin::pin!(uploads);
    let mut tick: Option<Instant> = None;
    let mut is_first_look = true;
    let mut fetches = Fetches { fetcher, tasks: JoinSet::new() };
    // Reads of the bucket do not wait for the journal's disk.
    let mut tending: Option<JoinHandle<()>> = None;
    let mut is_silent = false;
    loop {
        fetches.begin(&engine);
        note_silence(&engine, SystemClock.now_ms(), &mut is_silent);
        if engine.with(Front::begin_segment) {
            tokio::spawn(make_segment(Arc::clone(&engine)));
        }
        let is_closing = engine.with(|front| front.is_closing());
        let now = Instant::now();
        let is_due = (is_closing && is_first_look) || tick.is_some_and(|tick| tick <= now);
        if is_due && tending.is_none() {
            is_first_look &= !is_closing;
            tending = Some(tokio::spawn(tend(Arc::clone(&engine))));
            tick = None;
        }
        let is_restless = engine.with(Front::is_restless);
        if !is_restless {
            tick = None;
        } else if tick.is_none() {
            tick = Some(now + engine.tuning.tick);
        }
        let is_due = async {
            match (&mut tending, tick) {
                (Some(task), _) => drop(task.await),
                (None, Some(tick)) => return sleep_until(tick).await,
                (None, None) => std::future::pending().await,
            }
            tending = None;
        };
        tokio::select! {
            () = engine.rouse.0.notified() => {}
            () = is_due => {}
            outcome = &mut uploads => {
                if let Some(task) = tending {
                    drop(task.await);
                }
                return finish(&engine, outcome.ok(), &mut fetches).await;
            }
        }
    }
}

/// Says in the log when the store does not answer, and when it does again.
pub(crate) fn note_silence(engine: &Engine, now_ms: u64, is_silent: &mut bool) {
    let silent_ms = engine.traffic.silent_ms(now_ms);
    let was_silent = std::mem::replace(is_silent, silent_ms.is_some_and(|ms| ms >= SILENT_MS));
    let volume = &*engine.name;
    match (was_silent, silent_ms.filter(|_| *is_silent)) {
        (false, Some(ms)) => {
            let seconds = ms / 1000;
            tracing::warn!(volume, "the store has not answered a request for {seconds} seconds");
        }
        (true, None) => tracing::info!(volume, "the store answers again"),
        _ => {}
    }
}

/// Reads of the bucket, which end with the volume: they wait for a store that is away.
struct Fetches {
    fetcher: Fetcher,
    tasks: JoinSet<()>,
}

impl Fetches {
    /// Begins those that backends want.
    fn begin(&mut self, engine: &Arc<Engine>) {
        while self.tasks.try_join_next().is_some() {}
        for leaf in engine.with(Front::take_loads) {
            let (engine, fetcher) = (Arc::clone(engine), self.fetcher.clone());
            self.tasks.spawn(async move {
                let outcome = fetcher.load(leaf).await;
                drop(engine.with(|front| front.loaded(leaf, outcome)));
            });
        }
        for fetch in engine.with(Front::take_fetches) {
            let (engine, fetcher) = (Arc::clone(engine), self.fetcher.clone());
            self.tasks.spawn(async move {
                let outcome = again::fetch(&engine, &fetcher, &fetch).await;
                engine.with(|front| front.fetched(fetch.id, outcome));
            });
        }
        for ahead in self.fetcher.fetch_ahead(&engine.with(Front::take_ahead)) {
            self.tasks.spawn(ahead);
        }
    }
}

/// The uploads have ended: the bucket has everything and its root says "closed", or the volume is
/// not this process's any more.
async fn finish(engine: &Arc<Engine>, outcome: Option<Result<()>>, fetches: &mut Fetches) {
    match outcome {
        Some(Ok(())) => {
            let closing = Arc::clone(engine);
            let cleared = engine.journal_threads.run(move || {
                closing.with(Front::shut);
                // No segment is made behind this.
                let mut journal = closing.journal.lock().unwrap_or_else(PoisonError::into_inner);
                journal.take().map_or(Ok(()), |journal| journal.clear())
            });
            if let Err(error) = cleared.await {
                tracing::warn!(volume = &*engine.name, %error, "the journal keeps its room");
            }
        }
        failed => {
            let error = failed
                .and_then(Result::err)
                .unwrap_or_else(|| Error::new(ErrorKind::Io, "upload", "the task has ended early"));
            engine.with(|front| front.bucket_failed(&error));
            // Reads go on until the volume is closed.
            while !engine.with(|front| front.is_closing()) {
                fetches.begin(engine);
                engine.rouse.0.notified().await;
            }
        }
    }
    engine.ended();
}

/// Makes one more segment. A full disk is a full journal: writes wait.
async fn make_segment(engine: Arc<Engine>) {
    let making = Arc::clone(&engine);
    let made = engine.journal_threads.run(move || {
        let journal = making.journal.lock().unwrap_or_else(PoisonError::into_inner);
        journal.as_ref().map(|journal| make_room_for_segment(&making, journal)).transpose()
    });
    let made = made.await.unwrap_or_else(|error| {
        tracing::warn!(volume = &*engine.name, %error, "the journal has less room");
        None
    });
    engine.with(|front| front.made_segment(made));
}

/// Makes one more segment. The cache gives way to it.
fn make_room_for_segment(engine: &Engine, journal: &JournalDir) -> Result<SegmentFile> {
    loop {
        let made = journal.make_segment();
        let is_full = made.as_ref().is_err_and(|error| error.kind() == ErrorKind::NoSpace);
        let cache = engine.cached.as_ref().map(|cached| cached.chunks.cache());
        // Each time it is half as large.
        if !is_full || !cache.is_some_and(|cache| cache.give_way()) {
            return made;
        }
    }
}

/// Makes everything durable that is written, and states it in the journal; then a tick has passed.
async fn tend(engine: Arc<Engine>) {
    make_durable(&engine).await;
    drop(engine.with(|front| front.tick(SEAL_TICKS)));
}

async fn make_durable(engine: &Arc<Engine>) {
    sync(engine).await;
    if let Some((reserved, entry)) = engine.with(Front::begin_statement) {
        let lsn = reserved.lsn;
        let written = engine.journal_threads.run(move || {
            let record = Record { lsn, durable: reserved.durable, entry };
            let segment = &reserved.segment;
            let mut pages = Vec::new();
            if reserved.is_first {
                pages.extend(segment.header.encode());
            }
            pages.extend(record.encode(&segment.seed, reserved.page));
            let at = u64::from(reserved.first_page()) * BLOCK_BYTES;
            segment.file.worker.write_all_at(&pages, at)
        });
        match written.await {
            Ok(()) => engine.with(|front| front.wrote(lsn)),
            Err(error) => engine.with(|front| front.not_written(&error.to_string())),
        }
        sync(engine).await;
    }
}

async fn sync(engine: &Arc<Engine>) {
    let Some(Sync { upto, segments }) = engine.with(|front| front.unsynced()) else { return };
    let synced = engine
        .journal_threads
        .run(move || segments.iter().try_for_each(|segment| segment.file.worker.sync_data()));
    let outcome = synced.await.map_err(|error| error.to_string());
    engine.with(|front| front.worker_synced(upto, outcome.as_ref().copied().map_err(|why| &**why)));
}

/// A volume, as the uploads see it.
struct BucketFeed(Arc<Engine>);

impl Feed for BucketFeed {
    fn poll_sealed(&self, cx: &mut Context<'_>) -> Poll<Next> {
        match self.0.with(|front| front.next_batch(cx.waker())) {
            NextBatch::Batch(batch) => Poll::Ready(Next::Batch(to_sealed(&batch))),
            NextBatch::Drained => Poll::Ready(Next::Drained),
            NextBatch::Later => Poll::Pending,
        }
    }

    fn poll_ask(&self, cx: &mut Context<'_>) -> Poll<Ask> {
        self.0.with(|front| front.next_ask(cx.waker())).map_or(Poll::Pending, Poll::Ready)
    }

    fn committed(&self, committed: Committed, placed: &[Placed]) {
        for some in placed.chunks(FOLD_RUNS) {
            self.0.with(|front| front.fold(some));
        }
        drop(self.0.with(|front| front.committed(committed.lsn)));
    }

    fn moved(&self, placed: &[Placed]) {
        for some in placed.chunks(FOLD_RUNS) {
            self.0.with(|front| front.fold(some));
        }
        self.0.swept.note_moved(placed.iter().map(|placed| placed.blocks * BLOCK_BYTES).sum());
    }

    fn cover(&self, span: Span) -> Vec<(Span, Found)> {
        self.0.with(|front| front.cover(span))
    }

    fn build(&self, plan: Plan) -> Pin<Box<dyn Future<Output = Result<Built>> + Send + '_>> {
        let engine = Arc::clone(&self.0);
        let mut last: Option<Arc<Segment>> = None;
        Box::pin(self.0.build_threads.run(move || {
            plan.build(|from, blocks, into| {
                let is_same = |last: &&Arc<Segment>| last.header.number == from.segment;
                let segment = last.as_ref().filter(is_same).cloned();
                let segment = segment.or_else(|| engine.with(|front| front.segment(from.segment)));
                let segment = segment.expect("a batch's segments are kept until it is committed");
                let read = segment.read_blocks(from.page, blocks, into);
                last = Some(segment);
                read
            })
        }))
    }

    fn made(&self, id: ObjectId, body: Bytes) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let Some(cached) = &self.0.cached else { return Box::pin(async {}) };
        let chunks = Arc::clone(&cached.chunks);
        let threads = &cached.chunks.cache().threads;
        Box::pin(threads.run(move || chunks.keep(id, 0, &body)))
    }

    fn freeze(&self) -> Frozen {
        self.0.with(Front::freeze)
    }

    fn settle(&self, settled: Settled) {
        drop(self.0.with(|front| front.settle(settled)));
    }

    fn swept(&self, bytes: u64) {
        self.0.swept.note(bytes);
    }

    fn compute(
        &self,
        work: Box<dyn FnOnce() + Send>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.0.build_threads.run(work))
    }

    fn leaf(&self, number: u64) -> Option<Arc<Leaf>> {
        self.0.with(|front| front.leaf(number))
    }

    fn stopped(&self, error: Error) {
        self.0.with(|front| front.bucket_failed(&error));
    }

    fn store_says(&self, error: Option<&StoreError>) {
        self.0.with(|front| front.store_says(error.map(ToString::to_string)));
    }
}

fn to_sealed(batch: &Batch) -> Sealed {
    let entries = batch.extents.iter().map(|(span, fresh)| {
        let (lba, blocks) = (Lba(span.start), span.blocks);
        match *fresh {
            Fresh::Zero => SealedEntry::Zero { lba, blocks },
            Fresh::Journal(from) => SealedEntry::Write { lba, blocks, from },
        }
    });
    Sealed { lsn_first: batch.first, lsn_last: batch.last, entries: entries.collect() }
}
