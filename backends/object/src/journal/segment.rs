//! The files of a journal's segments.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use rustix::fs::{Advice, fadvise};
use sheave_core::{Error, ErrorKind, Result, printable};

use super::place;
use super::replay::Pages;
use crate::cipher::{TAG_BYTES, VolumeKey};
use crate::format::page::{PAGE_BYTES, Page};
use crate::format::record::Check;
use crate::format::segment::{Seed, SegmentHeader};

/// Zeroes are written in pieces of this many bytes.
const ZEROES_BYTES: usize = 1 << 20;

/// A file of a fixed length, which serves as one segment after another.
#[derive(Debug)]
pub(crate) struct SegmentFile {
    /// Through which shards write and sync.
    pub(crate) file: Arc<File>,
    /// Through which the worker does. The kernel reports a failed write-back once to each open
    /// description, so that two that sync at the same time do not share one.
    pub(crate) worker: Arc<File>,
    /// Its length.
    pub(crate) pages: u32,
}

impl SegmentFile {
    /// Makes one of zeroes, on stable storage. A file that grows when it is written, or that was
    /// only allocated, makes every sync slower.
    ///
    /// # Errors
    /// Errors of the file system; nothing is left then.
    pub(super) fn create(path: &Path, bytes: u64) -> Result<Self> {
        let unfinished = path.with_extension(sheave_durable::UNFINISHED);
        let make = || {
            let mut options = OpenOptions::new();
            let options = options.create(true).truncate(true).write(true).mode(0o600);
            let file = options.open(&unfinished)?;
            let zeroes = vec![0; ZEROES_BYTES];
            let mut at = 0;
            while at < bytes {
                let len = (bytes - at).min(zeroes.len() as u64);
                file.write_all_at(&zeroes[..len as usize], at)?;
                at += len;
            }
            file.sync_all()?;
            fs::rename(&unfinished, path)?;
            sheave_durable::sync_parent(path)
        };
        make().map_err(|error| {
            // It is of no use, and takes room that others may need.
            let _ = fs::remove_file(&unfinished);
            Error::from_io("make a segment", printable(&path).to_string(), error)
        })?;
        Self::open(path)
    }

    /// Opens one, when the last write that a killed process has begun is done.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when that takes too long, and errors of the file system.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let failed = |error| Error::from_io("open", printable(&path).to_string(), error);
        let open = || OpenOptions::new().read(true).write(true).open(path).map_err(failed);
        let (file, worker) = (open()?, open()?);
        place::wait_for_guards(&file, path)?;
        place::guard(&file, path)?;
        place::guard(&worker, path)?;
        let bytes = file.metadata().map_err(failed)?.len();
        let pages = u32::try_from(bytes / PAGE_BYTES as u64).unwrap_or(u32::MAX);
        Ok(Self { file: Arc::new(file), worker: Arc::new(worker), pages })
    }

    /// Its first page.
    ///
    /// # Errors
    /// Errors of the file system.
    pub(super) fn first_page(&self) -> io::Result<Page> {
        let mut page = [0; PAGE_BYTES];
        self.worker.read_exact_at(&mut page, 0)?;
        Ok(page)
    }

    /// Makes everything durable that is in it, also what another process has written.
    ///
    /// # Errors
    /// Errors of the file system.
    pub(super) fn sync(&self) -> io::Result<()> {
        #[cfg(test)]
        super::tests::note_sync(&self.worker);
        self.worker.sync_data()
    }

    /// Has the next read come from the disk. Only of a file that is synced.
    ///
    /// # Errors
    /// Errors of the system.
    pub(super) fn forget(&self) -> io::Result<()> {
        fadvise(&*self.worker, 0, None, Advice::DontNeed)?;
        Ok(())
    }

    /// Makes it a file that no segment uses.
    ///
    /// # Errors
    /// Errors of the file system.
    pub(super) fn clear(&self) -> io::Result<()> {
        self.worker.write_all_at(&[0; PAGE_BYTES], 0)?;
        self.sync()
    }
}

