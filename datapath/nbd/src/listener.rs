//! Sockets that accept clients.

use std::fs::{self, Permissions};
use std::future::poll_fn;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl, set_tcp_nodelay,
};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use sheave_core::{Error, ErrorKind, printable};
use tokio::net::{TcpListener, TcpStream, UnixListener};

use crate::acceptor::Uptime;
use crate::address::bind_tcp;
use crate::stream::Stream;

/// TCP keep-alive: idle time until the first probe, …
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// … time between probes, …
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// … and unanswered probes after which the connection is dead.
const KEEPALIVE_PROBES_MAX: u32 = 4;

/// The longest path of a unix socket in bytes (unix(7): 108 with the zero byte at its end).
const SOCKET_PATH_MAX: usize = 107;

/// A listening socket. A unix socket's path is removed on drop, if it is ours.
pub struct Listener {
    socket: Socket,
    name: String,
    /// The path of our own socket file, and its identity.
    path: Option<(PathBuf, FileId)>,
}

/// Permissions of a unix socket; clients that may write to it may connect (unix(7)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketAccess {
    /// Permission bits of the socket file; by default those that the umask leaves.
    pub mode: Option<u32>,
    /// Its group; by default that of the process.
    pub group: Option<u32>,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Device and inode.
type FileId = (u64, u64);

impl Listener {
    /// Listens on all addresses of `HOST:PORT`; port 0 picks a free one.
    ///
    /// # Errors
    /// As [`bind_tcp`]; or when they cannot be used in the running tokio runtime.
    pub fn tcp(address: &str) -> Result<Vec<Self>, Error> {
        let fail = |error| Error::from_io("listen", address, error);
        bind_tcp(address)?
            .into_iter()
            .map(|listener| Self::from_tcp(listener).map_err(fail))
            .collect()
    }

    /// Listens on a unix socket. A stale socket file is replaced.
    ///
    /// # Errors
    /// When another server listens there, or another file is there, or the path cannot be used.
    pub fn unix(path: &Path) -> Result<Self, Error> {
        Self::unix_for(path, SocketAccess::default())
    }

    /// Like [`Listener::unix`], with these permissions from the beginning.
    ///
    /// # Errors
    /// As [`Listener::unix`], and when the group cannot be set.
    pub fn unix_for(path: &Path, access: SocketAccess) -> Result<Self, Error> {
        let name = printable(&path).to_string();
        let fail = |error: io::Error| {
            let is_missing = error.kind() == io::ErrorKind::NotFound;
            let not_ours =
                access.group.is_some() && Errno::from_io_error(&error) == Some(Errno::PERM);
            let hint = match () {
                () if is_missing => " (its directory must exist)",
                () if not_ours => " (the group must be one of the user that runs this)",
                () => "",
            };
            Error::from_io("listen", format!("{name}{hint}"), error)
        };
        let len = path.as_os_str().len();
        if len > SOCKET_PATH_MAX {
            let why = format!("{len} bytes; a socket's path has at most {SOCKET_PATH_MAX}");
            return Err(invalid(&name, &why));
        }
        let found = path.symlink_metadata();
        if found.as_ref().is_ok_and(|found| !found.file_type().is_socket()) {
            return Err(invalid(&name, "exists and is no socket; choose another path"));
        }
        if found.is_ok() {
            match StdUnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(fail)?;
                }
                // Without permission to connect it is unknown whether another server listens.
                Err(error) => return Err(fail(error)),
                Ok(_) => {
                    let what = format!("{name}: another server listens there");
                    return Err(Error::new(ErrorKind::Busy, "listen", what));
                }
            }
        }
        let listener = bind_unix(path, access).map_err(fail)?;
        let mut listener = Self::from_unix(listener).map_err(fail)?;
        listener.path = Some((path.to_owned(), file_id(path).map_err(fail)?));
        listener.name = format!("unix:{name}");
        Ok(listener)
    }

    /// Takes over a TCP socket, as socket activation passes one.
    ///
    /// # Errors
    /// When it cannot be used in the running tokio runtime.
    pub fn from_tcp(listener: std::net::TcpListener) -> io::Result<Self> {
        let name = listener.local_addr()?.to_string();
        prepare(&listener)?;
        Ok(Self { socket: Socket::Tcp(TcpListener::from_std(listener)?), name, path: None })
    }

    /// Takes over a unix socket.
    ///
    /// # Errors
    /// When it cannot be used in the running tokio runtime.
    pub fn from_unix(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let path = address.as_pathname().map(|path| printable(&path).to_string());
        let name = format!("unix:{}", path.unwrap_or_default());
        prepare(&listener)?;
        Ok(Self { socket: Socket::Unix(UnixListener::from_std(listener)?), name, path: None })
    }

    /// The address or path, for people.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) async fn accept(&self, uptime: Uptime) -> io::Result<Stream> {
        poll_fn(|cx| self.poll_accept(cx, uptime)).await
    }

    pub(crate) fn poll_accept(
        &self,
        cx: &mut Context<'_>,
        uptime: Uptime,
    ) -> Poll<io::Result<Stream>> {
        Poll::Ready(Ok(match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, address) = ready!(listener.poll_accept(cx))?;
                // Not on the listener: a passed one may have had clients in its queue before.
                set_options(&stream);
                Stream::tcp(stream, address, uptime)
            }
            Socket::Unix(listener) => Stream::unix(ready!(listener.poll_accept(cx))?.0, uptime),
        }))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, id)) = &self.path
            && file_id(path).is_ok_and(|now| now == *id)
        {
            let _ = fs::remove_file(path);
        }
    }
}

pub(crate) fn invalid(what: &str, why: &str) -> Error {
    Error::new(ErrorKind::Invalid, "listen", format!("{what}: {why}"))
}

/// A socket with its permissions, to which no client can connect yet: it does not listen.
fn bind_unix(path: &Path, access: SocketAccess) -> io::Result<std::os::unix::net::UnixListener> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    let set = || {
        if let Some(group) = access.group {
            std::os::unix::fs::lchown(path, None, Some(group))?;
        }
        if let Some(mode) = access.mode {
            fs::set_permissions(path, Permissions::from_mode(mode))?;
        }
        Ok(())
    };
    match set() {
        Ok(()) => Ok(socket.into()),
        Err(error) => {
            // The file was made just now, by this process.
            let _ = fs::remove_file(path);
            Err(error)
        }
    }
}

fn file_id(path: &Path) -> io::Result<FileId> {
    path.symlink_metadata().map(|meta| (meta.dev(), meta.ino()))
}

/// Lets as many clients wait in the queue as net.core.somaxconn allows, also in a passed one.
fn prepare(socket: &impl AsFd) -> io::Result<()> {
    rustix::io::ioctl_fionbio(socket, true)?;
    Ok(listen(socket, i32::MAX)?)
}

/// Errors are ignored: if the client is gone already, its reads will fail.
fn set_options(stream: &TcpStream) {
    // Replies are gathered already; Nagle's algorithm would only delay them.
    let _ = set_tcp_nodelay(stream, true);
    // A client that lost its power never closes its connection.
    let _ = set_socket_keepalive(stream, true)
        .and_then(|()| set_tcp_keepidle(stream, KEEPALIVE_IDLE))
        .and_then(|()| set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL))
        .and_then(|()| set_tcp_keepcnt(stream, KEEPALIVE_PROBES_MAX));
}
