//! Our client against our server, with the bytes cut anywhere.

use std::collections::VecDeque;

use proptest::prelude::*;
use sheave_core::{Buf, ByteRange, Extent, NbdErrno, Payload, Segment};
use sheave_proto::reply::{block_status_chunk, failure, success};
use sheave_proto::wire::{command, command_flag};
use sheave_proto::{
    ClientConfig, ClientError, ClientHandshake, ClientNegotiated, ClientNext, Decoded, Goal,
    HandshakeLimits, MetaContext, Negotiated, Next, ReadCoverage, ReplyBody, ReplyDecoder,
    ReplyStyle, ReplyTo, Request, ServerHandshake, StatusQuery, TlsMode, Verdict, read_chunks,
};

use crate::support::{SIZE, exports, negotiated, volume};

/// How long the pieces are in which bytes arrive; over and over.
fn splits() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![Just(1), 1..8_usize, 8..64_usize, Just(1 << 20)], 1..8)
}

fn styles() -> impl Strategy<Value = ReplyStyle> {
    prop_oneof![Just(ReplyStyle::Simple), Just(ReplyStyle::Structured), Just(ReplyStyle::Extended)]
}

/// Bytes on their way, in pieces.
struct Pipe {
    bytes: VecDeque<u8>,
    splits: Vec<usize>,
    turn: usize,
}

impl Pipe {
    fn new(splits: &[usize]) -> Self {
        Self { bytes: VecDeque::new(), splits: splits.to_vec(), turn: 0 }
    }

    fn next_piece(&mut self) -> Vec<u8> {
        let len = self.splits[self.turn % self.splits.len()].min(self.bytes.len());
        self.turn += 1;
        self.bytes.drain(..len).collect()
    }
}

/// How a client's handshake with a server ended.
#[derive(Debug)]
enum End {
    Transmission(Box<Negotiated>, Box<ClientNegotiated>),
    Info(Box<ClientNegotiated>),
    Listed(Vec<String>),
    Failed(ClientError),
}

fn shake_hands(config: ClientConfig, mode: TlsMode, splits: &[usize]) -> End {
    let exports = exports();
    let mut server = ServerHandshake::new(mode, HandshakeLimits::default());
    let mut client = ClientHandshake::new(config).unwrap();
    let (mut to_client, mut to_server) = (Pipe::new(splits), Pipe::new(splits));
    to_client.bytes.extend(ServerHandshake::greeting());
    let mut served = None;
    loop {
        let piece = to_client.next_piece();
        let mut rest = piece.as_slice();
        while !rest.is_empty() {
            let step = client.step(rest);
            rest = &rest[step.consumed..];
            to_server.bytes.extend(step.output);
            match step.next {
                ClientNext::NeedMore => {}
                ClientNext::StartTls => {
                    server.tls_started();
                    to_server.bytes.extend(client.tls_started());
                }
                ClientNext::Ready(client) => {
                    return End::Transmission(served.expect("both are ready"), client);
                }
                ClientNext::Info(negotiated) => return End::Info(negotiated),
                ClientNext::Listed(entries) => {
                    return End::Listed(entries.into_iter().map(|entry| entry.name).collect());
                }
                ClientNext::Failed(error) => return End::Failed(error),
            }
        }
        let piece = to_server.next_piece();
        let mut rest = piece.as_slice();
        while !rest.is_empty() {
            let step = server.step(rest, &exports);
            rest = &rest[step.consumed..];
            to_client.bytes.extend(step.output);
            match step.next {
                Next::NeedMore | Next::StartTls => {}
                Next::Transmission(negotiated) => served = Some(negotiated),
                Next::Close(reason) => panic!("{reason}"),
            }
        }
    }
}

