//! Object volumes: opening, and what is open in this process.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use sheave_core::{
    Backend, BlockSizes, Capabilities, Error, ErrorKind, Result, Volume, VolumeInfo,
};

use crate::BLOCK_BYTES;
use crate::backend::ObjectBackend;
use crate::cache::{CACHE_BYTES_DEFAULT, Cache};
use crate::checkpoint::Cadence;
use crate::cipher::VolumeKey;
use crate::door::{self, Command};
use crate::fetch::Cached;
use crate::format::Durability;
use crate::front::{Front, Limits};
use crate::gc::Cleaning;
use crate::ids::{Lsn, Opening, VolumeId};
use crate::journal::{JournalDir, JournalSize, Log, Recovered};
use crate::map::Map;
use crate::open::{self, Request};
use crate::retry::Requests;
use crate::status::Swept;
use crate::stored::{blocks_of, make_journals};
use crate::threads::Threads;
use crate::traffic::Traffic;
use crate::upload::{BATCH_BYTES_MAX, MAP_BYTES_DEFAULT};
use crate::worker::{self, Rouse};

/// How long an opening waits for the end of an earlier use of the volume in this process.
pub(crate) const CLOSING_TIMEOUT: Duration = Duration::from_secs(60);

/// Threads for the journal of a volume: for its sync, a new segment, and reads for the store.
const JOURNAL_THREADS_MAX: usize = 4;
/// Threads that make objects of what the journal has.
const BUILD_THREADS_MAX: usize = 2;
/// The most bytes that are fetched ahead of readings in a row: what sixteen requests get.
const AHEAD_BYTES_MAX: u64 = 64 << 20;

/// How a volume uses its node.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Room of the journal.
    pub journal: JournalSize,
    /// An object is made of so many bytes, at most 32 MiB.
    pub object_bytes: u64,
    /// Writes that no flush covers are synced after so long, and go to the bucket after twice as
    /// long.
    pub tick: Duration,
    /// The read cache of all volumes with journals in one directory may have so many bytes there,
    /// if this volume is the first one. 0: this volume has none.
    pub cache_bytes: u64,
    /// The map of the volume takes at most so many bytes of memory. What it needs of the map beyond
    /// that is read from the store.
    pub map_bytes: u64,
    /// When more is stored for 100 bytes that are needed, objects are cleaned.
    pub space_percent: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        let journal = JournalSize::default();
        Self {
            journal,
            object_bytes: 32 << 20,
            tick: Duration::from_secs(5),
            cache_bytes: CACHE_BYTES_DEFAULT,
            map_bytes: MAP_BYTES_DEFAULT,
            space_percent: Cleaning::DEFAULT.space_percent,
        }
    }
}

/// An open object volume. It is closed when it and its backends are dropped: a thread of this
/// process then writes to the bucket what that lacks, and [`close_all`] waits for it.
pub struct ObjectVolume {
    opened: Arc<Opened>,
    requests: Requests,
}

/// The use of an open volume.
pub(crate) struct Opened {
    pub(crate) engine: Arc<Engine>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.engine.with(Front::close);
    }
}

/// An open volume, as backends and the worker share it.
pub(crate) struct Engine {
    /// Where the volume is, for messages.
    pub(crate) name: Arc<str>,
    pub(crate) info: VolumeInfo,
    /// In bytes, as it is served.
    size: AtomicU64,
    /// As its root says.
    stored_size: AtomicU64,
    pub(crate) opening: Opening,
    /// What is asked of the store.
    pub(crate) traffic: Arc<Traffic>,
    pub(crate) swept: Swept,
    has_lost: AtomicBool,
    front: Mutex<Front>,
    pub(crate) rouse: Rouse,
    /// The journal's directory, until the volume is closed.
    pub(crate) journal: Mutex<Option<JournalDir>>,
    /// For calls that read, write or sync the journal.
    pub(crate) journal_threads: Arc<Threads>,
    /// For calls that make objects, which take many milliseconds.
    pub(crate) build_threads: Arc<Threads>,
    /// What shards read from, if there is a cache.
    pub(crate) cached: Option<Cached>,
    /// Whether the journal is encrypted.
    pub(crate) is_encrypted: bool,
    pub(crate) tuning: Tuning,
}

/// The volumes that are open in this process, or closing.
static OPEN: Mutex<Vec<Arc<Engine>>> = Mutex::new(Vec::new());
static HAS_CLOSED: Condvar = Condvar::new();

