//! The handshake, server side.
//!
//! ```text
//! greeting  magic u64 | magic u64 | flags u16                                 from the server
//! flags     flags u32                                                         from the client
//! option    magic u64 | option u32 | length u32 | data                        from the client
//! reply     magic u64 | option u32 | type u32 | length u32 | data             from the server
//! ```

use std::mem;

use crate::bytes::{Put, Reader};
use crate::context::ContextSet;
use crate::exports::Exports;
use crate::negotiated::Negotiated;
use crate::wire::{ReplyStyle, handshake_flag, header_len, magic, option};

mod options;

/// The most options that one client may send.
pub const OPTIONS_MAX: usize = 64;
/// The longest data of an option that is decoded, in bytes.
pub const OPTION_LEN_MAX: usize = 16 << 10;
/// Longer data is consumed and answered with an error up to this many bytes; beyond it the client
/// is disconnected.
pub const OPTION_SKIP_MAX: u32 = 1 << 20;

/// Whether connections are encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsMode {
    /// Never.
    #[default]
    Off,
    /// Always: without it no option but STARTTLS is served.
    Forced,
    /// If the export or the client requires it.
    Selective,
}

/// Bounds of one client's handshake.
#[derive(Clone, Copy, Debug)]
pub struct HandshakeLimits {
    /// The most options that it may send.
    pub options_max: usize,
    /// The longest data of an option that is decoded, in bytes, and so the most that is buffered.
    pub option_len_max: usize,
}

impl Default for HandshakeLimits {
    fn default() -> Self {
        Self { options_max: OPTIONS_MAX, option_len_max: OPTION_LEN_MAX }
    }
}

/// One client's handshake: takes bytes, returns bytes and a decision, never blocks, and never holds
/// more than one option.
#[derive(Debug)]
pub struct ServerHandshake {
    mode: TlsMode,
    limits: HandshakeLimits,
    is_shutting_down: bool,
    state: State,
    /// The part of the next message that has arrived.
    buffer: Vec<u8>,
    options_seen: usize,
    client: ClientFlags,
    is_tls: bool,
    agreed: Agreed,
}

/// The result of some input.
#[derive(Debug)]
pub struct Step {
    /// The consumed bytes of the input; the rest belongs to the next step, or to the transmission
    /// phase.
    pub consumed: usize,
    /// Bytes for the client, to be sent in any case.
    pub output: Vec<u8>,
    /// The next step.
    pub next: Next,
}

/// The next step.
#[derive(Debug)]
pub enum Next {
    /// Step again, with the rest of the input or, if there is none, with more.
    NeedMore,
    /// Send the output, **discard all input that came in plain text**, do the TLS handshake, call
    /// [`ServerHandshake::tls_started`] and go on with decrypted input.
    StartTls,
    /// The handshake has succeeded.
    Transmission(Box<Negotiated>),
    /// Send the output and close the connection.
    Close(CloseReason),
}

/// The reason why a server ends a handshake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The client sent ABORT.
    #[error("the client ended the handshake")]
    Aborted,
    /// The client does not speak NBD.
    #[error("the client sent {0:#018x} instead of the magic number of an option")]
    BadMagic(u64),
    /// The client set flags that were not offered.
    #[error("the client set unknown flags ({0:#x})")]
    UnknownFlags(u32),
    /// [`HandshakeLimits::options_max`]
    #[error("the client sent more than {0} options")]
    TooManyOptions(usize),
    /// [`OPTION_SKIP_MAX`]
    #[error("the client sent an option of {0} bytes")]
    OptionTooLong(u32),
    /// An error of `EXPORT_NAME`, which cannot be reported otherwise.
    #[error("the client asked for an export by the old way, and {0}")]
    ExportName(&'static str),
    /// The caller went on after the end, or without TLS.
    #[error("the handshake is over")]
    Over,
}

/// The message that is arriving.
#[derive(Clone, Copy, Debug)]
enum State {
    Flags,
    Header,
    Data { option: u32, len: usize },
    Skip { option: u32, left: usize },
    Tls,
    Over,
}

#[derive(Clone, Copy, Debug, Default)]
struct ClientFlags {
    fixed_newstyle: bool,
    no_zeroes: bool,
}

/// The result of the options so far. Discarded when TLS starts, since a third party may have
/// changed the plain text before.
#[derive(Clone, Debug, Default)]
struct Agreed {
    style: ReplyStyle,
    /// The export name and contexts of the last `SET_META_CONTEXT`.
    contexts: Option<(String, ContextSet)>,
}

impl ServerHandshake {
    /// A handshake that waits for the client's flags.
    #[must_use]
    pub fn new(mode: TlsMode, limits: HandshakeLimits) -> Self {
        Self {
            mode,
            limits,
            is_shutting_down: false,
            state: State::Flags,
            buffer: Vec::new(),
            options_seen: 0,
            client: ClientFlags::default(),
            is_tls: false,
            agreed: Agreed::default(),
        }
    }

