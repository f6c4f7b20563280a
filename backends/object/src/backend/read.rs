//! Reads: from the journal and the cache by the engine of the shard, from the bucket by the worker.

use std::sync::Arc;

use sheave_core::{
    Buf, ByteRange, Completion, Error, Io, IoRequest, Outcome, Payload, Reply, Result,
    Segment as Piece, Tag,
};

use super::{Job, ObjectBackend, Request, Work, place_in, span_of};
use crate::BLOCK_BYTES;
use crate::cache::CHUNK_BYTES;
use crate::extents::Span;
use crate::fetch::CachedRun;
use crate::format::LeafRef;
use crate::front::Whereabouts;
use crate::ids::{Lba, Place};

/// The worker fetches at most so many blocks at a time.
const FETCH_BLOCKS_MAX: u64 = 1024;

/// A read in progress.
pub(super) struct Read {
    reply: Payload,
    pub(super) buf: Buf,
    /// Parts that are not there yet.
    left: usize,
    error: Option<Error>,
}

/// A part of a read that comes from the cache.
pub(super) struct CachedRead {
    job: usize,
    span: Span,
    /// Where it begins in the bucket.
    place: Place,
    /// Where it goes in the buffer of the read.
    at: usize,
    run: CachedRun,
    /// The frames.
    stored: Buf,
    /// Chunks that are not read yet.
    left: usize,
    is_whole: bool,
}

impl ObjectBackend {
    pub(super) fn read(&mut self, range: ByteRange, tag: Tag, io: &mut dyn Io) -> Option<Outcome> {
        let span = span_of(range);
        let parts = self.with(io, |front| {
            front.check_read("read")?;
            front.note_reading(span);
            Ok(front.resolve(span))
        });
        let parts = match parts {
            Ok(parts) => parts,
            Err(error) => return Some(Err(error)),
        };
        let mut reply = Payload::new();
        if parts.iter().all(|(_, whereabouts)| matches!(whereabouts, Whereabouts::Zero)) {
            reply.push(Piece::Zero(range.len() as usize));
            return Some(Ok(Reply::Data(reply)));
        }
        let made = io.buffer(range.len() as usize).and_then(|buf| {
            reply.try_reserve(parts.len())?;
            Ok(buf)
        });
        let buf = match made {
            Ok(buf) => buf,
            Err(error) => return Some(Err(error)),
        };
        for (part, whereabouts) in &parts {
            let (at, len) = place_in(span, *part);
            reply.push(match whereabouts {
                Whereabouts::Zero => Piece::Zero(len),
                _ => Piece::Data(buf.slice(at, len)),
            });
        }
        // One for this, so that it ends when all parts are begun.
        let read = Read { reply, buf: buf.clone(), left: 1, error: None };
        let job = self.jobs.insert(Job { tag, work: Work::Read(read) });
        for (part, whereabouts) in parts {
            let (at, len) = place_in(span, part);
            match whereabouts {
                Whereabouts::Zero => {}
                Whereabouts::Journal(segment, page) => {
                    self.part_begun(job);
                    self.read_journal(job, (segment, page), buf.slice(at, len), io);
                }
                Whereabouts::Bucket(place) => self.read_bucket(job, (part, place), at, io),
                Whereabouts::Leaf(leaf) => self.fetch_by(job, (part, leaf), at, io),
            }
        }
        self.read_arrived(job, Ok(()), io);
        None
    }

    /// Reads what is in the bucket, or in the cache.
    fn read_bucket(
        &mut self,
        job: usize,
        (span, place): (Span, Place),
        at: usize,
        io: &mut dyn Io,
    ) {
        let Some(cached) = &self.opened.engine.cached else {
            return self.fetch(job, (span, place), at, io);
        };
        let mut done = 0;
        for run in cached.runs(place, span.blocks) {
            let blocks = u64::from(run.part.blocks);
            let span = Span { start: span.start + done, blocks };
            let place = place.advance(done);
            let at = at + (done * BLOCK_BYTES) as usize;
            done += blocks;
            let bytes = run.part.bytes();
            let room =
                (!run.found.is_empty()).then(|| io.buffer((bytes.end - bytes.start) as usize));
            match room {
                Some(Ok(stored)) => {
                    let left = run.found.len();
                    let is_whole = true;
                    let read = CachedRead { job, span, place, at, run, stored, left, is_whole };
                    self.read_cached(read, io);
                }
                // Without memory the worker's serves.
                Some(Err(_)) | None => self.fetch(job, (span, place), at, io),
            }
        }
    }

