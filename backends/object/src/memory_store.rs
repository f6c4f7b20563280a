//! A store in memory, with faults, for tests. It runs on a seeded executor: each request waits for
//! some turns, and may fail, do its work without an answer, or do it at any later time.

use std::collections::BTreeMap;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};

use bytes::Bytes;

use crate::clock::Clock;
use crate::format::keys::ROOTS;
use crate::store::{Answer, Created, Listed, Store, StoreError, StoreErrorKind};

/// Random numbers of a seed (splitmix64).
#[derive(Debug)]
pub(crate) struct Random(AtomicU64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    pub(crate) fn next(&self) -> u64 {
        let state = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed);
        let mut mixed = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&self, end: u64) -> u64 {
        self.next() % end
    }

    /// Whether an event of this probability, in percent, happens.
    pub(crate) fn percent(&self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn bytes(&self) -> [u8; 16] {
        (u128::from(self.next()) << 64 | u128::from(self.next())).to_le_bytes()
    }
}

/// How often requests go wrong, in percent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// Of changes: no answer, and it happens later or never.
    pub(crate) late: u64,
    /// Of changes: it happens, and the answer is lost.
    pub(crate) unanswered: u64,
    /// Of all: it does not happen.
    pub(crate) busy: u64,
}

/// A store in memory.
#[derive(Debug)]
pub(crate) struct MemoryStore {
    inner: Mutex<Inner>,
    pub(crate) random: Arc<Random>,
    faults: Faults,
}

/// Requests of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) creates: u64,
    pub(crate) gets: u64,
    pub(crate) lists: u64,
    pub(crate) deletes: u64,
}

#[derive(Debug, Default)]
struct Inner {
    objects: BTreeMap<String, Bytes>,
    /// Roots that are deleted.
    old_roots: BTreeMap<String, Bytes>,
    late: Vec<Change>,
    counts: Counts,
    has_deleted: bool,
}

#[derive(Debug)]
enum Change {
    Create(String, Bytes),
    Delete(String),
}

impl MemoryStore {
    pub(crate) fn new(random: Arc<Random>, faults: Faults) -> Self {
        Self { inner: Mutex::default(), random, faults }
    }

    /// Lets one of the late changes happen, if there is one.
    pub(crate) fn land_one(&self) {
        let mut inner = self.inner();
        if inner.late.is_empty() {
            return;
        }
        let at = self.random.below(inner.late.len() as u64) as usize;
        let change = inner.late.swap_remove(at);
        inner.apply(change);
    }

    /// The requests since it was last asked.
    pub(crate) fn take_counts(&self) -> Counts {
        std::mem::take(&mut self.inner().counts)
    }

    /// All roots that were ever made.
    pub(crate) fn roots_ever(&self) -> Vec<Bytes> {
        let inner = self.inner();
        let roots = inner.objects.range(ROOTS.to_owned()..);
        let roots = roots.take_while(|(key, _)| key.starts_with(ROOTS));
        roots.chain(&inner.old_roots).map(|(_, body)| body.clone()).collect()
    }

    /// Whether something was deleted since it was last asked.
    pub(crate) fn take_deleted(&self) -> bool {
        std::mem::take(&mut self.inner().has_deleted)
    }

    pub(crate) fn object(&self, key: &str) -> Option<Bytes> {
        self.inner().objects.get(key).cloned()
    }

    pub(crate) fn keys(&self) -> Vec<String> {
        self.inner().objects.keys().cloned().collect()
    }

    /// Changes what is stored, against all rules.
    pub(crate) fn put(&self, key: &str, body: Option<Bytes>) {
        match body {
            Some(body) => self.inner().objects.insert(key.to_owned(), body),
            None => self.inner().objects.remove(key),
        };
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no test panics with the lock")
    }

    async fn turns(&self) {
        for _ in 0..self.random.below(4) {
            yield_now().await;
        }
    }

    fn busy() -> StoreError {
        StoreError::new(StoreErrorKind::Busy, "no answer")
    }

    async fn change(&self, change: Change) -> Result<Created, StoreError> {
        self.turns().await;
        let Faults { late, unanswered, busy } = self.faults;
        let outcome = self.random.below(100);
        if outcome < late {
            self.inner().late.push(change);
            return Err(Self::busy());
        }
        if outcome < late + busy {
            return Err(Self::busy());
        }
        let made = self.inner().apply(change);
        self.turns().await;
        match outcome < late + busy + unanswered {
            true => Err(Self::busy()),
            false => Ok(made),
        }
    }

    async fn look<T>(
        &self,
        look: impl FnOnce(&Inner) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.turns().await;
        if self.random.percent(self.faults.busy) {
            return Err(Self::busy());
        }
        let found = look(&self.inner());
        self.turns().await;
        found
    }
}

