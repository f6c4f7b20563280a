//! The remaining work of an op on a file, and the effect of each completed request on it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use rustix::io::Errno;
use sheave_core::{
    Allocate, Buf, ByteRange, Destination, Error, ErrorKind, Io, IoRequest, Op, Outcome, PAGE_SIZE,
    Payload, Reply, Result, Segment,
};

use super::{Handle, Image, ZEROES};

/// An op in progress.
pub(super) enum Work {
    Read {
        range: ByteRange,
        into: Buf,
        done: usize,
    },
    Write {
        range: ByteRange,
        data: Payload,
        done: usize,
        fua: Fua,
    },
    Trim {
        range: ByteRange,
        fua: bool,
    },
    Zero {
        range: ByteRange,
        how: Zeroing,
        fua: bool,
        fast: bool,
        no_hole: bool,
    },
    /// Waits for a sync, then completes.
    Sync,
}

/// How a write becomes stable before its completion.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fua {
    No,
    /// By `RWF_DSYNC`. For direct I/O, whose errors the kernel reports to the write itself.
    Dsync,
    /// `RWF_DSYNC` failed. The write is repeated without it to learn which half failed; if it was
    /// the sync, it may have reported the loss of other data.
    RetryWithoutSync,
    /// By a sync of the backend afterwards. Through the page cache `RWF_DSYNC` could take the
    /// error of another write's failed write-back away from that write.
    Sync,
}

/// The way to make zeroes.
pub(super) enum Zeroing {
    Allocate(Allocate),
    /// Written from this buffer of zeroes, this many bytes so far.
    Write {
        zeroes: Buf,
        done: u64,
    },
}

/// The next step.
pub(super) enum Step {
    /// [`Work::request`].
    Request,
    /// A sync.
    Sync,
    End(Outcome),
}

impl Work {
    /// The work for an op that needs the engine.
    pub(super) fn begin(op: &Op, image: &Image, io: &mut dyn Io) -> Result<Self, Outcome> {
        match op {
            Op::Read { range, into } => {
                let into = match into {
                    Some(into) => into.clone(),
                    None => io.buffer(range.len() as usize).map_err(Err)?,
                };
                Ok(Self::Read { range: *range, into, done: 0 })
            }
            Op::Write { range, data, fua } => {
                let direct = image.direct && !image.is_tail(*range);
                let fua = match (fua, direct) {
                    (false, _) => Fua::No,
                    (true, true) => Fua::Dsync,
                    (true, false) => Fua::Sync,
                };
                let data = storable(data, direct, image, io).map_err(Err)?;
                Ok(Self::Write { range: *range, data, done: 0, fua })
            }
            Op::Trim { range, fua } => {
                let range = whole_blocks(*range, image.hole_block);
                if range.is_empty() || image.features.no_punch_hole.load(Relaxed) {
                    return Err(Ok(Reply::Done));
                }
                Ok(Self::Trim { range, fua: *fua })
            }
            Op::WriteZeroes { range, fua, no_hole, fast } => {
                let (range, fua, no_hole, fast) = (*range, *fua, *no_hole, *fast);
                let how = zeroing(range, no_hole, fast, image).map_err(Err)?;
                Ok(Self::Zero { range, how, fua, fast, no_hole })
            }
            Op::Flush => Ok(Self::Sync),
            Op::Cache { .. } | Op::BlockStatus { .. } => Err(Ok(Reply::Done)),
        }
    }

    /// Where its requests most likely go.
    pub(super) fn destination(&self, image: &Image) -> Destination {
        match self {
            Self::Read { .. } | Self::Write { .. } if image.direct => Destination::Device,
            // Whole pages: nothing has to be read before.
            Self::Write { range, .. } if range.is_aligned(PAGE_SIZE as u64) => Destination::Memory,
            _ => Destination::Unknown,
        }
    }