proptest! {
    #[test]
    fn handshakes_agree(
        style in styles(),
        export in prop_oneof![Just(""), Just("disk"), Just("tape"), Just("secret")],
        block_sizes in any::<bool>(),
        with_context in any::<bool>(),
        tls in any::<bool>(),
        splits in splits(),
    ) {
        let contexts = if with_context { vec!["base:allocation".to_owned()] } else { vec![] };
        let export = export.to_owned();
        let goal = Goal::Go;
        let config =
            ClientConfig { export: export.clone(), goal, style, contexts, block_sizes, tls };
        let mode = if tls { TlsMode::Forced } else { TlsMode::Off };
        match shake_hands(config, mode, &splits) {
            End::Transmission(server, client) => {
                prop_assert_eq!((server.style, client.style), (style, style));
                prop_assert_eq!((server.tls, client.tls), (tls, tls));
                prop_assert_eq!(server.transmission_flags, client.transmission_flags);
                prop_assert_eq!(server.size, client.size);
                prop_assert_eq!(server.block_size_asked, block_sizes);
                let minimum = if block_sizes { 512 } else { 1 };
                prop_assert_eq!((client.block_sizes_told, client.block.minimum), (true, minimum));
                let with_context = with_context && style != ReplyStyle::Simple;
                prop_assert_eq!(server.contexts.len(), usize::from(with_context));
                let id = client.context("base:allocation");
                prop_assert_eq!(id, with_context.then_some(MetaContext::BaseAllocation.id()));
                let name = exports()[server.export].name.clone();
                prop_assert_eq!(client.name.as_ref(), Some(&name));
                prop_assert_eq!(name, export);
                let info = ClientNegotiated { block: server.info.block, ..*client }.volume_info();
                let mut want = server.info;
                want.can.block_status = with_context;
                prop_assert_eq!(info, want);
            }
            End::Failed(ClientError::Refused { .. }) => {
                prop_assert!(export.is_empty() || (export == "secret" && !tls));
            }
            end => prop_assert!(false, "{:?}", end),
        }
    }

    #[test]
    fn information_and_lists_arrive(tls in any::<bool>(), splits in splits()) {
        let mode = if tls { TlsMode::Selective } else { TlsMode::Off };
        let config =
            |goal| ClientConfig { export: "disk".to_owned(), goal, tls, ..Default::default() };
        let End::Listed(names) = shake_hands(config(Goal::List), mode, &splits) else {
            panic!("no list");
        };
        let all = ["disk", "tape", "secret"];
        prop_assert_eq!(names, &all[..if tls { 3 } else { 2 }]);
        let End::Info(info) = shake_hands(config(Goal::Info), mode, &splits) else {
            panic!("no information");
        };
        prop_assert_eq!((info.size, info.name.as_deref()), (SIZE, Some("disk")));
    }

    #[test]
    fn requests_arrive(
        style in styles(),
        cookie in any::<u64>(),
        flags in any::<u16>(),
        command in any::<u16>(),
        offset in any::<u64>(),
        length in any::<u64>(),
    ) {
        let length = if style == ReplyStyle::Extended { length } else { length >> 32 };
        let request = Request { cookie, flags, command, offset, length };
        let mut wire = Vec::new();
        request.encode(style, &mut wire);
        prop_assert_eq!(Request::decode(style, &wire), Ok(request));
    }

    #[test]
    fn reads_arrive(
        style in styles(),
        df in any::<bool>(),
        offset in 0_u64..100_000,
        runs in prop::collection::vec((any::<bool>(), 1_usize..20_000), 1..12),
        splits in splits(),
    ) {
        let df = df && style != ReplyStyle::Simple;
        let mut payload = Payload::new();
        for (index, (is_zero, len)) in runs.into_iter().enumerate() {
            let data = vec![u8::try_from(index).unwrap() + 1; len];
            payload.push(match is_zero {
                true => Segment::Zero(len),
                false => Segment::Data(Buf::from_bytes(&data)),
            });
        }
        let request = Request {
            cookie: 5,
            flags: if df { command_flag::DF } else { 0 },
            command: command::READ,
            offset,
            length: payload.len() as u64,
        };
        let Verdict::Read { range, df: asked } = negotiated(style, volume()).check(&request) else {
            panic!("a valid read is refused");
        };
        prop_assert_eq!(asked, df);
        let mut wire = Vec::new();
        for chunk in read_chunks(style, df, range, &payload) {
            chunk.encode(&mut wire, ReplyTo::new(style, &request));
            if !chunk.hole {
                wire.extend(bytes_of(&payload.slice(chunk.skip, chunk.len as usize)));
            }
        }
        let (bytes, chunks) = receive(style, request, &wire, &splits).unwrap();
        prop_assert_eq!(bytes, bytes_of(&payload));
        prop_assert!(chunks == 1 || !df);
    }

    #[test]
    fn errors_and_successes_arrive(style in styles(), splits in splits(), fails in any::<bool>()) {
        let request =
            Request { cookie: 9, flags: 0, command: command::TRIM, offset: 512, length: 512 };
        let mut wire = Vec::new();
        let to = ReplyTo::new(style, &request);
        match fails {
            true => failure(&mut wire, to, NbdErrno::NoSpc, "no room"),
            false => success(&mut wire, to),
        }
        let received = receive(style, request, &wire, &splits);
        match received {
            Err((errno, message)) => {
                prop_assert!(fails && errno == NbdErrno::NoSpc);
                prop_assert_eq!(message.is_empty(), style == ReplyStyle::Simple);
            }
            Ok(_) => prop_assert!(!fails),
        }
    }

    #[test]
    fn block_status_arrives(
        wide in any::<bool>(),
        req_one in any::<bool>(),
        extents in prop::collection::vec((1_u64..5000, 0_u8..4), 1..20),
    ) {
        let style = if wide { ReplyStyle::Extended } else { ReplyStyle::Structured };
        let flags = if req_one { command_flag::REQ_ONE } else { 0 };
        let command = command::BLOCK_STATUS;
        let request = Request { cookie: 1, flags, command, offset: 0, length: 1 << 24 };
        let extents: Vec<_> = extents
            .into_iter()
            .map(|(len, bits)| Extent { len, hole: bits & 1 != 0, zero: bits & 2 != 0 })
            .collect();
        let range = ByteRange::within(0, 1 << 24, 1 << 30).unwrap();
        let query = StatusQuery { range, req_one };
        let mut wire = Vec::new();
        let to = ReplyTo::new(style, &request);
        block_status_chunk(&mut wire, to, MetaContext::BaseAllocation, &extents, query, true);
        let decoded = ReplyDecoder::new(style).decode(&wire, |_| Some(request)).unwrap();
        let Decoded::Event { consumed, event } = decoded else { panic!("{decoded:?}") };
        prop_assert_eq!((consumed, event.done), (wire.len(), true));
        let ReplyBody::BlockStatus { context, extents: found } = event.body else {
            panic!("{:?}", event.body);
        };
        prop_assert_eq!(context, MetaContext::BaseAllocation.id());
        let mut known = extents.iter().flat_map(|extent| {
            let status = u64::from(MetaContext::BaseAllocation.status(extent));
            std::iter::repeat_n(status, usize::try_from(extent.len).unwrap())
        });
        for (len, status) in found.iter() {
            for _ in 0..len {
                prop_assert_eq!(known.next(), Some(status));
            }
        }
    }
}

