//! A server to talk to, byte by byte.

use sheave_core::{BlockSizes, Capabilities, VolumeInfo};
use sheave_proto::wire::{magic, option, reply_type};
use sheave_proto::{
    Export, HandshakeLimits, MetaContext, Negotiated, Next, ReplyStyle, ServerHandshake, TlsMode,
};

pub(crate) const SIZE: u64 = 1 << 30;

/// A volume that can do everything.
pub(crate) fn volume() -> VolumeInfo {
    VolumeInfo {
        block: BlockSizes { minimum: 512, ..BlockSizes::default() },
        read_only: false,
        rotational: false,
        volatile: false,
        identity: None,
        can: Capabilities::ALL,
    }
}

/// `disk`, `tape`, and `secret`, which needs TLS.
pub(crate) fn exports() -> Vec<Export> {
    let export = |name: &str, tls_only| Export {
        name: name.to_owned(),
        description: format!("the {name}"),
        size: SIZE,
        info: volume(),
        tls_only,
    };
    vec![export("disk", false), export("tape", false), export("secret", true)]
}

/// A server after greeting and client flags.
pub(crate) struct Server {
    pub(crate) handshake: ServerHandshake,
    pub(crate) exports: Vec<Export>,
}

/// Type and data of a reply to an option.
pub(crate) type Reply = (u32, Vec<u8>);

impl Server {
    pub(crate) fn new(mode: TlsMode) -> Self {
        Self::with_flags(mode, 3)
    }

    pub(crate) fn with_flags(mode: TlsMode, flags: u32) -> Self {
        let handshake = ServerHandshake::new(mode, HandshakeLimits::default());
        let mut server = Self { handshake, exports: exports() };
        let (output, next) = server.send(&flags.to_be_bytes());
        assert!(output.is_empty() && matches!(next, Next::NeedMore));
        server
    }

    /// Sends bytes that are at most one message.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> (Vec<u8>, Next) {
        let step = self.handshake.step(bytes, &self.exports);
        assert_eq!(step.consumed, bytes.len());
        (step.output, step.next)
    }

    /// Sends an option and parses the reply.
    pub(crate) fn ask(&mut self, option: u32, data: &[u8]) -> (Vec<Reply>, Next) {
        let (output, next) = self.send(&message(option, data));
        (replies(option, &output), next)
    }

    /// Sends an option that does not end the handshake; returns the last reply's type.
    pub(crate) fn kind(&mut self, option: u32, data: &[u8]) -> u32 {
        let (replies, next) = self.ask(option, data);
        assert!(matches!(next, Next::NeedMore), "{next:?}");
        replies.last().unwrap().0
    }

    /// Sends an option that must be acknowledged.
    pub(crate) fn agree(&mut self, option: u32, data: &[u8]) -> &mut Self {
        assert_eq!(self.kind(option, data), reply_type::ACK);
        self
    }

    /// Chooses an export the new way.
    pub(crate) fn go(&mut self, name: &str) -> Negotiated {
        let (replies, next) = self.ask(option::GO, &info(name, &[]));
        assert_eq!(replies.last().unwrap().0, reply_type::ACK);
        let Next::Transmission(negotiated) = next else { panic!("{next:?}") };
        *negotiated
    }

    /// Starts TLS, without TLS.
    pub(crate) fn start_tls(&mut self) -> &mut Self {
        let (replies, next) = self.ask(option::STARTTLS, &[]);
        assert_eq!(replies, [(reply_type::ACK, vec![])]);
        assert!(matches!(next, Next::StartTls));
        self.handshake.tls_started();
        self
    }
}

/// The negotiated state of a client with `style`, and block status where possible, for `info`.
pub(crate) fn negotiated(style: ReplyStyle, info: VolumeInfo) -> Negotiated {
    let mut contexts = sheave_proto::ContextSet::EMPTY;
    if style != ReplyStyle::Simple {
        contexts.insert(MetaContext::BaseAllocation);
    }
    Negotiated {
        export: 0,
        style,
        contexts,
        block_size_asked: false,
        transmission_flags: sheave_proto::transmission_flags(&info, style, contexts),
        size: SIZE,
        info,
        tls: false,
    }
}

pub(crate) fn message(option: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let fields = [option.to_be_bytes(), len.to_be_bytes()].concat();
    [magic::OPTION.to_be_bytes().as_slice(), &fields, data].concat()
}

/// Parses replies to one option.
pub(crate) fn replies(option: u32, mut output: &[u8]) -> Vec<Reply> {
    let mut found = Vec::new();
    while !output.is_empty() {
        let (head, rest) = output.split_at(20);
        assert_eq!(head[..8], magic::OPTION_REPLY.to_be_bytes());
        assert_eq!(be32(&head[8..]), option);
        let (data, rest) = rest.split_at(be32(&head[16..]) as usize);
        found.push((be32(&head[12..]), data.to_vec()));
        output = rest;
    }
    found
}

/// Data of `INFO` and `GO`.
pub(crate) fn info(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend(u16::try_from(wanted.len()).unwrap().to_be_bytes());
    data.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

/// Data of the options about metadata contexts.
pub(crate) fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    data.extend(queries.iter().flat_map(|query| string(query)));
    data
}

pub(crate) fn string(text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len()).unwrap();
    [len.to_be_bytes().as_slice(), text.as_bytes()].concat()
}

pub(crate) fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes(bytes[..2].try_into().unwrap())
}

pub(crate) fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}

pub(crate) fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().unwrap())
}
