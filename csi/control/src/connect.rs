//! Ways to a server of the control API: a unix socket, or the same process.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use tokio::io::DuplexStream;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::Service;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint, Error};

/// Bytes that wait between client and server of one process.
const PIPE_LEN: usize = 64 << 10;
/// Connections that wait to be accepted.
const BACKLOG: usize = 16;

/// Connections from the same process, as tonic's server takes them.
pub type Incoming = ReceiverStream<io::Result<DuplexStream>>;

/// For the calls' headers only; the connector has the address.
fn endpoint() -> Endpoint {
    Endpoint::from_static("http://localhost")
}

pub(crate) async fn connected(socket: &Path) -> Result<Channel, Error> {
    endpoint().connect_with_connector(UnixSocket { path: socket.to_owned() }).await
}

/// A channel to the server at this socket, which is connected when it is used, and again after the
/// server was restarted.
#[must_use]
pub fn channel(socket: &Path) -> Channel {
    endpoint().connect_with_connector_lazy(UnixSocket { path: socket.to_owned() })
}

/// A channel to a server of the same process, and the connections for
/// `tonic::transport::Server::serve_with_incoming`.
#[must_use]
pub fn in_process() -> (Channel, Incoming) {
    let (sender, receiver) = mpsc::channel(BACKLOG);
    let channel = endpoint().connect_with_connector_lazy(InProcess { sender });
    (channel, ReceiverStream::new(receiver))
}

/// Connects to a unix socket, whatever the URL.
struct UnixSocket {
    path: PathBuf,
}

impl Service<Uri> for UnixSocket {
    type Response = TokioIo<UnixStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        // A path need not be text, so it cannot be in a URL.
        let path = self.path.clone();
        Box::pin(async move { Ok(TokioIo::new(UnixStream::connect(path).await?)) })
    }
}

/// Connects to a server of the same process, whatever the URL.
struct InProcess {
    sender: mpsc::Sender<io::Result<DuplexStream>>,
}

impl Service<Uri> for InProcess {
    type Response = TokioIo<DuplexStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let sender = self.sender.clone();
        Box::pin(async move {
            let (client, server) = tokio::io::duplex(PIPE_LEN);
            let gone = |_| io::Error::from(io::ErrorKind::ConnectionRefused);
            sender.send(Ok(server)).await.map_err(gone)?;
            Ok(TokioIo::new(client))
        })
    }
}
