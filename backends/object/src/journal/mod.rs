//! The journal: what was written and is not yet in the bucket, on a disk of this node.
//!
//! A volume's directory has a lock, the directory `journal` with a superblock and segments, and
//! journals that were set aside (`*.orphan`). docs/format.md draws the files.

mod log;
mod place;
mod recover;
mod replay;
mod segment;
#[cfg(test)]
mod tests;

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use sheave_core::{Error, ErrorKind, Result, printable};

use crate::door;
use crate::format::record::WRITE_BLOCKS_MAX;
use crate::format::segment::{NoHeader, SegmentHeader};
pub use crate::format::superblock::Superblock;
use crate::ids::{BLOCK_BYTES, Lsn, Opening, VolumeId};

pub(crate) use log::{Log, Reserved};
pub(crate) use recover::Recovered;
pub(crate) use replay::Replayed;
pub(crate) use segment::{Segment, SegmentFile};

/// How much room a journal takes.
#[derive(Clone, Copy, Debug)]
pub struct JournalSize {
    /// Bytes of a segment, at least [`JournalSize::SEGMENT_BYTES_MIN`].
    pub segment_bytes: u64,
    /// The most segments, at least 2.
    pub segments_max: usize,
}

impl JournalSize {
    /// A segment has room for the longest record.
    pub const SEGMENT_BYTES_MIN: u64 = if cfg!(test) { 96 << 10 } else { 2 << 20 };
}

/// Its header, and a record with its blocks.
const _: () = assert!(JournalSize::SEGMENT_BYTES_MIN >= (2 + WRITE_BLOCKS_MAX) * BLOCK_BYTES);

impl Default for JournalSize {
    fn default() -> Self {
        Self { segment_bytes: 64 << 20, segments_max: 16 }
    }
}

/// Proof that the journal's superblock names an opening as the one that is adopting it, on stable
/// storage. Only then may the root say that the volume is open: a crash at any point leaves a
/// journal that is recognised.
#[derive(Debug)]
pub struct Adopted {
    opening: Opening,
}

impl Adopted {
    /// The opening that the superblock names.
    #[must_use]
    pub fn opening(&self) -> Opening {
        self.opening
    }

    /// For tests of the bucket's side, which have no journal.
    #[cfg(test)]
    pub(crate) fn without_journal(opening: Opening) -> Self {
        Self { opening }
    }
}

/// What the segments of a journal say about its writes, for messages and for the judgement whether
/// it is replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// All up to this one was in committed objects of the bucket when the last segment was begun.
    pub committed: Lsn,
    /// The first write that it has.
    pub first: Lsn,
    /// The last one; before `first` if it has none.
    pub last: Lsn,
}

/// A volume's directory on this node, locked.
#[derive(Debug)]
pub struct JournalDir {
    path: PathBuf,
    size: JournalSize,
    superblock: Option<Superblock>,
    _lock: File,
}

