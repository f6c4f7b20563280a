//! Reads committed blocks from log objects.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use bytes::Bytes;
use sheave_core::{Error, ErrorKind, Result};

use crate::cache::{CHUNK_BYTES, Cache, Found};
use crate::chunks::{self, Chunks, REQUEST_CHUNKS};
use crate::extents::Span;
use crate::format::{LeafRef, ObjectId, Run, RunPart, Wrong, decode_leaf, keys};
use crate::ids::{BLOCK_BYTES, Blocks, Lba, Place, Seq};
use crate::lineage::Lineage;
use crate::map::Leaf;
use crate::retry::{Listener, Patience, Requests};
use crate::sources::Sources;
use crate::store::StoreError;

/// Reads from the objects of a volume. Clones share what is under way.
#[derive(Clone, Debug)]
pub struct Fetcher {
    sources: Sources,
    lineage: Arc<Lineage>,
    chunks: Option<Arc<Chunks>>,
}

impl Fetcher {
    /// One for the objects of these epochs. It waits for a store that is away, as writes do: a
    /// device that waits is better than one that fails.
    #[must_use]
    pub fn new(sources: &Sources, lineage: Lineage) -> Self {
        let volume = sources.own().name().to_owned();
        let log = Arc::new(Log { volume, is_away: AtomicBool::new(false) });
        let of = |requests: &Requests| {
            requests.with_patience(Patience::Endless).heard_by(Arc::clone(&log) as _)
        };
        Self::of_command(&sources.with(of), lineage)
    }

    /// One that waits as long as the requests do.
    pub(crate) fn of_command(sources: &Sources, lineage: Lineage) -> Self {
        Self { sources: sources.clone(), lineage: lineage.into(), chunks: None }
    }

    /// What of which object has blocks; `None` if they are zeroes.
    pub(crate) fn part_of(&self, place: Place, blocks: Blocks) -> Option<(ObjectId, RunPart)> {
        part_of(&self.lineage, place, blocks)
    }

