//! The VOLUME language: the syntax of volumes, and how to open them.
//!
//! Every volume is reached through a VOLUME text, see [`VolumeSpec`]:
//!
//! ```
//! use sheave_volumes::{OpenOptions, open};
//!
//! let volume = open("memory:?size=1G", &OpenOptions::default())?;
//! assert_eq!(volume.size(), 1 << 30);
//! # Ok::<(), sheave_core::Error>(())
//! ```
#![forbid(unsafe_code)]

mod names;
mod node_memory;
mod parse;
mod schemes;
mod source;
mod spec;
mod state_dir;

pub use names::{export_name, file_url, parameter_value, path_text, volume_text};
pub use node_memory::check_memory;
pub use schemes::nbd::NbdServer;
pub use sheave_object::check as object_check;
pub use sheave_object::{
    BLOCK_BYTES, Codec, Durability, Info as ObjectInfo, RequestCounts, Root as ObjectRoot,
    Snapshot as ObjectSnapshot, Status as ObjectStatus, StoredVolume, statuses as object_statuses,
};
pub use spec::{OpenOptions, VolumeSpec, open};
pub use state_dir::state_dir;
