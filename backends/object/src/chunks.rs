//! Gets bytes of log objects, in chunks: from the cache, or from the store, where several that want
//! the same chunk wait for one request.

use std::collections::HashMap;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use bytes::Bytes;
use sheave_core::{Error, ErrorKind, Result};

use crate::cache::{CHUNK_BYTES, Cache, ChunkKey, Found};
use crate::format::{ObjectId, keys};
use crate::gate::Gate;
use crate::retry::Requests;
use crate::together::{all, boxed};

/// A request gets at most so many chunks: 4 MiB.
pub(crate) const REQUEST_CHUNKS: u32 = 64;
/// Requests under way for readings that wait, and for such as may come. Both beside those of the
/// uploads, so that a reading waits for none of them.
const URGENT_MAX: usize = 16;
const AHEAD_MAX: usize = 16;
/// Bytes on their way to the cache's file, in this process. What was read is not kept beyond that.
const KEPT_BYTES_MAX: u64 = 64 << 20;

static KEPT_BYTES: AtomicU64 = AtomicU64::new(0);

/// The chunks of the objects of an open volume.
#[derive(Debug)]
pub(crate) struct Chunks {
    cache: Arc<Cache>,
    history: u64,
    under_way: Mutex<HashMap<(ObjectId, u32), Place>>,
    urgent: Gate,
    ahead: Gate,
}

/// Where a chunk will be.
#[derive(Clone, Debug)]
struct Place {
    flight: Arc<Flight>,
    /// The chunk by which the flight begins.
    first: u32,
}

/// Bytes that will come, or come not.
#[derive(Debug, Default)]
struct Flight(Mutex<Landing>);

#[derive(Debug, Default)]
struct Landing {
    /// `None` in it: there is no such object.
    outcome: Option<Result<Option<Bytes>>>,
    waiting: Vec<Waker>,
}

impl Flight {
    fn land(&self, outcome: Result<Option<Bytes>>) {
        let mut landing = lock(&self.0);
        landing.outcome.get_or_insert(outcome);
        let waiting = std::mem::take(&mut landing.waiting);
        drop(landing);
        waiting.into_iter().for_each(Waker::wake);
    }

