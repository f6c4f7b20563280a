//! Volumes (memory, null, file) and the layers over them.
//!
//! Everything is reached through a VOLUME text, see [`VolumeSpec`]:
//!
//! ```
//! use sheave_backends::{OpenOptions, open};
//!
//! let volume = open("memory:?size=1G", &OpenOptions::default())?;
//! assert_eq!(volume.size(), 1 << 30);
//! # Ok::<(), sheave_core::Error>(())
//! ```
//!
//! No backend blocks in `submit`: memory and null answer at once, a file's I/O goes through the
//! engine. What an engine cannot do for us (`SEEK_HOLE`, `fadvise`) is bounded and stays inline.
#![forbid(unsafe_code)]

#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
mod extents;
mod file;
mod layers;
mod memory;
mod names;
mod null;
mod parse;
mod spec;
#[cfg(test)]
mod tests;

pub use file::{FileOptions, FileVolume, OpenBatch, are_holders_visible, start_process};
pub use layers::{BlockSize, Limits, RateLimits};
pub use memory::Memory;
pub use names::{export_name, file_url, path_text, volume_text};
pub use null::Null;
pub use parse::parse_size;
pub use spec::{OpenOptions, VolumeSpec, check_resize, identity, open, resize};

use sheave_core::Nanos;

/// How long until an op is tried again for which an engine or a backend below had no room, or which
/// waits for another thread.
const RETRY_NS: Nanos = 100_000;
