//! Volumes, and the backends through which an engine uses them.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::{
    ByteRange, Completion, Error, ErrorKind, Io, IoDone, Link, Nanos, Op, OpKind, Outcome, Payload,
    Result, Tag,
};

const FIXED_SIZE: &str =
    "this volume cannot be made longer from here; if it has grown by other means, name no size";

/// Block sizes in bytes (NBD: "block size constraints").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Every offset and length is a multiple of this power of two, at most 64 KiB.
    pub minimum: u32,
    /// The logical block of the disk that the volume is, for partition tables and file systems: a
    /// power of two, at least 512. Devices made of the volume have it. `minimum` is another
    /// property: the alignment that requests need.
    pub logical: u32,
    /// Best unit of I/O: a power of two, at least `minimum` and `logical`.
    pub preferred: u32,
    /// The longest read or write.
    pub maximum_payload: u32,
}

impl Default for BlockSizes {
    fn default() -> Self {
        Self { minimum: 1, logical: 512, preferred: 4096, maximum_payload: 32 << 20 }
    }
}

/// The ops that a volume has. A front advertises exactly these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent capabilities, each with a name")]
pub struct Capabilities {
    /// [`Op::Flush`] makes data stable.
    pub flush: bool,
    /// The `fua` field of writing ops.
    pub fua: bool,
    /// [`Op::Trim`].
    pub trim: bool,
    /// [`Op::WriteZeroes`].
    pub write_zeroes: bool,
    /// The `fast` field of [`Op::WriteZeroes`].
    pub fast_zero: bool,
    /// [`Op::Cache`].
    pub cache: bool,
    /// [`Op::BlockStatus`] knows more than "allocated".
    pub block_status: bool,
    /// A flush on one backend covers the writes completed on every other backend of the volume.
    pub multi_conn: bool,
}

impl Capabilities {
    /// All of them.
    pub const ALL: Self = Self {
        flush: true,
        fua: true,
        trim: true,
        write_zeroes: true,
        fast_zero: true,
        cache: true,
        block_status: true,
        multi_conn: true,
    };
}

/// What a volume is, except for its size. Constant while it is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Block sizes.
    pub block: BlockSizes,
    /// Writing ops are refused.
    pub read_only: bool,
    /// On rotating media.
    pub rotational: bool,
    /// Its content is lost when the process that has it open ends.
    pub volatile: bool,
    /// Distinguishes it from another volume that gets its name later; `None` where nothing does.
    pub identity: Option<String>,
    /// Which ops it has.
    pub can: Capabilities,
}

/// An open volume, shared by all threads that serve it.
pub trait Volume: Send + Sync {
    /// What it is.
    fn info(&self) -> &VolumeInfo;

    /// Size in bytes. It never shrinks while the volume is open, so a range that was inside the
    /// volume stays valid. It changes only in [`Volume::grow`].
    fn size(&self) -> u64;

    /// Checks whether the storage below has grown, serves the new size from now on, and returns it.
    /// A volume of fixed size returns that size. Existing backends serve the new size too.
    ///
    /// # Errors
    /// When the new size cannot be determined, and [`ErrorKind::Io`] when the storage below is
    /// shorter than before. The volume then keeps its size.
    fn grow(&self) -> Result<u64>;

    /// Extends the storage below to at least `size` bytes, stably, while the volume is open and in
    /// use; new bytes read as zeroes. [`Volume::grow`] then serves them. A layer passes the call on
    /// to the volume below.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when the volume cannot be extended from here,
    /// [`ErrorKind::Invalid`] when it is longer or cannot have this size, and errors of the system.
    fn extend(&self, size: u64) -> Result<()> {
        match self.below() {
            [below] => below.extend(size),
            _ => Err(Error::new(ErrorKind::Unsupported, "resize", FIXED_SIZE)),
        }
    }

    /// A backend for one thread. Like those of the backend, this call waits neither for a device
    /// nor for the network.
    ///
    /// # Errors
    /// When the volume can no longer be used.
    fn backend(&self) -> Result<Box<dyn Backend>>;

    /// The volumes below a layer, in the order of its legs ([`crate::Legs`]); none below a volume
    /// that keeps the data itself. Required, so that no layer hides what is below it.
    fn below(&self) -> &[Arc<dyn Volume>];

    /// Whether this volume, apart from those below, knows that data written to it is lost.
    fn has_lost_data_itself(&self) -> bool {
        false
    }

