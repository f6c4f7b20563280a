//! A raw image file or a block device.
//!
//! All data I/O goes through the engine. The kernel reports a failed write-back once to each open
//! file description. So backends that share a description take turns to sync it (`sync.rs`):
//! otherwise the flush of one thread could take the error that belongs to another's.

mod backend;
mod batch;
mod disk;
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
use disk::Disk;
pub use forks::start_process;
pub use holders::are_visible as are_holders_visible;
use lock::OpenEntry;
use sync::SharedSync;

/// Descriptions that are opened with the file, one for each thread of the usual engine. More
/// threads share them, since opening another one could wait for the disk.
pub const HANDLES_READY: usize = 4;
/// The longest write of zeroes where the file system cannot make them.
const ZEROES: usize = 1 << 20;
/// The shortest write through the page cache that is faster from registered memory.
const IN_PLACE_MIN_BYTES: u64 = 16 << 10;

/// How to open a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// Open it for reading only; other programs may do the same.
    pub read_only: bool,
    /// Bypass the page cache (`O_DIRECT`). The volume then takes whole blocks only.
    pub direct: bool,
    /// Refuse it when another program has it open for writing, and lock it against other programs.
    pub lock: bool,
    /// The logical block of the disk that it is, a power of two from 512 to 4096 bytes; by default
    /// that of the device, and 512 for an image.
    pub block: Option<u32>,
    /// Serve its bytes as they are without a warning, even if it looks like an image in another
    /// format.
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
    /// or has locked it), [`ErrorKind::Invalid`] if it is neither file nor block device,
    /// [`ErrorKind::Unsupported`] where there is no `direct`, and errors of the system.
    pub fn open(options: &FileOptions) -> Result<Self> {
        let mut image = open::open(options)?;
        for _ in 0..HANDLES_READY {
            let handle = open::handle(&image)?;
            image.handles.push(Arc::new(handle));
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
        let handle = self.image.handle();
        Ok(Box::new(backend::FileBackend::new(Arc::clone(&self.image), handle)))
    }

    fn takes_registered(&self, kind: OpKind, range: ByteRange) -> bool {
        let is_quicker = match kind {
            OpKind::Read => true,
            // The data of a direct write may change meanwhile, which some storage takes for an
            // error (stable_writes). Short writes are not slower through this process's memory,
            // since they are carried out inline.
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
    /// It grows by multiples of this: of its logical block, and of whole blocks if there are no
    /// descriptions for a tail. A new tail would not be safe either: its page could hold blocks
    /// that are written directly.
    growth_unit: u64,
    /// Held while the file is extended: of two concurrent extensions, the smaller size would cut
    /// off the larger one.
    extending: Mutex<()>,
    /// Direct, and it ended within a block when it was opened. I/O on such a last block goes
    /// through the page cache.
    has_tail: bool,
    /// It is on a disk of this machine: its I/O does not wait for a file server.
    local: bool,
    /// `fallocate` takes multiples of this: 1 for files, the logical block of a device.
    hole_block: u64,
    /// Features that the file system has turned out not to have.
    features: Features,
    /// A flush failed, so data written since the previous flush may be lost and the kernel no
    /// longer has it; or another program truncated the file. Set once, never cleared.
    poisoned: AtomicBool,
    zeroes: OnceLock<Buf>,
    /// The descriptions of backends. All are as old as the volume, and are kept: the kernel reports
    /// no failed write-back to a description that is opened after another one got the error.
    handles: Vec<Arc<Handle>>,
    /// The description that was opened by name and holds the locks. Backends use it for nothing but
    /// [`Image::allocates`].
    main: Arc<File>,
    /// `main` holds a device exclusively (`O_EXCL`).
    holds_device: bool,
    /// The device has no offload for zeroes: the kernel writes them, which is not faster than a
    /// write.
    no_zero_offload: bool,
    disk: Arc<Disk>,
    // Last, so that the file is closed before another opener in this process is let in.
    entry: Option<OpenEntry>,
}

/// Features that are taken for granted until the first refusal.
#[derive(Default)]
struct Features {
    no_punch_hole: AtomicBool,
    no_zero_range: AtomicBool,
}

/// The descriptions of a backend.
struct Handle {
    file: Arc<File>,
    /// Through the page cache, for the part of a direct volume beyond its last whole block.
    tail: Option<Arc<File>>,
    syncs: SharedSync,
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

    /// The handle for one more backend: one with the fewest users. The counts may be stale, which
    /// does no harm.
    fn handle(&self) -> Arc<Handle> {
        let fewest = self.handles.iter().min_by_key(|handle| Arc::strong_count(handle));
        Arc::clone(fewest.expect("handles are opened with the volume"))
    }

    fn size(&self) -> u64 {
        // Only the number itself is shared between threads.
        self.size.load(Ordering::Relaxed)
    }

    /// The present size of the file in bytes, also of a device (BLKGETSIZE64), whose metadata says
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
    /// made when the volume was shorter, so it is not compared with the volume's end.
    fn is_tail(&self, range: ByteRange) -> bool {
        self.has_tail && !range.end().is_multiple_of(self.info.block.minimum.into())
    }

    /// The description for `fallocate`. Before a device discards or zeroes a range, the kernel
    /// drops what its page cache has of it. If a description holds the device exclusively, it drops
    /// dirty pages for that one only, and fails with EBUSY for others (block/bdev.c,
    /// `truncate_bdev_range`). A failed write-back is reported by syncs, not by `fallocate`, so
    /// backends still get it through their own description.
    fn allocates<'a>(&'a self, handle: &'a Handle) -> &'a Arc<File> {
        if self.holds_device { &self.main } else { &handle.file }
    }

    /// A megabyte of zeroes that is never modified.
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
