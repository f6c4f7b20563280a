//! Reads committed blocks from log objects.

use std::future::Future;

use sheave_core::{ErrorKind, Result};

use crate::format::{ObjectId, RunPart, keys};
use crate::ids::{BLOCK_BYTES, Blocks, Lba, Place, VolumeId};
use crate::lineage::Lineage;
use crate::retry::Requests;

/// Reads from the objects of a volume. Clones share nothing that changes.
#[derive(Clone, Debug)]
pub struct Fetcher {
    requests: Requests,
    volume: VolumeId,
    lineage: std::sync::Arc<Lineage>,
}

impl Fetcher {
    /// One for the objects of these epochs.
    #[must_use]
    pub fn new(requests: Requests, volume: VolumeId, lineage: Lineage) -> Self {
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
