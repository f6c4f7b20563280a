//! A sparse volume in memory.
//!
//! The volume is cut into chunks of 64 KiB, which a two-level index finds: a table of leaves, made
//! when something in a leaf's 256 MiB is first written, and in each leaf one slot per chunk. Reads
//! return the chunks themselves; writes are received directly into them (`write_buffer`), and their
//! `submit` only checks whether the bytes are there.
//!
//! Memory is overcommitted: a range that is zeroed with `no_hole` counts as allocated but takes
//! memory, beside 40 bytes a chunk for the index, only when it is written. Ranges of many chunks
//! are zeroed piece by piece, one per turn, so that other volumes on the same thread need not wait.
//!
//! A write that gets no memory fails with [`ErrorKind::NoSpace`], not `NoMemory`: to its clients
//! the volume is a full disk, which they handle (qemu pauses the guest until there is room, file
//! systems report it), while they take ENOMEM for an I/O error.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use sheave_core::{
    Backend, BlockSizes, Buf, ByteRange, Capabilities, Completion, Error, ErrorKind, Extent, Io,
    IoDone, Nanos, Op, Outcome, Payload, Reply, Result, Segment, Submitted, Tag, Volume,
    VolumeInfo, memory,
};

use sheave_core::extents::{ExtentList, empty_range_outcome, hole};

/// Unit of allocation in bytes.
const CHUNK: u64 = 64 << 10;
/// Chunks in a leaf of the index.
const LEAF_CHUNKS: u64 = 4096;
/// Bytes that a leaf covers.
const LEAF: u64 = CHUNK * LEAF_CHUNKS;
/// The largest volume: its table of leaves takes 64 MiB.
const SIZE_MAX: u64 = 1 << 50;
/// The most chunks and missing leaves that one block status visits, so that it stays short.
const STATUS_LOOKS_MAX: usize = 64 << 10;
/// The most chunks and missing leaves that are zeroed in one turn.
const ZERO_STEPS_MAX: usize = 1024;
/// The most long ops in progress.
const LONG_MAX: usize = 1024;

const _: () = assert!(CHUNK.is_power_of_two() && LEAF.is_power_of_two());

/// A volume in memory; gone with the process.
pub struct Memory {
    store: Arc<Store>,
}

