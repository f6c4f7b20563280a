//! Reads committed blocks from log objects.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use sheave_core::{ErrorKind, Result};

use crate::format::{ObjectId, RunPart, keys};
use crate::ids::{BLOCK_BYTES, Blocks, Lba, Place, VolumeId};
use crate::lineage::Lineage;
use crate::retry::{Listener, Patience, Requests};
use crate::store::StoreError;

/// Reads from the objects of a volume. Clones share nothing that changes.
#[derive(Clone, Debug)]
pub struct Fetcher {
    requests: Requests,
    volume: VolumeId,
    lineage: Arc<Lineage>,
}

impl Fetcher {
    /// One for the objects of these epochs. It waits for a store that is away, as writes do: a
    /// device that waits is better than one that fails.
    #[must_use]
    pub fn new(requests: &Requests, volume: VolumeId, lineage: Lineage) -> Self {
        let log = Log { volume: requests.name().to_owned(), is_away: AtomicBool::new(false) };
        let requests = requests.with_patience(Patience::Endless).heard_by(Arc::new(log));
        Self { requests, volume, lineage: lineage.into() }
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
            match place {
                Place::Zero => Ok(vec![0; (blocks * BLOCK_BYTES) as usize]),
                Place::Object { seq, frame, skip, run } => {
                    let blocks = u32::try_from(blocks).ok().filter(|blocks| *blocks <= run - skip);
                    let blocks = blocks.expect("a map's piece is within its run");
                    let part = RunPart { frame, run, skip, blocks };
                    let epoch = fetcher.lineage.epoch_of(seq);
                    let epoch = epoch.expect("a map has objects of known epochs only");
                    fetcher.fetch_part(lba, part, ObjectId { epoch, seq }).await
                }
            }
        }
    }

    async fn fetch_part(&self, lba: Lba, part: RunPart, object: ObjectId) -> Result<Vec<u8>> {
        let key = keys::log(object.epoch, object.seq);
        let damaged = |why: &str| {
            let why = format!("{why} (block {lba}); the data is lost unless a copy of it exists");
            self.requests.error(ErrorKind::Corrupt, "read", &key, &why)
        };
        let stored = self.requests.get(&key, part.bytes()).await?;
        let stored = stored.ok_or_else(|| damaged("the object is missing"))?;
        part.decode(self.volume, object, lba, &stored).map_err(|wrong| damaged(&wrong.to_string()))
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
    use std::ops::Range;
    use std::pin::Pin;
    use std::sync::atomic::AtomicU64;

    use bytes::Bytes;

    use super::*;
    use crate::clock::Clock;
    use crate::format::Reach;
    use crate::ids::{Epoch, Seq};
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
        let fetcher = Fetcher::new(&requests, VolumeId([1; 16]), lineage);
        let place = Place::Object { seq: Seq(1), frame: 128, skip: 0, run: 1 };
        let error = block_on(fetcher.fetch(Lba(0), 1, place)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(clock.now_ms() >= 600_000);
    }
}