    /// The next request to the engine; `None` for a sync.
    pub(super) fn request(&self, image: &Image, handle: &Handle) -> Option<IoRequest> {
        Some(match self {
            Self::Read { range, into, done } => IoRequest::Read {
                file: Arc::clone(handle.of(*range, image)),
                at: range.start() + *done as u64,
                into: into.slice(*done, into.len() - done),
            },
            Self::Write { range, data, done, fua } => IoRequest::Write {
                file: Arc::clone(handle.of(*range, image)),
                at: range.start() + *done as u64,
                from: if *done == 0 { data.clone() } else { data.slice(*done, data.len() - done) },
                dsync: *fua == Fua::Dsync,
            },
            Self::Trim { range, .. } => allocate(image, handle, Allocate::PunchHole, *range),
            Self::Zero { range, how: Zeroing::Allocate(mode), .. } => {
                allocate(image, handle, *mode, *range)
            }
            Self::Zero { range, how: Zeroing::Write { zeroes, done }, .. } => {
                let rest = range.part(*done, range.len() - done);
                let piece = rest.pieces(ZEROES as u64).next().unwrap_or(rest);
                IoRequest::Write {
                    file: Arc::clone(handle.of(piece, image)),
                    at: piece.start(),
                    from: zeroes.slice(0, piece.len() as usize).into(),
                    dsync: false,
                }
            }
            Self::Sync => return None,
        })
    }

    /// Takes the completion of its request.
    pub(super) fn completed(&mut self, result: io::Result<usize>, image: &Image) -> Step {
        match self {
            Self::Read { range, into, done } => match result {
                Ok(0) => {
                    // What follows would read as zeroes after a write behind it.
                    image.poison();
                    Step::End(Err(shrunk("read", image, range.start() + *done as u64)))
                }
                Ok(count) => {
                    *done += count;
                    match *done < into.len() {
                        true => Step::Request,
                        false if into.registered_index().is_some() => Step::End(Ok(Reply::Done)),
                        false => Step::End(Ok(Reply::Data(into.clone().into()))),
                    }
                }
                Err(error) => Step::End(Err(failed("read", *range, image, error))),
            },
            Self::Write { range, data, done, fua } => match result {
                Ok(0) => Step::End(Err(stuck(*range, image))),
                Ok(count) => {
                    *done += count;
                    match *fua {
                        Fua::RetryWithoutSync => {
                            image.poison();
                            Step::End(image.check_poison("write").map(|()| Reply::Done))
                        }
                        _ if *done < data.len() => Step::Request,
                        fua => sync_or_end(fua == Fua::Sync),
                    }
                }
                Err(error) => {
                    let error = failed("write", *range, image, error);
                    if *fua != Fua::Dsync {
                        return Step::End(Err(error));
                    }
                    // EIO may come from the write or from the flush of the device's cache, with
                    // which other writes are lost.
                    if error.kind() == ErrorKind::Io {
                        image.poison();
                        return Step::End(Err(error));
                    }
                    *fua = Fua::RetryWithoutSync;
                    Step::Request
                }
            },
            Self::Trim { range, fua } => match result {
                Ok(_) => sync_or_end(*fua),
                Err(error) if is_unsupported(&error) => {
                    image.features.no_punch_hole.store(true, Relaxed);
                    Step::End(Ok(Reply::Done))
                }
                // A trim is a hint.
                Err(error) if is_held(&error) => Step::End(Ok(Reply::Done)),
                Err(error) => Step::End(Err(failed("trim", *range, image, error))),
            },
            Self::Zero { .. } => self.zero_completed(result, image),
            Self::Sync => Step::Sync,
        }
    }

    fn zero_completed(&mut self, result: io::Result<usize>, image: &Image) -> Step {
        let Self::Zero { range, how, fua, fast, no_hole } = self else { return Step::Sync };
        match (&mut *how, result) {
            (Zeroing::Allocate(_), Ok(_)) => sync_or_end(*fua),
            (Zeroing::Allocate(mode), Err(error)) if is_unsupported(&error) => {
                let refused = match mode {
                    Allocate::PunchHole => &image.features.no_punch_hole,
                    Allocate::ZeroRange => &image.features.no_zero_range,
                };
                refused.store(true, Relaxed);
                match zeroing(*range, *no_hole, *fast, image) {
                    Ok(next) => {
                        let Self::Zero { how, .. } = self else { return Step::Sync };
                        *how = next;
                        Step::Request
                    }
                    Err(error) => Step::End(Err(error)),
                }
            }
            // Nothing has been changed yet.
            (Zeroing::Allocate(_), Err(error)) if is_held(&error) => {
                if *fast {
                    let why = format!("{}: another program holds the device", image.name);
                    let error = Error::new(ErrorKind::Unsupported, "write_zeroes", why);
                    return Step::End(Err(error));
                }
                match image.zeroes() {
                    Ok(zeroes) => *how = Zeroing::Write { zeroes, done: 0 },
                    Err(error) => return Step::End(Err(error)),
                }
                Step::Request
            }
            (Zeroing::Write { .. }, Ok(0)) => Step::End(Err(stuck(*range, image))),
            (Zeroing::Write { done, .. }, Ok(count)) => {
                *done += count as u64;
                if *done < range.len() { Step::Request } else { sync_or_end(*fua) }
            }
            (_, Err(error)) => Step::End(Err(failed("write_zeroes", *range, image, error))),
        }
    }
}