    /// Bytes of an object, unchecked; `None` if there is no object.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) async fn stored(
        &self,
        object: ObjectId,
        bytes: Range<u64>,
    ) -> Result<Option<Bytes>> {
        let (requests, _) = self.sources.of(object.seq);
        requests.get(&keys::log(object.epoch, object.seq), bytes).await
    }

    /// Checks the frames of blocks that begin at an address.
    ///
    /// # Errors
    /// What is wrong with one.
    pub(crate) fn verify(
        &self,
        (object, part): (ObjectId, RunPart),
        lba: Lba,
        stored: &[u8],
    ) -> Result<(), Wrong> {
        self.decode((object, part), lba, stored).map(drop)
    }

    /// Takes blocks that begin at an address out of their frames, which are checked.
    ///
    /// # Errors
    /// What is wrong with one.
    pub(crate) fn decode(
        &self,
        (object, part): (ObjectId, RunPart),
        lba: Lba,
        stored: &[u8],
    ) -> Result<Vec<u8>, Wrong> {
        self.sources.reader(object).read(part, lba, stored)
    }

    /// The name of an object that is committed.
    pub(crate) fn object_of(&self, seq: Seq) -> ObjectId {
        let epoch = self.lineage.epoch_of(seq);
        ObjectId { epoch: epoch.expect("a map has objects of known epochs only"), seq }
    }

    /// The requests for the volume's own objects.
    pub(crate) fn requests(&self) -> &Requests {
        self.sources.own()
    }

    /// The same with a cache, for a volume of that history.
    pub(crate) fn with_cache(self, cache: Arc<Cache>, history: u64) -> Self {
        Self { chunks: Some(Chunks::new(cache, history)), ..self }
    }

    /// What a backend needs to read from the cache itself.
    pub(crate) fn cached(&self) -> Option<Cached> {
        let chunks = Arc::clone(self.chunks.as_ref()?);
        let (sources, lineage) = (self.sources.clone(), Arc::clone(&self.lineage));
        Some(Cached { chunks, sources, lineage })
    }

    /// The blocks from an address on, which are at a place. They are checked.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when an object is missing or damaged, and those of the store.
    pub fn fetch(
        &self,
        lba: Lba,
        blocks: Blocks,
        place: Place,
    ) -> impl Future<Output = Result<Vec<u8>>> + Send + 'static {
        let fetcher = self.clone();
        async move {
            match part_of(&fetcher.lineage, place, blocks) {
                None => Ok(vec![0; (blocks * BLOCK_BYTES) as usize]),
                Some((object, part)) => fetcher.fetch_part(lba, part, object).await,
            }
        }
    }

    /// The blocks of a span that a leaf knows.
    ///
    /// # Errors
    /// As for [`Fetcher::fetch`].
    pub fn fetch_by(
        &self,
        leaf: Arc<Leaf>,
        span: Span,
    ) -> impl Future<Output = Result<Vec<u8>>> + Send + 'static {
        let fetcher = self.clone();
        async move {
            let mut data = vec![0; span.bytes() as usize];
            let runs: Vec<_> = leaf.within(span).collect();
            for Run { span: part, place } in runs {
                let some = fetcher.fetch(Lba(part.start), part.blocks, place).await?;
                let at = ((part.start - span.start) * BLOCK_BYTES) as usize;
                data[at..at + some.len()].copy_from_slice(&some);
            }
            Ok(data)
        }
    }

    /// A leaf of the map.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when it is missing or damaged, and those of the store.
    pub fn load(&self, leaf: LeafRef) -> impl Future<Output = Result<Arc<Leaf>>> + Send + 'static {
        let fetcher = self.clone();
        async move {
            let LeafRef { number, place } = leaf;
            let epoch = fetcher.lineage.epoch_of(place.seq);
            let epoch = epoch.expect("a map has objects of known epochs only");
            let object = ObjectId { epoch, seq: place.seq };
            let key = keys::log(epoch, place.seq);
            let (requests, _) = fetcher.sources.of(place.seq);
            let damaged = |why: &str| {
                let why = format!("{why}; it has a part of the map of the volume");
                requests.error(ErrorKind::Corrupt, "read", &key, &why)
            };
            let begin = u64::from(place.at);
            let bytes = begin..begin + u64::from(place.bytes);
            let decode = |stored: &[u8]| {
                decode_leaf(fetcher.sources.reader(object), (number, place.at), stored)
            };
            let runs = fetcher.get(object, bytes, decode, damaged).await?;
            Ok(Arc::new(Leaf::new(number, &runs)))
        }
    }

    async fn fetch_part(&self, lba: Lba, part: RunPart, object: ObjectId) -> Result<Vec<u8>> {
        let key = keys::log(object.epoch, object.seq);
        let (requests, _) = self.sources.of(object.seq);
        let damaged = |why: &str| {
            let why = format!("{why} (block {lba}); the data is lost unless a copy of it exists");
            requests.error(ErrorKind::Corrupt, "read", &key, &why)
        };
        let decode = |stored: &[u8]| self.sources.reader(object).read(part, lba, stored);
        self.get(object, part.bytes(), decode, damaged).await
    }

    /// What a range of an object has, from the cache or the store. `decode` checks it; what is
    /// damaged in the cache is read from the store.
    async fn get<T>(
        &self,
        object: ObjectId,
        range: Range<u64>,
        decode: impl Fn(&[u8]) -> Result<T, Wrong>,
        damaged: impl Fn(&str) -> Error,
    ) -> Result<T> {
        let missing = || damaged("the object is missing");
        let (requests, _) = self.sources.of(object.seq);
        if let Some(chunks) = &self.chunks {
            let (stored, is_cached) = chunks.get(requests, object, range.clone()).await?;
            match decode(&stored.ok_or_else(missing)?) {
                Err(_) if is_cached => chunks.forget(object, &range),
                decoded => return decoded.map_err(|wrong| damaged(&wrong.to_string())),
            }
        }
        let key = keys::log(object.epoch, object.seq);
        let stored = requests.get(&key, range).await?;
        decode(&stored.ok_or_else(missing)?).map_err(|wrong| damaged(&wrong.to_string()))
    }

    /// Requests that get blocks into the cache which may be read soon.
    pub(crate) fn fetch_ahead(
        &self,
        pieces: &[(Span, Place)],
    ) -> Vec<impl Future<Output = ()> + Send + 'static> {
        let Some(chunks) = &self.chunks else { return Vec::new() };
        // Pieces that follow one another in an object are got together.
        let mut runs = Vec::<(ObjectId, Range<u32>)>::new();
        for (span, place) in pieces {
            let Some((object, part)) = part_of(&self.lineage, *place, span.blocks) else {
                continue;
            };
            let indexes = chunks::indexes(&part.bytes());
            match runs.last_mut() {
                Some((of, run))
                    if *of == object && (run.start..=run.end).contains(&indexes.start) =>
                {
                    run.end = run.end.max(indexes.end);
                }
                _ => runs.push((object, indexes)),
            }
        }
        let mut out = Vec::new();
        for (object, indexes) in runs {
            let (requests, _) = self.sources.of(object.seq);
            let mut begin = indexes.start;
            while begin < indexes.end {
                // At multiples, so that two runs of an object do not cut it in small pieces.
                let end = (begin + 1).next_multiple_of(REQUEST_CHUNKS).min(indexes.end);
                out.push(Arc::clone(chunks).get_ahead(requests.clone(), object, begin..end));
                begin = end;
            }
        }
        out
    }
}

