//! Clients whose `:authority` is no authority.
//!
//! A gRPC client of a unix socket may send the socket's path as `:authority`, as it is, with
//! percent signs, or nothing at all: kubelet before 1.26, and the libraries of C++, Python and
//! Java. The HTTP/2 server here refuses such requests. So the bytes that come from a client pass
//! through [`PlainAuthority`], which writes each header block anew, with `localhost` as its
//! authority (RFC 9113, RFC 7541). Nothing else is changed.

mod rewriter;

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::server::{Connected, UdsConnectInfo};

use rewriter::Rewriter;

/// How much is read from a client at once.
const INPUT_LEN: usize = 16 << 10;

/// A client's connection, with `localhost` as the authority of all requests.
pub(crate) struct PlainAuthority<S> {
    inner: S,
    rewriter: Rewriter,
    input: Vec<u8>,
    output: Vec<u8>,
    /// How much of the output is taken.
    taken: usize,
}

/// The connections of a listener, as tonic's server takes them.
pub(crate) fn incoming(
    listener: UnixListener,
) -> impl Stream<Item = io::Result<PlainAuthority<UnixStream>>> {
    UnixListenerStream::new(listener).map(|accepted| accepted.map(PlainAuthority::new))
}

impl<S> PlainAuthority<S> {
    /// A connection from which nothing was read yet.
    pub(crate) fn new(inner: S) -> Self {
        let (input, output) = (vec![0; INPUT_LEN], Vec::new());
        Self { inner, rewriter: Rewriter::new(), input, output, taken: 0 }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for PlainAuthority<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.taken == this.output.len() {
            this.output.clear();
            this.taken = 0;
            let mut input = ReadBuf::new(&mut this.input);
            ready!(Pin::new(&mut this.inner).poll_read(context, &mut input))?;
            if input.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.rewriter.push(input.filled(), &mut this.output)?;
        }
        let left = &this.output[this.taken..];
        let len = left.len().min(buffer.remaining());
        buffer.put_slice(&left[..len]);
        this.taken += len;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for PlainAuthority<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

impl Connected for PlainAuthority<UnixStream> {
    type ConnectInfo = UdsConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.inner.connect_info()
    }
}