impl JournalDir {
    /// Locks the directory, which is made if there is none, and reads the superblock.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when another process has the volume open, [`ErrorKind::Unsupported`] on
    /// a network file system or for a newer superblock, [`ErrorKind::Corrupt`] for a damaged one.
    pub fn open(path: &Path, size: JournalSize) -> Result<Self> {
        assert!(
            size.segment_bytes >= JournalSize::SEGMENT_BYTES_MIN && size.segments_max >= 2,
            "a journal has room for the longest record twice"
        );
        let failed = |error| Error::from_io("open", printable(&path).to_string(), error);
        make_dir(path).map_err(failed)?;
        // Their names are to be there after a power loss, as what is in them.
        for dir in path.ancestors().take(2) {
            sheave_durable::sync_parent(dir).map_err(failed)?;
        }
        place::check_local(path)?;
        let lock = place::lock(&path.join("lock"))?;
        let superblock = Superblock::read(&superblock_path(path))?;
        Ok(Self { path: path.to_owned(), size, superblock, _lock: lock })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Notes that the root of the adopting opening exists.
    ///
    /// # Errors
    /// Errors of the file system.
    pub(crate) fn settle(&mut self, opened: Opening) -> Result<()> {
        let Some(superblock) = self.superblock else { return Ok(()) };
        self.put(Superblock { current: Some(opened), adopting: None, ..superblock })
    }

    /// Gives the room of its segments back: the bucket has everything, and its root says "closed".
    /// The superblock stays, by which this node recognises the journal.
    ///
    /// # Errors
    /// Errors of the file system; what is left is replayed, and changes nothing.
    pub(crate) fn clear(&self) -> Result<()> {
        let dir = journal_path(&self.path);
        let failed = |error| Error::from_io("clear", printable(&dir).to_string(), error);
        for path in self.segment_paths()? {
            fs::remove_file(&path).map_err(failed)?;
        }
        sheave_durable::settle(&superblock_path(&self.path))
    }

    /// Deletes the journal of a volume that is deleted. What was set aside stays.
    ///
    /// # Errors
    /// Errors of the file system.
    pub(crate) fn remove(self) -> Result<()> {
        let dir = journal_path(&self.path);
        let failed = |error| Error::from_io("delete", printable(&dir).to_string(), error);
        // The superblock is first: without it what is left is no journal.
        sheave_durable::remove(&superblock_path(&self.path))?;
        for entry in fs::read_dir(&dir).map_err(failed)? {
            fs::remove_file(entry.map_err(failed)?.path()).map_err(failed)?;
        }
        fs::remove_dir(&dir).map_err(failed)?;
        fs::remove_file(self.path.join("lock")).map_err(failed)?;
        self.remove_door();
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => Err(failed(error)),
            _ => Ok(()),
        }
    }

    /// Removes the socket of the process that had the volume open.
    fn remove_door(&self) {
        let _ = fs::remove_file(self.path.join(door::SOCKET));
    }

    fn put(&mut self, superblock: Superblock) -> Result<()> {
        superblock.write(&superblock_path(&self.path))?;
        self.superblock = Some(superblock);
        Ok(())
    }

    /// Makes one more segment, on stable storage.
    ///
    /// # Errors
    /// Errors of the file system.
    pub(crate) fn make_segment(&self) -> Result<SegmentFile> {
        let dir = journal_path(&self.path);
        let mut paths = (0..=self.size.segments_max).map(|id| dir.join(format!("segment-{id}")));
        let Some(path) = paths.find(|path| !path.exists()) else {
            let why = format!("{}: has all its segments already", printable(&dir));
            return Err(Error::new(ErrorKind::Exists, "make a segment", why));
        };
        SegmentFile::create(&path, self.size.segment_bytes)
    }

    /// Makes the directory of superblock and segments, on stable storage.
    fn make_journal(&self) -> Result<()> {
        let dir = journal_path(&self.path);
        make_dir(&dir)
            .and_then(|()| sheave_durable::sync_parent(&dir))
            .map_err(|error| Error::from_io("make", printable(&dir).to_string(), error))
    }

    /// The most segments that it may have.
    pub(crate) fn segments_max(&self) -> usize {
        self.size.segments_max
    }

    /// The files of segments, also unfinished ones.
    fn segment_paths(&self) -> Result<Vec<PathBuf>> {
        let dir = journal_path(&self.path);
        let failed = |error| Error::from_io("read", printable(&dir).to_string(), error);
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let is_segment = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("segment-"))
        };
        let paths = entries.map(|entry| entry.map(|entry| entry.path()));
        paths
            .filter(|path| path.as_ref().map_or(true, is_segment))
            .collect::<io::Result<_>>()
            .map_err(failed)
    }

    fn segments(&self) -> Result<Segments> {
        let failed =
            |path: &Path, error| Error::from_io("read", printable(&path).to_string(), error);
        let mut segments = Segments::default();
        for path in self.segment_paths()? {
            if path.extension().is_some_and(|found| found == sheave_durable::UNFINISHED) {
                fs::remove_file(&path).map_err(|error| failed(&path, error))?;
                continue;
            }
            let file = SegmentFile::open(&path)?;
            if u64::from(file.pages) * BLOCK_BYTES < JournalSize::SEGMENT_BYTES_MIN {
                let why = format!("{}: it has been cut off", printable(&path));
                return Err(Error::new(ErrorKind::Corrupt, "open", why));
            }
            let page = file.first_page().map_err(|error| failed(&path, error))?;
            match SegmentHeader::decode(&page) {
                Ok(header) => segments.chain.push((header, file)),
                Err(NoHeader::Unused) if page.iter().all(|byte| *byte == 0) => {
                    segments.free.push(file);
                }
                Err(NoHeader::Unused) => segments.headless.push(file),
                Err(NoHeader::Version(version)) => {
                    let why = format!(
                        "{}: its version {version} is unknown here; use a newer program",
                        printable(&path)
                    );
                    return Err(Error::new(ErrorKind::Unsupported, "open", why));
                }
            }
        }
        segments.chain.sort_by_key(|(header, _)| header.number);
        Ok(segments)
    }
}

