//! The requests of a volume to its store: how many there were, and how long some have waited.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use slab::Slab;

/// What is asked of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestKind {
    Create,
    Get,
    List,
    Delete,
}

/// Requests of one kind. A request that is tried again counts again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestCounts {
    /// Those that the store has answered as it should.
    pub answered: u64,
    /// Those that have failed, or were refused for now.
    pub failed: u64,
    /// Bytes of objects that were sent or received.
    pub bytes: u64,
}

/// The requests of a volume, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestsByKind {
    /// Objects that were to be made.
    pub create: RequestCounts,
    /// Parts of objects that were read.
    pub get: RequestCounts,
    /// Listings of names.
    pub list: RequestCounts,
    /// Objects that were to be deleted.
    pub delete: RequestCounts,
}

/// Counts the requests of a volume.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    counts: [Counts; 4],
    waiting: Mutex<Slab<Waiting>>,
}

#[derive(Debug, Default)]
struct Counts {
    answered: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
}

/// A request without its final answer.
#[derive(Debug)]
struct Waiting {
    /// When it was made, by the volume's clock.
    begun_ms: u64,
    /// When its last try was made, if that is not answered.
    tried_ms: Option<u64>,
}

/// A request that is counted until this is dropped.
pub(crate) struct Asked {
    traffic: Arc<Traffic>,
    key: usize,
}

impl Traffic {
    /// Notes a request.
    pub(crate) fn ask(self: &Arc<Self>, now_ms: u64) -> Asked {
        let key = self.waiting().insert(Waiting { begun_ms: now_ms, tried_ms: None });
        Asked { traffic: Arc::clone(self), key }
    }

    /// For how long the oldest request has had no final answer, in milliseconds.
    pub(crate) fn oldest_ms(&self, now_ms: u64) -> Option<u64> {
        let waiting = self.waiting();
        let begun_ms = waiting.iter().map(|(_, waiting)| waiting.begun_ms).min()?;
        Some(now_ms.saturating_sub(begun_ms))
    }

    /// For how long the store has not answered some try at all, in milliseconds.
    pub(crate) fn silent_ms(&self, now_ms: u64) -> Option<u64> {
        let waiting = self.waiting();
        let tried_ms = waiting.iter().filter_map(|(_, waiting)| waiting.tried_ms).min()?;
        Some(now_ms.saturating_sub(tried_ms))
    }

    /// All requests so far.
    pub(crate) fn by_kind(&self) -> RequestsByKind {
        let of = |kind: RequestKind| {
            let Counts { answered, failed, bytes } = &self.counts[kind as usize];
            let [answered, failed, bytes] =
                [answered, failed, bytes].map(|count| count.load(Relaxed));
            RequestCounts { answered, failed, bytes }
        };
        RequestsByKind {
            create: of(RequestKind::Create),
            get: of(RequestKind::Get),
            list: of(RequestKind::List),
            delete: of(RequestKind::Delete),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Slab<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Asked {
    /// It is tried.
    pub(crate) fn tried(&self, now_ms: u64) {
        self.traffic.waiting()[self.key].tried_ms = Some(now_ms);
    }

    /// A try is answered; `bytes` of an object have gone one way or the other, `None` if it has
    /// failed.
    pub(crate) fn answered(&self, kind: RequestKind, bytes: Option<usize>) {
        self.traffic.waiting()[self.key].tried_ms = None;
        let counts = &self.traffic.counts[kind as usize];
        match bytes {
            None => counts.failed.fetch_add(1, Relaxed),
            Some(bytes) => {
                counts.bytes.fetch_add(bytes as u64, Relaxed);
                counts.answered.fetch_add(1, Relaxed)
            }
        };
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.traffic.waiting().remove(self.key);
    }
}
