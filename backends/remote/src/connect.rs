//! Connecting, TLS and option haggling: everything that waits. Never on a shard.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use rustls::ClientConnection;
use sheave_core::{Error, ErrorKind, Result};
use sheave_proto::uri::Transport;
use sheave_proto::{ClientConfig, ClientHandshake, ClientNegotiated, ClientNext, Goal};
use sheave_tls::{ClientTls, client_tls, explain_io};

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
        match connect(options, Goal::Go) {
            Ok(another) => all.push(another),
            // Some servers promise what they do not take.
            Err(error) => {
                tracing::warn!(count = all.len(), "no more connections: {error}");
                break;
            }
        }
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
    // Read each time, since certificates are renewed.
    let tls = if uri.tls { Some(client_tls(uri)?) } else { None };
    let mut stream = Stream::open(&uri.transport, by).map_err(fail)?;
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
                let tls = tls.clone().ok_or_else(|| refused("TLS was not asked for".into()))?;
                stream.start_tls(tls).map_err(fail)?;
                stream.write_all(&handshake.tls_started()).map_err(fail)?;
            }
            ClientNext::Ready(negotiated) | ClientNext::Info(negotiated) => {
                let (socket, tls) = stream.into_parts(&uri.transport).map_err(fail)?;
                return Ok(Connected { socket, tls, negotiated: *negotiated, input });
            }
            ClientNext::Failed(error) => return Err(refused(error.to_string())),
            ClientNext::Listed(_) => unreachable!("no list was asked for"),
        }
    }
}

/// A connection during the handshake, whose calls wait no longer than until `by`.
struct Stream {
    /// Of any kind: reads and writes are the same.
    socket: UnixStream,
    tls: Option<Box<ClientConnection>>,
    by: Instant,
}

impl Stream {
    fn open(transport: &Transport, by: Instant) -> io::Result<Self> {
        let socket = sheave_tls::connect(transport, left(by)?).map_err(in_words)?.into();
        Ok(Self { socket, tls: None, by })
    }

    fn start_tls(&mut self, tls: ClientTls) -> io::Result<()> {
        let mut tls = ClientConnection::new(tls.config, tls.server).map_err(io::Error::other)?;
        // A send is bounded by what is gathered for it; rustls need not bound it again.
        tls.set_buffer_limit(None);
        self.tls = Some(Box::new(tls));
        Ok(())
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
            self.limit()?;
            let read = match &mut self.tls {
                Some(tls) => rustls::Stream::new(&mut **tls, &mut self.socket).read(into),
                None => self.socket.read(into),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map_err(in_words),
            }
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.limit()?;
        match &mut self.tls {
            Some(tls) => {
                let mut stream = rustls::Stream::new(&mut **tls, &mut self.socket);
                stream.write_all(bytes).and_then(|()| stream.flush())
            }
            None => self.socket.write_all(bytes),
        }
        .map_err(in_words)
    }

    /// Lets the next call wait as long as there is time.
    fn limit(&self) -> io::Result<()> {
        let left = Some(left(self.by)?);
        self.socket.set_read_timeout(left)?;
        self.socket.set_write_timeout(left)
    }

    fn into_parts(
        self,
        transport: &Transport,
    ) -> io::Result<(OwnedFd, Option<Box<ClientConnection>>)> {
        self.socket.set_read_timeout(None)?;
        self.socket.set_write_timeout(None)?;
        if let Transport::Tcp { .. } = transport {
            watch(&self.socket)?;
        }
        Ok((self.socket.into(), self.tls))
    }
}

/// Has the kernel notice within seconds that the other side is gone.
fn watch(socket: impl AsFd) -> io::Result<()> {
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, KEEP_IDLE)?;
    sockopt::set_tcp_keepintvl(&socket, KEEP_INTERVAL)?;
    sockopt::set_tcp_keepcnt(&socket, KEEP_COUNT)?;
    sockopt::set_tcp_user_timeout(&socket, USER_TIMEOUT_MS)?;
    Ok(())
}

/// The time that is left until then.
fn left(by: Instant) -> io::Result<Duration> {
    let left = by.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(in_words(io::ErrorKind::TimedOut.into())) } else { Ok(left) }
}

/// Says what a time-out is, and what TLS finds wrong.
fn in_words(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            let why = "the server does not answer in time (connect-timeout); is it an NBD server?";
            io::Error::new(io::ErrorKind::TimedOut, why)
        }
        _ => explain_io(error),
    }
}
