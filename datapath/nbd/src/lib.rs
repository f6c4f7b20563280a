//! The NBD server: listeners, handshake, TLS, and the session that a shard runs; and a plain
//! client for tools.
#![forbid(unsafe_code)]

mod accept_errors;
mod address;
mod admission;
mod client;
mod gate;
mod handshake;
mod incoming;
mod kernel;
mod listener;
mod logged;
mod remote;
mod replies;
mod server;
mod session;
mod stream;
mod tls;

pub use accept_errors::AcceptErrors;
pub use address::bind_tcp;
pub use client::unreachable;
pub use kernel::kernel_session;
pub use listener::Listener;
pub use remote::Remote;
pub use server::{Export, Limits, Server, ServerConfig};
pub use tls::{ClientTls, TlsFiles, client_tls, server_tls};
