//! The bodies of the fuzzers, as plain functions: no assertion may fail for any input. The fuzz
//! targets include this file; here it runs over seeded random input. Each function returns whether
//! the input got past the first message, so that a test can check the quality of its inputs.

use std::ops::ControlFlow;

use sheave_core::{BlockSizes, Capabilities, VolumeInfo};
use sheave_proto::uri::NbdUri;
use sheave_proto::wire::{magic, transmission_flag as flag};
use sheave_proto::{
    ClientConfig, ClientHandshake, ClientNext, ContextSet, Export, Goal, HandshakeLimits,
    MetaContext, Negotiated, Next, PAYLOAD_SKIP_MAX, ReplyStyle, Request, ServerHandshake, TlsMode,
    Verdict, transmission_flags,
};

/// More than any answer to one message of a client that sees three exports.
const OUTPUT_LEN_MAX: usize = 16 << 10;

/// Takes bytes from the front of the fuzzer's input; zeroes when there are no more.
pub(crate) struct Source<'a>(pub(crate) &'a [u8]);

impl<'a> Source<'a> {
    pub(crate) fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub(crate) fn word(&mut self) -> u64 {
        u64::from_be_bytes(self.array())
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let taken = self.take(N);
        out[..taken.len()].copy_from_slice(taken);
        out
    }

    fn take(&mut self, len: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        head
    }

    pub(crate) fn style(&mut self) -> ReplyStyle {
        match self.byte() % 3 {
            0 => ReplyStyle::Simple,
            1 => ReplyStyle::Structured,
            _ => ReplyStyle::Extended,
        }
    }

    /// Of a volume that may be exported.
    pub(crate) fn size(&mut self) -> u64 {
        self.word() >> (1 + self.byte() % 63)
    }

    /// A volume that may be exported, with odd numbers.
    pub(crate) fn volume(&mut self) -> VolumeInfo {
        let bits = self.byte();
        let has = |bit: u8| bits & 1 << bit != 0;
        let minimum = 1 << (self.byte() % 17);
        VolumeInfo {
            block: BlockSizes {
                minimum,
                logical: 512,
                preferred: minimum.max(512),
                maximum_payload: 1 << 20,
            },
            read_only: has(0),
            rotational: has(1),
            volatile: false,
            identity: None,
            can: Capabilities {
                flush: has(2),
                fua: has(3),
                trim: has(4),
                write_zeroes: has(5),
                fast_zero: has(6),
                cache: has(7),
                block_status: true,
                multi_conn: has(0),
            },
        }
    }
}

fn exports() -> Vec<Export> {
    let export = |name: &str, tls_only| Export {
        name: name.to_owned(),
        description: "about it".to_owned(),
        size: 1 << 30,
        info: VolumeInfo {
            block: BlockSizes::default(),
            read_only: false,
            rotational: false,
            volatile: false,
            identity: None,
            can: Capabilities::default(),
        },
        tls_only,
    };
    vec![export("a", false), export("b", false), export("c", true)]
}

/// The same bytes, as they are or with headers around them, so that the fuzzer need not guess
/// magic numbers all the time. `head` makes a header of a kind and a length.
fn framed(source: &mut Source<'_>, head: impl Fn(u8, u8, u32) -> Vec<u8>) -> Vec<u8> {
    let mut out = Vec::new();
    while !source.0.is_empty() {
        let (kind, detail, len) = (source.byte(), source.byte(), source.byte());
        let data = source.take(len.into());
        out.extend(head(kind, detail, u32::try_from(data.len()).expect("at most 255")));
        out.extend(data);
    }
    out
}

/// A server in its handshake survives any client, however the bytes are cut.
pub(crate) fn server_handshake(data: &[u8]) -> bool {
    let mut source = Source(data);
    let shape = source.byte();
    let split = usize::from(source.byte()).max(1);
    let input = if shape & 1 == 0 {
        source.0.to_vec()
    } else {
        let messages = framed(&mut source, |kind, detail, len| {
            let option = if kind < 240 { u32::from(kind % 13) } else { detail.into() };
            let fields = [option.to_be_bytes(), len.to_be_bytes()].concat();
            [magic::OPTION.to_be_bytes().as_slice(), &fields].concat()
        });
        [[0, 0, 0, shape >> 1 & 3].as_slice(), &messages].concat()
    };
    let mode = match shape >> 3 & 3 {
        0 => TlsMode::Off,
        1 => TlsMode::Forced,
        _ => TlsMode::Selective,
    };
    let is_shutting_down = shape >> 5 == 7;
    let whole = run_server(mode, is_shutting_down, &input, input.len().max(1));
    assert_eq!(whole, run_server(mode, is_shutting_down, &input, split), "splits change nothing");
    whole.1.starts_with("Negotiated")
}