impl ObjectVolume {
    /// Opens the volume at the place that `name` says. Its journal is in a directory of its id
    /// below `journals`. Waits for the bucket and the disk.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when it is open, on this node or another one; [`ErrorKind::Corrupt`]
    /// when its objects or its journal are damaged; and those of the store and the disk.
    pub fn open(
        name: &str,
        requests: &Requests,
        request: &Request,
        journals: &Path,
        tuning: Tuning,
    ) -> Result<Self> {
        wait_for_closing(name)?;
        // Nothing is made for a volume that does not exist.
        let lock = |id: VolumeId| {
            make_journals(journals)?;
            JournalDir::open(&journal_dir(journals, id), tuning.journal)
        };
        let opened = crate::threads::block_on(open::open(requests, request, lock))?;
        let open::Opened { mut journal, volume: id, size, opening, mut map, committed, .. } =
            opened;
        let (upload, mut fetcher, key) = (opened.upload, opened.fetcher, opened.key);
        let durability = opened.durability;
        if durability == Durability::Unsafe {
            tracing::warn!("{name}: flushes wait for nothing (durability unsafe)");
        }
        map.keep_within(tuning.map_bytes);
        let (space_percent, move_bytes) = (tuning.space_percent, tuning.object_bytes);
        let cleaning = Cleaning { space_percent, move_bytes: move_bytes.min(BATCH_BYTES_MAX) };
        let cadence = Cadence { cleaning, ..Cadence::of_bytes(tuning.map_bytes) };
        let upload = upload.with_cadence(cadence);
        let recovered = journal.recover((id, key.as_ref()), committed.lsn)?;
        journal.settle(opening)?;
        let traffic = Arc::clone(requests.traffic());
        if let Some(cache) = Cache::in_dir(journals, tuning.cache_bytes) {
            let history = cache.history(id, opened.before, opening);
            fetcher = fetcher.with_cache(cache, history);
        }
        let engine = Engine::new(
            name,
            (id, opening),
            (info(id), size * BLOCK_BYTES),
            Parts {
                journal: Some(journal),
                recovered,
                map,
                committed: committed.lsn,
                traffic,
                cached: fetcher.cached(),
                key,
                tuning,
                durability,
            },
        )?;
        worker::start(&engine, upload, fetcher)?;
        open_volumes().push(Arc::clone(&engine));
        Ok(Self { opened: Arc::new(Opened { engine }), requests: requests.clone() })
    }
}

impl ObjectVolume {
    /// Asks for something, as another process does by its door, and waits for the outcome.
    ///
    /// # Errors
    /// Those of the command.
    pub(crate) fn ask(&self, command: &Command) -> Result<Value> {
        let engine = &self.opened.engine;
        crate::threads::block_on(door::obey(engine, &self.requests, command.clone()))
    }
}

impl Volume for ObjectVolume {
    fn info(&self) -> &VolumeInfo {
        &self.opened.engine.info
    }

    fn size(&self) -> u64 {
        self.opened.engine.size.load(Relaxed)
    }

    fn grow(&self) -> Result<u64> {
        let engine = &self.opened.engine;
        let size = engine.stored_size.load(Relaxed);
        Ok(size.max(engine.size.fetch_max(size, Relaxed)))
    }

    fn extend(&self, size: u64) -> Result<()> {
        if self.info().read_only {
            let why = "a snapshot has the size that it had";
            return Err(self.requests.error(ErrorKind::Unsupported, "resize", "", why));
        }
        let blocks = blocks_of(&self.requests, size)?;
        self.ask(&Command::Resize { blocks }).map(drop)
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        Ok(Box::new(ObjectBackend::new(Arc::clone(&self.opened))))
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        &[]
    }

    fn has_lost_data_itself(&self) -> bool {
        self.opened.engine.has_lost.load(Relaxed)
    }
}

/// What an engine is made of.
pub(crate) struct Parts {
    /// A snapshot has none.
    pub(crate) journal: Option<JournalDir>,
    pub(crate) recovered: Recovered,
    pub(crate) map: Map,
    pub(crate) committed: Lsn,
    pub(crate) traffic: Arc<Traffic>,
    pub(crate) cached: Option<Cached>,
    /// Of an encrypted volume.
    pub(crate) key: Option<VolumeKey>,
    pub(crate) tuning: Tuning,
    pub(crate) durability: Durability,
}

impl Engine {
    /// An open volume that no worker works for yet.
    pub(crate) fn new(
        name: &str,
        (volume, opening): (VolumeId, Opening),
        (info, size): (VolumeInfo, u64),
        parts: Parts,
    ) -> Result<Arc<Self>> {
        let Parts { journal, mut recovered, map, committed, traffic, cached, key, tuning, .. } =
            parts;
        let is_encrypted = key.is_some();
        let records = std::mem::take(&mut recovered.records);
        let log = Log::new((volume, key), opening, committed, recovered, worker::salts()?);
        let seal_bytes = tuning.object_bytes.min(BATCH_BYTES_MAX);
        let cache_bytes = cached.as_ref().map_or(0, |cached| cached.chunks.cache().bytes_max());
        let limits = Limits {
            seal_bytes,
            segments_max: journal.as_ref().map_or(0, JournalDir::segments_max),
            // What is fetched ahead is on probation in the cache until it is read.
            ahead_blocks_max: AHEAD_BYTES_MAX.min(cache_bytes / 32) / BLOCK_BYTES,
        };
        let name: Arc<str> = name.into();
        Ok(Arc::new(Self {
            info,
            size: size.into(),
            stored_size: size.into(),
            opening,
            traffic,
            swept: Swept::default(),
            has_lost: AtomicBool::new(false),
            front: Mutex::new(Front::new(
                Arc::clone(&name),
                (limits, parts.durability),
                map,
                (log, &records),
            )),
            rouse: Rouse::default(),
            journal: Mutex::new(journal),
            journal_threads: Threads::new("object-journal", JOURNAL_THREADS_MAX),
            build_threads: Threads::new("object-build", BUILD_THREADS_MAX),
            name,
            cached,
            is_encrypted,
            tuning,
        }))
    }

