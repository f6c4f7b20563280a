//! The backend of a file.

use std::collections::VecDeque;
use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;

use rustix::fs::{Advice, fadvise};
use sheave_core::{
    Backend, ByteRange, Completion, Destination, Error, Io, IoDone, IoRequest, IoToken, Nanos,
    OWN_BITS, Op, Outcome, Reply, Result, Stalled, Submitted, Tag, VolumeInfo, memory,
};
use slab::Slab;

use super::disk::Share;
use super::sync::{GroupSync, Turn};
use super::work::{Step, Work};
use super::{Handle, Image, seek};
use sheave_core::extents::empty_range_outcome;

/// The most ops in progress.
const JOBS_MAX: usize = 1024;
/// The most times that one request is started again after a signal.
const INTERRUPTIONS_MAX: u8 = 100;
/// The most bytes that one op prefetches, so that it stays short.
const PREFETCH_MAX: u64 = 32 << 20;
/// The token of the sync in flight; those of jobs are their slab keys.
const SYNC: IoToken = IoToken((1 << OWN_BITS) - 1);

pub(super) struct FileBackend {
    image: Arc<Image>,
    handle: Arc<Handle>,
    /// Ops in progress. Each has one request in flight or stalled, or waits for a sync.
    jobs: Slab<Job>,
    sync: GroupSync,
    sync_interruptions: u8,
    /// The sync that this backend waits for, while one of another backend runs on the description.
    awaited_sync: Option<u64>,
    /// Later requests of ops in progress, for which the engine had no room.
    stalled: Stalled,
    ready: VecDeque<Completion>,
    /// What it has in flight at the disk, and whether a sync of it runs on the description.
    share: Share,
}

struct Job {
    tag: Tag,
    work: Work,
    interruptions: u8,
}

impl FileBackend {
    pub(super) fn new(image: Arc<Image>, handle: Arc<Handle>) -> Self {
        let share = Share::new(&image.disk);
        Self {
            image,
            handle,
            jobs: Slab::new(),
            sync: GroupSync::default(),
            sync_interruptions: 0,
            awaited_sync: None,
            stalled: Stalled::default(),
            ready: VecDeque::new(),
            share,
        }
    }
}

impl Drop for FileBackend {
    fn drop(&mut self) {
        if self.share.is_syncing() {
            self.handle.syncs.given_up();
        }
    }
}

impl Backend for FileBackend {
    fn info(&self) -> &VolumeInfo {
        &self.image.info
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if let Some(outcome) = self.inline(&op) {
            return Submitted::Done(outcome);
        }
        if self.jobs.len() >= JOBS_MAX {
            return Submitted::Full(op);
        }
        if let Err(error) = self.make_room() {
            return Submitted::Done(Err(error));
        }
        let work = match Work::begin(&op, &self.image, io) {
            Ok(work) => work,
            Err(outcome) => return Submitted::Done(outcome),
        };
        let request = work.request(&self.image, &self.handle);
        let destination = work.destination(&self.image);
        let key = self.jobs.insert(Job { tag, work, interruptions: 0 });
        let destination = self.now_at(destination);
        match request.map(|request| io.start(request, token(key), destination)) {
            None => self.join_sync(key, io),
            Some(Ok(())) => {}
            Some(Err(_)) => {
                self.jobs.remove(key);
                return Submitted::Full(op);
            }
        }
        Submitted::Queued
    }

    fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        let IoDone { token, request, result } = done;
        if token == SYNC {
            return self.sync_completed(request, result, io);
        }
        let key = token.0 as usize;
        let Some(job) = self.jobs.get_mut(key) else {
            debug_assert!(false, "an end of a request that was never started");
            return;
        };
        if is_interrupted(&result) && job.interruptions < INTERRUPTIONS_MAX {
            job.interruptions += 1;
            return self.start(request, token, io);
        }
        // The job references the same buffers, and recycles them when it completes.
        drop(request);
        match job.work.completed(result, &self.image) {
            Step::Request => {
                if let Some(request) = job.work.request(&self.image, &self.handle) {
                    self.start(request, token, io);
                }
            }
            Step::Sync => self.join_sync(key, io),
            Step::End(outcome) => self.complete(key, outcome, io),
        }
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        if !self.stalled.is_empty() {
            self.start_stalled(io);
        }
        if let Some(awaited) = self.awaited_sync.take() {
            let turn = self.handle.syncs.ask_again(awaited, || io.waker());
            self.take_turn(turn, io);
        }
        self.share.completed(self.jobs.len());
        self.ready.pop_front()
    }

    fn deadline(&self) -> Option<Nanos> {
        self.stalled.deadline()
    }
}