impl Pages for SegmentFile {
    fn pages(&self) -> u32 {
        self.pages
    }

    fn read(&self, page: u32, into: &mut [u8]) -> io::Result<()> {
        self.worker.read_exact_at(into, u64::from(page) * PAGE_BYTES as u64)
    }
}

/// A segment, for as long as its file serves as this one.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) file: SegmentFile,
    pub(crate) header: SegmentHeader,
    pub(crate) seed: Seed,
    /// By page: the CRC-32 of the block in it, if it has one; and its tag, if it is encrypted.
    crcs: Box<[AtomicU32]>,
    tags: Box<[[AtomicU64; 2]]>,
}

impl Segment {
    /// Of a volume with that key.
    pub(crate) fn new(
        file: SegmentFile,
        header: SegmentHeader,
        key: Option<&VolumeKey>,
    ) -> Arc<Self> {
        let seed = header.seed(key);
        let crcs = (0..file.pages).map(|_| AtomicU32::new(0)).collect();
        let tags = if seed.is_sealed() { file.pages } else { 0 };
        let tags = (0..tags).map(|_| Default::default()).collect();
        Arc::new(Self { file, header, seed, crcs, tags })
    }

    /// Notes by what the blocks behind the record at that page are checked.
    pub(crate) fn note_checks(&self, record: u32, checks: &[Check]) {
        for (page, check) in (record as usize + 1..).zip(checks) {
            self.crcs[page].store(check.crc, Relaxed);
            if let Some(halves) = self.tags.get(page) {
                let (tag, _) = check.tag.as_chunks();
                for (into, half) in halves.iter().zip(tag) {
                    into.store(u64::from_le_bytes(*half), Relaxed);
                }
            }
        }
    }

    /// Checks the bytes in a page, and decrypts them. `None` if they are not what was written.
    #[must_use]
    pub(crate) fn open(&self, page: u32, block: &mut Page) -> Option<()> {
        let mut tag = [0; TAG_BYTES];
        if let Some(halves) = self.tags.get(page as usize) {
            let (into, _) = tag.as_chunks_mut();
            for (into, half) in into.iter_mut().zip(halves) {
                *into = half.load(Relaxed).to_le_bytes();
            }
        }
        if self.crcs[page as usize].load(Relaxed) != crc32fast::hash(block) {
            return None;
        }
        if self.seed.is_sealed() {
            let stored = *block;
            self.seed.open(page, &[], (&stored, &tag), block)?;
        }
        Some(())
    }

    /// Encrypts a block that goes to a page, if it is to be. Returns what it is checked by.
    pub(crate) fn seal(&self, page: u32, block: &mut Page) -> Check {
        let tag = self.seed.seal(page, &[], block).unwrap_or_default();
        Check { crc: crc32fast::hash(block), tag }
    }

    /// Appends some blocks, checked. Their record is not needed for that. May wait for the disk.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when they fail their check, and errors of the file system.
    pub(crate) fn read_blocks(&self, page: u32, blocks: u64, into: &mut Vec<u8>) -> Result<()> {
        let number = self.header.number;
        let begin = into.len();
        into.resize(begin + blocks as usize * PAGE_BYTES, 0);
        let into = &mut into[begin..];
        Pages::read(&self.file, page, into).map_err(|error| {
            Error::from_io("read", format!("journal segment {number}, page {page}"), error)
        })?;
        let (blocks, _): (&mut [Page], _) = into.as_chunks_mut();
        for (page, block) in (page..).zip(blocks) {
            self.open(page, block).ok_or_else(|| {
                let why = format!(
                    "journal segment {number}, page {page}: the data is damaged; look at its disk"
                );
                Error::new(ErrorKind::Corrupt, "read", why)
            })?;
        }
        Ok(())
    }
}

/// Whether blocks have these checksums.
pub(super) fn are_whole(blocks: &[u8], checks: &[Check]) -> bool {
    let mut of_blocks = blocks.chunks(PAGE_BYTES).map(crc32fast::hash);
    checks.iter().all(|check| of_blocks.next() == Some(check.crc))
}
