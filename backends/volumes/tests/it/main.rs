//! What VOLUME texts mean.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod names;
mod page;
mod spec;
