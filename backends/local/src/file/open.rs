//! Opens a file: finds out what it is and what it can do, and locks it.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock};

use rustix::fs::{Access, AtFlags, OFlags, StatxFlags, ioctl_blksszget, statx};
use rustix::io::Errno;
use sheave_core::{BlockSizes, Capabilities, Error, ErrorKind, Result, VolumeInfo, printable};

use super::disk::{Disk, attribute};
use super::lock::{self, Identity, OpenEntry};
use super::sync::SharedSync;
use super::{Features, FileOptions, Handle, Image, format, holders, seek};

/// The largest minimum block that a volume may state.
const BLOCK_MAX: u32 = 64 << 10;
/// The default logical block of an image.
const LOGICAL_DEFAULT: u32 = 512;
/// The alignment that every present device and file system takes, where the kernel does not report
/// one.
const DIRECT_BLOCK_DEFAULT: u32 = 4096;

/// FUSE and 9P, whose files may have other inode numbers when they are opened again (statfs(2)).
const FILE_SYSTEMS_WITHOUT_IDENTITY: [u32; 2] = [0x6573_5546, 0x0102_1997];
/// ext4 and its predecessors, XFS, btrfs and tmpfs (statfs(2)).
const LOCAL_FILE_SYSTEMS: [u32; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994];

pub(super) fn open(options: &FileOptions) -> Result<Image> {
    let path = &options.path;
    let name = printable(&path).to_string();
    let failed = |error| Error::from_io("open", &*name, error);
    // Checked before it is opened, since opening a FIFO would wait for its other end.
    let metadata = path.metadata().map_err(failed)?;
    let is_device = metadata.file_type().is_block_device();
    if !is_device && !metadata.is_file() {
        let why = format!("{name}: a volume is a regular file or a block device; this is neither");
        return Err(Error::new(ErrorKind::Invalid, "open", why));
    }
    let (entry, mut file) = take(options, &name, &metadata)?;
    let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let sector = if is_device { logical_block(&file).map_err(failed)? } else { LOGICAL_DEFAULT };
    let logical = logical(options, &name, sector, size)?;
    let block = block_sizes(&file, &metadata, &name, options.direct, size)?;
    let block = BlockSizes { logical, preferred: block.preferred.max(logical), ..block };
    if !options.raw {
        format::warn_of_others(&name, &file, size);
    }
    let hole_block = if is_device { sector.into() } else { 1 };
    let has_tail = options.direct && !size.is_multiple_of(block.minimum.into());
    let whole = if options.direct && !has_tail { block.minimum } else { 1 };
    // Without the offload a refused hole would already have dropped dirty pages.
    let no_zero_offload = is_device
        && attribute(metadata.rdev(), "queue/write_zeroes_max_bytes").as_deref() == Some("0");
    let disk = Disk::of(&file, &metadata);
    Ok(Image {
        info: VolumeInfo {
            block,
            read_only: options.read_only,
            rotational: is_device && is_rotational(&metadata),
            volatile: false,
            identity: identity_of(&file, &metadata),
            can: capabilities(options, seek::is_supported(&file)),
        },
        name,
        path: path.clone(),
        size: AtomicU64::new(size),
        growth_unit: whole.max(options.block.unwrap_or(1)).into(),
        extending: Mutex::new(()),
        has_tail,
        direct: options.direct,
        local: !is_device && lock::is_on(&file, &LOCAL_FILE_SYSTEMS),
        hole_block,
        features: Features {
            no_punch_hole: AtomicBool::new(no_zero_offload),
            ..Features::default()
        },
        poisoned: AtomicBool::new(false),
        zeroes: OnceLock::new(),
        handles: Vec::new(),
        main: Arc::new(file),
        holds_device: is_exclusive(options, is_device),
        no_zero_offload,
        disk,
        entry,
    })
}

/// Opens the file of this name, if it may be used, and locks it against other programs. The file is
/// closed before the entry is removed.
fn take(
    options: &FileOptions,
    name: &str,
    metadata: &Metadata,
) -> Result<(Option<OpenEntry>, File)> {
    let is_device = metadata.file_type().is_block_device();
    let identity = Identity::of(metadata);
    let entry =
        options.lock.then(|| OpenEntry::new(&identity, name, options.read_only)).transpose()?;
    let file = open_file(options, is_device).map_err(|error| explain(error, name, options))?;
    let opened = file.metadata().map_err(|error| Error::from_io("open", name, error))?;
    if Identity::of(&opened) != identity {
        let why = format!("{name}: it was replaced while it was being opened; try again");
        return Err(Error::new(ErrorKind::Busy, "open", why));
    }
    if options.lock {
        lock::lock(&file, &identity, &options.path, options.read_only)?;
    }
    if is_device && !options.read_only {
        check_writable(&file).map_err(|error| explain(error, name, options))?;
    }
    Ok((entry, file))
}

