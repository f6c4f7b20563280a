//! One thread's access to an object volume.

mod change;
mod journal_read;
mod read;
mod status;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::AcqRel};

use sheave_core::extents::empty_range_outcome;
use sheave_core::{
    Backend, ByteRange, Completion, Destination, Error, ErrorKind, Io, IoDone, IoRequest, IoToken,
    Nanos, Op, Outcome, Reply, Result, Segment as Piece, Stalled, Submitted, Tag, VolumeInfo,
    memory,
};
use slab::Slab;

use crate::BLOCK_BYTES;
use crate::extents::Span;
use crate::front::{Mail, News, Sync};
use crate::ids::Lsn;
use crate::volume::Opened;
use change::Change;
use journal_read::JournalRead;
use read::{CachedRead, Read};

/// The most ops in progress, those that wait for room in the journal included. Fronts bound theirs
/// far below, so that reads are not held up by writes that wait.
const JOBS_MAX: usize = 64 << 10;
/// The most times that one request is started again after a signal, or without progress.
const TRIES_MAX: u8 = 100;

pub(crate) struct ObjectBackend {
    opened: Arc<Opened>,
    user: usize,
    has_news: Arc<AtomicBool>,
    jobs: Slab<Job>,
    /// Requests that the engine has, or will get.
    requests: Slab<InFlight>,
    cached: Slab<CachedRead>,
    /// Changes that wait for room in the journal, in order.
    waiting: VecDeque<usize>,
    /// Requests for which the engine had no room.
    stalled: Stalled,
    ready: VecDeque<Completion>,
    mail: Vec<Mail>,
}

struct Job {
    tag: Tag,
    work: Work,
}

enum Work {
    Change(Change),
    Read(Read),
    Flush,
    /// A block status that waits for a leaf of the map: its range, and the most extents.
    Status(ByteRange, usize),
}

/// A request in flight.
enum Request {
    /// Writes the record of this LSN.
    Append(Lsn),
    /// Reads for this job; the segment is kept until then.
    Read(JournalRead),
    /// Reads a chunk for this reading of the cache.
    Cached(usize),
    /// Syncs the last segment of the list.
    Sync(Sync),
}

struct InFlight {
    of: Request,
    /// How often it was started again in vain.
    tries: u8,
}

impl ObjectBackend {
    pub(crate) fn new(opened: Arc<Opened>) -> Self {
        let has_news = Arc::<AtomicBool>::default();
        let user = opened.engine.with(|front| front.enter(Arc::clone(&has_news)));
        Self {
            opened,
            user,
            has_news,
            jobs: Slab::new(),
            requests: Slab::new(),
            cached: Slab::new(),
            waiting: VecDeque::new(),
            stalled: Stalled::default(),
            ready: VecDeque::new(),
            mail: Vec::new(),
        }
    }

    /// Does something with the state of the volume.
    fn with<T>(&self, io: &dyn Io, act: impl FnOnce(&mut crate::front::Front) -> T) -> T {
        self.opened.engine.with(|front| {
            front.act(self.user, || io.waker());
            let answer = act(front);
            front.rest();
            answer
        })
    }
}

impl Drop for ObjectBackend {
    fn drop(&mut self) {
        let of_journal = |(_, request): (usize, &InFlight)| {
            !matches!(request.of, Request::Read(_) | Request::Cached(_))
        };
        let is_lost = self.requests.iter().any(of_journal);
        let user = self.user;
        self.opened.engine.with(|front| front.leave(user, is_lost));
    }
}

impl Backend for ObjectBackend {
    fn info(&self) -> &VolumeInfo {
        &self.opened.engine.info
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if let Some(outcome) = empty_range_outcome(&op) {
            return Submitted::Done(outcome);
        }
        if self.info().read_only && op.kind().is_write() {
            return Submitted::Done(Err(op.read_only_error()));
        }
        if self.jobs.len() >= JOBS_MAX {
            return Submitted::Full(op);
        }
        if let Err(error) = self.make_room() {
            return Submitted::Done(Err(error));
        }
        let begun = match op {
            Op::Cache { .. } => Some(Ok(Reply::Done)),
            Op::BlockStatus { range, extents_max } => {
                self.block_status((range, extents_max), tag, io)
            }
            Op::Read { range, .. } => self.read(range, tag, io),
            Op::Flush => self.flush(tag, io),
            Op::Write { .. } | Op::Trim { .. } | Op::WriteZeroes { .. } => {
                self.begin_change(op, tag, io)
            }
        };
        begun.map_or(Submitted::Queued, Submitted::Done)
    }

    fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        let IoDone { token, request, result } = done;
        let key = token.0 as usize;
        let Some(in_flight) = self.requests.get_mut(key) else {
            debug_assert!(false, "a completion of a request that was never started");
            return;
        };
        let rest = match &result {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Some(request.clone()),
            Ok(count) => rest_of(&request, *count),
            _ => None,
        };
        in_flight.tries = match result {
            Ok(1..) => 0,
            _ => in_flight.tries + 1,
        };
        if let Some(rest) = rest.filter(|_| in_flight.tries < TRIES_MAX) {
            return self.stalled.start(rest, token, Destination::Unknown, io);
        }
        let result = match (result, &request) {
            (Ok(0), IoRequest::Write { .. }) => Err(io::ErrorKind::WriteZero.into()),
            (result, _) => result,
        };
        match self.requests.remove(key).of {
            Request::Append(lsn) => {
                recycle_page(request, io);
                self.with(io, |front| match result {
                    Ok(_) => front.wrote(lsn),
                    Err(error) => front.not_written(&error.to_string()),
                });
            }
            Request::Read(read) => {
                drop(request);
                let outcome = match result {
                    Ok(0) => Err(Error::new(ErrorKind::Io, "read", "the journal has been cut off")),
                    Ok(_) => read.check(),
                    Err(error) => Err(Error::from_io("read", "the journal", error)),
                };
                self.read_arrived(read.job, outcome, io);
            }
            Request::Cached(key) => {
                drop(request);
                self.chunk_read(key, result.is_ok_and(|count| count > 0), io);
            }
            Request::Sync(mut sync) => {
                drop(request);
                sync.segments.pop();
                match result {
                    Ok(_) if !sync.segments.is_empty() => self.start_sync(sync, io),
                    outcome => {
                        let outcome = outcome.map(|_| ()).map_err(|error| error.to_string());
                        let next = self.with(io, |front| {
                            front
                                .synced(sync.upto, outcome.as_ref().copied().map_err(|why| &**why));
                            front.begin_sync()
                        });
                        if let Some(sync) = next {
                            self.start_sync(sync, io);
                        }
                    }
                }
            }
        }
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        if !self.stalled.is_empty() {
            self.stalled.start_again(io, |to| to);
        }
        // What it does may be news for itself.
        while self.has_news.swap(false, AcqRel) {
            self.take_news(io);
        }
        self.ready.pop_front()
    }

    fn deadline(&self) -> Option<Nanos> {
        self.stalled.deadline()
    }
}

impl ObjectBackend {
    /// Makes sure that one more job needs no more memory in these lists. Those of requests grow by
    /// some ten bytes for each 64 KiB of a job's buffers, which are allocated before.
    fn make_room(&mut self) -> Result<()> {
        let count = self.jobs.len() + 1;
        memory::check_growth::<Job>(self.jobs.len(), self.jobs.capacity())?;
        memory::attempt(|| self.ready.try_reserve(count))?;
        memory::attempt(|| self.waiting.try_reserve(count - self.waiting.len().min(count)))
    }

    fn flush(&mut self, tag: Tag, io: &mut dyn Io) -> Option<Outcome> {
        let job = self.jobs.insert(Job { tag, work: Work::Flush });
        match self.join_flush("flush", job, None, io) {
            Ok(false) => None,
            outcome => {
                self.jobs.remove(job);
                Some(outcome.map(|_| Reply::Done))
            }
        }
    }

    /// Has a job wait until all up to a record is durable; true if it is already.
    fn join_flush(
        &mut self,
        op: &'static str,
        job: usize,
        needs: Option<Lsn>,
        io: &mut dyn Io,
    ) -> Result<bool> {
        let user = self.user;
        let (outcome, sync) = self.with(io, |front| {
            let outcome = front.flush(op, (user, job), needs);
            (outcome, front.begin_sync())
        });
        if let Some(sync) = sync {
            self.start_sync(sync, io);
        }
        outcome
    }