impl Memory {
    /// A volume of `size` bytes, which costs nothing until it is written.
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`] above 1 PiB; [`ErrorKind::NoMemory`] when the table of its leaves,
    /// 16 bytes for each 256 MiB, cannot be allocated.
    pub fn new(size: u64) -> Result<Self> {
        if size > SIZE_MAX {
            let why = format!("a memory volume of {size} bytes; the most is 1P");
            return Err(Error::new(ErrorKind::TooLarge, "create", why));
        }
        let block = BlockSizes::default();
        let info = VolumeInfo {
            block,
            read_only: false,
            rotational: false,
            volatile: true,
            identity: None,
            can: Capabilities::ALL,
        };
        let leaves = list(size.div_ceil(LEAF) as usize, OnceLock::new)?;
        Ok(Self { store: Arc::new(Store { size, info, leaves, held_bytes: Arc::default() }) })
    }
}

impl Volume for Memory {
    fn info(&self) -> &VolumeInfo {
        &self.store.info
    }

    fn size(&self) -> u64 {
        self.store.size
    }

    fn grow(&self) -> Result<u64> {
        Ok(self.store.size)
    }

    fn extend(&self, _: u64) -> Result<()> {
        Err(fixed_size())
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        &[]
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        Ok(Box::new(MemoryBackend { store: Arc::clone(&self.store), long: VecDeque::new() }))
    }

    fn held_bytes(&self) -> Option<Arc<AtomicU64>> {
        Some(Arc::clone(&self.store.held_bytes))
    }
}

/// The error for extending a volume whose text has its size.
pub(crate) fn fixed_size() -> Error {
    let why = "its size is part of its name; attach another one";
    Error::new(ErrorKind::Unsupported, "resize", why)
}

struct MemoryBackend {
    store: Arc<Store>,
    /// Ranges that take more than one turn to zero.
    long: VecDeque<Zeroing>,
}

/// The rest of an op that zeroes a range.
struct Zeroing {
    tag: Tag,
    rest: ByteRange,
    no_hole: bool,
}

impl Backend for MemoryBackend {
    fn info(&self) -> &VolumeInfo {
        &self.store.info
    }

    fn write_buffer(&mut self, range: ByteRange, _: &mut dyn Io) -> Result<Payload> {
        let mut out = Payload::new();
        out.try_reserve(chunk_count(range))?;
        for piece in range.pieces(CHUNK) {
            let (skip, len) = in_chunk(piece);
            out.push(Segment::Data(self.store.chunk(piece)?.slice(skip, len)));
        }
        Ok(out)
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if let Some(outcome) = empty_range_outcome(&op) {
            return Submitted::Done(outcome);
        }
        Submitted::Done(match op {
            Op::Read { range, .. } => self.store.read(range).map(Reply::Data),
            Op::Write { range, data, .. } => self.store.write(range, &data).map(|copied| {
                if copied {
                    io.recycle(data);
                }
                Reply::Done
            }),
            Op::Trim { .. } | Op::WriteZeroes { .. } if self.long.len() >= LONG_MAX => {
                return Submitted::Full(op);
            }
            Op::Trim { range, .. } => return self.zero(range, false, tag),
            Op::WriteZeroes { range, no_hole, .. } => return self.zero(range, no_hole, tag),
            Op::BlockStatus { range, extents_max } => self.store.block_status(range, extents_max),
            Op::Flush | Op::Cache { .. } => Ok(Reply::Done),
        })
    }

    fn io_done(&mut self, _: IoDone, _: &mut dyn Io) {
        // Nothing is ever started.
    }

    fn reap(&mut self, _: &mut dyn Io) -> Option<Completion> {
        let Zeroing { tag, rest, no_hole } = self.long.pop_front()?;
        match self.zero(rest, no_hole, tag) {
            Submitted::Done(outcome) => Some(Completion { tag, outcome }),
            // It goes behind the other ops.
            _ => None,
        }
    }

    fn deadline(&self) -> Option<Nanos> {
        (!self.long.is_empty()).then_some(0)
    }
}

impl MemoryBackend {
    fn zero(&mut self, range: ByteRange, no_hole: bool, tag: Tag) -> Submitted {
        let rest = match self.store.zero_some(range, no_hole, ZERO_STEPS_MAX) {
            Err(error) => return Submitted::Done(Err(error)),
            Ok(rest) if rest.is_empty() => return Submitted::Done(Ok(Reply::Done)),
            Ok(rest) => rest,
        };
        // Not refused for want of memory: the list is short, and trim frees memory.
        if let Err(error) = memory::insist(|| self.long.try_reserve(1)) {
            return Submitted::Done(Err(error));
        }
        self.long.push_back(Zeroing { tag, rest, no_hole });
        Submitted::Queued
    }
}

/// The content of a slot.
enum Slot {
    /// Nothing.
    Hole,
    /// Zeroes that count as allocated.
    Zeroed,
    /// A whole chunk. Replies in flight may hold it too.
    Data(Buf),
}

type Leaf = Box<[RwLock<Slot>]>;

struct Store {
    size: u64,
    info: VolumeInfo,
    leaves: Box<[OnceLock<Leaf>]>,
    /// Bytes of chunks and leaves.
    held_bytes: Arc<AtomicU64>,
}

impl Store {
    fn read(&self, range: ByteRange) -> Result<Payload> {
        let mut out = Payload::new();
        out.try_reserve(chunk_count(range))?;
        for piece in range.pieces(CHUNK) {
            let (skip, len) = in_chunk(piece);
            let slot = self.slot(piece).map(read);
            out.push(match slot.as_deref() {
                Some(Slot::Data(chunk)) => Segment::Data(chunk.slice(skip, len)),
                _ => Segment::Zero(len),
            });
        }
        Ok(out)
    }

    /// Writes `data`; whether any of it had to be copied.
    fn write(&self, range: ByteRange, data: &Payload) -> Result<bool> {
        let (mut done, mut copied) = (0, false);
        for segment in data.segments() {
            let target = range.part(done, segment.len() as u64);
            done += target.len();
            match segment {
                Segment::Zero(_) => {
                    self.zero_some(target, false, usize::MAX)?;
                }
                Segment::Data(buf) => copied |= self.write_buf(target, buf)?,
            }
        }
        Ok(copied)
    }

    fn write_buf(&self, range: ByteRange, buf: &Buf) -> Result<bool> {
        let (mut from, mut copied) = (0, false);
        for piece in range.pieces(CHUNK) {
            let (skip, len) = in_chunk(piece);
            let slot = self.slot_or_new(piece)?;
            // The lock is held while bytes are copied, so that they go to a chunk of the volume
            // even when other threads free chunks meanwhile.
            let shared = read(slot);
            copied |= if let Slot::Data(chunk) = &*shared {
                copy_unless_in_place(chunk, skip, buf, from, len)
            } else {
                drop(shared);
                let mut slot = write(slot);
                let chunk = self.allocated(&mut slot, None)?;
                copy_unless_in_place(&chunk, skip, buf, from, len)
            };
            from += len;
        }
        Ok(copied)
    }

    /// The chunk that holds `piece`, allocated if it was not.
    fn chunk(&self, piece: ByteRange) -> Result<Buf> {
        let slot = self.slot_or_new(piece)?;
        if let Slot::Data(chunk) = &*read(slot) {
            return Ok(chunk.clone());
        }
        // Clearing memory takes long; the lock is not held, so that readers need not wait.
        let fresh = self.new_chunk()?;
        self.allocated(&mut write(slot), Some(fresh))
    }

    /// The chunk in a slot; put there, `fresh` or new, if there was none.
    fn allocated(&self, slot: &mut Slot, fresh: Option<Buf>) -> Result<Buf> {
        if let Slot::Data(chunk) = slot {
            return Ok(chunk.clone());
        }
        let chunk = fresh.map_or_else(|| self.new_chunk(), Ok)?;
        *slot = Slot::Data(chunk.clone());
        self.held_bytes.fetch_add(CHUNK, Relaxed);
        Ok(chunk)
    }

    fn new_chunk(&self) -> Result<Buf> {
        Buf::try_zeroed(CHUNK as usize).map_err(|_| self.full())
    }

    #[cold]
    fn full(&self) -> Error {
        let why = format!(
            "no memory is left for the volume, which holds {} bytes of it; trim what is not \
             needed, or give the server more memory",
            self.held_bytes.load(Relaxed)
        );
        Error::new(ErrorKind::NoSpace, "write", why)
    }

    /// Makes a range read as zeroes; the memory of whole chunks is freed. Returns the rest of the
    /// range after at most `steps` steps.
    fn zero_some(&self, range: ByteRange, no_hole: bool, steps_max: usize) -> Result<ByteRange> {
        let (mut done, mut steps) = (0, 0);
        for part in range.pieces(LEAF) {
            if !no_hole && self.leaf(part).is_none() {
                if steps == steps_max {
                    break;
                }
                steps += 1;
                done += part.len();
                continue;
            }
            for piece in part.pieces(CHUNK) {
                if steps == steps_max {
                    return Ok(range.part(done, range.len() - done));
                }
                self.zero_piece(piece, no_hole)?;
                steps += 1;
                done += piece.len();
            }
        }
        Ok(range.part(done, range.len() - done))
    }

    fn zero_piece(&self, piece: ByteRange, no_hole: bool) -> Result<()> {
        let (skip, len) = in_chunk(piece);
        let whole = skip == 0 && (len as u64 == CHUNK || piece.end() == self.size);
        let mut slot = write(self.slot_or_new(piece)?);
        match &*slot {
            Slot::Data(chunk) if !whole => chunk.zero(skip, len),
            Slot::Hole if !no_hole => {}
            Slot::Zeroed if !whole => {}
            _ => {
                let old =
                    std::mem::replace(&mut *slot, if no_hole { Slot::Zeroed } else { Slot::Hole });
                // Freeing memory takes long; the lock is not held.
                drop(slot);
                if let Slot::Data(_) = old {
                    self.held_bytes.fetch_sub(CHUNK, Relaxed);
                }
                drop(old);
            }
        }
        Ok(())
    }

    fn block_status(&self, range: ByteRange, extents_max: usize) -> Outcome {
        let mut list = ExtentList::new(extents_max);
        let mut looked_at = 0;
        for part in range.pieces(LEAF) {
            if self.leaf(part).is_none() {
                looked_at += 1;
                if looked_at > STATUS_LOOKS_MAX || !list.push(hole(part.len())) {
                    return list.into_reply();
                }
                continue;
            }
            for piece in part.pieces(CHUNK) {
                looked_at += 1;
                if looked_at > STATUS_LOOKS_MAX || !list.push(self.extent(piece)) {
                    return list.into_reply();
                }
            }
        }
        list.into_reply()
    }

    fn extent(&self, piece: ByteRange) -> Extent {
        let slot = self.slot(piece).map(read);
        let (hole, zero) = match slot.as_deref() {
            None | Some(Slot::Hole) => (true, true),
            Some(Slot::Zeroed) => (false, true),
            Some(Slot::Data(_)) => (false, false),
        };
        Extent { len: piece.len(), hole, zero }
    }

    fn leaf(&self, piece: ByteRange) -> Option<&Leaf> {
        self.leaves[(piece.start() / LEAF) as usize].get()
    }

    fn slot(&self, piece: ByteRange) -> Option<&RwLock<Slot>> {
        Some(&self.leaf(piece)?[slot_index(piece)])
    }

    fn slot_or_new(&self, piece: ByteRange) -> Result<&RwLock<Slot>> {
        let place = &self.leaves[(piece.start() / LEAF) as usize];
        let leaf = match place.get() {
            Some(leaf) => leaf,
            None => self.new_leaf(place)?,
        };
        Ok(&leaf[slot_index(piece)])
    }

    #[cold]
    fn new_leaf<'a>(&self, place: &'a OnceLock<Leaf>) -> Result<&'a Leaf> {
        let fresh = list(LEAF_CHUNKS as usize, || RwLock::new(Slot::Hole));
        let fresh = fresh.map_err(|_| self.full())?;
        let len_bytes = size_of_val(&*fresh) as u64;
        // Another thread may be first; its leaf stays then.
        Ok(place.get_or_init(|| {
            self.held_bytes.fetch_add(len_bytes, Relaxed);
            fresh
        }))
    }
}

/// A list of `count` new entries.
fn list<T>(count: usize, new: impl FnMut() -> T) -> Result<Box<[T]>> {
    let mut list = Vec::new();
    memory::attempt(|| list.try_reserve_exact(count))?;
    list.resize_with(count, new);
    Ok(list.into_boxed_slice())
}

/// The number of chunks that a range touches.
fn chunk_count(range: ByteRange) -> usize {
    (range.end().div_ceil(CHUNK) - range.start() / CHUNK) as usize
}

/// Copies `len` bytes of `buf` to their place in a chunk, unless they were received there; returns
/// whether it had to copy.
fn copy_unless_in_place(chunk: &Buf, skip: usize, buf: &Buf, from: usize, len: usize) -> bool {
    // Both blocks of pages are alive, so equal addresses mean the same block.
    let in_place =
        std::ptr::eq(chunk.pages(), buf.pages()) && chunk.start() + skip == buf.start() + from;
    if !in_place {
        chunk.slice(skip, len).copy_from(&buf.slice(from, len));
    }
    !in_place
}

/// The offset of a piece in its chunk, and its length.
fn in_chunk(piece: ByteRange) -> (usize, usize) {
    ((piece.start() % CHUNK) as usize, piece.len() as usize)
}

fn slot_index(piece: ByteRange) -> usize {
    (piece.start() % LEAF / CHUNK) as usize
}

/// A slot is replaced in one step, so it is whole even if a holder of the lock panicked.
fn read(slot: &RwLock<Slot>) -> RwLockReadGuard<'_, Slot> {
    slot.read().unwrap_or_else(PoisonError::into_inner)
}

/// See [`read`].
fn write(slot: &RwLock<Slot>) -> RwLockWriteGuard<'_, Slot> {
    slot.write().unwrap_or_else(PoisonError::into_inner)
}
