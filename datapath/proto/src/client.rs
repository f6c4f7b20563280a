//! The handshake, client side. For the messages see [`crate::ServerHandshake`]'s module.

use std::mem;

use sheave_core::{BlockSizes, Capabilities, VolumeInfo};

use crate::bytes::{Put, Reader, as_string};
use crate::wire::{
    EXPORT_NAME_PADDING_LEN, ReplyStyle, handshake_flag, header_len, magic, option, reply_type,
    transmission_flag,
};

mod gathered;
mod in_flight;
mod options;
mod transmission;

pub use gathered::{Answer, REPLY_ERRORS_MAX, ServerError};
pub use in_flight::Cookie;
pub use transmission::{CLIENT_IN_FLIGHT_MAX, Client, ClientEvent, PayloadPlace};

/// The longest data of a reply to an option in bytes.
pub const OPTION_REPLY_LEN_MAX: usize = 16 << 10;
/// The most replies to one option; bounds how many exports a server may list.
pub const OPTION_REPLIES_MAX: usize = 64 << 10;
/// The most metadata contexts that are requested and accepted.
pub const CONTEXTS_MAX: usize = 64;

/// The configuration of a client.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// The export; the empty name is the server's default, if it has one.
    pub export: String,
    /// The goal of the handshake.
    pub goal: Goal,
    /// The best style of replies to request; the server decides.
    pub style: ReplyStyle,
    /// Metadata contexts to select, such as `base:allocation`; needs more than simple replies.
    pub contexts: Vec<String>,
    /// Request the block sizes, and so promise to respect them.
    pub block_sizes: bool,
    /// Encrypt the connection or fail.
    pub tls: bool,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            export: String::new(),
            goal: Goal::Go,
            style: ReplyStyle::Extended,
            contexts: vec!["base:allocation".to_owned()],
            block_sizes: true,
            tls: false,
        }
    }
}

/// The goal of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Transmission.
    Go,
    /// Information about the export. The metadata contexts are then not selected but listed: those
    /// that match the queries in [`ClientConfig::contexts`], or all if there is none.
    Info,
    /// The names of all exports.
    List,
}

/// A client's handshake: takes bytes, returns bytes and a decision, and never blocks.
#[derive(Debug)]
pub struct ClientHandshake {
    config: ClientConfig,
    state: State,
    /// The part of the next message that has arrived.
    buffer: Vec<u8>,
    no_zeroes: bool,
    is_tls: bool,
    style: ReplyStyle,
    found: Found,
    entries: Vec<ExportEntry>,
    /// Replies to the option in flight.
    replies: usize,
}

/// The result of some input.
#[derive(Debug)]
pub struct ClientStep {
    /// The consumed bytes of the input.
    pub consumed: usize,
    /// Bytes for the server, to be sent in any case.
    pub output: Vec<u8>,
    /// The next step.
    pub next: ClientNext,
}

/// The next step.
#[derive(Debug)]
pub enum ClientNext {
    /// Step again, with the rest of the input or, if there is none, with more.
    NeedMore,
    /// Send the output, do the TLS handshake, send the bytes that [`ClientHandshake::tls_started`]
    /// returns, and go on with decrypted input.
    StartTls,
    /// Transmission begins.
    Ready(Box<ClientNegotiated>),
    /// The server's answers; the connection is of no more use.
    Info(Box<ClientNegotiated>),
    /// The server's exports; the connection is of no more use.
    Listed(Vec<ExportEntry>),
    /// It failed; the connection is of no more use. Send the output, which ends the session.
    Failed(ClientError),
}

/// An export in a server's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportEntry {
    /// Its name.
    pub name: String,
    /// What it is, for people; may be empty.
    pub description: String,
}

/// What a client and a server agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientNegotiated {
    /// The style of requests and replies.
    pub style: ReplyStyle,
    /// Size of the export in bytes.
    pub size: u64,
    /// The server's capabilities ([`transmission_flag`]).
    pub transmission_flags: u16,
    /// The server's block sizes, or the protocol's defaults.
    pub block: BlockSizes,
    /// The server sent its block sizes.
    pub block_sizes_told: bool,
    /// Ids and names of the selected metadata contexts; of those listed for [`Goal::Info`], whose
    /// ids mean nothing.
    pub contexts: Vec<(u32, String)>,
    /// The export's name as the server has it.
    pub name: Option<String>,
    /// What it is, for people.
    pub description: Option<String>,
    /// The connection is encrypted.
    pub tls: bool,
}

impl ClientNegotiated {
    /// Whether the server has all of these [`transmission_flag`]s.
    #[must_use]
    pub fn has(&self, flags: u16) -> bool {
        self.transmission_flags & flags == flags
    }

    /// The id of a selected metadata context.
    #[must_use]
    pub fn context(&self, name: &str) -> Option<u32> {
        self.contexts.iter().find(|(_, known)| known == name).map(|(id, _)| *id)
    }

