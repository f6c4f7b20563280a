//! The NBD protocol, spoken byte by byte and without any care, so that it can be spoken wrongly.
//!
//! It shares no code with the server: its numbers are copied from the protocol's document.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::server::Address;
use crate::{PATIENCE, Server};

/// Magic numbers.
#[expect(missing_docs, reason = "names of the protocol's document")]
pub mod magic {
    pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
    pub const IHAVEOPT: u64 = 0x4948_4156_454F_5054;
    pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
    pub const REQUEST: u32 = 0x2560_9513;
    pub const SIMPLE_REPLY: u32 = 0x6744_6698;
    pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;
}

/// Options.
#[expect(missing_docs, reason = "names of the protocol's document")]
pub mod opt {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
}

/// Option reply types.
#[expect(missing_docs, reason = "names of the protocol's document")]
pub mod reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Commands.
#[expect(missing_docs, reason = "names of the protocol's document")]
pub mod cmd {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
#[expect(missing_docs, reason = "names of the protocol's document")]
pub mod flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 2;
}

/// Errors on the wire.
#[expect(missing_docs, reason = "names of the protocol's document")]
pub mod errno {
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const ENOMEM: u32 = 12;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
}

/// A connection.
pub struct Wire {
    stream: Box<dyn Stream>,
}

/// What `GO` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GoReply {
    /// Size of the export in bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
}

/// One structured reply chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Flags; bit 0 is "done".
    pub flags: u16,
    /// Type.
    pub kind: u16,
    /// Cookie of the request.
    pub cookie: u64,
    /// Payload.
    pub data: Vec<u8>,
}

trait Stream: Read + Write + Send {
    fn set_timeout(&self, timeout: Duration) -> io::Result<()>;
    fn stop_sending(&self) -> io::Result<()>;
}

