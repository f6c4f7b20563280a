//! The control API of `sheave daemon`: gRPC on a unix socket.
#![forbid(unsafe_code)]

use std::path::Path;

use tonic::transport::{Channel, Endpoint, Error};

/// Version 1: messages, client and server trait.
#[allow(missing_docs, unused_qualifications, clippy::too_many_lines, clippy::use_self)]
pub mod v1 {
    tonic::include_proto!("sheave.control.v1");
}

/// A client of a daemon.
pub type ControlClient = v1::control_client::ControlClient<Channel>;

/// Connects to the daemon at this socket.
///
/// # Errors
/// When nobody listens there, or this user may not.
pub async fn connect(socket: &Path) -> Result<ControlClient, Error> {
    let endpoint = Endpoint::try_from(format!("unix://{}", socket.display()))?;
    Ok(ControlClient::new(endpoint.connect().await?))
}