/// What of which object has blocks; `None` if they are zeroes.
fn part_of(lineage: &Lineage, place: Place, blocks: Blocks) -> Option<(ObjectId, RunPart)> {
    let Place::Object { seq, frame, form, skip, run } = place else { return None };
    let blocks = u32::try_from(blocks).ok().filter(|blocks| *blocks <= run - skip);
    let blocks = blocks.expect("a map's piece is within its run");
    let epoch = lineage.epoch_of(seq).expect("a map has objects of known epochs only");
    Some((ObjectId { epoch, seq }, RunPart { frame, form, run, skip, blocks }))
}

/// The cache, as a backend sees it.
#[derive(Clone, Debug)]
pub(crate) struct Cached {
    pub(crate) chunks: Arc<Chunks>,
    sources: Sources,
    lineage: Arc<Lineage>,
}

/// Blocks that follow one another at a place.
#[derive(Debug)]
pub(crate) struct CachedRun {
    pub(crate) part: RunPart,
    pub(crate) object: ObjectId,
    /// The chunks that have them; none if one of them is not in the cache.
    pub(crate) found: Vec<Found>,
}

impl Cached {
    /// The runs of blocks at a place that the cache has, and of those that it does not have.
    pub(crate) fn runs(&self, place: Place, blocks: Blocks) -> Vec<CachedRun> {
        let mut runs = Vec::<CachedRun>::new();
        let Some((object, part)) = part_of(&self.lineage, place, blocks) else { return runs };
        let indexes = chunks::indexes(&part.bytes());
        let found: Vec<_> =
            indexes.clone().map(|index| self.find(object, index, &part.bytes())).collect();
        for piece in part.frames() {
            let of_frame = chunks::indexes(&piece.bytes());
            let [begin, end] = [of_frame.start, of_frame.end].map(|at| at - indexes.start);
            let of_frame = &found[begin as usize..end as usize];
            let is_cached = of_frame.iter().all(Option::is_some);
            let last = runs.last_mut().filter(|run| run.found.is_empty() != is_cached);
            let run = match last {
                Some(run) => {
                    run.part.blocks += piece.blocks;
                    run
                }
                None => {
                    runs.push(CachedRun { part: piece, object, found: Vec::new() });
                    let Some(run) = runs.last_mut() else { continue };
                    run
                }
            };
            for found in of_frame.iter().flatten().filter(|_| is_cached) {
                if run.found.last() != Some(found) {
                    run.found.push(*found);
                }
            }
        }
        runs
    }

    /// Finds a chunk for a reading of these bytes.
    fn find(&self, object: ObjectId, index: u32, bytes: &Range<u64>) -> Option<Found> {
        let begin = u64::from(index) * CHUNK_BYTES;
        let cache = self.chunks.cache();
        let key = self.chunks.key(object, index);
        let skip = bytes.start.saturating_sub(begin);
        let end = (bytes.end - begin).min(CHUNK_BYTES);
        // The end of a block is no reading of the chunk in which the next block begins.
        let found = match skip == 0 && end < BLOCK_BYTES {
            true => cache.has(&key),
            false => cache.find(&key, skip),
        };
        found.filter(|found| end <= found.len())
    }

