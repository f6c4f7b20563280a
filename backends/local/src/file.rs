//! A raw image file or a block device.
//!
//! All data I/O goes through the engine. Every backend has an open file description of its own,
//! because the kernel tells each description once of a failed write-back: with a shared one, the
//! flush of one thread could swallow the error that belongs to another's.

mod backend;
mod batch;
mod forks;
mod format;
mod holders;
mod lock;
mod open;
mod seek;
mod sync;
mod work;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::fs::OFlags;
use sheave_core::{
    Backend, Buf, ByteRange, Error, ErrorKind, OpKind, Result, Volume, VolumeInfo, printable,
};

pub use batch::OpenBatch;
pub use forks::start_process;
pub use holders::are_visible as are_holders_visible;
use lock::OpenEntry;

/// Descriptions that are opened with the file: one for each thread of the usual engine.
pub const HANDLES_READY: usize = 4;
/// Longest piece in which zeroes are written where the file system can't make them.
const ZEROES: usize = 1 << 20;
/// Writes through the page cache that are quicker if their data stays where it is.
const IN_PLACE_MIN_BYTES: u64 = 16 << 10;

/// How to open a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// Open it for reading only; others may do the same.
    pub read_only: bool,
    /// Bypass the page cache (`O_DIRECT`). The volume then takes whole blocks only.
    pub direct: bool,
    /// Refuse it when another program has it open for writing, and lock it against others.
    pub lock: bool,
    /// The logical block of the disk that it is, a power of two from 512 to 4096 bytes; without it
    /// that of the device, and 512 for an image.
    pub block: Option<u32>,
    /// It is meant to be served as it is, even if it looks like an image in another format.
    pub raw: bool,
}

impl FileOptions {
    /// Opens `path` for reading and writing, locked, through the page cache.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
            direct: false,
            lock: true,
            block: None,
            raw: false,
        }
    }
}

/// A file or block device. It keeps working when its name is removed.
pub struct FileVolume {
    image: Arc<Image>,
}

impl FileVolume {
    /// Opens it.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when another program has it open for writing (for reading and writing:
    /// at all, if it says so by a lock), [`ErrorKind::Invalid`] for what is neither file nor block
    /// device, [`ErrorKind::Unsupported`] where there is no `direct`, and what the system says.
    pub fn open(options: &FileOptions) -> Result<Self> {
        let image = open::open(options)?;
        for _ in 0..HANDLES_READY {
            image.give_back(open::handle(&image)?);
        }
        Ok(Self { image: Arc::new(image) })
    }
}

/// The [`VolumeInfo::identity`] of the file of this name.
///
/// # Errors
/// When there is no such file.
pub fn file_identity(path: &Path) -> Result<Option<String>> {
    let failed = |error| Error::from_io("open", printable(&path).to_string(), error);
    let mut options = std::fs::OpenOptions::new();
    options.read(true).custom_flags(OFlags::PATH.bits() as i32);
    let file = options.open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    Ok(open::identity_of(&file, &metadata))
}

impl Volume for FileVolume {
    fn info(&self) -> &VolumeInfo {
        &self.image.info
    }

    fn size(&self) -> u64 {
        self.image.size()
    }

    fn grow(&self) -> Result<u64> {
        self.image.grow()
    }

    fn extend(&self, size: u64) -> Result<()> {
        self.image.extend(size)
    }

    fn has_lost_data_itself(&self) -> bool {
        self.image.poisoned.load(Ordering::Relaxed)
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        &[]
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        let handle = self.image.handle()?;
        Ok(Box::new(backend::FileBackend::new(Arc::clone(&self.image), handle)))
    }

    fn takes_registered(&self, kind: OpKind, range: ByteRange) -> bool {
        let is_quicker = match kind {
            OpKind::Read => true,
            // What is written directly may be changed meanwhile, which some storage takes for an
            // error (stable_writes). Short writes are not slower by way of this process, which
            // carries them out on the spot.
            OpKind::Write => !self.image.direct && range.len() >= IN_PLACE_MIN_BYTES,
            _ => false,
        };
        is_quicker && self.image.local
    }
}

/// An open file, shared by the backends of its volume.
struct Image {
    /// For messages.
    name: String,
    /// As it was opened.
    path: PathBuf,
    info: VolumeInfo,
    /// Bytes. It only grows, so an older value that was read before is still safe to use.
    size: AtomicU64,
    direct: bool,
    /// It grows by multiples of this: of its logical block, and of whole blocks where there are no
    /// descriptions for a tail. Nor would such a tail be safe: its page could hold blocks that are
    /// written directly.
    growth_unit: u64,
    /// Held while the file is extended: of two that extend it at once, the lesser size would cut
    /// off what the greater has added.
    extending: Mutex<()>,
    /// Direct, and it ended within a block when it was opened. What of a range lies in such a last
    /// block goes through the page cache.
    has_tail: bool,
    /// It is on a disk of this machine: I/O on it does not wait for a server that is away.
    local: bool,
    /// `fallocate` takes multiples of this: 1 for files, the logical block of a device.
    hole_block: u64,
    /// What the file system has turned out to be able to do.
    features: Features,
    /// A flush failed, so data written since the previous flush may be lost and the kernel no
    /// longer has it; or another program truncated the file. Set once, never cleared.
    poisoned: AtomicBool,
    zeroes: OnceLock<Buf>,
    /// Descriptions that no backend uses now. They are kept, since closing any descriptor of a
    /// file drops the process's POSIX lock on it.
    idle: Mutex<Vec<Handle>>,
    /// The description that was opened by name and holds the locks. Backends use it for nothing but
    /// [`Image::allocates`].
    main: Arc<File>,
    /// `main` holds a device exclusively (`O_EXCL`).
    holds_device: bool,
    /// The device has no offload for zeroes: the kernel writes them, which is not faster than a
    /// write.
    no_zero_offload: bool,
    // Last, so that the file is closed before another opener in this process is let in.
    entry: Option<OpenEntry>,
}

