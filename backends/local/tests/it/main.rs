//! Properties of each local volume that the conformance suite does not check.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod devices;
mod file;
mod file_faults;
mod foreign;
mod growth;
mod memory;
