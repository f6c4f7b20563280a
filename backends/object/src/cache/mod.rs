//! The read cache: a file with chunks of log objects, as they are stored.
//!
//! All volumes of the process that keep their journals in one directory share one file there. It
//! has no name and is empty at every start: what has been read or written can be read again, and a
//! file that nothing can open twice needs no format, no lock and no check of whose it is.
//!
//! Nothing that it has is believed. A reader looks after its reading whether the slot still has the
//! chunk, and checks every frame by its own checksum. Whatever is wrong is a miss.

mod set;

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::fstatvfs;
use sheave_core::printable;

use crate::format::ObjectId;
use crate::ids::{Opening, VolumeId};
use crate::threads::Threads;
use set::{Set, Use};

/// Bytes of a chunk; the last one of an object may be shorter.
pub(crate) const CHUNK_BYTES: u64 = 64 << 10;
/// The most bytes of the file, if nothing else is said.
pub const CACHE_BYTES_DEFAULT: u64 = 10 << 30;
/// Parts of the index with locks of their own.
const SETS: usize = 16;
/// The cache leaves so much of the file system free: a sixteenth of it, within these bounds.
const SPARE_PART: u64 = 16;
const SPARE_BYTES_MIN: u64 = 64 << 20;
const SPARE_BYTES_MAX: u64 = 4 << 30;
/// It looks how much is free after so many chunks.
const LOOK_CHUNKS: u64 = 256;
/// Threads for calls that wait for the file's disk.
const THREADS_MAX: usize = 4;
/// Volumes whose histories are known; with more, all are forgotten.
const HISTORIES_MAX: usize = 64 << 10;

/// The name of a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ChunkKey {
    /// See [`Cache::history`].
    pub(crate) history: u64,
    pub(crate) object: ObjectId,
    pub(crate) index: u32,
}

impl ChunkKey {
    fn hash(&self) -> u64 {
        let object = self.object;
        let numbers = [self.history, object.epoch.0, object.seq.0, u64::from(self.index)];
        numbers.iter().fold(0, |hash: u64, number| {
            let mixed = (hash.rotate_left(23) ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed ^ (mixed >> 29)
        })
    }
}

/// A chunk that has been found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    set: usize,
    of: Use,
}

impl Found {
    /// Where it is in the file.
    pub(crate) fn at(&self) -> u64 {
        (u64::from(self.of.slot) * SETS as u64 + self.set as u64) * CHUNK_BYTES
    }

    pub(crate) fn len(&self) -> u64 {
        u64::from(self.of.len)
    }
}

/// What the caches of this process have done and have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheStats {
    /// Readings of chunks that were there.
    pub hits: u64,
    /// Readings of chunks that were not.
    pub misses: u64,
    /// Chunks that have made room for others.
    pub evictions: u64,
    /// Bytes of chunks that are there.
    pub bytes: u64,
}

/// A cache. All of its functions but [`Cache::insert`] and [`Cache::read`] are short.
#[derive(Debug)]
pub(crate) struct Cache {
    dir: PathBuf,
    bytes_max: u64,
    file: Arc<File>,
    sets: [Mutex<Set>; SETS],
    hits: AtomicU64,
    misses: AtomicU64,
    inserted: AtomicU64,
    may_grow: AtomicBool,
    /// The file has failed.
    is_off: AtomicBool,
    histories: Mutex<Histories>,
    /// For what waits for the disk.
    pub(crate) threads: Arc<Threads>,
}

#[derive(Debug, Default)]
struct Histories {
    last: u64,
    /// By volume: the last opening in this process, and what is in the cache by then.
    by_volume: HashMap<VolumeId, (Opening, u64)>,
}

/// The caches of this process, which end with the last volume that uses them.
static CACHES: Mutex<Vec<Weak<Cache>>> = Mutex::new(Vec::new());

