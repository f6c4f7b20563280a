//! Object volumes: disks made of immutable, numbered objects in a bucket or a directory, with a
//! journal on a local disk in front.
//!
//! `docs/format.md` has every byte that is stored, and the rules that keep one writer.
//!
//! ```text
//!  shard                                   worker thread
//!  Backend ─ lock ─▶ Front ◀─ mailbox ─ uploads, fetches ─▶ Store (directory, bucket)
//!     │ journal: append, sync, read
//! ```
//!
//! The bucket: [`Store`] and its kinds, [`format`], [`open`](mod@open), [`life`], `snapshots`,
//! [`upload`], [`fetch`], [`map`], `gc`; in front of it `chunks` and the file of `cache`, which a
//! shard reads itself. The journal and the shard: `journal`, `front`, `backend`, `volume`,
//! `worker`, and `door` for other processes. Only `worker` and `door` know tokio.
#![forbid(unsafe_code)]

mod answers;
pub mod ask;
mod backend;
mod budget;
mod cache;
pub mod check;
mod checkpoint;
mod chunks;
pub mod cipher;
pub mod clock;
mod clones;
mod dir_store;
pub mod door;
pub mod extents;
pub mod fetch;
pub mod format;
mod front;
mod gate;
mod gc;
mod head;
mod ids;
mod journal;
mod key_source;
pub mod life;
pub mod lineage;
pub mod map;
#[cfg(test)]
mod memory_store;
pub mod open;
mod passed;
mod probe;
mod recent;
pub mod recover;
mod restore;
mod retry;
#[cfg(test)]
mod sim;
mod snapshots;
pub mod sources;
mod status;
pub mod store;
mod stored;
pub mod threads;
mod together;
mod traffic;
pub mod upload;
mod volume;
mod worker;

pub use cache::{CACHE_BYTES_DEFAULT, CacheStats, cache_stats};
pub use dir_store::DirStore;
pub use format::{Codec, Durability, Root, Snapshot, State};
pub use head::Head;
pub use ids::{BLOCK_BYTES, Blocks, Epoch, Incarnation, Lba, Lsn, Opening, Place, Seq, VolumeId};
pub use journal::{Adopted, JournalDir, JournalSize, Summary, Superblock};
pub use key_source::KeySource;
pub use life::Info;
pub use status::{Status, statuses};
pub use store::{Created, Store, StoreError, StoreErrorKind};
pub use stored::{Fencing, StoredVolume, VolumeStore};
pub use traffic::{RequestCounts, RequestsByKind};
pub use volume::{ObjectVolume, Tuning, close_all, finish_closing};