    fn read_cached(&mut self, read: CachedRead, io: &mut dyn Io) {
        let Some(cached) = &self.opened.engine.cached else { return };
        let file = cached.chunks.cache().file();
        let bytes = read.run.part.bytes();
        let (found, stored) = (read.run.found.clone(), read.stored.clone());
        self.part_begun(read.job);
        let key = self.cached.insert(read);
        let mut begin = bytes.start;
        for found in found {
            let end = (begin / CHUNK_BYTES + 1) * CHUNK_BYTES;
            let end = end.min(bytes.end);
            let into = stored.slice((begin - bytes.start) as usize, (end - begin) as usize);
            let at = found.at() + begin % CHUNK_BYTES;
            let request = IoRequest::Read { file: Arc::clone(&file), at, into };
            self.request(request, Request::Cached(key), io);
            begin = end;
        }
    }

    /// A chunk of the cache is read, or could not be.
    pub(super) fn chunk_read(&mut self, key: usize, is_read: bool, io: &mut dyn Io) {
        let Some(read) = self.cached.get_mut(key) else {
            debug_assert!(false, "a reading of the cache has one answer for each of its chunks");
            return;
        };
        read.left -= 1;
        read.is_whole &= is_read;
        if read.left > 0 {
            return;
        }
        let CachedRead { job, span, place, at, run, stored, is_whole, .. } =
            self.cached.remove(key);
        let is_right = match (&self.opened.engine.cached, self.jobs.get(job)) {
            (Some(cached), Some(Job { work: Work::Read(Read { buf, .. }), .. })) => {
                let copy_out = |skip, frame: &mut [u8]| stored.copy_out(skip, frame);
                let copy_in = |skip, block: &[u8]| buf.copy_in(at + skip, block);
                let lba = Lba(span.start);
                let is_right = is_whole && cached.decode(&run, lba, copy_out, copy_in);
                if !is_right {
                    cached.forget(&run);
                }
                is_right
            }
            _ => false,
        };
        io.recycle(stored.into());
        if !is_right {
            // It has made room for another chunk meanwhile, or is damaged: the bucket has it.
            self.fetch(job, (span, place), at, io);
        }
        self.read_arrived(job, Ok(()), io);
    }

    /// Has the worker fetch a part of a read.
    fn fetch(&mut self, job: usize, (span, place): (Span, Place), at: usize, io: &mut dyn Io) {
        for (done, part) in pieces(span) {
            let at = at + (done * BLOCK_BYTES) as usize;
            self.part_begun(job);
            let (user, place) = (self.user, place.advance(done));
            self.with(io, |front| front.fetch((user, job), at, (part, place)));
        }
    }

    /// The same for a part that a leaf of the map knows.
    fn fetch_by(&mut self, job: usize, (span, leaf): (Span, LeafRef), at: usize, io: &mut dyn Io) {
        for (done, part) in pieces(span) {
            let at = at + (done * BLOCK_BYTES) as usize;
            self.part_begun(job);
            let user = self.user;
            self.with(io, |front| front.fetch_by((user, job), at, (part, leaf)));
        }
    }

    fn part_begun(&mut self, job: usize) {
        if let Some(Job { work: Work::Read(read), .. }) = self.jobs.get_mut(job) {
            read.left += 1;
        }
    }

    /// A part of a read is there, or is not to be had.
    pub(super) fn read_arrived(&mut self, key: usize, outcome: Result<()>, io: &mut dyn Io) {
        let Some(Job { work: Work::Read(read), .. }) = self.jobs.get_mut(key) else {
            debug_assert!(false, "a read has one answer for each of its parts");
            return;
        };
        read.left -= 1;
        if let Err(why) = outcome {
            read.error.get_or_insert(why);
        }
        if read.left > 0 {
            return;
        }
        let Job { tag, work } = self.jobs.remove(key);
        let Work::Read(Read { reply, error, .. }) = work else { return };
        let outcome = match error {
            None => Ok(Reply::Data(reply)),
            Some(error) => {
                io.recycle(reply);
                Err(error)
            }
        };
        self.ready.push_back(Completion { tag, outcome });
    }
}

/// A span in pieces that are fetched at once, each with the blocks before it.
fn pieces(span: Span) -> impl Iterator<Item = (u64, Span)> {
    (0..span.blocks).step_by(FETCH_BLOCKS_MAX as usize).map(move |done| {
        let blocks = FETCH_BLOCKS_MAX.min(span.blocks - done);
        (done, Span { start: span.start + done, blocks })
    })
}