/// All output, and the result of the handshake.
fn run_server(mode: TlsMode, shut_down: bool, input: &[u8], split: usize) -> (Vec<u8>, String) {
    let exports = exports();
    let mut handshake = ServerHandshake::new(mode, HandshakeLimits::default());
    if shut_down {
        handshake.shut_down();
    }
    let (mut all, mut is_tls) = (Vec::new(), false);
    let ended = in_pieces(input, split, |piece| {
        let step = handshake.step(piece, &exports);
        assert!(step.output.len() <= OUTPUT_LEN_MAX);
        all.extend(step.output);
        match step.next {
            Next::NeedMore => (step.consumed, ControlFlow::Continue(())),
            Next::StartTls => {
                assert!(!is_tls && mode != TlsMode::Off);
                is_tls = true;
                handshake.tls_started();
                (step.consumed, ControlFlow::Continue(()))
            }
            Next::Transmission(negotiated) => {
                check_negotiated(&negotiated);
                assert_eq!(negotiated.tls, is_tls);
                assert!(is_tls || mode != TlsMode::Forced);
                assert!(is_tls || !exports[negotiated.export].tls_only);
                assert!(!shut_down);
                (step.consumed, ControlFlow::Break(format!("{negotiated:?}")))
            }
            Next::Close(reason) => (step.consumed, ControlFlow::Break(format!("{reason:?}"))),
        }
    });
    (all, ended.unwrap_or_default())
}

/// Feeds `input` in pieces to `step`, which returns the consumed length, until it breaks.
fn in_pieces<T>(
    input: &[u8],
    split: usize,
    mut step: impl FnMut(&[u8]) -> (usize, ControlFlow<T>),
) -> Option<T> {
    for piece in input.chunks(split) {
        let mut rest = piece;
        while !rest.is_empty() {
            let (consumed, flow) = step(rest);
            assert!(consumed <= rest.len());
            if let ControlFlow::Break(end) = flow {
                return Some(end);
            }
            assert!(consumed > 0, "a step takes something");
            rest = &rest[consumed..];
        }
    }
    None
}

fn check_negotiated(negotiated: &Negotiated) {
    let has = |bits| negotiated.transmission_flags & bits == bits;
    assert!(has(flag::HAS_FLAGS));
    assert!(!has(flag::SEND_FAST_ZERO) || has(flag::SEND_WRITE_ZEROES));
    assert_eq!(has(flag::SEND_DF), negotiated.style != ReplyStyle::Simple);
    assert!(!has(flag::BLOCK_STATUS_PAYLOAD) || negotiated.style == ReplyStyle::Extended);
    assert!(negotiated.contexts.is_empty() || negotiated.style != ReplyStyle::Simple);
}

/// A server in transmission survives any client, and no verdict leaves the volume.
pub(crate) fn server_transmission(data: &[u8]) -> bool {
    let mut source = Source(data);
    let style = source.style();
    let (info, size) = (source.volume(), source.size());
    let mut contexts = ContextSet::EMPTY;
    if style != ReplyStyle::Simple && source.byte() & 1 != 0 {
        contexts.insert(MetaContext::BaseAllocation);
    }
    let negotiated = Negotiated {
        export: 0,
        style,
        contexts,
        block_size_asked: source.byte() & 1 != 0,
        transmission_flags: transmission_flags(&info, style, contexts),
        size,
        info,
        tls: false,
    };
    check_negotiated(&negotiated);
    let mut is_useful = false;
    let header_len = Request::header_len(style);
    while source.0.len() >= header_len {
        let header = source.take(header_len);
        let request = match Request::decode(style, header) {
            Ok(request) => request,
            // Random input rarely has the right magic number, so it is patched in.
            Err(_) => {
                let mut patched = header.to_vec();
                let magic = match style {
                    ReplyStyle::Extended => magic::EXTENDED_REQUEST,
                    ReplyStyle::Simple | ReplyStyle::Structured => magic::REQUEST,
                };
                patched[..4].copy_from_slice(&magic.to_be_bytes());
                patched[6] = 0;
                Request::decode(style, &patched).expect("the magic number is right")
            }
        };
        let mut again = Vec::new();
        request.encode(style, &mut again);
        assert_eq!(Request::decode(style, &again), Ok(request));
        let verdict = negotiated.check(&request);
        check_verdict(&negotiated, &request, verdict);
        is_useful |= !matches!(verdict, Verdict::Refuse { .. } | Verdict::Drop(_));
        if let Verdict::BlockStatusFilter { payload_len } = verdict {
            let payload = source.take(payload_len as usize);
            let filtered = negotiated.block_status_filter(&request, payload);
            assert!(!matches!(filtered, Verdict::BlockStatusFilter { .. }));
            if let Verdict::Refuse { skip, .. } = filtered {
                assert_eq!(skip, 0);
            } else {
                check_verdict(&negotiated, &request, filtered);
            }
        }
    }
    is_useful
}

