//! What is known of a volume that is open in this process.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use crate::clock::{Clock as _, SystemClock};
use crate::format::Durability;
use crate::front::Front;
use crate::traffic::RequestsByKind;
use crate::volume::{Engine, open_volumes};

/// A store that has not answered a request for so long is worth a word.
pub(crate) const SILENT_MS: u64 = 10_000;

/// An open volume. Its numbers may be of slightly different times.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Where it is.
    pub name: String,
    /// What its flushes wait for; older releases do not say it.
    #[serde(default)]
    pub durability: String,
    /// What tells it from other volumes.
    pub uuid: String,
    /// The opening.
    pub epoch: u64,
    /// Bytes of data that were written and that the store lacks. Trims and zeroes have none.
    pub lag_bytes: u64,
    /// Writes that the store lacks.
    pub lag_writes: u64,
    /// For how long the oldest of them has been there, in milliseconds.
    pub lag_ms: u64,
    /// Bytes of the journal's files.
    pub journal_bytes: u64,
    /// Of them, those of segments with writes that the store lacks, and of the current one.
    pub journal_used_bytes: u64,
    /// The most bytes of the journal's files.
    pub journal_bytes_max: u64,
    /// Its requests to the store.
    pub requests: RequestsByKind,
    /// Objects that it has deleted, since nothing needed them; older releases do not say it.
    #[serde(default)]
    pub deleted_objects: u64,
    /// Their bytes.
    #[serde(default)]
    pub deleted_bytes: u64,
    /// Bytes of blocks that it has moved out of objects which are mostly garbage.
    #[serde(default)]
    pub moved_bytes: u64,
    /// For how long the oldest of them has waited for its final answer, in milliseconds.
    pub oldest_request_ms: Option<u64>,
    /// What its writes or reads wait for, or why they fail; `None` if all is well.
    pub waits_for: Option<String>,
}

/// What a volume has deleted and moved.
#[derive(Debug, Default)]
pub(crate) struct Swept {
    objects: AtomicU64,
    bytes: AtomicU64,
    moved_bytes: AtomicU64,
}

impl Swept {
    pub(crate) fn note_moved(&self, bytes: u64) {
        self.moved_bytes.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn note(&self, bytes: u64) {
        self.objects.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
    }
}

/// The volumes that are open in this process, or closing.
#[must_use]
pub fn statuses() -> Vec<Status> {
    let engines = open_volumes().clone();
    engines.iter().map(|engine| engine.status()).collect()
}

impl Engine {
    pub(crate) fn status(&self) -> Status {
        self.status_at(SystemClock.now_ms())
    }

    pub(crate) fn status_at(&self, now_ms: u64) -> Status {
        let silent_ms = self.traffic.silent_ms(now_ms).filter(|ms| *ms >= SILENT_MS);
        let report = self.with(|front| front.report());
        let segment_bytes = self.tuning.journal.segment_bytes;
        let silent = || {
            let seconds = silent_ms? / 1000;
            Some(format!("the store has not answered a request for {seconds} seconds"))
        };
        Status {
            name: self.name.to_string(),
            durability: report.durability.name().to_owned(),
            uuid: self.info.identity.clone().unwrap_or_default(),
            epoch: self.opening.epoch.0,
            lag_bytes: report.lag_bytes,
            lag_writes: report.lag_writes,
            lag_ms: report.lag_ms,
            journal_bytes: report.segments * segment_bytes,
            journal_used_bytes: report.segments_held * segment_bytes,
            journal_bytes_max: self.tuning.journal.segments_max as u64 * segment_bytes,
            requests: self.traffic.by_kind(),
            deleted_objects: self.swept.objects.load(Relaxed),
            deleted_bytes: self.swept.bytes.load(Relaxed),
            moved_bytes: self.swept.moved_bytes.load(Relaxed),
            oldest_request_ms: self.traffic.oldest_ms(now_ms),
            waits_for: report.waits_for.or_else(silent),
        }
    }
}

/// The part of a status that is behind the lock.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) lag_bytes: u64,
    pub(crate) lag_writes: u64,
    pub(crate) lag_ms: u64,
    pub(crate) segments: u64,
    pub(crate) segments_held: u64,
    pub(crate) waits_for: Option<String>,
    pub(crate) durability: Durability,
}

impl Front {
    pub(crate) fn report(&self) -> Report {
        let since = self.recent().since();
        let log = self.log();
        Report {
            lag_bytes: self.lag_bytes(),
            lag_writes: if since.is_some() { log.written().0 - log.committed().0 } else { 0 },
            lag_ms: since.map_or(0, |since| since.elapsed().as_millis() as u64),
            segments: log.segments() as u64,
            segments_held: log.segments_held() as u64,
            waits_for: self.waits_for(),
            durability: self.durability(),
        }
    }
}
