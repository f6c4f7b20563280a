//! Images: sparse files.

use std::fs::File;
use std::io;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Where a sparse file has its first data. `None` also where its file system does not tell: then
/// the whole file is data.
pub(super) fn first_data(file: &File) -> io::Result<Option<u64>> {
    let len = file.metadata()?.len();
    match seek(file, SeekFrom::Data(0)) {
        Ok(0) if seek(file, SeekFrom::Hole(0)) == Ok(len) => Ok(None),
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether no file of its file system can be so long.
pub(super) fn is_too_large(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::FileTooLarge | io::ErrorKind::InvalidInput)
}

pub(super) fn grow(file: &File, size: u64) -> io::Result<()> {
    file.set_len(size)?;
    file.sync_all()
}
