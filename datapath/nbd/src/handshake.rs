//! From a new connection to a negotiated one, on the control thread.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll};

use rustls::ServerConnection;
use sheave_proto::{
    CloseReason, Exports, HandshakeLimits, Negotiated, Next, ServerHandshake, TlsMode,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_rustls::TlsAcceptor;

use crate::listener::Stream;
use crate::tls::explain_io;

/// Bytes received at once; the longest option is bounded by the protocol crate.
const RECEIVE_LEN: usize = 4096;

/// A connection that enters the transmission phase.
pub(crate) struct Agreed {
    pub(crate) socket: OwnedFd,
    pub(crate) negotiated: Negotiated,
    pub(crate) tls: Option<ServerConnection>,
    /// What the client sent right behind its last option.
    pub(crate) early: Vec<u8>,
}

/// Negotiates. `None` when the client left in good order. `peer` names it in the log.
pub(crate) async fn negotiate(
    mut stream: Stream,
    peer: &str,
    exports: &(dyn Exports + Sync),
    tls: Option<&TlsAcceptor>,
    mode: TlsMode,
) -> io::Result<Option<Agreed>> {
    let mut handshake = ServerHandshake::new(mode, HandshakeLimits::default());
    stream.write_all(&ServerHandshake::greeting()).await?;
    let (negotiated, early) = match talk(&mut stream, peer, &mut handshake, exports).await? {
        End::Closed => return Ok(None),
        End::Agreed { negotiated, early } => (*negotiated, early),
        End::StartTls => {
            let acceptor =
                tls.ok_or_else(|| io::Error::other("TLS agreed on without a certificate"))?;
            // What the client sent before TLS is forgotten: it may not be the client's.
            handshake.tls_started();
            let mut stream = acceptor.accept(stream).await.map_err(explain_io)?;
            let End::Agreed { negotiated, early } =
                talk(&mut stream, peer, &mut handshake, exports).await?
            else {
                let _ = stream.shutdown().await;
                return Ok(None);
            };
            // All replies must be out before the shard goes on with the cipher state.
            stream.flush().await?;
            let (stream, tls) = stream.into_inner();
            let socket = stream.into_fd()?;
            return Ok(Some(Agreed { socket, negotiated: *negotiated, tls: Some(tls), early }));
        }
    };
    Ok(Some(Agreed { socket: stream.into_fd()?, negotiated, tls: None, early }))
}

enum End {
    Agreed { negotiated: Box<Negotiated>, early: Vec<u8> },
    Closed,
    StartTls,
}

async fn talk<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    peer: &str,
    handshake: &mut ServerHandshake,
    exports: &(dyn Exports + Sync),
) -> io::Result<End> {
    let mut pending = Vec::with_capacity(RECEIVE_LEN);
    loop {
        if stream.read_buf(&mut pending).await? == 0 {
            tracing::debug!(peer, "the client left the handshake");
            return Ok(End::Closed);
        }
        loop {
            let step = handshake.step(&pending, exports);
            pending.drain(..step.consumed);
            let answered = stream.write_all(&step.output).await;
            // Who says good-bye need not wait for the answer.
            if !matches!(step.next, Next::Close(_)) {
                answered?;
            }
            match step.next {
                Next::NeedMore if step.consumed > 0 && !pending.is_empty() => {}
                Next::NeedMore => break,
                Next::StartTls => return Ok(End::StartTls),
                Next::Transmission(negotiated) => {
                    return Ok(End::Agreed { negotiated, early: pending });
                }
                Next::Close(reason) => {
                    match reason {
                        // As clients do that only want the list of exports.
                        CloseReason::Aborted => tracing::debug!(peer, %reason, "handshake ended"),
                        _ => tracing::info!(peer, %reason, "handshake ended"),
                    }
                    // A client that sees a reset may never read why.
                    let _ = stream.shutdown().await;
                    return Ok(End::Closed);
                }
            }
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
