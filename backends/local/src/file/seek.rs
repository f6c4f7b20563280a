//! Which parts of a file are allocated.

use std::fs::File;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sheave_core::{ByteRange, Reply, Result};

use super::Image;
use super::work::shrunk;
use sheave_core::extents::{ExtentList, data, hole};

/// The most seeks of one block status, so that it stays short.
const SEEKS_MAX: usize = 1024;

/// Whether the file system distinguishes holes from data.
pub(super) fn is_supported(file: &File) -> bool {
    // ENXIO if there is no data from here on.
    matches!(seek(file, SeekFrom::Data(0)), Ok(_) | Err(Errno::NXIO))
}

/// Describes a range of an image.
///
/// # Errors
/// When the file is shorter than the image: the missing part is no hole.
pub(super) fn block_status(
    file: &File,
    range: ByteRange,
    image: &Image,
    extents_max: usize,
) -> Result<Reply> {
    let size = image.size();
    let mut list = ExtentList::new(extents_max);
    let mut at = range.start();
    for _ in 0..SEEKS_MAX {
        let (end, is_data) = match seek(file, SeekFrom::Data(at)) {
            Ok(next) if next > at => (next, false),
            Ok(_) => (seek(file, SeekFrom::Hole(at)).unwrap_or_else(|_| range.end()), true),
            Err(Errno::NXIO) => (size, false),
            Err(_) => (range.end(), true),
        };
        // Another program may change the file meanwhile.
        let end = end.clamp(at + 1, size);
        let run = if is_data { data(end - at) } else { hole(end - at) };
        at = end;
        if !list.push(run) || at >= range.end() {
            break;
        }
    }
    // Checked last, so that it cannot have been truncated meanwhile.
    match seek(file, SeekFrom::End(0)) {
        Ok(end) if end < size => Err(shrunk("block_status", image, end)),
        _ => list.into_reply(),
    }
}
