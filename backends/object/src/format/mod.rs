//! The bytes that are stored, as `docs/format.md` draws them.

mod build;
mod code;
mod codec;
mod counted;
mod directory;
mod durability;
mod frame;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod keys;
mod object;
pub(crate) mod page;
pub(crate) mod record;
mod root;
mod run;
pub(crate) mod segment;
mod snapshot;
pub(crate) mod superblock;
#[cfg(test)]
mod tests;

pub use build::{Author, Built, ObjectBuilder, Placed, decode_directory, decode_leaf, fence};
pub use code::Wrong;
pub use codec::Codec;
pub(crate) use counted::COUNTED_BYTES_MAX;
pub use counted::Counted;
pub use directory::{Directory, LeafRef, Run};
pub use durability::Durability;
pub use frame::{Coding, FRAME_HEADER_BYTES, FrameId, FrameReader};
pub use object::{
    ENTRIES_MAX, ENTRY_BYTES, Entry, HEADER_BYTES, Head, Header, LEAF_BLOCKS, OBJECT_BYTES_MAX,
    ObjectId,
};
pub(crate) use root::NUMBER_MAX;
pub use root::{
    Committed, FramePlace, LastOpening, NODE_BYTES_MAX, ROOT_BYTES_MAX, Reach, Root, SIZE_MAX,
    State,
};
pub use run::{Form, RunPart};
pub(crate) use snapshot::SNAPSHOT_BYTES_MAX;
pub use snapshot::{
    CheckpointPlace, Owner, Pin, SIBLING_NAME_BYTES_MAX, SNAPSHOT_NAME_BYTES_MAX, Snapshot,
    SnapshotNews, is_snapshot_name,
};