/// Opens the file once more, as a description of its own.
pub(super) fn handle(image: &Image) -> Result<Handle> {
    let reopen = |direct: bool| {
        let flags = if direct { OFlags::DIRECT.bits() as i32 } else { 0 };
        let mut options = OpenOptions::new();
        options.read(true).write(!image.info.read_only).custom_flags(flags);
        let file = open_again(image, &options)
            .map_err(|error| Error::from_io("open", format!("{} again", image.name), error))?;
        if image.is_locked() && !image.info.read_only {
            lock::guard(&file, &image.path)?;
        }
        Ok::<_, Error>(Arc::new(file))
    };
    let tail = image.has_tail.then(|| reopen(false)).transpose()?;
    Ok(Handle { file: reopen(image.direct)?, tail, syncs: SharedSync::default() })
}

/// Opens the same file again through /proc, since its name may be gone or belong to another file by
/// now. Where /proc is not mounted, by its name, if that is still the same file.
fn open_again(image: &Image, options: &OpenOptions) -> io::Result<File> {
    if holders::are_visible() {
        return options.open(format!("/proc/self/fd/{}", image.main.as_raw_fd()));
    }
    let own = Identity::of(&image.main.metadata()?);
    let check = |found: Metadata| match Identity::of(&found) == own {
        true => Ok(()),
        false => Err(io::Error::other("its name is another file's; mount /proc to go without it")),
    };
    // Before opening, which would wait for a FIFO, and after.
    check(image.path.metadata()?)?;
    let file = options.open(&image.path)?;
    check(file.metadata()?)?;
    Ok(file)
}

fn open_file(options: &FileOptions, is_device: bool) -> io::Result<File> {
    let mut flags = OFlags::empty();
    flags.set(OFlags::DIRECT, options.direct);
    // Fails for a device that is mounted or part of another device.
    flags.set(OFlags::EXCL, is_exclusive(options, is_device));
    OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(flags.bits() as i32)
        .open(&options.path)
}

/// Whether to hold a device exclusively.
fn is_exclusive(options: &FileOptions, is_device: bool) -> bool {
    is_device && !options.read_only && options.lock
}

/// Checks that a device which was opened for writing can be written. Only a write checks whether it
/// is read-only (BLKROGET) or a swap device (block/fops.c, `blkdev_write_iter`). Writes nothing.
fn check_writable(device: &File) -> io::Result<()> {
    rustix::io::retry_on_intr(|| rustix::io::pwrite(device, &[], 0))?;
    Ok(())
}

/// Adds advice that the errno alone does not give.
fn explain(error: io::Error, name: &str, options: &FileOptions) -> Error {
    let kind = ErrorKind::of_io(&error);
    let hint = match kind {
        _ if Errno::from_io_error(&error) == Some(Errno::NOMEDIUM) => {
            " (there is no medium in it; insert one)"
        }
        ErrorKind::Permission if !options.read_only && is_held_read_only(&options.path) => {
            " (the kernel holds this device read-only; serve it with --read-only or \
             read-only=true, or make it writable: blockdev --setrw)"
        }
        ErrorKind::Permission if !options.read_only && is_readable(&options.path) => {
            " (read-only=true serves it without write access)"
        }
        ErrorKind::Invalid if options.direct => {
            " (its file system has no O_DIRECT; leave out direct=true)"
        }
        ErrorKind::Busy => {
            " (mounted, part of another device, or running; unmount it, or use read-only=true)"
        }
        _ => "",
    };
    let kind = match kind {
        ErrorKind::Invalid if options.direct => ErrorKind::Unsupported,
        kind => kind,
    };
    Error::new(kind, "open", format!("{name}{hint}")).because(error)
}

/// Whether it is a device, and the kernel says that it is read-only.
fn is_held_read_only(path: &Path) -> bool {
    let metadata = path.metadata().ok().filter(|found| found.file_type().is_block_device());
    metadata.is_some_and(|found| attribute(found.rdev(), "ro").as_deref() == Some("1"))
}