impl Cache {
    /// The cache in a directory, of so many bytes if there is none yet. `None` for no bytes, or if
    /// it cannot be made: volumes work without it.
    pub(crate) fn in_dir(dir: &Path, bytes_max: u64) -> Option<Arc<Self>> {
        let slots = usize::try_from(bytes_max / CHUNK_BYTES).ok()? / SETS;
        if slots == 0 {
            return None;
        }
        let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        let mut caches = lock(&CACHES);
        caches.retain(|cache| cache.strong_count() > 0);
        let mut known = caches.iter().filter_map(Weak::upgrade);
        if let Some(cache) = known.find(|cache| cache.dir == dir) {
            return Some(cache);
        }
        drop(known);
        let made = Self::make(dir, bytes_max, slots)?;
        caches.push(Arc::downgrade(&made));
        Some(made)
    }

    fn make(dir: PathBuf, bytes_max: u64, slots: usize) -> Option<Arc<Self>> {
        let file = match unnamed_file(&dir) {
            Ok(file) => Arc::new(file),
            Err(error) => {
                let dir = printable(&dir);
                tracing::warn!("{dir}: there is no read cache, since a file fails: {error}");
                return None;
            }
        };
        Some(Arc::new(Self {
            dir,
            bytes_max,
            file,
            sets: std::array::from_fn(|_| Mutex::new(Set::new(slots))),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            inserted: AtomicU64::new(0),
            may_grow: AtomicBool::new(false),
            is_off: AtomicBool::new(false),
            histories: Mutex::default(),
            threads: Threads::new("object-cache", THREADS_MAX),
        }))
    }

    /// The file, for readings of what was found.
    pub(crate) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// The most bytes of its chunks.
    pub(crate) fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// A number for the objects of a volume which is opened now, and whose last opening before was
    /// `before`. It is the one of the last opening in this process, if that was `before`.
    ///
    /// Otherwise it is a new one. The bucket may be an older state or a copy of the one that this
    /// process knew, with other objects of the same volume, epoch and number.
    pub(crate) fn history(&self, volume: VolumeId, before: Opening, opening: Opening) -> u64 {
        let mut histories = lock(&self.histories);
        let known = histories.by_volume.get(&volume).filter(|(last, _)| *last == before);
        let history = match known {
            Some((_, history)) => *history,
            None => {
                histories.last += 1;
                histories.last
            }
        };
        if histories.by_volume.len() >= HISTORIES_MAX {
            histories.by_volume.clear();
        }
        histories.by_volume.insert(volume, (opening, history));
        history
    }

    /// Finds a chunk, a reading of which begins at that byte of it.
    pub(crate) fn find(&self, key: &ChunkKey, skip: u64) -> Option<Found> {
        let found = self.look(key, Some((skip * 16 / CHUNK_BYTES) as u32));
        let counter = if found.is_some() { &self.hits } else { &self.misses };
        counter.fetch_add(1, Relaxed);
        found
    }

    /// Finds a chunk that is not read now.
    pub(crate) fn has(&self, key: &ChunkKey) -> Option<Found> {
        self.look(key, None)
    }

    fn look(&self, key: &ChunkKey, sixteenth: Option<u32>) -> Option<Found> {
        let set = set_of(key);
        lock(&self.sets[set]).find(key, sixteenth).map(|of| Found { set, of })
    }

    /// Whether the slot that was found has had the chunk all the time since.
    pub(crate) fn is_still(&self, found: &Found) -> bool {
        lock(&self.sets[found.set]).is_still(found.of)
    }

    /// Takes a chunk out, which is damaged.
    pub(crate) fn remove(&self, found: &Found) {
        lock(&self.sets[found.set]).remove(found.of);
    }

    /// Reads a chunk that was found; `None` if it is gone. Waits for the disk.
    pub(crate) fn read(&self, found: &Found) -> Option<Vec<u8>> {
        let mut bytes = vec![0; found.len() as usize];
        let read = self.file.read_exact_at(&mut bytes, found.at());
        (read.is_ok() && self.is_still(found)).then_some(bytes)
    }

