//! Where clients come in.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl, set_tcp_nodelay,
};
use sheave_core::{Error, ErrorKind, printable};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// A client from which nothing was heard for so long is asked whether it is still there, …
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// … and again after each of these, …
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// … and taken for gone when so many questions were not answered.
const KEEPALIVE_PROBES_MAX: u32 = 4;

/// The longest path of a unix socket in bytes (unix(7): 108 with the zero byte at its end).
const SOCKET_PATH_MAX: usize = 107;

/// A bound socket. A unix socket's path is removed on drop, if it is ours.
pub struct Listener {
    socket: Socket,
    name: String,
    /// Where our own socket file is, and which one it is.
    path: Option<(PathBuf, FileId)>,
}

/// Device and inode.
type FileId = (u64, u64);

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A client that has not negotiated yet.
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Listener {
    /// Listens on `HOST:PORT`; port 0 picks a free one.
    ///
    /// # Errors
    /// When the address is not one, or is in use.
    pub fn tcp(address: &str) -> Result<Self, Error> {
        check_address(address)?;
        let fail = |error: io::Error| {
            let hint = match error.kind() {
                io::ErrorKind::AddrInUse => {
                    " (choose another port by --listen, or 0 for a free one)"
                }
                io::ErrorKind::PermissionDenied => {
                    " (ports below 1024 are for root; choose another by --listen)"
                }
                io::ErrorKind::AddrNotAvailable => {
                    " (no address of this machine; 0.0.0.0 stands for all it has)"
                }
                _ => "",
            };
            Error::from_io("listen", format!("{address}{hint}"), error)
        };
        let addresses: Vec<SocketAddr> = address.to_socket_addrs().map_err(fail)?.collect();
        let listener = std::net::TcpListener::bind(&addresses[..]).map_err(fail)?;
        Self::from_tcp(listener).map_err(fail)
    }

    /// Listens on a unix socket. A socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// When somebody does listen there, or something else is there, or the path cannot be used.
    pub fn unix(path: &Path) -> Result<Self, Error> {
        let name = printable(&path).to_string();
        let fail = |error: io::Error| {
            let is_missing = error.kind() == io::ErrorKind::NotFound;
            let hint = if is_missing { " (its directory must exist)" } else { "" };
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
                    std::fs::remove_file(path).map_err(fail)?;
                }
                // Whoever may not connect cannot know that nobody listens.
                Err(error) => return Err(fail(error)),
                Ok(_) => {
                    let what = format!("{name}: another server listens there");
                    return Err(Error::new(ErrorKind::Busy, "listen", what));
                }
            }
        }
        let listener = std::os::unix::net::UnixListener::bind(path).map_err(fail)?;
        let mut listener = Self::from_unix(listener).map_err(fail)?;
        listener.path = Some((path.to_owned(), file_id(path).map_err(fail)?));
        listener.name = format!("unix:{name}");
        Ok(listener)
    }

    /// Takes a bound TCP socket over, as socket activation passes one.
    ///
    /// # Errors
    /// When it cannot be used in the running tokio runtime.
    pub fn from_tcp(listener: std::net::TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let name = listener.local_addr()?.to_string();
        let socket = Socket::Tcp(TcpListener::from_std(listener)?);
        Ok(Self { socket, name, path: None })
    }

    /// Takes a bound unix socket over.
    ///
    /// # Errors
    /// When it cannot be used in the running tokio runtime.
    pub fn from_unix(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let path = address.as_pathname().map(|path| printable(&path).to_string());
        let name = format!("unix:{}", path.unwrap_or_default());
        let socket = Socket::Unix(UnixListener::from_std(listener)?);
        Ok(Self { socket, name, path: None })
    }

    /// What it listens on, for people.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) async fn accept(&self) -> io::Result<Stream> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                set_options(&stream);
                Ok(Stream::Tcp(stream))
            }
            Socket::Unix(listener) => Ok(Stream::Unix(listener.accept().await?.0)),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, id)) = &self.path
            && file_id(path).is_ok_and(|now| now == *id)
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Says what is wrong with an address that is none, which the resolver would not.
fn check_address(address: &str) -> Result<(), Error> {
    let Some((host, port)) = address.rsplit_once(':') else {
        return Err(invalid(
            address,
            "the port is missing; write HOST:PORT, as in 127.0.0.1:10809",
        ));
    };
    if host.is_empty() {
        let why = format!("the host is missing; write 127.0.0.1:{port}, or 0.0.0.0:{port} for all");
        return Err(invalid(address, &why));
    }
    if host.contains(':') && !host.starts_with('[') {
        let why = "write HOST:PORT with an IPv6 address in brackets, as in [::1]:10809";
        return Err(invalid(address, why));
    }
    match port.parse::<u16>() {
        Ok(_) => Ok(()),
        Err(_) => Err(invalid(address, "the port must be a number from 0 to 65535")),
    }
}

fn invalid(what: &str, why: &str) -> Error {
    Error::new(ErrorKind::Invalid, "listen", format!("{what}: {why}"))
}

fn file_id(path: &Path) -> io::Result<FileId> {
    path.symlink_metadata().map(|meta| (meta.dev(), meta.ino()))
}

/// A client that is gone already is no reason to stop accepting, so errors are left to its reads.
fn set_options(stream: &TcpStream) {
    // Replies are gathered already; Nagle would only hold them back.
    let _ = set_tcp_nodelay(stream, true);
    // A client that lost its power never says good-bye.
    let _ = set_socket_keepalive(stream, true)
        .and_then(|()| set_tcp_keepidle(stream, KEEPALIVE_IDLE))
        .and_then(|()| set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL))
        .and_then(|()| set_tcp_keepcnt(stream, KEEPALIVE_PROBES_MAX));
}

impl Stream {
    /// Who is at the other end, for people.
    pub(crate) fn peer(&self) -> String {
        match self {
            Self::Tcp(stream) => match stream.peer_addr() {
                Ok(address) => address.to_string(),
                Err(_) => "a client that left".to_owned(),
            },
            Self::Unix(stream) => match stream.peer_cred() {
                // There is no process id when it is in another namespace.
                Ok(who) => format!("unix:pid={},uid={}", who.pid().unwrap_or(0), who.uid()),
                Err(_) => "unix".to_owned(),
            },
        }
    }

    pub(crate) fn into_fd(self) -> io::Result<OwnedFd> {
        Ok(match self {
            Self::Tcp(stream) => stream.into_std()?.into(),
            Self::Unix(stream) => stream.into_std()?.into(),
        })
    }
}