fn check_verdict(negotiated: &Negotiated, request: &Request, verdict: Verdict) {
    let info = &negotiated.info;
    let payload_len = request.payload_len(negotiated.style);
    let range = match verdict {
        Verdict::Read { range, .. } => {
            assert!(range.len() <= info.block.maximum_payload.into());
            range
        }
        Verdict::Write { range, .. } => {
            assert!(!info.read_only && range.len() <= info.block.maximum_payload.into());
            assert_eq!(range.len(), payload_len);
            range
        }
        Verdict::Trim { range, .. } | Verdict::WriteZeroes { range, .. } => {
            assert!(!info.read_only);
            range
        }
        Verdict::Cache { range } => range,
        Verdict::BlockStatus { range, contexts, .. } => {
            assert!(!contexts.is_empty());
            assert!(contexts.iter().all(|context| negotiated.contexts.contains(context)));
            range
        }
        Verdict::Refuse { skip, message, .. } => {
            assert_eq!(skip, payload_len, "all of the payload is consumed");
            assert!(skip <= PAYLOAD_SKIP_MAX && !message.is_empty());
            return;
        }
        Verdict::BlockStatusFilter { payload_len: len } => {
            assert_eq!(u64::from(len), payload_len);
            return assert!(len <= 64);
        }
        Verdict::Drop(_) => return assert!(payload_len > info.block.maximum_payload.into()),
        Verdict::Flush => return assert_eq!(payload_len, 0),
        Verdict::Done | Verdict::Disconnect => return,
    };
    assert!(!range.is_empty() && range.end() <= negotiated.size);
    assert_eq!(range.start(), request.offset);
}

/// A client in its handshake survives any server, however the bytes are cut.
pub(crate) fn client_handshake(data: &[u8]) -> bool {
    let mut source = Source(data);
    let shape = source.byte();
    let split = usize::from(source.byte()).max(1);
    let config = ClientConfig {
        export: "a".to_owned(),
        goal: match shape >> 1 & 3 {
            0 => Goal::List,
            1 => Goal::Info,
            _ => Goal::Go,
        },
        style: source.style(),
        contexts: vec!["base:allocation".to_owned()],
        block_sizes: shape & 8 != 0,
        tls: shape & 16 != 0,
    };
    let input = if shape & 1 == 0 {
        source.0.to_vec()
    } else {
        let greeting = [magic::NBD.to_be_bytes(), magic::OPTION.to_be_bytes()].concat();
        let messages = framed(&mut source, |kind, detail, len| {
            let reply = match detail {
                0..128 => u32::from(detail % 5),
                _ => 1 << 31 | u32::from(detail % 12),
            };
            let fields = [u32::from(kind % 12), reply, len].map(u32::to_be_bytes).concat();
            [magic::OPTION_REPLY.to_be_bytes().as_slice(), &fields].concat()
        });
        [greeting.as_slice(), &[0, shape >> 5 & 3], &messages].concat()
    };
    let whole = run_client(&config, &input, input.len().max(1));
    let cut = run_client(&config, &input, split);
    // Plain text behind the start of TLS is seen only if it comes along with it.
    if !config.tls {
        assert_eq!(whole, cut, "splits change nothing");
    }
    whole.1.starts_with(['C', '['])
}

/// All output, and the result of the handshake.
fn run_client(config: &ClientConfig, input: &[u8], split: usize) -> (Vec<u8>, String) {
    let mut handshake = ClientHandshake::new(config.clone()).expect("a valid configuration");
    let (mut all, mut is_tls) = (Vec::new(), false);
    let ended = in_pieces(input, split, |piece| {
        let step = handshake.step(piece);
        assert!(step.output.len() <= OUTPUT_LEN_MAX);
        all.extend(step.output);
        let end = match step.next {
            ClientNext::NeedMore => return (step.consumed, ControlFlow::Continue(())),
            ClientNext::StartTls => {
                assert!(config.tls && !is_tls && step.consumed == piece.len());
                is_tls = true;
                all.extend(handshake.tls_started());
                return (step.consumed, ControlFlow::Continue(()));
            }
            ClientNext::Ready(negotiated) => {
                assert!(config.goal == Goal::Go && negotiated.tls == config.tls);
                assert!(negotiated.style <= config.style && negotiated.has(flag::HAS_FLAGS));
                assert!(negotiated.block.minimum.is_power_of_two());
                format!("{negotiated:?}")
            }
            ClientNext::Info(negotiated) => {
                assert!(config.goal == Goal::Info && negotiated.tls == config.tls);
                format!("{negotiated:?}")
            }
            ClientNext::Listed(entries) => {
                assert!(config.goal == Goal::List && is_tls == config.tls);
                format!("{entries:?}")
            }
            ClientNext::Failed(error) => error.to_string(),
        };
        (step.consumed, ControlFlow::Break(end))
    });
    assert!(!handshake.closed().to_string().is_empty());
    (all, ended.unwrap_or_default())
}

/// Any text is a URI or an error; a URI survives being written and read.
pub(crate) fn uri(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let parsed = text.parse::<NbdUri>();
    match &parsed {
        Ok(uri) => assert_eq!(uri.to_string().parse().as_ref(), Ok(uri)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    parsed.is_ok()
}