impl Drop for JournalDir {
    fn drop(&mut self) {
        // It is still locked.
        self.remove_door();
    }
}

impl crate::open::Journal for JournalDir {
    fn superblock(&self) -> Result<Option<Superblock>> {
        Ok(self.superblock)
    }

    fn prepare(&mut self, volume: VolumeId) -> Result<()> {
        self.make_journal()?;
        if self.superblock.is_none() {
            self.put(Superblock { volume, current: None, adopting: None })?;
        }
        let dir = journal_path(&self.path);
        sheave_durable::keep_spare(&dir).map_err(|error| {
            Error::from_io("make a spare file in", printable(&dir).to_string(), error)
        })
    }

    fn summary(&self) -> Result<Option<Summary>> {
        let Segments { chain, headless, .. } = self.segments()?;
        let mut summary = None;
        if let (Some((first, _)), Some((newest, _))) = (chain.first(), chain.last()) {
            let (first, committed) = (first.first, newest.committed);
            let mut last = Lsn(first.0.saturating_sub(1));
            // What is whole counts here, also in front of damage.
            let _ = replay::replay(&chain, None, (last, Lsn(0)), |record, _| last = record.lsn);
            summary = Some(Summary { committed, first, last });
        }
        let Some(Superblock { volume, .. }) = self.superblock else { return Ok(summary) };
        for file in &headless {
            let read = replay::read_headless(file, volume);
            let read = read.map_err(|error| {
                Error::from_io("read", printable(&self.path).to_string(), error)
            })?;
            let Some((first, last)) = read.records else { continue };
            let known = summary.get_or_insert(Summary { committed: Lsn(0), first, last });
            known.last = known.last.max(last);
        }
        Ok(summary)
    }

    fn adopt(
        &mut self,
        volume: VolumeId,
        current: Option<Opening>,
        opening: Opening,
    ) -> Result<Adopted> {
        self.make_journal()?;
        self.put(Superblock { volume, current, adopting: Some(opening) })?;
        Ok(Adopted { opening })
    }

    fn set_aside(&mut self) -> Result<PathBuf> {
        let failed = |error| Error::from_io("set aside", printable(&self.path).to_string(), error);
        let epoch = self.superblock.and_then(|superblock| superblock.current);
        let epoch = epoch.map_or(0, |opening| opening.epoch.0);
        let summary = self.summary()?;
        let range = summary
            .map_or_else(String::new, |Summary { first, last, .. }| format!("-lsn-{first}-{last}"));
        let name = |count| match count {
            0 => format!("epoch-{epoch}{range}.orphan"),
            _ => format!("epoch-{epoch}{range}.{count}.orphan"),
        };
        let paths = (0..u32::MAX).map(|count| self.path.join(name(count)));
        let mut free = paths.skip_while(|path| path.exists());
        let to = free.next().ok_or_else(|| failed(io::ErrorKind::AlreadyExists.into()))?;
        fs::rename(journal_path(&self.path), &to)
            .and_then(|()| sheave_durable::sync_parent(&to))
            .map_err(failed)?;
        self.superblock = None;
        Ok(to)
    }
}

/// The files of a journal.
#[derive(Default)]
struct Segments {
    /// Those that were used, in order.
    chain: Vec<(SegmentHeader, SegmentFile)>,
    /// Those whose header is torn or damaged.
    headless: Vec<SegmentFile>,
    free: Vec<SegmentFile>,
}

fn journal_path(path: &Path) -> PathBuf {
    path.join("journal")
}

fn superblock_path(path: &Path) -> PathBuf {
    journal_path(path).join("superblock")
}

/// Makes a directory that only its owner can read.
fn make_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}
