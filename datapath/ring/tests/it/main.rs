//! The ring and its plain twin on real sockets, pipes and files.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod end_of_life;
mod files;
mod limits;
mod requests;
mod sockets;
mod support;
