//! The NBD server: listeners, handshake, TLS, and the session that a shard runs.
#![forbid(unsafe_code)]

mod accept_errors;
mod acceptor;
mod access;
mod address;
mod admission;
mod connections;
mod exports;
mod handshake;
mod incoming;
mod kernel;
mod listener;
mod replies;
mod server;
mod session;
mod stream;
mod tls;

pub use accept_errors::AcceptErrors;
pub use access::{Access, CertificateName, PeerFilter};
pub use address::bind_tcp;
pub use connections::ClientSnapshot;
pub use exports::{Export, ExportSnapshot, LiveExports, STRING_LEN_MAX};
pub use kernel::kernel_session;
pub use listener::{Listener, SocketAccess};
pub use rustls::ServerConfig as TlsConfig;
pub use server::{Limits, Server, ServerConfig};
