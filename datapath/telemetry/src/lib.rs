//! Latency histograms and counters of volumes, recorded without locks and merged on read.
//!
//! Each shard owns one [`Recorder`] per volume and is its only writer, so that recording takes a
//! plain load and a plain store; readers look at the same counters at any time. A [`Registry`]
//! knows all recorders and merges them into [`VolumeSnapshot`]s. Nothing here does I/O or reads a
//! clock: durations come in as nanoseconds.
#![forbid(unsafe_code)]

mod failures;
mod hgrm;
mod json;
mod layout;
mod recorder;
mod registry;
mod snapshot;
mod stage;

pub use failures::{FailureCount, LastFailure, Notice};
pub use hdrhistogram::Histogram;
pub use hgrm::write_hgrm;
pub use layout::new_histogram;
pub use recorder::Recorder;
pub use registry::{Registry, VolumeStats};
pub use snapshot::{OpSnapshot, VolumeGauges, VolumeSnapshot};
pub use stage::Stage;