    /// Adds a chunk, if there is room. Waits for the disk.
    pub(crate) fn insert(&self, key: ChunkKey, bytes: &[u8]) {
        if self.is_off.load(Relaxed) || bytes.is_empty() || bytes.len() as u64 > CHUNK_BYTES {
            return;
        }
        if self.inserted.fetch_add(1, Relaxed).is_multiple_of(LOOK_CHUNKS) {
            self.may_grow.store(self.has_space(), Relaxed);
        }
        let (set, may_grow) = (set_of(&key), self.may_grow.load(Relaxed));
        let reserved = lock(&self.sets[set]).reserve(key, bytes.len() as u32, may_grow);
        let Some(of) = reserved else { return };
        let written = self.file.write_all_at(bytes, Found { set, of }.at());
        lock(&self.sets[set]).filled(of, written.is_ok());
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::StorageFull => drop(self.give_way()),
            Err(error) if self.is_off.swap(true, Relaxed) => drop(error),
            Err(error) => {
                let dir = printable(&self.dir);
                tracing::warn!("{dir}: the read cache is given up, since its file fails: {error}");
                self.shrink(|_| 0);
            }
        }
    }

    /// Gives half of its room back: the journal needs it. False if it has none.
    pub(crate) fn give_way(&self) -> bool {
        self.may_grow.store(false, Relaxed);
        self.shrink(|slots| slots / 2)
    }

    /// Leaves each part that many of its slots. False if none had any.
    fn shrink(&self, slots_of: impl Fn(usize) -> usize) -> bool {
        let (mut had, mut most) = (0, 0);
        for set in &self.sets {
            let mut set = lock(set);
            had = set.slots().max(had);
            let slots = slots_of(set.slots());
            set.shrink(slots);
            most = slots.max(most);
        }
        // What is written there at the same time is no more than some chunks.
        let cut = self.file.set_len((most * SETS) as u64 * CHUNK_BYTES);
        if let Err(error) = cut {
            tracing::debug!(%error, "the read cache keeps its room");
        }
        had > 0
    }

    fn has_space(&self) -> bool {
        let Ok(stat) = fstatvfs(&*self.file) else { return false };
        let [all, free] = [stat.f_blocks, stat.f_bavail].map(|blocks| blocks * stat.f_frsize);
        free > (all / SPARE_PART).clamp(SPARE_BYTES_MIN, SPARE_BYTES_MAX)
    }

    pub(crate) fn stats(&self) -> CacheStats {
        let (hits, misses) = (self.hits.load(Relaxed), self.misses.load(Relaxed));
        let mut stats = CacheStats { hits, misses, evictions: 0, bytes: 0 };
        for set in &self.sets {
            let set = lock(set);
            stats.bytes += set.bytes;
            stats.evictions += set.evictions;
        }
        stats
    }
}

/// What the caches of this process have done and have; `None` if there is none. Those of volumes
/// that are closed are gone.
#[must_use]
pub fn cache_stats() -> Option<CacheStats> {
    let caches: Vec<_> = lock(&CACHES).iter().filter_map(Weak::upgrade).collect();
    caches.iter().map(|cache| cache.stats()).reduce(|sum, of| CacheStats {
        hits: sum.hits + of.hits,
        misses: sum.misses + of.misses,
        evictions: sum.evictions + of.evictions,
        bytes: sum.bytes + of.bytes,
    })
}

fn set_of(key: &ChunkKey) -> usize {
    // Other bits than those by which the index finds it.
    (key.hash() >> 40) as usize % SETS
}

/// A new file without a name. Of a name that a killed process has left, the file has no bytes.
fn unnamed_file(dir: &Path) -> io::Result<File> {
    let path = dir.join(format!("cache-{}", process::id()));
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
