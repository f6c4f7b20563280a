//! Connecting, TLS and option haggling: everything that waits. Never on a shard.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use rustls::ClientConnection;
use sheave_core::{Error, ErrorKind, Result};
use sheave_proto::uri::{NbdUri, Transport};
use sheave_proto::{ClientConfig, ClientHandshake, ClientNegotiated, ClientNext, Goal};

use crate::RemoteOptions;

const RECEIVE_LEN: usize = 16 << 10;
/// An idle connection is probed after so long, so often, and so many times before it counts as
/// broken: a server that is gone without a word is noticed after 11 s.
const KEEP_IDLE: Duration = Duration::from_secs(5);
const KEEP_INTERVAL: Duration = Duration::from_secs(2);
const KEEP_COUNT: u32 = 3;
/// The same for data that is not acknowledged, in milliseconds.
const USER_TIMEOUT_MS: u32 = 11_000;

/// A negotiated connection.
pub(crate) struct Connected {
    /// In blocking mode, without time-outs.
    pub(crate) socket: OwnedFd,
    pub(crate) tls: Option<Box<ClientConnection>>,
    pub(crate) negotiated: ClientNegotiated,
    /// What the server has sent behind its last reply.
    pub(crate) input: Vec<u8>,
}

/// As many connections as are wanted and allowed, at least one.
///
/// # Errors
/// Why there are none.
pub(crate) fn connect_all(options: &RemoteOptions) -> Result<Vec<Connected>> {
    let first = connect(options, Goal::Go)?;
    let count = match first.negotiated.volume_info().can.multi_conn {
        true => options.connections,
        false => 1,
    };
    let mut all = vec![first];
    while all.len() < count {
        all.push(connect(options, Goal::Go)?);
    }
    Ok(all)
}

/// What the export is now.
///
/// # Errors
/// Why that cannot be found out.
pub(crate) fn inquire(options: &RemoteOptions) -> Result<ClientNegotiated> {
    connect(options, Goal::Info).map(|connected| connected.negotiated)
}

fn connect(options: &RemoteOptions, goal: Goal) -> Result<Connected> {
    let uri = &options.uri;
    let by = Instant::now() + options.connect_timeout;
    let name = &options.name;
    let fail = |error| Error::from_io("connect", name.clone(), error);
    let refused =
        |what: String| Error::new(ErrorKind::Invalid, "connect", format!("{name}: {what}"));
    let config =
        ClientConfig { export: uri.export.clone(), tls: uri.tls, goal, ..ClientConfig::default() };
    let mut stream = Stream::open(uri, by).map_err(fail)?;
    let mut handshake = ClientHandshake::new(config).map_err(|error| refused(error.to_string()))?;
    let mut input = Vec::new();
    loop {
        let step = handshake.step(&input);
        input.drain(..step.consumed);
        stream.write_all(&step.output).map_err(fail)?;
        match step.next {
            ClientNext::NeedMore if step.consumed > 0 && !input.is_empty() => {}
            ClientNext::NeedMore => {
                if stream.receive(&mut input).map_err(fail)? == 0 {
                    return Err(refused(handshake.closed().to_string()));
                }
            }
            ClientNext::StartTls => {
                // What came before TLS may be anybody's.
                input.clear();
                stream.start_tls(uri)?;
                stream.write_all(&handshake.tls_started()).map_err(fail)?;
            }
            ClientNext::Ready(negotiated) | ClientNext::Info(negotiated) => {
                let (socket, tls) = stream.into_parts().map_err(fail)?;
                return Ok(Connected { socket, tls, negotiated: *negotiated, input });
            }
            ClientNext::Failed(error) => return Err(refused(error.to_string())),
            ClientNext::Listed(_) => unreachable!("no list was asked for"),
        }
    }
}

/// A connection during the handshake, whose calls wait no longer than until `by`.
struct Stream {
    socket: Socket,
    tls: Option<Box<ClientConnection>>,
    by: Instant,
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn open(uri: &NbdUri, by: Instant) -> io::Result<Self> {
        let socket = match &uri.transport {
            Transport::Tcp { host, port } => Socket::Tcp(connect_tcp(host, *port, by)?),
            Transport::Unix { path } => {
                Socket::Unix(UnixStream::connect(path).map_err(unreachable)?)
            }
            Transport::Vsock { .. } => {
                return Err(io::Error::new(io::ErrorKind::Unsupported, "vsock is not supported"));
            }
        };
        Ok(Self { socket, tls: None, by })
    }

    fn start_tls(&mut self, uri: &NbdUri) -> Result<()> {
        let why = "TLS is not supported";
        Err(Error::new(ErrorKind::Unsupported, "connect", format!("{uri}: {why}")))
    }

    fn receive(&mut self, input: &mut Vec<u8>) -> io::Result<usize> {
        let start = input.len();
        input.resize(start + RECEIVE_LEN, 0);
        let received = self.read(&mut input[start..]);
        input.truncate(start + received.as_ref().copied().unwrap_or(0));
        received
    }

    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            self.socket.limit(self.by)?;
            let read = match &mut self.tls {
                Some(tls) => rustls::Stream::new(&mut **tls, &mut self.socket).read(into),
                None => self.socket.read(into),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map_err(silent),
            }
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.limit(self.by)?;
        match &mut self.tls {
            Some(tls) => rustls::Stream::new(&mut **tls, &mut self.socket).write_all(bytes),
            None => self.socket.write_all(bytes),
        }
        .map_err(silent)
    }

    fn into_parts(self) -> io::Result<(OwnedFd, Option<Box<ClientConnection>>)> {
        let socket = match self.socket {
            Socket::Tcp(stream) => {
                stream.set_read_timeout(None)?;
                stream.set_write_timeout(None)?;
                watch(&stream)?;
                OwnedFd::from(stream)
            }
            Socket::Unix(stream) => {
                stream.set_read_timeout(None)?;
                stream.set_write_timeout(None)?;
                OwnedFd::from(stream)
            }
        };
        Ok((socket, self.tls))
    }
}

impl Socket {
    /// Lets the next calls wait until then.
    fn limit(&self, by: Instant) -> io::Result<()> {
        let left = by.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(silent(io::ErrorKind::WouldBlock.into()));
        }
        match self {
            Self::Tcp(stream) => {
                stream.set_read_timeout(Some(left))?;
                stream.set_write_timeout(Some(left))
            }
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(left))?;
                stream.set_write_timeout(Some(left))
            }
        }
    }
}

impl Read for Socket {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(into),
            Self::Unix(stream) => stream.read(into),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tries all addresses of a name within one time.
fn connect_tcp(host: &str, port: u16, by: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in (host, port).to_socket_addrs()? {
        let left = by.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(silent(io::ErrorKind::TimedOut.into()));
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(unreachable(silent(last)))
}

/// Has the kernel notice within seconds that the other side is gone.
fn watch(socket: impl AsFd) -> io::Result<()> {
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, KEEP_IDLE)?;
    sockopt::set_tcp_keepintvl(&socket, KEEP_INTERVAL)?;
    sockopt::set_tcp_keepcnt(&socket, KEEP_COUNT)?;
    sockopt::set_tcp_user_timeout(&socket, USER_TIMEOUT_MS)?;
    Ok(())
}

/// Names a time-out as what it is.
fn silent(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::new(io::ErrorKind::TimedOut, "the server does not answer in time")
        }
        _ => error,
    }
}

/// Says what to look for when a connection is refused.
fn unreachable(error: io::Error) -> io::Error {
    match error.kind() {
        kind @ (io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            io::Error::new(kind, format!("{error}; is the server running?"))
        }
        _ => error,
    }
}
