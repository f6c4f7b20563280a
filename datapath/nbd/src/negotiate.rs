//! Opening a connection to a server by blocking calls: connect, TLS, options.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::sockopt::{self, Timeout};
use rustls::{ClientConnection, StreamOwned};
use sheave_core::{Error, ErrorKind};
use sheave_proto::{
    ClientConfig, ClientError, ClientHandshake, ClientNegotiated, ClientNext, ExportEntry,
    uri::Transport,
};
use sheave_tls::{ClientTls, explain_io};

/// The most that is received at once, in bytes.
const RECEIVE_LEN: usize = 256 << 10;

/// A connection, encrypted or not.
pub(crate) trait Stream: Read + Write + Send {
    /// The version of TLS and the cipher suite, if it is encrypted.
    fn tls(&self) -> Option<String> {
        None
    }
}

impl Stream for UnixStream {}

impl Stream for StreamOwned<ClientConnection, Box<dyn Stream>> {
    fn tls(&self) -> Option<String> {
        let version = format!("{:?}", self.conn.protocol_version()?);
        let suite = self.conn.negotiated_cipher_suite()?.suite();
        let suite =
            suite.as_str().unwrap_or("an unknown cipher suite").trim_start_matches("TLS13_");
        Some(format!("{} with {suite}", version.replace("TLSv1_", "TLS 1.")))
    }
}

/// What a handshake has come to.
pub(crate) enum Reached {
    /// Transmission begins; `input` is what has been received of it.
    Ready { stream: Box<dyn Stream>, negotiated: Box<ClientNegotiated>, input: Vec<u8> },
    /// The server has told what the export is.
    Info { negotiated: Box<ClientNegotiated>, tls: Option<String> },
    /// The server has told what it has.
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
        Self::Io(match error.kind() {
            io::ErrorKind::WouldBlock => {
                let why = "the server does not answer; is it an NBD server?";
                io::Error::new(io::ErrorKind::TimedOut, why)
            }
            _ => explain_io(error),
        })
    }
}

/// Connects and negotiates. A server that is silent for longer than `silence_max`, then or later,
/// is an error.
pub(crate) fn negotiate(
    transport: &Transport,
    config: ClientConfig,
    tls: Option<&ClientTls>,
    silence_max: Duration,
) -> Result<Reached, Refused> {
    let mut stream = connect(transport, silence_max)?;
    let mut handshake = ClientHandshake::new(config).map_err(Refused::Server)?;
    let mut input = Vec::new();
    loop {
        let step = handshake.step(&input);
        input.drain(..step.consumed);
        stream.write_all(&step.output)?;
        match step.next {
            ClientNext::NeedMore if step.consumed > 0 && !input.is_empty() => {}
            ClientNext::NeedMore => {
                if receive(&mut *stream, &mut input)? == 0 {
                    return Err(Refused::Server(handshake.closed()));
                }
            }
            ClientNext::StartTls => {
                let Some(tls) = tls else { return Ok(Reached::Tls) };
                // What came before TLS may be anybody's.
                input.clear();
                stream = start_tls(stream, tls.clone())?;
                stream.write_all(&handshake.tls_started())?;
            }
            ClientNext::Ready(negotiated) => {
                return Ok(Reached::Ready { stream, negotiated, input });
            }
            ClientNext::Info(negotiated) => {
                return Ok(Reached::Info { negotiated, tls: stream.tls() });
            }
            ClientNext::Listed(exports) => return Ok(Reached::Listed(exports)),
            ClientNext::Failed(error) => return Err(Refused::Server(error)),
        }
    }
}

fn connect(transport: &Transport, silence_max: Duration) -> io::Result<Box<dyn Stream>> {
    let socket = sheave_tls::connect(transport, silence_max)?;
    for way in [Timeout::Recv, Timeout::Send] {
        sockopt::set_socket_timeout(&socket, way, Some(silence_max))?;
    }
    // Reads and writes are the same for TCP.
    Ok(Box::new(UnixStream::from(socket)))
}

fn start_tls(stream: Box<dyn Stream>, tls: ClientTls) -> io::Result<Box<dyn Stream>> {
    let tls = ClientConnection::new(tls.config, tls.server).map_err(io::Error::other)?;
    Ok(Box::new(StreamOwned::new(tls, stream)))
}

/// Receives once, behind what is in `input`; 0 when the server has closed the connection.
pub(crate) fn receive(stream: &mut dyn Stream, input: &mut Vec<u8>) -> io::Result<usize> {
    let start = input.len();
    input.resize(start + RECEIVE_LEN, 0);
    let received = loop {
        match stream.read(&mut input[start..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other,
        }
    };
    input.truncate(start + received.as_ref().copied().unwrap_or(0));
    received
}