impl Stream for UnixStream {
    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }

    fn stop_sending(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Stream for TcpStream {
    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.set_nodelay(true)?;
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }

    fn stop_sending(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Wire {
    /// Connects to a server, wherever it listens.
    ///
    /// # Errors
    /// The system's.
    pub fn connect(server: &Server) -> io::Result<Self> {
        match server.address() {
            Address::Unix(socket) => Self::over(UnixStream::connect(socket)?),
            Address::Tcp(address) => Self::over(TcpStream::connect(address)?),
        }
    }

    /// A negotiated connection to the single export at a unix socket, with simple replies.
    ///
    /// # Errors
    /// The system's, and when the server refuses.
    pub fn unix(path: &Path) -> io::Result<Self> {
        let mut wire = Self::over(UnixStream::connect(path)?)?;
        wire.handshake()?;
        wire.go("")?;
        Ok(wire)
    }

    /// Speaks over a TCP connection.
    ///
    /// # Errors
    /// The system's.
    pub fn tcp(stream: TcpStream) -> io::Result<Self> {
        Self::over(stream)
    }

    /// A negotiated connection to a single export, with simple replies.
    ///
    /// # Errors
    /// The system's, and when the server refuses.
    pub fn ready(server: &Server) -> io::Result<Self> {
        let mut wire = Self::connect(server)?;
        wire.handshake()?;
        wire.go("")?;
        Ok(wire)
    }

    fn over(stream: impl Stream + 'static) -> io::Result<Self> {
        stream.set_timeout(PATIENCE)?;
        Ok(Self { stream: Box::new(stream) })
    }

    /// Waits no longer than this for the server.
    pub fn set_timeout(&self, timeout: Duration) {
        self.stream.set_timeout(timeout).expect("set a timeout");
    }

    /// Closes its own direction only.
    pub fn stop_sending(&self) {
        self.stream.stop_sending().expect("shut down a socket");
    }

    /// Sends any bytes.
    ///
    /// # Errors
    /// The system's.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Receives some bytes.
    ///
    /// # Errors
    /// The system's.
    pub fn receive<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Receives `len` bytes.
    ///
    /// # Errors
    /// The system's.
    pub fn receive_vec(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Whether the server closes the connection, whatever it says before, within the timeout.
    pub fn is_closed(&mut self) -> bool {
        let mut rest = [0; 4096];
        loop {
            match self.stream.read(&mut rest) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
            }
        }
    }

    /// Receives the greeting and answers it with the usual flags.
    ///
    /// # Errors
    /// The system's.
    pub fn handshake(&mut self) -> io::Result<()> {
        assert_eq!(self.greeting()?, 3, "handshake flags");
        self.send(&3_u32.to_be_bytes())
    }

    /// Receives the greeting and returns its flags.
    ///
    /// # Errors
    /// The system's.
    pub fn greeting(&mut self) -> io::Result<u16> {
        assert_eq!(u64::from_be_bytes(self.receive()?), magic::NBDMAGIC);
        assert_eq!(u64::from_be_bytes(self.receive()?), magic::IHAVEOPT);
        Ok(u16::from_be_bytes(self.receive()?))
    }

    /// Sends an option.
    ///
    /// # Errors
    /// The system's.
    pub fn option(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let len = u32::try_from(data.len()).expect("a short option");
        self.send(&option_header(option, len))?;
        self.send(data)
    }

    /// Receives an option reply: its type and data.
    ///
    /// # Errors
    /// The system's.
    pub fn option_reply(&mut self, option: u32) -> io::Result<(u32, Vec<u8>)> {
        assert_eq!(u64::from_be_bytes(self.receive()?), magic::OPTION_REPLY);
        assert_eq!(u32::from_be_bytes(self.receive()?), option, "the option that is answered");
        let kind = u32::from_be_bytes(self.receive()?);
        let len = u32::from_be_bytes(self.receive()?);
        assert!(len <= 65536, "an option reply of {len} bytes");
        Ok((kind, self.receive_vec(len as usize)?))
    }

    /// Negotiates an export; an option reply that refuses it is `InvalidInput`.
    ///
    /// # Errors
    /// The system's.
    pub fn go(&mut self, export: &str) -> io::Result<GoReply> {
        self.option(opt::GO, &go_data(export))?;
        let mut export = None;
        loop {
            match self.option_reply(opt::GO)? {
                (reply::ACK, _) => return export.ok_or_else(no_info),
                (reply::INFO, data) if data[..2] == [0, 0] => {
                    let size = data[2..10].try_into().expect("8 bytes");
                    let flags = data[10..12].try_into().expect("2 bytes");
                    export = Some(GoReply {
                        size: u64::from_be_bytes(size),
                        flags: u16::from_be_bytes(flags),
                    });
                }
                (reply::INFO, _) => {}
                (kind, _) => {
                    let text = format!("option reply {kind:#x}");
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
                }
            }
        }
    }

    /// Sends a request without a payload.
    ///
    /// # Errors
    /// The system's.
    pub fn request(&mut self, command: u16, cookie: u64, at: u64, len: u32) -> io::Result<()> {
        self.send(&request_header(0, command, cookie, at, len))
    }

    /// Receives a simple reply's error; it must have this cookie.
    ///
    /// # Errors
    /// The system's.
    pub fn simple_reply(&mut self, cookie: u64) -> io::Result<u32> {
        let (error, got) = self.any_simple_reply()?;
        assert_eq!(got, cookie, "cookie");
        Ok(error)
    }

    /// Receives a simple reply: its error and cookie.
    ///
    /// # Errors
    /// The system's.
    pub fn any_simple_reply(&mut self) -> io::Result<(u32, u64)> {
        assert_eq!(u32::from_be_bytes(self.receive()?), magic::SIMPLE_REPLY);
        let error = u32::from_be_bytes(self.receive()?);
        Ok((error, u64::from_be_bytes(self.receive()?)))
    }

    /// Receives a structured reply chunk.
    ///
    /// # Errors
    /// The system's.
    pub fn chunk(&mut self) -> io::Result<Chunk> {
        assert_eq!(u32::from_be_bytes(self.receive()?), magic::STRUCTURED_REPLY);
        let flags = u16::from_be_bytes(self.receive()?);
        let kind = u16::from_be_bytes(self.receive()?);
        let cookie = u64::from_be_bytes(self.receive()?);
        let len = u32::from_be_bytes(self.receive()?);
        Ok(Chunk { flags, kind, cookie, data: self.receive_vec(len as usize)? })
    }

    /// Writes and waits for the reply, its error.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&mut self, at: u64, data: &[u8]) -> io::Result<u32> {
        let len = u32::try_from(data.len()).expect("a payload");
        self.send(&request_header(0, cmd::WRITE, at, at, len))?;
        self.send(data)?;
        self.simple_reply(at)
    }

    /// Reads; `Err` inside is the error on the wire.
    ///
    /// # Errors
    /// The system's.
    pub fn read(&mut self, at: u64, len: u32) -> io::Result<Result<Vec<u8>, u32>> {
        self.request(cmd::READ, at, at, len)?;
        match self.simple_reply(at)? {
            0 => Ok(Ok(self.receive_vec(len as usize)?)),
            error => Ok(Err(error)),
        }
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wire")
    }
}

/// The first 16 bytes of an option.
#[must_use]
pub fn option_header(option: u32, len: u32) -> Vec<u8> {
    let mut bytes = magic::IHAVEOPT.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// The data of `GO` and `INFO` without information requests.
#[must_use]
pub fn go_data(export: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(export.len()).expect("a short name").to_be_bytes().to_vec();
    bytes.extend(export.as_bytes());
    bytes.extend(0_u16.to_be_bytes());
    bytes
}

/// A request's 28 bytes.
#[must_use]
pub fn request_header(flags: u16, command: u16, cookie: u64, at: u64, len: u32) -> Vec<u8> {
    let mut bytes = magic::REQUEST.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(at.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

fn no_info() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "acknowledged without NBD_INFO_EXPORT")
}