    async fn landed(&self) -> Result<Option<Bytes>> {
        poll_fn(|cx| {
            let mut landing = lock(&self.0);
            match &landing.outcome {
                Some(outcome) => Poll::Ready(outcome.clone()),
                None => {
                    landing.waiting.push(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

/// Chunks that one request gets.
struct Request {
    chunks: Arc<Chunks>,
    object: ObjectId,
    indexes: Range<u32>,
    flight: Arc<Flight>,
}

impl Drop for Request {
    fn drop(&mut self) {
        let why = "the reading was given up, as the volume is being closed; open it again";
        self.flight.land(Err(Error::new(ErrorKind::Shutdown, "read", why)));
        let mut under_way = lock(&self.chunks.under_way);
        self.indexes.clone().for_each(|index| drop(under_way.remove(&(self.object, index))));
    }
}

/// How one chunk comes.
enum Way {
    Cached(Found),
    UnderWay(Place),
}

impl Chunks {
    /// Those of a volume's history: see [`Cache::history`].
    pub(crate) fn new(cache: Arc<Cache>, history: u64) -> Arc<Self> {
        let [urgent, ahead] = [URGENT_MAX, AHEAD_MAX].map(Gate::new);
        Arc::new(Self { cache, history, under_way: Mutex::default(), urgent, ahead })
    }

    /// Their cache.
    pub(crate) fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    pub(crate) fn key(&self, object: ObjectId, index: u32) -> ChunkKey {
        ChunkKey { history: self.history, object, index }
    }

    /// Gets bytes of an object, fewer if it ends before; `None` if there is no object. True: some
    /// of them were in the cache.
    pub(crate) async fn get(
        self: &Arc<Self>,
        requests: &Requests,
        object: ObjectId,
        range: Range<u64>,
    ) -> Result<(Option<Bytes>, bool)> {
        let (ways, own) = self.ways(object, indexes(&range));
        all(own.into_iter().map(|own| boxed(own.run(requests, Some(&self.urgent)))).collect())
            .await;
        if let Some(Way::UnderWay(place)) = ways.first()
            && ways.iter().all(|way| way.is_of(place))
        {
            let begin = u64::from(place.first) * CHUNK_BYTES;
            let landed = place.flight.landed().await?;
            let wanted = range.start - begin..range.end - begin;
            return Ok((landed.map(|bytes| part(&bytes, wanted)), false));
        }
        let is_cached = ways.iter().any(|way| matches!(way, Way::Cached(_)));
        let mut out = Vec::with_capacity((range.end - range.start) as usize);
        for (index, way) in indexes(&range).zip(&ways) {
            let Some(chunk) = self.arrived(requests, (object, index), way).await? else {
                return Ok((None, is_cached));
            };
            let begin = u64::from(index) * CHUNK_BYTES;
            let end = (range.end - begin).min(CHUNK_BYTES);
            out.extend_from_slice(&part(&chunk, range.start.max(begin) - begin..end));
        }
        Ok((Some(out.into()), is_cached))
    }

    /// Takes bytes of an object out of the cache, which are damaged there.
    pub(crate) fn forget(&self, object: ObjectId, range: &Range<u64>) {
        let found = indexes(range).filter_map(|index| self.cache.has(&self.key(object, index)));
        found.for_each(|found| self.cache.remove(&found));
    }

    /// Waits for a chunk.
    async fn arrived(
        &self,
        requests: &Requests,
        (object, index): (ObjectId, u32),
        way: &Way,
    ) -> Result<Option<Bytes>> {
        match way {
            Way::UnderWay(Place { flight, first }) => {
                let skip = u64::from(index - first) * CHUNK_BYTES;
                let landed = flight.landed().await?;
                Ok(landed.map(|bytes| part(&bytes, skip..skip + CHUNK_BYTES)))
            }
            Way::Cached(found) => {
                let (cache, found) = (Arc::clone(&self.cache), *found);
                // If it cannot be read, it has gone in this moment, or the file is cut off.
                if let Some(bytes) = self.cache.threads.run(move || cache.read(&found)).await {
                    return Ok(Some(bytes.into()));
                }
                self.cache.remove(&found);
                let begin = u64::from(index) * CHUNK_BYTES;
                let _permit = self.urgent.enter().await;
                let key = keys::log(object.epoch, object.seq);
                requests.get(&key, begin..begin + CHUNK_BYTES).await
            }
        }
    }

    /// Gets chunks that are not there into the cache.
    pub(crate) async fn get_ahead(
        self: Arc<Self>,
        requests: Requests,
        object: ObjectId,
        indexes: Range<u32>,
    ) {
        let _permit = self.ahead.enter().await;
        // Only now: a reading that needs one of them has not waited for this turn.
        let (_, own) = self.ways(object, indexes);
        for request in own {
            request.run(&requests, None).await;
        }
    }

    /// How chunks come, and the requests that are to be made for this.
    fn ways(self: &Arc<Self>, object: ObjectId, indexes: Range<u32>) -> (Vec<Way>, Vec<Request>) {
        let (mut ways, mut own) = (Vec::new(), Vec::<Request>::new());
        let mut under_way = lock(&self.under_way);
        for index in indexes {
            if let Some(place) = under_way.get(&(object, index)) {
                ways.push(Way::UnderWay(place.clone()));
                continue;
            }
            if let Some(found) = self.cache.has(&self.key(object, index)) {
                ways.push(Way::Cached(found));
                continue;
            }
            let continues = |request: &&mut Request| {
                request.indexes.end == index && request.indexes.len() < REQUEST_CHUNKS as usize
            };
            let request = match own.last_mut().filter(continues) {
                Some(_) => own.last_mut(),
                None => {
                    let (chunks, flight) = (Arc::clone(self), Arc::default());
                    own.push(Request { chunks, object, indexes: index..index, flight });
                    own.last_mut()
                }
            };
            let Some(request) = request else { continue };
            request.indexes.end += 1;
            let flight = Arc::clone(&request.flight);
            let place = Place { flight, first: request.indexes.start };
            under_way.insert((object, index), place.clone());
            ways.push(Way::UnderWay(place));
        }
        (ways, own)
    }

    /// Writes bytes of an object, from a chunk on, to the cache's file. Waits for the disk.
    pub(crate) fn keep(&self, object: ObjectId, first: u32, bytes: &[u8]) {
        for (index, chunk) in (first..).zip(bytes.chunks(CHUNK_BYTES as usize)) {
            self.cache.insert(self.key(object, index), chunk);
        }
    }
}

impl Request {
    /// Gets the chunks, which then go to the cache; what waits for them goes on before. With a
    /// gate it is urgent: it passes there, and does not wait for the cache.
    async fn run(self, requests: &Requests, gate: Option<&Gate>) {
        let Self { object, .. } = self;
        let (begin, end) = (u64::from(self.indexes.start), u64::from(self.indexes.end));
        let key = keys::log(object.epoch, object.seq);
        let permit = match gate {
            Some(gate) => Some(gate.enter().await),
            None => None,
        };
        let outcome = requests.get(&key, begin * CHUNK_BYTES..end * CHUNK_BYTES).await;
        drop(permit);
        self.flight.land(outcome.clone());
        let Ok(Some(bytes)) = outcome else { return };
        let len = bytes.len() as u64;
        let before = KEPT_BYTES.fetch_add(len, Relaxed);
        if before + len > KEPT_BYTES_MAX && gate.is_some() {
            KEPT_BYTES.fetch_sub(len, Relaxed);
            return;
        }
        // Readings find the chunks under way until they are in the cache.
        let threads = Arc::clone(&self.chunks.cache().threads);
        let keeping = threads.run(move || {
            self.chunks.keep(self.object, self.indexes.start, &bytes);
            KEPT_BYTES.fetch_sub(len, Relaxed);
        });
        if gate.is_none() {
            keeping.await;
        }
    }
}

impl Way {
    /// Whether it is in the same flight.
    fn is_of(&self, place: &Place) -> bool {
        matches!(self, Self::UnderWay(other) if Arc::ptr_eq(&other.flight, &place.flight))
    }
}

/// The chunks that have a range.
pub(crate) fn indexes(range: &Range<u64>) -> Range<u32> {
    let [begin, end] = [range.start / CHUNK_BYTES, range.end.div_ceil(CHUNK_BYTES)];
    begin as u32..end as u32
}

/// A part of bytes that may end before.
fn part(bytes: &Bytes, range: Range<u64>) -> Bytes {
    let end = (range.end as usize).min(bytes.len());
    bytes.slice((range.start as usize).min(end)..end)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