    /// Does something with the state, and then what comes of it.
    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut Front) -> T) -> T {
        // Released programs abort on a panic; in others it is the test that has failed.
        let mut front = self.front.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = act(&mut front);
        let effects = std::mem::take(&mut front.effects);
        if front.has_lost() {
            self.has_lost.store(true, Relaxed);
        }
        drop(front);
        effects.wakes.into_iter().for_each(std::task::Waker::wake);
        if effects.rouse {
            self.rouse.rouse();
        }
        answer
    }

    /// Its root says that it has so many bytes.
    pub(crate) fn has_grown(&self, size: u64) {
        self.stored_size.fetch_max(size, Relaxed);
    }

    /// The volume's directory on this node, as long as it is open.
    pub(crate) fn dir(&self) -> Option<PathBuf> {
        let journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        journal.as_ref().map(|journal| journal.path().to_owned())
    }

    /// The volume is closed, or given up: another opening may begin.
    pub(crate) fn ended(self: &Arc<Self>) {
        self.with(Front::shut);
        self.journal.lock().unwrap_or_else(PoisonError::into_inner).take();
        open_volumes().retain(|other| !Arc::ptr_eq(self, other));
        HAS_CLOSED.notify_all();
    }
}

/// Closes all volumes of this process, and waits until the buckets have everything, for `within` at
/// most. Returns the names of volumes that are not there yet, with the bytes that their buckets
/// lack, which stay safe in the journals of this node.
pub fn close_all(within: Duration) -> Vec<(String, u64)> {
    // Not with the list locked: a volume may end by this.
    let engines = open_volumes().clone();
    engines.iter().for_each(|engine| engine.with(Front::close));
    finish_closing(within)
}

/// As [`close_all`], but leaves those open that are still in use, as a killed process does: a
/// successor of this process goes on with them at once.
pub fn finish_closing(within: Duration) -> Vec<(String, u64)> {
    let until = Instant::now() + within;
    let is_closing = |engine: &&Arc<Engine>| engine.with(|front| front.is_closing());
    let mut open = open_volumes();
    while open.iter().any(|engine| is_closing(&engine))
        && let Some(left) = until.checked_duration_since(Instant::now())
    {
        open = HAS_CLOSED.wait_timeout(open, left).unwrap_or_else(PoisonError::into_inner).0;
    }
    let left: Vec<_> = open.iter().filter(is_closing).cloned().collect();
    drop(open);
    let lag = |engine: &Arc<Engine>| engine.with(|front| front.lag_bytes());
    left.iter().map(|engine| (engine.name.to_string(), lag(engine))).collect()
}

/// Waits until an earlier use of the volume has ended.
fn wait_for_closing(name: &str) -> Result<()> {
    let until = Instant::now() + CLOSING_TIMEOUT;
    let mut open = open_volumes();
    while let Some(engine) = open.iter().find(|engine| *engine.name == *name).cloned() {
        let busy = |why: &str| Err(Error::new(ErrorKind::Busy, "open", format!("{name}: {why}")));
        drop(open);
        if !engine.with(|front| front.is_closing()) {
            return busy("this process has it open already; use its export");
        }
        drop(engine);
        let Some(left) = until.checked_duration_since(Instant::now()) else {
            return busy("this process is still writing it to its store; try again later");
        };
        let poll = left.min(Duration::from_millis(100));
        open = open_volumes();
        open = HAS_CLOSED.wait_timeout(open, poll).unwrap_or_else(PoisonError::into_inner).0;
    }
    Ok(())
}

/// The directory of a volume on this node.
fn journal_dir(journals: &Path, id: VolumeId) -> PathBuf {
    journals.join(id.to_string())
}

pub(crate) fn info(id: VolumeId) -> VolumeInfo {
    VolumeInfo {
        block: BlockSizes {
            minimum: BLOCK_BYTES as u32,
            logical: 512,
            preferred: BLOCK_BYTES as u32,
            maximum_payload: 32 << 20,
        },
        read_only: false,
        rotational: false,
        volatile: false,
        identity: Some(id.to_string()),
        can: Capabilities { cache: false, ..Capabilities::ALL },
    }
}

pub(crate) fn open_volumes() -> MutexGuard<'static, Vec<Arc<Engine>>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) use snapshot::{Census, census, find_snapshot, identity as snapshot_identity};

mod snapshot;

#[cfg(test)]
mod cache_tests;
#[cfg(test)]
mod tests;