fn bytes_of(payload: &Payload) -> Vec<u8> {
    let segments = payload.segments().iter().map(|segment| match segment {
        Segment::Zero(len) => vec![0; *len],
        Segment::Data(buf) => buf.to_vec(),
    });
    segments.collect::<Vec<_>>().concat()
}

/// Receives the reply to one request, as a client would: what it says is decoded from what has
/// arrived, read payloads go where they belong. Answers the bytes and the count of chunks.
fn receive(
    style: ReplyStyle,
    request: Request,
    wire: &[u8],
    splits: &[usize],
) -> Result<(Vec<u8>, usize), (NbdErrno, String)> {
    let mut pipe = Pipe::new(splits);
    pipe.bytes.extend(wire);
    let decoder = ReplyDecoder::new(style);
    let mut bytes = vec![0xee; usize::try_from(request.length).unwrap()];
    let mut coverage = ReadCoverage::new(&request);
    let mut chunks = 0;
    let mut failed = None;
    let mut input = Vec::new();
    loop {
        let decoded =
            decoder.decode(&input, |cookie| (cookie == request.cookie).then_some(request));
        let (consumed, event) = match decoded.unwrap() {
            Decoded::NeedMore(needed) => {
                assert!(needed > input.len());
                assert!(!pipe.bytes.is_empty(), "the reply is incomplete");
                input.extend(pipe.next_piece());
                continue;
            }
            Decoded::Event { consumed, event } => (consumed, event),
        };
        let done = event.done;
        let place = |at: u64, len: u32| {
            let start = usize::try_from(at - request.offset).unwrap();
            start..start + len as usize
        };
        let mut payload_len = 0;
        match event.body {
            ReplyBody::Success => {}
            ReplyBody::Data { at, len } => {
                coverage.add(at, len).unwrap();
                payload_len = len as usize;
                while input.len() < consumed + payload_len {
                    input.extend(pipe.next_piece());
                }
                bytes[place(at, len)].copy_from_slice(&input[consumed..][..payload_len]);
                chunks += 1;
            }
            ReplyBody::Hole { at, len } => {
                coverage.add(at, len).unwrap();
                bytes[place(at, len)].fill(0);
                chunks += 1;
            }
            ReplyBody::Error { errno, message, .. } => failed = Some((errno, message.to_owned())),
            ReplyBody::BlockStatus { .. } => panic!("nobody asked"),
        }
        input.drain(..consumed + payload_len);
        if done {
            assert!(input.is_empty() && pipe.bytes.is_empty(), "bytes after the reply");
            assert!(failed.is_some() || request.command != command::READ || coverage.is_complete());
            return failed.map_or(Ok((bytes, chunks)), Err);
        }
    }
}
