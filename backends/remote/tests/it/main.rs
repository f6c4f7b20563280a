//! Remote volumes on servers that break at every point.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod flaky;
mod poison;
mod rules;
mod server;
mod support;