impl Inner {
    fn get(&self, key: &str, range: &Range<u64>) -> Result<Bytes, StoreError> {
        let found = self.objects.get(key);
        let found = found.ok_or_else(|| StoreError::new(StoreErrorKind::NotFound, key))?;
        let end = (range.end as usize).min(found.len());
        Ok(found.slice((range.start as usize).min(end)..end))
    }

    fn list(&self, prefix: &str, after: &str, max: usize) -> Vec<Listed> {
        let found = self.objects.iter();
        let found = found.filter(|(key, _)| key.starts_with(prefix) && key.as_str() > after);
        let listed =
            |(key, body): (&String, &Bytes)| Listed { key: key.clone(), bytes: body.len() as u64 };
        found.map(listed).take(max).collect()
    }

    fn apply(&mut self, change: Change) -> Created {
        match change {
            Change::Create(key, _) if self.objects.contains_key(&key) => return Created::Exists,
            Change::Create(key, body) => self.objects.insert(key, body),
            Change::Delete(key) => {
                let body = self.objects.remove(&key);
                self.has_deleted |= body.is_some();
                if key.starts_with(ROOTS) {
                    self.old_roots.extend(body.clone().map(|body| (key, body)));
                }
                body
            }
        };
        Created::Made
    }
}

impl Store for MemoryStore {
    fn create<'a>(&'a self, key: &'a str, body: Bytes) -> Answer<'a, Created> {
        self.inner().counts.creates += 1;
        Box::pin(self.change(Change::Create(key.to_owned(), body)))
    }

    fn get<'a>(&'a self, key: &'a str, range: Range<u64>) -> Answer<'a, Bytes> {
        self.inner().counts.gets += 1;
        Box::pin(self.look(move |inner| inner.get(key, &range)))
    }

    fn list<'a>(&'a self, prefix: &'a str, after: &'a str, max: usize) -> Answer<'a, Vec<Listed>> {
        self.inner().counts.lists += 1;
        Box::pin(self.look(move |inner| Ok(inner.list(prefix, after, max))))
    }

    fn delete<'a>(&'a self, key: &'a str) -> Answer<'a, ()> {
        self.inner().counts.deletes += 1;
        Box::pin(async move { self.change(Change::Delete(key.to_owned())).await.map(drop) })
    }
}

/// The same objects, without faults and turns.
#[derive(Debug)]
pub(crate) struct Still(pub(crate) Arc<MemoryStore>);

impl Store for Still {
    fn create<'a>(&'a self, _: &'a str, _: Bytes) -> Answer<'a, Created> {
        unreachable!("it is only read")
    }

    fn get<'a>(&'a self, key: &'a str, range: Range<u64>) -> Answer<'a, Bytes> {
        let found = self.0.inner().get(key, &range);
        Box::pin(async move { found })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: &'a str, max: usize) -> Answer<'a, Vec<Listed>> {
        let found = self.0.inner().list(prefix, after, max);
        Box::pin(async move { Ok(found) })
    }

    fn delete<'a>(&'a self, _: &'a str) -> Answer<'a, ()> {
        unreachable!("it is only read")
    }
}

/// The objects of one of several volumes in a memory.
#[derive(Clone, Debug)]
pub(crate) struct Below {
    pub(crate) store: Arc<MemoryStore>,
    /// It has no slash.
    pub(crate) name: String,
}

impl Below {
    fn key(&self, key: &str) -> String {
        format!("{}/{key}", self.name)
    }
}

impl Store for Below {
    fn create<'a>(&'a self, key: &'a str, body: Bytes) -> Answer<'a, Created> {
        Box::pin(async move { self.store.create(&self.key(key), body).await })
    }

    fn get<'a>(&'a self, key: &'a str, range: Range<u64>) -> Answer<'a, Bytes> {
        Box::pin(async move { self.store.get(&self.key(key), range).await })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: &'a str, max: usize) -> Answer<'a, Vec<Listed>> {
        Box::pin(async move {
            let mut found = self.store.list(&self.key(prefix), &self.key(after), max).await?;
            for listed in &mut found {
                listed.key = listed.key.split_off(self.name.len() + 1);
            }
            Ok(found)
        })
    }

    fn delete<'a>(&'a self, key: &'a str) -> Answer<'a, ()> {
        Box::pin(async move { self.store.delete(&self.key(key)).await })
    }

    fn sibling(&self, name: &str) -> Option<Arc<dyn Store>> {
        Some(Arc::new(Self { name: name.to_owned(), ..self.clone() }))
    }
}

/// Time that passes by turns.
#[derive(Debug, Default)]
pub(crate) struct TurnClock;

impl Clock for TurnClock {
    fn now_ms(&self) -> u64 {
        0
    }

    fn sleep(&self, _: u64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(yield_now())
    }
}

/// Ends at the next turn of its task.
pub(crate) async fn yield_now() {
    struct Yield(bool);
    impl Future for Yield {
        type Output = ();

        fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            cx.waker().wake_by_ref();
            match std::mem::replace(&mut self.0, true) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        }
    }
    Yield(false).await;
}
