//! Pools: named catalogs of volumes, which are made, deleted, resized and published through them.
//!
//! A pool is a [`Pool`]. What a volume is beside its data is its [`Record`]. The record's rules are
//! the same in every pool: which nodes may use it, and whether it holds a file system.
#![forbid(unsafe_code)]

mod catalog;
mod file;
mod list;
mod nbd;
mod pool;
mod record;
mod sharing;
mod unrecorded;

pub use catalog::{Listed, PoolConfig, Pools, Site, VolumeId};
pub use file::{FilePool, Limits};
pub use list::ListPool;
pub use nbd::NbdPool;
pub use pool::{Capacity, Exclusion, Found, Key, NewVolume, Pool, PoolInfo, SIZE_UNIT, SizeRange};
pub use record::{AccessMode, Publication, Record};
pub use sharing::{Judge, judge};