    fn start_sync(&mut self, sync: Sync, io: &mut dyn Io) {
        let last = sync.segments.last().expect("a sync has segments");
        let file = Arc::clone(&last.file.file);
        self.request(IoRequest::Sync { file }, Request::Sync(sync), io);
    }

    /// Processes the mail, and goes on with what waits.
    fn take_news(&mut self, io: &mut dyn Io) {
        let mut mail = std::mem::take(&mut self.mail);
        let user = self.user;
        let sync = self.with(io, |front| {
            front.take_mail(user, &mut mail);
            front.begin_sync()
        });
        if let Some(sync) = sync {
            self.start_sync(sync, io);
        }
        for Mail { job, news } in mail.drain(..) {
            self.process(job, news, io);
        }
        self.mail = mail;
        self.go_on(io);
    }

    fn process(&mut self, key: usize, news: News, io: &mut dyn Io) {
        match news {
            News::Fetched(_, outcome) if self.is_status(key) => self.leaf_arrived(key, outcome, io),
            News::Fetched(at, outcome) => {
                let outcome = outcome.map(|bytes| {
                    if let Some(Job { work: Work::Read(read), .. }) = self.jobs.get(key) {
                        read.buf.copy_in(at, &bytes);
                    }
                });
                self.read_arrived(key, outcome, io);
            }
            News::Written => self.record_ended(key, Ok(()), io),
            News::Synced => self.complete(key, Ok(Reply::Done), io),
            News::Failed(error) => match self.jobs.get(key).map(|job| &job.work) {
                Some(Work::Change(change)) if !change.is_written() => {
                    self.record_ended(key, Err(error), io);
                }
                _ => self.complete(key, Err(error), io),
            },
        }
    }

    /// Ends a job that waits for nothing any more.
    fn complete(&mut self, key: usize, outcome: Outcome, io: &mut dyn Io) {
        let Job { tag, work } = self.jobs.remove(key);
        if let Work::Change(Change { data: Some(data), .. }) = work {
            io.recycle(data);
        }
        self.ready.push_back(Completion { tag, outcome });
    }

    fn request(&mut self, request: IoRequest, of: Request, io: &mut dyn Io) {
        self.request_at(request, of, Destination::Unknown, io);
    }

    fn request_at(&mut self, request: IoRequest, of: Request, to: Destination, io: &mut dyn Io) {
        let token = IoToken(self.requests.insert(InFlight { of, tries: 0 }) as u64);
        self.stalled.start(request, token, to, io);
    }
}

/// What is left of a request that has moved `count` bytes; `None` if nothing is, or nothing moved.
fn rest_of(request: &IoRequest, count: usize) -> Option<IoRequest> {
    match request {
        IoRequest::Read { file, at, into } if count > 0 && count < into.len() => {
            Some(IoRequest::Read {
                file: Arc::clone(file),
                at: at + count as u64,
                into: into.slice(count, into.len() - count),
            })
        }
        IoRequest::Write { file, at, from, dsync } if count < from.len() => {
            Some(IoRequest::Write {
                file: Arc::clone(file),
                at: at + count as u64,
                from: from.slice(count, from.len() - count),
                dsync: *dsync,
            })
        }
        _ => None,
    }
}

/// Gives the first page of a record back.
fn recycle_page(request: IoRequest, io: &mut dyn Io) {
    let IoRequest::Write { from, .. } = request else { return };
    let mut pieces = from.into_segments();
    if let Some(Piece::Data(page)) = pieces.next() {
        drop(pieces);
        io.recycle(page.into());
    }
}

/// The blocks of a range, which begins and ends at blocks.
fn span_of(range: ByteRange) -> Span {
    debug_assert!(range.is_aligned(BLOCK_BYTES), "the block-size layer aligns ranges");
    Span { start: range.start() / BLOCK_BYTES, blocks: range.len() / BLOCK_BYTES }
}

/// Where a part of a span is in its buffer, in bytes, and how long it is.
fn place_in(span: Span, part: Span) -> (usize, usize) {
    (((part.start - span.start) * BLOCK_BYTES) as usize, part.bytes() as usize)
}