impl FileBackend {
    /// The outcome of an op that needs no engine.
    fn inline(&self, op: &Op) -> Option<Outcome> {
        if let Some(outcome) = empty_range_outcome(op) {
            return Some(outcome);
        }
        let info = &self.image.info;
        match op {
            Op::Read { .. } => None,
            Op::Write { .. } | Op::Trim { .. } | Op::WriteZeroes { .. } if info.read_only => {
                Some(Err(op.read_only_error()))
            }
            Op::Flush if info.read_only => Some(Ok(Reply::Done)),
            Op::Write { .. } | Op::Trim { .. } | Op::WriteZeroes { .. } | Op::Flush => {
                self.image.check_poison(op.kind().name()).err().map(Err)
            }
            Op::Cache { range } => {
                self.prefetch(*range);
                Some(Ok(Reply::Done))
            }
            Op::BlockStatus { range, extents_max } => {
                Some(seek::block_status(&self.handle.file, *range, &self.image, *extents_max))
            }
        }
    }

    /// Where a request goes, by what its disk has to do at the moment.
    fn now_at(&mut self, to: Destination) -> Destination {
        match to {
            Destination::Memory if self.share.waits_for_sync() => Destination::BusyMemory,
            Destination::Memory => Destination::Memory,
            to if self.share.has_room(self.jobs.len()) => to,
            _ => Destination::BusyDevice,
        }
    }

    /// Makes sure that one more job needs no more memory in these lists.
    fn make_room(&mut self) -> Result<()> {
        let count = self.jobs.len() + 1;
        memory::check_growth::<Job>(self.jobs.len(), self.jobs.capacity())?;
        memory::attempt(|| self.ready.try_reserve(count))?;
        // The sync may be stalled, too.
        self.stalled.reserve(count + 1)?;
        self.sync.make_room(count)
    }

    fn prefetch(&self, range: ByteRange) {
        if !self.image.direct {
            let len = NonZeroU64::new(range.len().min(PREFETCH_MAX));
            // A hint: errors are ignored.
            let _ = fadvise(&*self.handle.file, range.start(), len, Advice::WillNeed);
        }
    }

    fn start(&mut self, request: IoRequest, token: IoToken, io: &mut dyn Io) {
        let to = self.now_at(Destination::Unknown);
        self.stalled.start(request, token, to, io);
    }

    fn start_stalled(&mut self, io: &mut dyn Io) {
        let mut stalled = std::mem::take(&mut self.stalled);
        stalled.start_again(io, |_| self.now_at(Destination::Unknown));
        self.stalled = stalled;
    }

    /// Makes a job wait for the next sync.
    fn join_sync(&mut self, key: usize, io: &mut dyn Io) {
        if self.sync.join(key) {
            self.start_sync(io);
        }
    }

    fn start_sync(&mut self, io: &mut dyn Io) {
        let turn = self.handle.syncs.ask(|| io.waker());
        self.take_turn(turn, io);
    }

    fn take_turn(&mut self, turn: Turn, io: &mut dyn Io) {
        match turn {
            Turn::Start => {
                self.share.set_syncing(true);
                let file = Arc::clone(&self.handle.file);
                self.start(IoRequest::Sync { file }, SYNC, io);
            }
            Turn::Wait(awaited) => self.awaited_sync = Some(awaited),
            Turn::Served => self.sync_served(None, io),
        }
    }

    fn sync_completed(&mut self, request: IoRequest, result: io::Result<usize>, io: &mut dyn Io) {
        if is_interrupted(&result) && self.sync_interruptions < INTERRUPTIONS_MAX {
            self.sync_interruptions += 1;
            return self.start(request, SYNC, io);
        }
        self.sync_interruptions = 0;
        let errno = result.err().map(|error| {
            self.image.poison();
            error.raw_os_error()
        });
        self.share.set_syncing(false);
        self.handle.syncs.ended();
        self.sync_served(errno, io);
    }

    /// Completes the jobs that a sync has served; `errno` is why it failed.
    fn sync_served(&mut self, errno: Option<Option<i32>>, io: &mut dyn Io) {
        while let Some(key) = self.sync.served() {
            let outcome = match &errno {
                None => self.image.check_poison("flush").map(|()| Reply::Done),
                Some(errno) => Err(self.sync_error(*errno)),
            };
            self.complete(key, outcome, io);
        }
        if self.sync.completed() {
            self.start_sync(io);
        }
    }

    fn sync_error(&self, errno: Option<i32>) -> Error {
        let cause = errno.map_or_else(|| io::ErrorKind::Other.into(), io::Error::from_raw_os_error);
        let why = format!(
            "{}: what was written since the last flush may be lost; nothing more is accepted until \
             the volume is opened again",
            self.image.name
        );
        Error::from_io("flush", why, cause)
    }

    fn complete(&mut self, key: usize, outcome: Outcome, io: &mut dyn Io) {
        let job = self.jobs.remove(key);
        if let Work::Write { data, .. } = job.work {
            io.recycle(data);
        }
        self.ready.push_back(Completion { tag: job.tag, outcome });
    }
}

fn token(key: usize) -> IoToken {
    IoToken(key as u64)
}

fn is_interrupted(result: &io::Result<usize>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::Interrupted)
}
