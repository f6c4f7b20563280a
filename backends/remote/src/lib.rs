//! Volumes on NBD servers elsewhere.
//!
//! The backends of all threads share one [`State`](state::State) behind a lock: ops, connections,
//! and the writes that no flush covers yet. Each connection is driven by one backend at a time, on
//! the sockets of its engine; the others leave their ops in the queue of the connection and wake
//! that backend's thread. A backend that has ops drives a connection that none drives, so driving
//! moves when a backend goes.
//!
//! Whatever may wait (names, connecting, TLS, options) is done by a thread that exists only while a
//! connection is missing. What survives the end of a connection, and how, is decided in
//! docs/decisions/0008.
#![forbid(unsafe_code)]

mod backend;
mod connect;
mod job;
mod kept;
mod line;
mod options;
mod probe;
mod reach;
mod reconnect;
mod state;
mod volume;

pub use options::{CONNECTIONS_MAX, RemoteOptions};
pub use probe::{Offered, export_size, list, probe};
pub use volume::RemoteVolume;