    /// Takes the chunks of a run out of the cache, if they are there: they are of no use.
    pub(crate) fn forget(&self, run: &CachedRun) {
        run.found.iter().for_each(|found| self.chunks.cache().remove(found));
    }

    /// Takes the blocks of a run that was read from the cache out of their frames, if all is as it
    /// was stored. `copy_out` copies that many bytes from there on, `take` gets the blocks of each.
    pub(crate) fn decode(
        &self,
        run: &CachedRun,
        lba: Lba,
        mut copy_out: impl FnMut(usize, &mut [u8]),
        mut take: impl FnMut(usize, &[u8]),
    ) -> bool {
        let cache = self.chunks.cache();
        if !run.found.iter().all(|found| cache.is_still(found)) {
            return false;
        }
        let begin = run.part.bytes().start;
        let mut reader = self.sources.reader(run.object);
        let mut frame = Vec::new();
        for piece in run.part.frames() {
            let bytes = piece.bytes();
            frame.resize((bytes.end - bytes.start) as usize, 0);
            copy_out((bytes.start - begin) as usize, &mut frame);
            let before = piece.skip - run.part.skip;
            let at = before as usize * BLOCK_BYTES as usize;
            let lba = Lba(lba.0 + u64::from(before));
            if reader.read_frame(piece, lba, &frame, |blocks| take(at, blocks)).is_err() {
                return false;
            }
        }
        true
    }
}

/// Says in the log when reads begin to wait for the store, and when they go on.
struct Log {
    volume: String,
    is_away: AtomicBool,
}

impl Listener for Log {
    fn store_says(&self, error: Option<&StoreError>) {
        if self.is_away.swap(error.is_some(), Relaxed) == error.is_some() {
            return;
        }
        match error {
            Some(why) => tracing::warn!(volume = &*self.volume, "reads wait for the store: {why}"),
            None => tracing::info!(volume = &*self.volume, "reads go on"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::clock::Clock;
    use crate::format::{Form, Reach};
    use crate::ids::{Epoch, VolumeId};
    use crate::store::{Answer, Created, Listed, Store, StoreErrorKind};
    use crate::threads::block_on;

    /// A store that is away for some time, and then has no object.
    #[derive(Debug)]
    struct Away(Arc<Hours>);

    /// Time that passes when something sleeps.
    #[derive(Debug, Default)]
    struct Hours(AtomicU64);

    impl Clock for Hours {
        fn now_ms(&self) -> u64 {
            self.0.load(Relaxed)
        }

        fn sleep(&self, ms: u64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
            self.0.fetch_add(ms, Relaxed);
            Box::pin(async {})
        }
    }

    impl Store for Away {
        fn create<'a>(&'a self, _: &'a str, _: Bytes) -> Answer<'a, Created> {
            unreachable!("a read makes nothing")
        }

        fn get<'a>(&'a self, _: &'a str, _: Range<u64>) -> Answer<'a, Bytes> {
            let kind = match self.0.now_ms() {
                0..300_000 => StoreErrorKind::Busy,
                300_000..600_000 => StoreErrorKind::Denied,
                _ => StoreErrorKind::NotFound,
            };
            Box::pin(async move { Err(StoreError::new(kind, "away")) })
        }

        fn list<'a>(&'a self, _: &'a str, _: &'a str, _: usize) -> Answer<'a, Vec<Listed>> {
            unreachable!("a read lists nothing")
        }

        fn delete<'a>(&'a self, _: &'a str) -> Answer<'a, ()> {
            unreachable!("a read deletes nothing")
        }
    }

    #[test]
    fn a_read_waits_for_a_store_that_is_away() {
        let clock = Arc::<Hours>::default();
        let requests = Requests::new(Arc::new(Away(Arc::clone(&clock))), clock.clone(), "v");
        let lineage = Lineage::default().with(Reach { epoch: Epoch(1), first: Seq(1) });
        let sources = Sources::of_volume(&requests, VolumeId([1; 16]));
        let fetcher = Fetcher::new(&sources, lineage);
        let (seq, form) = (Seq(1), Form::Plain);
        let place = Place::Object { seq, frame: 128, form, skip: 0, run: 1 };
        let error = block_on(fetcher.fetch(Lba(0), 1, place)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(clock.now_ms() >= 600_000);
    }
}
