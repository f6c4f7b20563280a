//! Reaching a server: connecting, TLS, option haggling. Everything that waits, in blocking calls.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustls::ClientConnection;
use sheave_core::{Error, ErrorKind};
use sheave_proto::uri::Transport;
use sheave_proto::{
    ClientConfig, ClientError, ClientHandshake, ClientNegotiated, ClientNext, ExportEntry,
};
use sheave_tls::{ClientTls, explain_io};

/// The most that is received at once, in bytes.
const RECEIVE_LEN: usize = 16 << 10;

/// What a handshake has come to.
pub(crate) enum Reached {
    /// The server has described the export. Transmission begins if that was the goal; `input` is
    /// what has been received of it.
    Negotiated { stream: Stream, negotiated: Box<ClientNegotiated>, input: Vec<u8> },
    /// The server has listed its exports.
    Listed(Vec<ExportEntry>),
    /// The server would start TLS, and the caller has no configuration for it.
    Tls,
}

/// Why no connection was opened.
#[derive(Debug)]
pub(crate) enum Refused {
    /// The network, TLS, or no server.
    Io(io::Error),
    /// What the server said, or what it is not.
    Server(ClientError),
}

impl Refused {
    /// The error of a connection to the server of this name.
    pub(crate) fn at(self, name: &str) -> Error {
        match self {
            Self::Io(error) => Error::from_io("connect", name, error),
            Self::Server(error) => {
                Error::new(ErrorKind::Invalid, "connect", format!("{name}: {error}"))
            }
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::Server(error) => error.fmt(f),
        }
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Connects and negotiates, until `by` at the longest.
pub(crate) fn reach(
    transport: &Transport,
    config: ClientConfig,
    tls: Option<&ClientTls>,
    by: Instant,
) -> Result<Reached, Refused> {
    let mut stream = Stream::open(transport, by)?;
    let mut handshake = ClientHandshake::new(config).map_err(Refused::Server)?;
    let mut input = Vec::new();
    loop {
        let step = handshake.step(&input);
        input.drain(..step.consumed);
        stream.write_all(&step.output)?;
        match step.next {
            ClientNext::NeedMore if step.consumed > 0 && !input.is_empty() => {}
            ClientNext::NeedMore => {
                if stream.receive(&mut input)? == 0 {
                    return Err(Refused::Server(handshake.closed()));
                }
            }
            ClientNext::StartTls => {
                let Some(tls) = tls else { return Ok(Reached::Tls) };
                // Bytes from before TLS may be forged.
                input.clear();
                stream.start_tls(tls.clone())?;
                stream.write_all(&handshake.tls_started())?;
            }
            ClientNext::Ready(negotiated) | ClientNext::Info(negotiated) => {
                return Ok(Reached::Negotiated { stream, negotiated, input });
            }
            ClientNext::Listed(exports) => return Ok(Reached::Listed(exports)),
            ClientNext::Failed(error) => return Err(Refused::Server(error)),
        }
    }
}

/// A connection during the handshake, whose calls wait no longer than until `by`.
pub(crate) struct Stream {
    socket: Timed,
    tls: Option<Box<ClientConnection>>,
}

/// A socket whose calls wait no longer than until `by`, however many TLS makes of them.
struct Timed {
    /// Of any kind: reads and writes are the same.
    socket: UnixStream,
    by: Instant,
}

impl Stream {
    fn open(transport: &Transport, by: Instant) -> io::Result<Self> {
        let socket = sheave_tls::connect(transport, left(by)?).map_err(in_words)?.into();
        Ok(Self { socket: Timed { socket, by }, tls: None })
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
        match &mut self.tls {
            Some(tls) => {
                let mut stream = rustls::Stream::new(&mut **tls, &mut self.socket);
                let sent = stream.write_all(bytes).and_then(|()| stream.flush());
                sent.map_err(|error| match error.kind() {
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                        refusal(tls, &mut self.socket).unwrap_or(error)
                    }
                    _ => error,
                })
            }
            None => self.socket.write_all(bytes),
        }
        .map_err(in_words)
    }

    /// The version of TLS and the cipher suite, if it is encrypted.
    pub(crate) fn tls(&self) -> Option<String> {
        let tls = self.tls.as_ref()?;
        let version = format!("{:?}", tls.protocol_version()?);
        let suite = tls.negotiated_cipher_suite()?.suite();
        let suite =
            suite.as_str().unwrap_or("an unknown cipher suite").trim_start_matches("TLS13_");
        Some(format!("{} with {suite}", version.replace("TLSv1_", "TLS 1.")))
    }

    /// The socket, in blocking mode and without time-outs.
    pub(crate) fn into_parts(self) -> io::Result<(OwnedFd, Option<Box<ClientConnection>>)> {
        let socket = self.socket.socket;
        socket.set_read_timeout(None)?;
        socket.set_write_timeout(None)?;
        Ok((socket.into(), self.tls))
    }
}

impl Read for Timed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(Some(left(self.by)?))?;
        self.socket.read(into)
    }
}

impl Write for Timed {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(Some(left(self.by)?))?;
        self.socket.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

/// Why a server has closed the connection, if it has sent an alert before that.
fn refusal(tls: &mut ClientConnection, socket: &mut Timed) -> Option<io::Error> {
    while tls.read_tls(socket).ok()? > 0 {
        if let Err(error) = tls.process_new_packets() {
            return Some(io::Error::new(io::ErrorKind::InvalidData, error));
        }
    }
    None
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
