//! The NBD server: listeners, handshake, TLS, and the session that a shard runs.
#![forbid(unsafe_code)]

mod handshake;
mod incoming;
mod listener;
mod replies;
mod server;
mod session;
mod tls;

pub use listener::Listener;
pub use server::{Export, Limits, Server, ServerConfig};
pub use tls::{TlsFiles, server_tls};