    /// The export as a volume of [`Self::size`] bytes.
    #[must_use]
    pub fn volume_info(&self) -> VolumeInfo {
        use transmission_flag as flag;
        VolumeInfo {
            block: self.block,
            read_only: self.has(flag::READ_ONLY),
            rotational: self.has(flag::ROTATIONAL),
            volatile: false,
            identity: None,
            can: Capabilities {
                flush: self.has(flag::SEND_FLUSH),
                fua: self.has(flag::SEND_FUA),
                trim: self.has(flag::SEND_TRIM),
                write_zeroes: self.has(flag::SEND_WRITE_ZEROES),
                fast_zero: self.has(flag::SEND_FAST_ZERO),
                cache: self.has(flag::SEND_CACHE),
                block_status: self.context("base:allocation").is_some(),
                multi_conn: self.has(flag::CAN_MULTI_CONN),
            },
        }
    }
}

/// Why a client's handshake failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The configuration cannot be put on the wire.
    #[error("{0}")]
    Config(&'static str),
    /// The peer is no NBD server.
    #[error("the server does not speak NBD")]
    NotNbd,
    /// The server is too old for the request.
    #[error("the server is too old: {0}")]
    TooOld(&'static str),
    /// The server broke the protocol.
    #[error("the server broke the protocol: {0}")]
    Violation(&'static str),
    /// The server refused.
    #[error("{}", refusal_text(*option, *code, message))]
    Refused {
        /// The option ([`option`]).
        option: u32,
        /// The reason ([`reply_type`]).
        code: u32,
        /// The server's message.
        message: String,
    },
    /// The server closed the connection.
    #[error("the server closed the connection {0}")]
    Closed(&'static str),
    /// The caller went on after the end, or without TLS.
    #[error("the handshake is over")]
    Over,
}

/// The message that is arriving.
#[derive(Clone, Copy, Debug)]
enum State {
    Greeting,
    ReplyHeader { option: u32 },
    ReplyData { option: u32, kind: u32, len: usize },
    ExportNameReply,
    Tls,
    Over,
}

/// The server's answers so far.
#[derive(Clone, Debug, Default)]
struct Found {
    size_and_flags: Option<(u64, u16)>,
    block: Option<BlockSizes>,
    contexts: Vec<(u32, String)>,
    name: Option<String>,
    description: Option<String>,
}

impl ClientHandshake {
    /// A handshake that waits for the server's greeting.
    ///
    /// # Errors
    /// When a name in `config` is too long or has a NUL, or there are too many contexts.
    pub fn new(config: ClientConfig) -> Result<Self, ClientError> {
        if as_string(config.export.as_bytes()).is_none() {
            let why = "an export's name has at most 4096 bytes, none of them NUL";
            return Err(ClientError::Config(why));
        }
        let has_bad_context =
            config.contexts.iter().any(|name| as_string(name.as_bytes()).is_none());
        if has_bad_context || config.contexts.len() > CONTEXTS_MAX {
            let why = "a context's name has at most 4096 bytes, and there are at most 64";
            return Err(ClientError::Config(why));
        }
        Ok(Self {
            config,
            state: State::Greeting,
            buffer: Vec::new(),
            no_zeroes: false,
            is_tls: false,
            style: ReplyStyle::Simple,
            found: Found::default(),
            entries: Vec::new(),
            replies: 0,
        })
    }

    /// TLS has started; returns the bytes to send next, encrypted.
    ///
    /// # Panics
    /// When the last step was not [`ClientNext::StartTls`]: a bug of the caller.
    #[must_use]
    pub fn tls_started(&mut self) -> Vec<u8> {
        assert!(matches!(self.state, State::Tls), "TLS starts when the handshake says so");
        self.is_tls = true;
        let mut out = Vec::new();
        self.after_tls(&mut out);
        out
    }

    /// The error if the server closes the connection now.
    #[must_use]
    pub fn closed(&self) -> ClientError {
        ClientError::Closed(match self.state {
            State::Greeting => "before it said anything",
            State::ExportNameReply => "instead of an answer: it has no such export",
            State::ReplyHeader { .. } | State::ReplyData { .. } => "instead of an answer",
            State::Tls => "instead of starting TLS",
            State::Over => "after the handshake",
        })
    }

    /// Takes input up to the end of one message and goes on from there. Consumes something
    /// whenever there is input and the handshake is not over.
    pub fn step(&mut self, input: &[u8]) -> ClientStep {
        let mut consumed = 0;
        loop {
            let wanted = match self.state {
                State::Greeting => header_len::GREETING,
                State::ReplyHeader { .. } => header_len::OPTION_REPLY,
                State::ReplyData { len, .. } => len,
                State::ExportNameReply if self.no_zeroes => EXPORT_NAME_REPLY_LEN,
                State::ExportNameReply => EXPORT_NAME_REPLY_LEN + EXPORT_NAME_PADDING_LEN,
                State::Tls | State::Over => {
                    self.state = State::Over;
                    let next = ClientNext::Failed(ClientError::Over);
                    return ClientStep { consumed, output: Vec::new(), next };
                }
            };
            let taken = (wanted - self.buffer.len()).min(input.len() - consumed);
            self.buffer.extend_from_slice(&input[consumed..consumed + taken]);
            consumed += taken;
            if self.buffer.len() < wanted {
                return ClientStep { consumed, output: Vec::new(), next: ClientNext::NeedMore };
            }
            let is_last = consumed == input.len();
            if let Some((output, next)) = self.message(is_last) {
                return ClientStep { consumed, output, next };
            }
        }
    }

    /// Takes a whole message out of the buffer. `None` when its data is needed.
    fn message(&mut self, is_last: bool) -> Option<(Vec<u8>, ClientNext)> {
        let message = mem::take(&mut self.buffer);
        let mut out = Vec::new();
        let next = match self.state {
            State::Greeting => self.greeting(&message, &mut out),
            State::ReplyHeader { option } => match self.reply_header(option, &message) {
                Ok(()) => return None,
                Err(error) => Err(error),
            },
            State::ReplyData { option, kind, .. } => self.reply(option, kind, &message, &mut out),
            State::ExportNameReply => self.export_name_reply(&message),
            State::Tls | State::Over => Err(ClientError::Over),
        };
        let next = match next {
            // Plain text after this is a forgery by a third party, not by the server.
            Ok(ClientNext::StartTls) if !is_last => {
                Err(ClientError::Violation("it sent plain text after it agreed to start TLS"))
            }
            next => next,
        };
        match next {
            Ok(ClientNext::NeedMore) => {}
            Ok(ClientNext::StartTls) => self.state = State::Tls,
            Ok(_) | Err(_) => self.state = State::Over,
        }
        Some((out, next.unwrap_or_else(ClientNext::Failed)))
    }

    fn greeting(&mut self, message: &[u8], out: &mut Vec<u8>) -> Result<ClientNext, ClientError> {
        let mut fields = Reader::new(message);
        let mut read = || Some((fields.u64()?, fields.u64()?, fields.u16()?));
        let (first, second, flags) = read().expect("the message is whole");
        match (first, second) {
            (magic::NBD, magic::OPTION) => {}
            (magic::NBD, magic::OLD_STYLE) => {
                return Err(ClientError::TooOld("it does oldstyle negotiation only"));
            }
            _ => return Err(ClientError::NotNbd),
        }
        // Unknown flags are ignored.
        let flags = flags & handshake_flag::ALL;
        self.no_zeroes = flags & handshake_flag::NO_ZEROES != 0;
        out.put_u32(u32::from(flags));
        if flags & handshake_flag::FIXED_NEWSTYLE != 0 {
            self.first_option(out);
            return Ok(ClientNext::NeedMore);
        }
        if self.config.tls {
            return Err(ClientError::TooOld("it cannot do TLS"));
        }
        if self.config.goal != Goal::Go {
            return Err(ClientError::TooOld("it cannot tell about its exports"));
        }
        self.send_export_name(out);
        Ok(ClientNext::NeedMore)
    }

    fn reply_header(&mut self, option: u32, message: &[u8]) -> Result<(), ClientError> {
        let mut fields = Reader::new(message);
        let mut read = || Some((fields.u64()?, fields.u32()?, fields.u32()?, fields.u32()?));
        let (found, answered, kind, len) = read().expect("the message is whole");
        if found != magic::OPTION_REPLY {
            return Err(ClientError::Violation("a reply without its magic number"));
        }
        if answered != option {
            return Err(ClientError::Violation("a reply to an option that was not sent"));
        }
        let len = len as usize;
        if len > OPTION_REPLY_LEN_MAX {
            return Err(ClientError::Violation("a reply that is too long"));
        }
        self.replies += 1;
        if self.replies > OPTION_REPLIES_MAX {
            return Err(ClientError::Violation("too many replies to one option"));
        }
        self.state = State::ReplyData { option, kind, len };
        Ok(())
    }

    fn export_name_reply(&mut self, message: &[u8]) -> Result<ClientNext, ClientError> {
        let mut fields = Reader::new(message);
        self.found.size_and_flags = fields.u64().zip(fields.u16());
        Ok(ClientNext::Ready(Box::new(self.negotiated()?)))
    }
}

const EXPORT_NAME_REPLY_LEN: usize = 10;

fn refusal_text(option: u32, code: u32, message: &str) -> String {
    let what = match option {
        option::LIST => "to list its exports",
        option::STARTTLS => "to start TLS",
        option::INFO | option::GO => "the export",
        _ => "an option",
    };
    let why = match code {
        reply_type::ERR_UNSUP => "it does not know how",
        reply_type::ERR_POLICY => "its configuration forbids it",
        reply_type::ERR_TLS_REQD => "it wants TLS: write nbds://, and tls-certificates=DIR",
        reply_type::ERR_UNKNOWN => "it has no such export",
        reply_type::ERR_SHUTDOWN => "it is shutting down",
        reply_type::ERR_BLOCK_SIZE_REQD => "it wants its block sizes to be asked for",
        _ => "it gave no known reason",
    };
    // The server's message is left out where ours says the same.
    let said = match message {
        message if why.contains(message) => String::new(),
        message => format!(" ({message})"),
    };
    let reason = reply_type::ERROR_BIT ^ code;
    format!("the server refused {what}: {why}{said} [error {reason}]")
}