    /// The server's first bytes.
    #[must_use]
    pub fn greeting() -> [u8; header_len::GREETING] {
        let mut out = [0; header_len::GREETING];
        out[..8].copy_from_slice(&magic::NBD.to_be_bytes());
        out[8..16].copy_from_slice(&magic::OPTION.to_be_bytes());
        out[16..].copy_from_slice(&handshake_flag::ALL.to_be_bytes());
        out
    }

    /// From now on all options but `ABORT` are answered with ERR_SHUTDOWN.
    pub fn shut_down(&mut self) {
        self.is_shutting_down = true;
    }

    /// The TLS handshake has succeeded; discards the result of all options before.
    ///
    /// # Panics
    /// When the last step was not to start TLS: a bug of the caller.
    pub fn tls_started(&mut self) {
        assert!(matches!(self.state, State::Tls), "TLS starts when the handshake says so");
        self.state = State::Header;
        self.is_tls = true;
        self.agreed = Agreed::default();
    }

    /// Takes input up to the end of one message and answers it. Consumes something whenever there
    /// is input and the handshake is not over.
    pub fn step(&mut self, input: &[u8], exports: &dyn Exports) -> Step {
        let mut consumed = 0;
        loop {
            let wanted = match self.state {
                State::Flags => header_len::CLIENT_FLAGS,
                State::Header => header_len::OPTION,
                State::Data { len, .. } => len,
                State::Skip { left, .. } => left,
                State::Tls | State::Over => return self.close(consumed, CloseReason::Over),
            };
            let taken = (wanted - self.buffer.len()).min(input.len() - consumed);
            let bytes = &input[consumed..consumed + taken];
            consumed += taken;
            if let State::Skip { option, left } = self.state {
                self.state = State::Skip { option, left: left - taken };
                if taken < left {
                    return Step { consumed, output: Vec::new(), next: Next::NeedMore };
                }
            } else {
                self.buffer.extend_from_slice(bytes);
                if self.buffer.len() < wanted {
                    return Step { consumed, output: Vec::new(), next: Next::NeedMore };
                }
            }
            if let Some((output, next)) = self.message(exports) {
                return Step { consumed, output, next };
            }
        }
    }

    /// Takes a whole message out of the buffer. `None` when its data is needed.
    fn message(&mut self, exports: &dyn Exports) -> Option<(Vec<u8>, Next)> {
        let message = mem::take(&mut self.buffer);
        let state = mem::replace(&mut self.state, State::Header);
        let (output, next) = match state {
            State::Flags => (Vec::new(), self.flags(&message)),
            State::Header => match self.header(&message) {
                Ok(()) => return None,
                Err(reason) => (Vec::new(), Next::Close(reason)),
            },
            State::Data { option, .. } => self.option(option, &message, exports),
            State::Skip { option, .. } => self.oversized(option),
            State::Tls | State::Over => (Vec::new(), Next::Close(CloseReason::Over)),
        };
        match next {
            Next::NeedMore => {}
            Next::StartTls => self.state = State::Tls,
            Next::Transmission(_) | Next::Close(_) => self.state = State::Over,
        }
        Some((output, next))
    }

    fn flags(&mut self, message: &[u8]) -> Next {
        let flags = Reader::new(message).u32().expect("the message is whole");
        let known = u32::from(handshake_flag::ALL);
        if flags & !known != 0 {
            return Next::Close(CloseReason::UnknownFlags(flags & !known));
        }
        self.client = ClientFlags {
            fixed_newstyle: flags & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0,
            no_zeroes: flags & u32::from(handshake_flag::NO_ZEROES) != 0,
        };
        Next::NeedMore
    }

    fn header(&mut self, message: &[u8]) -> Result<(), CloseReason> {
        let mut fields = Reader::new(message);
        let mut read = || Some((fields.u64()?, fields.u32()?, fields.u32()?));
        let (found, option, len) = read().expect("the message is whole");
        if found != magic::OPTION {
            return Err(CloseReason::BadMagic(found));
        }
        self.options_seen += 1;
        if self.options_seen > self.limits.options_max {
            return Err(CloseReason::TooManyOptions(self.limits.options_max));
        }
        let left = len as usize;
        self.state = if left <= self.limits.option_len_max {
            State::Data { option, len: left }
        } else if len <= OPTION_SKIP_MAX && option != option::EXPORT_NAME {
            State::Skip { option, left }
        } else {
            return Err(CloseReason::OptionTooLong(len));
        };
        Ok(())
    }

    fn close(&mut self, consumed: usize, reason: CloseReason) -> Step {
        self.state = State::Over;
        Step { consumed, output: Vec::new(), next: Next::Close(reason) }
    }
}

/// Appends a reply to an option.
fn put_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.put_u64(magic::OPTION_REPLY);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(u32::try_from(data.len()).expect("replies to options are short"));
    out.extend_from_slice(data);
}
