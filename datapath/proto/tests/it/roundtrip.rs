//! Our client against our server, with the bytes cut anywhere.

use std::collections::VecDeque;

use proptest::prelude::*;
use sheave_proto::{
    ClientConfig, ClientError, ClientHandshake, ClientNegotiated, ClientNext, Goal,
    HandshakeLimits, MetaContext, Negotiated, Next, ReplyStyle, Request, ServerHandshake, TlsMode,
};

use crate::support::{SIZE, exports};

/// The lengths of pieces in which bytes arrive, repeated.
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

/// The result of a client's handshake with a server.
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
}