    /// The bytes of memory that the volume's data takes, if it is kept in memory. The counter can
    /// be read at any time.
    fn held_bytes(&self) -> Option<Arc<AtomicU64>> {
        let [below] = self.below() else { return None };
        below.held_bytes()
    }

    /// The state of the connection to the server that has its data, if a server has it. It can be
    /// read at any time.
    fn link(&self) -> Option<Arc<Link>> {
        let [below] = self.below() else { return None };
        below.link()
    }

    /// Whether the data of such a read or write may stay in memory that only the kernel sees
    /// ([`crate::Buf::registered`]): because the volume passes it on to [`Io::start`] without
    /// reading it, and is faster that way.
    fn takes_registered(&self, kind: OpKind, range: ByteRange) -> bool {
        let _ = (kind, range);
        false
    }
}

/// A volume around another one, with the size, growth and data of that one.
pub trait Layer: Send + Sync {
    /// The volume below.
    fn inner(&self) -> &Arc<dyn Volume>;

    /// See [`Volume::info`].
    fn info(&self) -> &VolumeInfo {
        self.inner().info()
    }

    /// See [`Volume::backend`].
    ///
    /// # Errors
    /// When the volume can no longer be used.
    fn backend(&self) -> Result<Box<dyn Backend>>;

    /// See [`Volume::takes_registered`].
    fn takes_registered(&self, kind: OpKind, range: ByteRange) -> bool {
        let _ = (kind, range);
        false
    }
}

impl<L: Layer> Volume for L {
    fn info(&self) -> &VolumeInfo {
        Layer::info(self)
    }

    fn size(&self) -> u64 {
        self.inner().size()
    }

    fn grow(&self) -> Result<u64> {
        self.inner().grow()
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        Layer::backend(self)
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        std::slice::from_ref(self.inner())
    }

    fn takes_registered(&self, kind: OpKind, range: ByteRange) -> bool {
        Layer::takes_registered(self, kind, range)
    }
}

impl dyn Volume + '_ {
    /// Whether data that was written to the volume is known to be lost, in it or below. Only this
    /// process may know, so the volume must not be closed and opened again as if all were well.
    /// No layer answers this by itself.
    #[must_use]
    pub fn has_lost_data(&self) -> bool {
        self.has_lost_data_itself() || self.below().iter().any(|below| below.has_lost_data())
    }
}

/// The state of a submitted op.
#[derive(Debug)]
pub enum Submitted {
    /// It has completed.
    Done(Outcome),
    /// It will complete; [`Backend::reap`] returns its completion.
    Queued,
    /// No room: the op is handed back unchanged. The owner keeps it, and submits it again after the
    /// next completion or deadline, before later ops.
    Full(Op),
}

/// One thread's access to a volume. Layers are backends around a backend.
///
/// The owner submits ops, passes on the completions of file I/O that the backend started, and reaps
/// completions of ops after each batch of either, when [`Backend::deadline`] has passed, and when
/// another thread has called the waker of [`Io::waker`]. An op in flight therefore needs file I/O
/// in flight, a deadline, or a waker that another thread holds: the owner sleeps until one of
/// these.
///
/// No method waits for a device or the network: all connections of the thread would wait, too.
pub trait Backend: Send {
    /// What the volume is.
    fn info(&self) -> &VolumeInfo;

    /// Memory to receive the data of a write to `range` into. A backend that keeps its data in
    /// memory answers with that memory itself, so that the write needs no copy; contents may then
    /// change before the op is submitted.
    ///
    /// # Errors
    /// When there is no memory for it; the write fails with this error.
    fn write_buffer(&mut self, range: ByteRange, io: &mut dyn Io) -> Result<Payload> {
        let len = usize::try_from(range.len()).expect("a payload fits into memory");
        io.buffer(len).map(Payload::from)
    }

    /// Starts an op, whose range lies inside the volume and, unless the volume says otherwise, is
    /// aligned to its minimum block.
    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted;

    /// Takes the completion of a request that this backend started through [`Io::start`].
    fn io_done(&mut self, done: IoDone, io: &mut dyn Io);

    /// The next completion, if one is ready.
    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion>;

    /// When the owner should call [`Backend::reap`] even if no I/O has completed.
    fn deadline(&self) -> Option<Nanos> {
        None
    }
}
