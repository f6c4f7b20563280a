//! Connects to a server.

use std::io;
use std::net::{TcpStream, ToSocketAddrs as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use sheave_proto::uri::Transport;

/// A socket in blocking mode that is connected to a server, within `timeout` over all addresses of
/// its name. The resolver has limits of its own (resolv.conf(5)).
///
/// # Errors
/// Errors of the system, with advice; [`io::ErrorKind::Unsupported`] for virtual machines' sockets.
pub fn connect(transport: &Transport, timeout: Duration) -> io::Result<OwnedFd> {
    match transport {
        Transport::Unix { path } => {
            connect_unix(path, timeout).map_err(|error| advise(error.into()))
        }
        Transport::Tcp { host, port } => {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            let addresses = (host.as_str(), *port).to_socket_addrs()?;
            let by = Instant::now() + timeout;
            for address in addresses {
                let left = by.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    last = io::ErrorKind::TimedOut.into();
                    break;
                }
                match TcpStream::connect_timeout(&address, left) {
                    Ok(stream) => {
                        stream.set_nodelay(true)?;
                        return Ok(stream.into());
                    }
                    Err(error) => last = error,
                }
            }
            Err(advise(last))
        }
        Transport::Vsock { .. } => {
            Err(io::Error::new(io::ErrorKind::Unsupported, "vsock is not supported"))
        }
    }
}

fn connect_unix(path: &Path, timeout: Duration) -> rustix::io::Result<OwnedFd> {
    // An abstract name begins with NUL.
    let address = match path.as_os_str().as_bytes() {
        [0, name @ ..] => SocketAddrUnix::new_abstract_name(name)?,
        _ => SocketAddrUnix::new(path)?,
    };
    let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // It bounds the wait for room in the server's listen queue (unix(7), SO_SNDTIMEO).
    set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
    rustix::net::connect(&socket, &address)?;
    set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(socket)
}

/// Gives advice when no server listens.
fn advise(error: io::Error) -> io::Error {
    match error.kind() {
        kind @ (io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            io::Error::new(kind, format!("{error}; is the server running?"))
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixListener};
    use std::path::PathBuf;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(60);

    #[test]
    fn a_server_is_reached_by_path_by_abstract_name_and_by_address() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        connect(&Transport::Unix { path }, TIMEOUT).unwrap();

        let name = format!("sheave-connect-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
        let _listener = UnixListener::bind_addr(&address).unwrap();
        let path = PathBuf::from(format!("\0{name}"));
        connect(&Transport::Unix { path }, TIMEOUT).unwrap();

        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        // The name may have an address of IPv6 first, on which no server listens.
        connect(&Transport::Tcp { host: "localhost".to_owned(), port }, TIMEOUT).unwrap();
    }

    #[test]
    fn a_server_that_accepts_none_costs_no_more_than_the_time_given() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let transport = Transport::Unix { path };
        let limit = Duration::from_millis(100);
        let waiting: Vec<_> = (0..8).map_while(|_| connect(&transport, limit).ok()).collect();
        assert!(waiting.len() < 8, "its queue is full");
        let error = connect(&transport, limit).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
    }

    #[test]
    fn advice_is_given_where_no_server_listens() {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let nowhere = [
            Transport::Unix { path: dir.path().join("none") },
            Transport::Tcp { host: "127.0.0.1".to_owned(), port },
        ];
        for transport in nowhere {
            let error = connect(&transport, TIMEOUT).unwrap_err().to_string();
            assert!(error.ends_with("is the server running?"), "{error}");
        }
        let vsock = Transport::Vsock { cid: 1, port: 1 };
        assert!(connect(&vsock, TIMEOUT).is_err());
    }
}
