//! Images: sparse files.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Where a sparse file has its first data. A file system that knows no holes shows a file as data
/// from end to end; then it is data if it takes any room.
pub(super) fn first_data(file: &File) -> io::Result<Option<u64>> {
    let metadata = file.metadata()?;
    let whole = || (metadata.blocks() > 0).then_some(0);
    match seek(file, SeekFrom::Data(0)) {
        Ok(0) if seek(file, SeekFrom::Hole(0)) == Ok(metadata.len()) => Ok(whole()),
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(whole()),
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn rule_16_an_image_is_blank_if_nothing_was_written() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 20).unwrap();
        assert_eq!(first_data(&file).unwrap(), None);
        file.write_all_at(b"x", 5 << 20).unwrap();
        assert_eq!(first_data(&file).unwrap(), Some(5 << 20));
        file.write_all_at(&vec![1; 8 << 20], 0).unwrap();
        assert_eq!(first_data(&file).unwrap(), Some(0), "data from end to end");
    }
}