fn sync_or_end(sync: bool) -> Step {
    if sync { Step::Sync } else { Step::End(Ok(Reply::Done)) }
}

/// The best remaining way to make zeroes.
fn zeroing(range: ByteRange, no_hole: bool, fast: bool, image: &Image) -> Result<Zeroing, Error> {
    let aligned = range.is_aligned(image.hole_block);
    let features = &image.features;
    if aligned && !no_hole && !features.no_punch_hole.load(Relaxed) {
        return Ok(Zeroing::Allocate(Allocate::PunchHole));
    }
    if aligned && !features.no_zero_range.load(Relaxed) && !(fast && image.no_zero_offload) {
        return Ok(Zeroing::Allocate(Allocate::ZeroRange));
    }
    if fast {
        let why = format!("{}: its file system can only write zeroes", image.name);
        return Err(Error::new(ErrorKind::Unsupported, "write_zeroes", why));
    }
    Ok(Zeroing::Write { zeroes: image.zeroes()?, done: 0 })
}

/// `data` without zero segments and, for direct I/O, in aligned memory.
fn storable(data: &Payload, direct: bool, image: &Image, io: &mut dyn Io) -> Result<Payload> {
    let block = image.info.block.minimum as usize;
    let fits = |segment: &Segment| match segment {
        Segment::Zero(_) => false,
        Segment::Data(buf) => {
            !direct || (buf.start().is_multiple_of(block) && buf.len().is_multiple_of(block))
        }
    };
    if data.segments().iter().all(fits) {
        return Ok(data.clone());
    }
    if !direct {
        return Ok(without_zero_segments(data, &image.zeroes()?));
    }
    let buf = io.buffer(data.len())?;
    let mut at = 0;
    for segment in data.segments() {
        match segment {
            Segment::Zero(len) => buf.zero(at, *len),
            Segment::Data(from) => buf.slice(at, from.len()).copy_from(from),
        }
        at += segment.len();
    }
    Ok(buf.into())
}

fn without_zero_segments(data: &Payload, zeroes: &Buf) -> Payload {
    let mut out = Payload::new();
    for segment in data.segments() {
        match segment {
            Segment::Data(buf) => out.push(Segment::Data(buf.clone())),
            Segment::Zero(len) => {
                let mut left = *len;
                while left > 0 {
                    let now = left.min(zeroes.len());
                    out.push(Segment::Data(zeroes.slice(0, now)));
                    left -= now;
                }
            }
        }
    }
    out
}

/// The part of a range that consists of whole blocks.
fn whole_blocks(range: ByteRange, block: u64) -> ByteRange {
    let skip = (range.start().next_multiple_of(block) - range.start()).min(range.len());
    let end = (range.end() & !(block - 1)).max(range.start() + skip);
    range.part(skip, end - range.start() - skip)
}

fn allocate(image: &Image, handle: &Handle, mode: Allocate, range: ByteRange) -> IoRequest {
    let file = Arc::clone(image.allocates(handle));
    IoRequest::Allocate { file, mode, at: range.start(), len: range.len() }
}

fn is_unsupported(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::NOTTY))
}

/// Whether a device refuses because its page cache has dirty data of the range, and another program
/// has it open exclusively.
fn is_held(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::BUSY)
}

fn failed(op: &'static str, range: ByteRange, image: &Image, error: io::Error) -> Error {
    let (start, len) = (range.start(), range.len());
    Error::from_io(op, format!("{}: {len} bytes at {start}", image.name), error)
}

pub(super) fn shrunk(op: &'static str, image: &Image, at: u64) -> Error {
    let why = format!(
        "{}: it ends at or before byte {at} but is served with {} bytes; \
         somebody has cut it off",
        image.name,
        image.size()
    );
    Error::new(ErrorKind::Io, op, why)
}

fn stuck(range: ByteRange, image: &Image) -> Error {
    let why = format!("{}: nothing was written at {}", image.name, range.start());
    Error::new(ErrorKind::Io, "write", why)
}