/// Features that are taken for granted until the first refusal.
#[derive(Default)]
struct Features {
    no_punch_hole: AtomicBool,
    no_zero_range: AtomicBool,
}

/// The descriptions of one backend.
#[derive(Clone)]
struct Handle {
    file: Arc<File>,
    /// Through the page cache, for the part of a direct volume beyond its last whole block.
    tail: Option<Arc<File>>,
}

impl Handle {
    /// The description for I/O on a range.
    fn of(&self, range: ByteRange, image: &Image) -> &Arc<File> {
        self.tail.as_ref().filter(|_| image.is_tail(range)).unwrap_or(&self.file)
    }
}

impl Image {
    fn is_locked(&self) -> bool {
        self.entry.is_some()
    }

    fn handle(&self) -> Result<Handle> {
        // Adding and taking whole entries: nothing can be half done.
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let found = idle.pop();
        drop(idle);
        found.map_or_else(|| self.late_handle(), Ok)
    }

    /// A description that is opened after data may have been written. The kernel does not report a
    /// failed write-back to it that was reported to another description before; the one that is as
    /// old as the volume still gets the error. May wait for the disk, which happens only with more
    /// threads than usual.
    fn late_handle(&self) -> Result<Handle> {
        let handle = open::handle(self)?;
        if !self.info.read_only {
            let synced = rustix::io::retry_on_intr(|| rustix::fs::fdatasync(&self.main));
            if synced.is_err() {
                self.poison();
            }
        }
        Ok(handle)
    }

    fn give_back(&self, handle: Handle) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(handle);
    }

    fn size(&self) -> u64 {
        // Only the number itself passes from thread to thread.
        self.size.load(Ordering::Relaxed)
    }

    /// Bytes of the file now. Answers the size of a device too (BLKGETSIZE64), whose metadata says
    /// 0.
    fn end(&self) -> io::Result<u64> {
        (&*self.main).seek(SeekFrom::End(0))
    }

    /// See [`Volume::grow`].
    fn grow(&self) -> Result<u64> {
        let end = self.end().map_err(|error| Error::from_io("grow", &*self.name, error))?;
        let end = end - end % self.growth_unit;
        let had = self.size.fetch_max(end, Ordering::Relaxed);
        if end < had { Err(work::shrunk("grow", self, end)) } else { Ok(end) }
    }

    /// See [`Volume::extend`].
    fn extend(&self, size: u64) -> Result<()> {
        let refused =
            |kind, why: &str| Err(Error::new(kind, "resize", format!("{}: {why}", self.name)));
        let failed = |error| Error::from_io("resize", &*self.name, error);
        let _alone = self.extending.lock().unwrap_or_else(PoisonError::into_inner);
        let end = self.end().map_err(failed)?;
        if size < end {
            let why = format!("has {end} bytes; to make it {size} would cut data off");
            return refused(ErrorKind::Invalid, &why);
        }
        if !size.is_multiple_of(self.growth_unit) {
            let why = format!("{size} bytes are no multiple of its block, {}", self.growth_unit);
            return refused(ErrorKind::Invalid, &why);
        }
        if size == end {
            return Ok(());
        }
        if !self.main.metadata().map_err(failed)?.is_file() {
            let why = "a block device grows by other means; then leave out --size";
            return refused(ErrorKind::Unsupported, why);
        }
        if self.info.read_only {
            let why = "is open for reading only; make it longer by truncate(1), then resize it \
                       without --size";
            return refused(ErrorKind::Unsupported, why);
        }
        if !self.is_locked() {
            let why = "with lock=false another program may change its length at the same time; \
                       make it longer by truncate(1), then resize it without --size";
            return refused(ErrorKind::Unsupported, why);
        }
        self.main.set_len(size).and_then(|()| self.main.sync_all()).map_err(failed)
    }

    /// Whether a range goes beyond the last whole block of a direct volume. The range may have been
    /// made when the volume was shorter, so the end of the volume is no measure.
    fn is_tail(&self, range: ByteRange) -> bool {
        self.has_tail && !range.end().is_multiple_of(self.info.block.minimum.into())
    }

    /// The description for `fallocate`. Before a device discards or zeroes a range, the kernel
    /// drops what its page cache has of it. If a description holds the device exclusively, it drops
    /// dirty pages for that one only, and fails with EBUSY for others (block/bdev.c,
    /// `truncate_bdev_range`). A failed write-back is reported by syncs, not by `fallocate`, so
    /// each backend still hears of it through its own description.
    fn allocates<'a>(&'a self, handle: &'a Handle) -> &'a Arc<File> {
        if self.holds_device { &self.main } else { &handle.file }
    }

    /// A megabyte of zeroes that is never written to.
    fn zeroes(&self) -> Result<Buf> {
        if let Some(zeroes) = self.zeroes.get() {
            return Ok(zeroes.clone());
        }
        let fresh = Buf::try_zeroed(ZEROES)?;
        Ok(self.zeroes.get_or_init(|| fresh).clone())
    }

    fn poison(&self) {
        self.poisoned.store(true, Ordering::SeqCst);
    }

    fn check_poison(&self, op: &'static str) -> Result<()> {
        if !self.poisoned.load(Ordering::SeqCst) {
            return Ok(());
        }
        let why = format!(
            "{}: an earlier flush failed, or the file was cut off, so data written before may be \
             lost; check the disk, then open the volume again",
            self.name
        );
        Err(Error::new(ErrorKind::Io, op, why))
    }
}
