//! From a new connection to a negotiated one, on the control thread.

use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Poll, ready};

use rustls::ServerConnection;
use sheave_proto::{CloseReason, HandshakeLimits, Negotiated, Next, ServerHandshake};
use sheave_tls::{client_names, explain_io};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_rustls::TlsAcceptor;

use crate::acceptor::Acceptor;
use crate::access::Client;
use crate::exports::{ExportState, View};
use crate::stream::Stream;

/// Bytes received at once; the longest option is bounded by the protocol crate.
const RECEIVE_LEN: usize = 4096;

/// A connection that enters the transmission phase.
pub(crate) struct Agreed {
    pub(crate) socket: OwnedFd,
    pub(crate) negotiated: Negotiated,
    pub(crate) tls: Option<ServerConnection>,
    /// Bytes that the client sent right behind its last option.
    pub(crate) early: Vec<u8>,
    pub(crate) client: Client,
}

/// Why a client ended before it had negotiated.
pub(crate) enum Failure {
    /// It sent nothing and left, as health checks and port scans do.
    Left,
    /// Any other failure.
    Failed(io::Error),
}

/// Negotiates. `None` when the client left in good order. `peer` names it in the log.
pub(crate) async fn negotiate(
    stream: Stream,
    peer: &str,
    state: &ExportState,
    acceptor: &Acceptor,
) -> Result<Option<Agreed>, Failure> {
    let mut heard = false;
    match negotiate_heard(stream, peer, state, acceptor, &mut heard).await {
        Ok(None) if !heard => Err(Failure::Left),
        Err(error) if !heard && has_left(&error) => Err(Failure::Left),
        outcome => outcome.map_err(Failure::Failed),
    }
}

/// Whether the client closed the connection, with or without a reset.
fn has_left(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected)
}

/// Sets `heard` when the client has sent something.
async fn negotiate_heard(
    mut stream: Stream,
    peer: &str,
    state: &ExportState,
    acceptor: &Acceptor,
    heard: &mut bool,
) -> io::Result<Option<Agreed>> {
    let client = stream.client();
    let mut handshake = ServerHandshake::new(state.tls_mode(), HandshakeLimits::default());
    stream.write_all(&ServerHandshake::greeting()).await?;
    let view = state.view(&client);
    match talk(&mut stream, peer, acceptor, &mut handshake, &view, heard).await? {
        End::Closed => Ok(None),
        End::Agreed { negotiated, early } => {
            let socket = stream.into_fd()?;
            Ok(Some(Agreed { socket, negotiated: *negotiated, tls: None, early, client }))
        }
        End::StartTls => {
            let tls = state
                .tls
                .as_ref()
                .ok_or_else(|| io::Error::other("TLS agreed on without a certificate"))?;
            // In a box, since most clients are without TLS and need not carry its state.
            Box::pin(negotiate_encrypted(stream, peer, acceptor, handshake, client, state, tls))
                .await
        }
    }
}

async fn negotiate_encrypted(
    stream: Stream,
    peer: &str,
    acceptor: &Acceptor,
    mut handshake: ServerHandshake,
    mut client: Client,
    state: &ExportState,
    tls: &TlsAcceptor,
) -> io::Result<Option<Agreed>> {
    // State from before TLS is discarded: a third party may have forged it.
    handshake.tls_started();
    let mut stream = tls.accept(stream).await.map_err(explain_io)?;
    client.names = client_names(stream.get_ref().1);
    let view = state.view(&client);
    let ended = talk(&mut stream, peer, acceptor, &mut handshake, &view, &mut true).await?;
    let End::Agreed { negotiated, early } = ended else {
        let _ = stream.shutdown().await;
        return Ok(None);
    };
    // All replies must be out before the shard goes on with the cipher state.
    stream.flush().await?;
    let (stream, tls) = stream.into_inner();
    let socket = stream.into_fd()?;
    Ok(Some(Agreed { socket, negotiated: *negotiated, tls: Some(tls), early, client }))
}

enum End {
    Agreed { negotiated: Box<Negotiated>, early: Vec<u8> },
    Closed,
    StartTls,
}

/// Appends the bytes that have arrived. A client that sends nothing costs no buffer.
async fn receive<S: AsyncRead + Unpin>(stream: &mut S, pending: &mut Vec<u8>) -> io::Result<usize> {
    poll_fn(|cx| {
        let mut bytes = [MaybeUninit::uninit(); RECEIVE_LEN];
        let mut arrived = ReadBuf::uninit(&mut bytes);
        ready!(Pin::new(&mut *stream).poll_read(cx, &mut arrived))?;
        pending.extend_from_slice(arrived.filled());
        Poll::Ready(Ok(arrived.filled().len()))
    })
    .await
}

async fn talk<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    peer: &str,
    acceptor: &Acceptor,
    handshake: &mut ServerHandshake,
    exports: &View<'_>,
    heard: &mut bool,
) -> io::Result<End> {
    let mut pending = Vec::new();
    loop {
        if receive(stream, &mut pending).await? == 0 {
            tracing::debug!(peer, "the client left the handshake");
            return Ok(End::Closed);
        }
        *heard = true;
        loop {
            let step = handshake.step(&pending, exports);
            pending.drain(..step.consumed);
            let answered = stream.write_all(&step.output).await;
            // A client that sends ABORT need not wait for the answer.
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
                        // Clients that only list exports leave like this.
                        CloseReason::Aborted => tracing::debug!(peer, %reason, "handshake ended"),
                        _ => match acceptor.fault() {
                            Some(more) => tracing::info!(peer, %reason, more, "handshake ended"),
                            None => tracing::debug!(peer, %reason, "handshake ended"),
                        },
                    }
                    // After a reset the client may never read the reason.
                    let _ = stream.shutdown().await;
                    return Ok(End::Closed);
                }
            }
        }
    }
}
