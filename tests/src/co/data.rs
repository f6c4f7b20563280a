//! What the programs of pods write, and what must be there afterwards.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::claim::Use;
use crate::pattern;

/// Bytes of one write.
const BLOCK: usize = 4096;
/// Blocks that each pod writes, again and again.
const SLOTS: u64 = 64;
/// Regions of a raw volume; a writer has one. Of files, the last ones are looked at.
const REGIONS: usize = 16;
/// Between two writes, so that a small machine has time for other work.
const PAUSE: Duration = Duration::from_millis(3);
const MARKER: &str = "born";
/// How long a test that fails waits for a program whose device may not be served any more.
const DROP_TIMEOUT: Duration = Duration::from_secs(10);

/// All that was flushed on a volume.
pub(super) struct Content {
    /// Differs for each volume.
    seed: u64,
    /// The volume was used, so it has its marker.
    born: bool,
    /// Writers so far.
    writers: Vec<Written>,
}

/// What a writer has written.
struct Written {
    name: String,
    /// Blocks that it has flushed.
    blocks: Arc<AtomicU64>,
    has_ended: bool,
}

/// A program that writes and flushes without an end.
pub(super) struct Writer {
    name: String,
    ended: Arc<AtomicBool>,
    blocks: Arc<AtomicU64>,
    longest_us: Arc<AtomicU64>,
    /// Until it is waited for.
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Content {
    pub(super) fn new(name: &str) -> Self {
        let bytes = name.bytes().fold(0_u64, |sum, byte| sum.wrapping_mul(257) + u64::from(byte));
        Self { seed: bytes | 1, born: false, writers: Vec::new() }
    }

    fn block(&self, writer: usize, block: u64) -> Vec<u8> {
        pattern(BLOCK, self.seed ^ ((writer as u64 + 1) << 32) ^ (block << 1))
    }

    /// Checks that all is there at a place, or writes the marker of a new volume.
    ///
    /// # Panics
    /// When something is missing: it was formatted anew, or lost what was flushed.
    #[track_caller]
    pub(super) fn check(&mut self, used: Use, target: &Path) {
        match used {
            Use::Filesystem(_) => self.check_files(target),
            Use::Block => self.check_device(target),
        }
    }

    #[track_caller]
    fn check_files(&mut self, target: &Path) {
        let marker = target.join(MARKER);
        let what = target.display();
        if !self.born {
            assert!(!marker.exists(), "{what}: a new volume has the files of another");
            let mut file = File::create(&marker).expect("a marker");
            file.write_all(&self.seed.to_be_bytes())
                .and_then(|()| file.sync_all())
                .expect("a marker");
            File::open(target).and_then(|dir| dir.sync_all()).expect("its directory");
            self.born = true;
            return;
        }
        let found = fs::read(&marker).unwrap_or_else(|error| panic!("{what}: its marker: {error}"));
        assert_eq!(found, self.seed.to_be_bytes(), "{what}: the files of another volume");
        let first = self.writers.len().saturating_sub(REGIONS);
        for (index, written) in self.writers.iter().enumerate().skip(first) {
            let Written { name, blocks, has_ended } = written;
            let blocks = blocks.load(Acquire);
            // A program that has begun just now may not have made its file yet.
            if blocks == 0 && !has_ended {
                continue;
            }
            let file =
                File::open(target.join(name)).unwrap_or_else(|e| panic!("{what}/{name}: {e}"));
            // One that runs overwrites its blocks meanwhile.
            let first = if *has_ended { blocks.saturating_sub(SLOTS) } else { blocks };
            for block in first..blocks {
                let mut found = vec![0; BLOCK];
                let read = file.read_exact_at(&mut found, block % SLOTS * BLOCK as u64);
                read.unwrap_or_else(|error| panic!("{what}/{name}: {error}"));
                assert!(found == self.block(index, block), "{what}/{name}: block {block} is lost");
            }
        }
    }

    #[track_caller]
    fn check_device(&mut self, target: &Path) {
        let what = target.display();
        let device = OpenOptions::new().read(true).write(true).open(target).expect("the device");
        let marker = pattern(BLOCK, self.seed);
        if !self.born {
            device.write_all_at(&marker, 0).and_then(|()| device.sync_all()).expect("a marker");
            self.born = true;
            return;
        }
        let mut found = vec![0; BLOCK];
        device.read_exact_at(&mut found, 0).expect("read");
        assert!(found == marker, "{what}: its marker is lost");
        // Earlier ones had the regions of later ones.
        let first = self.writers.len().saturating_sub(REGIONS);
        let ended = |(_, written): &(usize, &Written)| written.has_ended;
        for (index, written) in self.writers.iter().enumerate().skip(first).filter(ended) {
            let blocks = written.blocks.load(Acquire);
            for block in blocks.saturating_sub(SLOTS)..blocks {
                device.read_exact_at(&mut found, place(index, block)).expect("read");
                assert!(found == self.block(index, block), "{what}: block {block} is lost");
            }
        }
    }

    /// Starts a program at a place that was checked.
    pub(super) fn start(&mut self, used: Use, target: &Path, pod: &str) -> Writer {
        let index = self.writers.len();
        let (ended, blocks) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (name, flushed) = (pod.to_owned(), Arc::clone(&blocks));
        self.writers.push(Written { name, blocks: flushed, has_ended: false });
        let longest_us = Arc::<AtomicU64>::default();
        let shared = (Arc::clone(&ended), Arc::clone(&blocks), Arc::clone(&longest_us));
        let path = match used {
            Use::Filesystem(_) => target.join(pod),
            Use::Block => target.to_owned(),
        };
        let seed = Self { seed: self.seed, born: true, writers: Vec::new() };
        let thread = thread::spawn(move || {
            let (ended, blocks, longest_us) = shared;
            let open = |path: PathBuf| match used {
                Use::Filesystem(_) => File::create(path),
                Use::Block => OpenOptions::new().write(true).open(path),
            };
            let file = open(path)?;
            for block in 0.. {
                if ended.load(Relaxed) {
                    break;
                }
                let (data, begun) = (seed.block(index, block), Instant::now());
                let at = match used {
                    Use::Filesystem(_) => block % SLOTS * BLOCK as u64,
                    Use::Block => place(index, block),
                };
                file.write_all_at(&data, at)?;
                file.sync_data()?;
                longest_us.fetch_max(begun.elapsed().as_micros() as u64, Relaxed);
                blocks.fetch_add(1, Release);
                thread::sleep(PAUSE);
            }
            file.sync_all()
        });
        Writer { name: pod.to_owned(), ended, blocks, longest_us, thread: Some(thread) }
    }

    /// Ends a program, and returns how long its longest write took.
    ///
    /// # Panics
    /// When it had an error.
    #[track_caller]
    pub(super) fn end(&mut self, mut writer: Writer) -> Duration {
        writer.ended.store(true, Relaxed);
        let thread = writer.thread.take().expect("it was not waited for");
        let ended = thread.join().expect("no panic");
        let done = writer.blocks.load(Acquire);
        let longest = Duration::from_micros(writer.longest_us.load(Relaxed));
        ended.unwrap_or_else(|error| panic!("{}: block {done}: {error}", writer.name));
        let found = self.writers.iter_mut().find(|written| written.name == writer.name);
        found.expect("a writer of this volume").has_ended = true;
        longest
    }
}

impl Drop for Writer {
    /// Ends it with a test that fails, while its device is still served. Where no daemon serves the
    /// device any more, waiting without an end would hide why the test failed.
    fn drop(&mut self) {
        self.ended.store(true, Relaxed);
        let Some(thread) = self.thread.take() else { return };
        let begun = Instant::now();
        while !thread.is_finished() && begun.elapsed() < DROP_TIMEOUT {
            thread::sleep(PAUSE);
        }
    }
}

/// Where a writer's block is on a raw volume: behind the marker, in the writer's region.
fn place(writer: usize, block: u64) -> u64 {
    (1 + (writer % REGIONS) as u64 * SLOTS + block % SLOTS) * BLOCK as u64
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    /// Whether a volume passes whose only writer has no file.
    fn passes(blocks: u64, has_ended: bool) -> bool {
        let dir = tempfile::tempdir().expect("a directory");
        let used = Use::Filesystem("ext4");
        let mut content = Content::new("a");
        content.check(used, dir.path());
        let blocks = Arc::new(AtomicU64::new(blocks));
        content.writers.push(Written { name: "pod".to_owned(), blocks, has_ended });
        catch_unwind(AssertUnwindSafe(|| content.check(used, dir.path()))).is_ok()
    }

    #[test]
    fn a_file_is_missed_once_its_writer_has_flushed_or_ended() {
        assert!(passes(0, false), "a writer that has just begun has no file yet");
        assert!(!passes(1, false) && !passes(0, true) && !passes(1, true));
    }
}
