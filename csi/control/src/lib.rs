//! The control API of `sheave daemon`: gRPC on a unix socket.
#![forbid(unsafe_code)]

mod connect;

use std::path::Path;

use tonic::transport::{Channel, Error};

pub use connect::{Incoming, channel, in_process};

/// Version 1: messages, clients and server traits.
#[allow(missing_docs, unused_qualifications, clippy::too_many_lines, clippy::use_self)]
pub mod v1 {
    tonic::include_proto!("sheave.control.v1");
}

/// A client of a daemon's devices.
pub type ControlClient = v1::control_client::ControlClient<Channel>;
/// A client of the volumes of pools.
pub type VolumesClient = v1::volumes_client::VolumesClient<Channel>;

/// Connects to the daemon at this socket.
///
/// # Errors
/// When no daemon listens there, or this user may not connect.
pub async fn connect(socket: &Path) -> Result<ControlClient, Error> {
    Ok(ControlClient::new(connect::connected(socket).await?))
}

/// Connects to the volumes of the daemon at this socket.
///
/// # Errors
/// When no daemon listens there, or this user may not connect.
pub async fn connect_volumes(socket: &Path) -> Result<VolumesClient, Error> {
    Ok(VolumesClient::new(connect::connected(socket).await?))
}