fn is_readable(path: &Path) -> bool {
    rustix::fs::access(path, Access::READ_OK).is_ok()
}

/// Distinguishes this file from another of its name. An inode number alone may be reused when this
/// file is removed.
pub(super) fn identity_of(file: &File, metadata: &Metadata) -> Option<String> {
    if metadata.file_type().is_block_device() {
        // The disk's sequence number since the node's start, since Linux 5.15.
        let sequence = attribute(metadata.rdev(), "diskseq").unwrap_or_default();
        return Some(format!("device {} {sequence}", metadata.rdev()));
    }
    if lock::is_on(file, &FILE_SYSTEMS_WITHOUT_IDENTITY) {
        return None;
    }
    let born = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME).ok();
    let born = born.filter(|stat| stat.stx_mask & StatxFlags::BTIME.bits() != 0);
    let born = born.map(|stat| (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec)).unwrap_or_default();
    Some(format!("file {} {}.{:09}", metadata.ino(), born.0, born.1))
}

fn capabilities(options: &FileOptions, block_status: bool) -> Capabilities {
    let write = !options.read_only;
    Capabilities {
        flush: true,
        fua: write,
        trim: write,
        write_zeroes: write,
        fast_zero: write,
        cache: !options.direct,
        block_status,
        multi_conn: true,
    }
}

/// The logical block of a disk whose sectors have `sector` bytes.
fn logical(options: &FileOptions, name: &str, sector: u32, size: u64) -> Result<u32> {
    let Some(block) = options.block else { return Ok(sector) };
    if block < sector {
        let why = format!("{name}: block={block}: the blocks of this device have {sector} bytes");
        return Err(Error::new(ErrorKind::Invalid, "open", why));
    }
    if !size.is_multiple_of(block.into()) {
        let why = format!(
            "{name}: block={block}: its {size} bytes are no multiple of that; \
             round it up: truncate -s %{block} FILE"
        );
        return Err(Error::new(ErrorKind::Invalid, "open", why));
    }
    Ok(block)
}

fn block_sizes(
    file: &File,
    metadata: &Metadata,
    name: &str,
    direct: bool,
    size: u64,
) -> Result<BlockSizes> {
    let default = BlockSizes::default();
    if !direct {
        return Ok(default);
    }
    let failed = |error| Error::from_io("open", name, error);
    let mut minimum = if metadata.file_type().is_block_device() {
        logical_block(file).map_err(failed)?
    } else {
        direct_block(file, name)?
    };
    if !size.is_multiple_of(u64::from(minimum)) {
        // The last piece goes through the page cache, so direct writes must not touch its page:
        // writing the page back would undo a direct write to its other part.
        let unit = u32::try_from(metadata.blksize()).unwrap_or(u32::MAX).max(DIRECT_BLOCK_DEFAULT);
        minimum = minimum.max(unit);
    }
    if !minimum.is_power_of_two() || minimum > BLOCK_MAX {
        let why = format!("{name}: blocks of {minimum} bytes are too large; leave out direct=true");
        return Err(Error::new(ErrorKind::Unsupported, "open", why));
    }
    Ok(BlockSizes { minimum, preferred: default.preferred.max(minimum), ..default })
}

/// The alignment that direct I/O on a regular file needs.
fn direct_block(file: &File, name: &str) -> Result<u32> {
    let flags = AtFlags::EMPTY_PATH;
    let Ok(stat) = statx(file, "", flags, StatxFlags::DIOALIGN) else {
        return Ok(DIRECT_BLOCK_DEFAULT);
    };
    if !StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN) {
        return Ok(DIRECT_BLOCK_DEFAULT);
    }
    match stat.stx_dio_offset_align.max(stat.stx_dio_mem_align) {
        0 => {
            let why = format!("{name}: no direct I/O on this file; leave out direct=true");
            Err(Error::new(ErrorKind::Unsupported, "open", why))
        }
        align => Ok(align.max(512)),
    }
}

fn logical_block(file: &File) -> io::Result<u32> {
    Ok(ioctl_blksszget(file)?)
}

/// Whether a device, or the whole device of a partition, is rotational.
fn is_rotational(metadata: &Metadata) -> bool {
    attribute(metadata.rdev(), "queue/rotational").is_some_and(|text| text == "1")
}
