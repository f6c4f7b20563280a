//! A block device of this node: checked to be one, and read without the page cache.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, ioctl_blksszget};
use rustix::io::{Errno, pread};
use sheave_core::printable;

use crate::mountinfo::Number;
use crate::probe::{Content, Part, Region, parse, regions};
use crate::volumes::Device;
use crate::{Error, Kind, Result};

/// Direct reads want memory and offsets like this; no logical block is longer.
const ALIGN: usize = 4096;

/// A block device.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    pub(crate) number: Number,
    /// Bytes.
    pub(crate) size: u64,
    pub(crate) read_only: bool,
}

impl Disk {
    /// Looks at a device that the daemon has named.
    ///
    /// # Errors
    /// When its path is no block device, or its size is not the one that the daemon knows.
    pub(crate) fn of(device: &Device) -> Result<Self> {
        let disk = Self::at(&device.path)?;
        if disk.size != device.size {
            let why = format!(
                "{}: {} bytes, and the daemon says {}; it may be changing, try again",
                printable(&disk.path),
                disk.size,
                device.size
            );
            return Err(Error::new(Kind::Unavailable, why));
        }
        Ok(Self { read_only: disk.read_only || device.read_only, ..disk })
    }

    /// Looks at the block device at a path.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn at(path: &Path) -> Result<Self> {
        let fail = |error| Error::of_io(printable(path), &error);
        let metadata = fs::metadata(path).map_err(fail)?;
        if !metadata.file_type().is_block_device() {
            let why = format!("{}: it is no block device", printable(path));
            return Err(Error::new(Kind::Unavailable, why));
        }
        let number = Number::of(metadata.rdev());
        let size = File::open(path).and_then(|mut file| file.seek(SeekFrom::End(0)));
        let read_only = fs::read_to_string(sys_path(number).join("ro")).map_err(fail)?;
        let read_only = read_only.trim() != "0";
        Ok(Self { path: path.to_owned(), number, size: size.map_err(fail)?, read_only })
    }

    /// Opens it, so that it stays the device that it is.
    ///
    /// # Errors
    /// When another device has its path by now.
    pub(crate) fn hold(&self) -> Result<File> {
        let fail = |error| Error::of_io(printable(&self.path), &error);
        let file = File::open(&self.path).map_err(fail)?;
        self.check_same(&file)?;
        Ok(file)
    }

    fn check_same(&self, file: &File) -> Result<()> {
        let rdev = file.metadata().map_err(|error| self.unreadable(&error))?.rdev();
        if Number::of(rdev) == self.number {
            return Ok(());
        }
        let why = format!("{}: it is another device now", printable(&self.path));
        Err(Error::new(Kind::Unavailable, why))
    }

    /// What kind of data is on it.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] when a part cannot be read: then nothing is known.
    pub(crate) fn probe(&self) -> Result<Content> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::DIRECT.bits().cast_signed())
            .open(&self.path)
            .map_err(|error| self.unreadable(&error))?;
        self.check_same(&file)?;
        let block = ioctl_blksszget(&file).map_err(|errno| self.unreadable(&errno.into()))?;
        if block as usize > ALIGN || !self.size.is_multiple_of(u64::from(block)) {
            let why = format!("{}: logical blocks of {block} bytes", printable(&self.path));
            return Err(Error::new(Kind::Refused, why));
        }
        let mut parts = Vec::new();
        for region in regions(self.size) {
            parts.push(self.read(&file, region)?);
        }
        Ok(parse(self.size, &parts))
    }

    fn read(&self, file: &File, region: Region) -> Result<Part> {
        let mut memory = vec![0; region.len + ALIGN];
        // At most ALIGN - 1; usize::MAX is "unknown".
        let shift = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        let buffer = &mut memory[shift..shift + region.len];
        let mut done = 0;
        while done < region.len {
            match pread(file, &mut buffer[done..], region.at + done as u64) {
                Ok(0) => {
                    let end = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
                    return Err(self.unreadable(&end));
                }
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) => {
                    let what = format!(
                        "{}: {} bytes at {} cannot be read, so it is not known what is there",
                        printable(&self.path),
                        region.len,
                        region.at
                    );
                    return Err(Error::of_errno(what, errno).with_kind(Kind::Unavailable));
                }
            }
        }
        Ok(Part { at: region.at, bytes: buffer.to_vec() })
    }

    /// Waits until all that was written is on stable storage.
    ///
    /// # Errors
    /// When the device fails.
    pub(crate) fn sync(&self) -> Result<()> {
        let synced = File::open(&self.path).and_then(|file| file.sync_all());
        synced.map_err(|error| Error::of_io(format!("{}: sync", printable(&self.path)), &error))
    }

    fn unreadable(&self, error: &std::io::Error) -> Error {
        Error::of_io(format!("{}: read", printable(&self.path)), error).with_kind(Kind::Unavailable)
    }
}

/// Where the kernel shows a device.
pub(crate) fn sys_path(number: Number) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", number.major, number.minor))
}
