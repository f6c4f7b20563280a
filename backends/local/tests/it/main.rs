//! What each local volume promises besides what the conformance suite checks.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod devices;
mod file;
mod file_faults;
mod foreign;
mod growth;
mod memory;
