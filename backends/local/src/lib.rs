//! Volumes of this node: memory, null, and files and block devices.
//!
//! No backend blocks in `submit`: memory and null complete at once, a file's I/O goes through the
//! engine. Calls that an engine does not have (`SEEK_HOLE`, `fadvise`) are bounded and made inline.
#![forbid(unsafe_code)]

mod file;
mod memory;
mod null;

pub use file::{
    FileOptions, FileVolume, HANDLES_READY, OpenBatch, are_holders_visible, file_identity,
    start_process,
};
pub use memory::Memory;
pub use null::Null;
