//! A client's socket while it negotiates.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use crate::acceptor::Uptime;
use crate::access::{self, Client};
use crate::admission::{Moved, Source};

/// A client that has not negotiated yet. Keeps the time of the last byte in either direction.
pub(crate) struct Stream {
    socket: Socket,
    peer: Peer,
    moved: Moved,
    uptime: Uptime,
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

#[derive(Clone, Copy)]
enum Peer {
    Address(SocketAddr),
    Process {
        pid: i32,
        user: u32,
    },
    /// The client left before its address was read.
    Unknown,
}

impl Stream {
    pub(crate) fn tcp(stream: TcpStream, address: SocketAddr, uptime: Uptime) -> Self {
        Self::new(Socket::Tcp(stream), Peer::Address(address), uptime)
    }

    pub(crate) fn unix(stream: UnixStream, uptime: Uptime) -> Self {
        let peer = stream.peer_cred().map_or(Peer::Unknown, |credentials| Peer::Process {
            // There is no process id when it is in another namespace.
            pid: credentials.pid().unwrap_or(0),
            user: credentials.uid(),
        });
        Self::new(Socket::Unix(stream), peer, uptime)
    }

    fn new(socket: Socket, peer: Peer, uptime: Uptime) -> Self {
        Self { socket, peer, moved: Arc::new(AtomicU64::new(uptime.now_ms())), uptime }
    }

    /// The peer, for people.
    pub(crate) fn peer(&self) -> String {
        match self.peer {
            Peer::Address(address) => address.to_string(),
            Peer::Process { pid, user } => format!("unix:pid={pid},uid={user}"),
            Peer::Unknown => "a client that left".to_owned(),
        }
    }

    /// The peer, for the admission policy.
    pub(crate) fn source(&self) -> Source {
        match self.peer {
            Peer::Address(address) => address.ip().into(),
            Peer::Process { user, .. } => Source::User(user),
            Peer::Unknown => Source::Unknown,
        }
    }

    /// The peer, for the access rules of exports. Its certificate is not known yet.
    pub(crate) fn client(&self) -> Client {
        let address = match self.peer {
            Peer::Address(address) => access::PeerAddress::Address(address.ip()),
            Peer::Process { user, .. } => access::PeerAddress::Unix(user),
            Peer::Unknown => access::PeerAddress::Unknown,
        };
        Client { address, names: Vec::new() }
    }

    /// When the last byte moved.
    pub(crate) fn moved(&self) -> &Moved {
        &self.moved
    }

    pub(crate) fn into_fd(self) -> io::Result<OwnedFd> {
        Ok(match self.socket {
            Socket::Tcp(stream) => stream.into_std()?.into(),
            Socket::Unix(stream) => stream.into_std()?.into(),
        })
    }

    fn has_moved(&self) {
        self.moved.store(self.uptime.now_ms(), Relaxed);
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(match &mut this.socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Socket::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        })?;
        this.has_moved();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let count = ready!(match &mut this.socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Socket::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        })?;
        this.has_moved();
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
