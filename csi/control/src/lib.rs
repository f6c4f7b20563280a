//! The control API of `sheave daemon`: gRPC on a unix socket.
#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::codegen::Service;
use tonic::codegen::http::Uri;
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
/// When no daemon listens there, or this user may not connect.
pub async fn connect(socket: &Path) -> Result<ControlClient, Error> {
    // It is for the calls' headers; a path need not be text, so it cannot be in a URL.
    let endpoint = Endpoint::from_static("http://localhost");
    let connector = Connector { socket: socket.to_owned() };
    Ok(ControlClient::new(endpoint.connect_with_connector(connector).await?))
}

/// Connects to a unix socket, whatever the URL.
struct Connector {
    socket: PathBuf,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<UnixStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let socket = self.socket.clone();
        Box::pin(async move { Ok(TokioIo::new(UnixStream::connect(socket).await?)) })
    }
}
