//! The client's transmission phase against our server's encoders.

use proptest::prelude::*;
use sheave_core::{Buf, ByteRange, Extent, NbdErrno, Op, OpKind, Payload, Segment};
use sheave_proto::reply::{block_status_chunk, failure, success};
use sheave_proto::wire::{command, command_flag};
use sheave_proto::{
    Answer, Client, ClientEvent, ClientNegotiated, ContextSet, Cookie, MetaContext, Negotiated,
    ReplyError, ReplyStyle, ReplyTo, Request, ServerError, StatusQuery, Verdict, read_chunks,
    transmission_flags,
};

use crate::support::{SIZE, negotiated, volume};

pub(crate) const STYLES: [ReplyStyle; 3] =
    [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];
pub(crate) const CHUNKED: [ReplyStyle; 2] = [ReplyStyle::Structured, ReplyStyle::Extended];

/// The result of a client's negotiation with a server that can do everything.
pub(crate) fn learnt(style: ReplyStyle) -> ClientNegotiated {
    let mut contexts = ContextSet::EMPTY;
    contexts.insert(MetaContext::BaseAllocation);
    let ids = contexts.iter().map(|context| (context.id(), context.name().to_owned()));
    ClientNegotiated {
        style,
        size: SIZE,
        transmission_flags: transmission_flags(&volume(), style, contexts),
        block: volume().block,
        block_sizes_told: true,
        contexts: if style == ReplyStyle::Simple { Vec::new() } else { ids.collect() },
        name: None,
        description: None,
        tls: false,
    }
}

pub(crate) fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::within(start, len, SIZE).unwrap()
}

/// A client with a read's bytes as its state.
pub(crate) type Reader = Client<Vec<u8>>;

/// The outcome of a request.
pub(crate) type Ended = (Cookie, Vec<u8>, Result<Answer, ServerError>);

/// A connection: the server's side decodes the client's bytes.
pub(crate) struct Connection {
    style: ReplyStyle,
    pub(crate) client: Reader,
    server: Negotiated,
}

impl Connection {
    pub(crate) fn new(style: ReplyStyle) -> Self {
        let client = Client::new(&learnt(style), 64);
        Self { style, client, server: negotiated(style, volume()) }
    }

    /// Submits an op; returns the request as the server decodes it.
    pub(crate) fn ask(&mut self, op: &Op) -> (Cookie, Request) {
        let len = match op {
            Op::Read { range, .. } => usize::try_from(range.len()).unwrap(),
            _ => 0,
        };
        let mut wire = Vec::new();
        let cookie = self.client.submit(op, vec![0xee; len], &mut wire).unwrap();
        (cookie, Request::decode(self.style, &wire).unwrap())
    }

    pub(crate) fn read(&mut self, start: u64, len: u64) -> (Cookie, Request) {
        self.ask(&Op::Read { range: range(start, len), into: None })
    }

    pub(crate) fn to(&self, request: &Request) -> ReplyTo {
        ReplyTo::new(self.style, request)
    }

    /// Takes all of `wire` at once.
    pub(crate) fn take(&mut self, wire: &[u8]) -> Result<Vec<Ended>, ReplyError> {
        receive(&mut self.client, wire, &[usize::MAX], false)
    }

    pub(crate) fn lie(&mut self, wire: &[u8]) -> String {
        let error = self.take(wire).unwrap_err();
        assert_eq!(self.take(&[]).unwrap_err(), error, "it stays broken");
        error.to_string()
    }
}

/// Receives `wire` in pieces of these lengths, payloads `in_place` or by way of the input.
fn receive(
    client: &mut Reader,
    mut wire: &[u8],
    splits: &[usize],
    in_place: bool,
) -> Result<Vec<Ended>, ReplyError> {
    let (mut input, mut ended) = (Vec::new(), Vec::new());
    let mut splits = splits.iter().cycle();
    loop {
        let (consumed, event) = client.step(&input)?;
        let mut needs_more = false;
        match event {
            ClientEvent::NeedMore(len) => {
                assert!(len > input.len() - consumed);
                needs_more = true;
            }
            ClientEvent::Data { state, at, bytes, .. } => {
                assert!(!bytes.is_empty());
                state[at..at + bytes.len()].copy_from_slice(bytes);
            }
            ClientEvent::Zeroes { state, at, len, .. } => state[at..at + len].fill(0),
            ClientEvent::Done { cookie, state, outcome } => ended.push((cookie, state, outcome)),
        }
        input.drain(..consumed);
        if !needs_more {
            continue;
        }
        if wire.is_empty() {
            return Ok(ended);
        }
        let piece = *splits.next().unwrap();
        match client.payload().filter(|_| in_place) {
            Some(place) => {
                assert!(input.is_empty(), "payload is consumed as far as it has arrived");
                let len = place.len.min(piece).min(wire.len());
                place.state[place.at..place.at + len].copy_from_slice(&wire[..len]);
                wire = &wire[len..];
                client.payload_received(len);
            }
            None => {
                let (now, later) = wire.split_at(piece.min(wire.len()));
                input.extend(now);
                wire = later;
            }
        }
    }
}

/// The server's answer to a request: pieces of its reply, and the outcome that the client must
/// report.
#[derive(Clone, Debug)]
enum Script {
    Read { start: u64, runs: Vec<(bool, usize)>, fails: bool },
    Status { start: u64, extents: Vec<(u64, u8)>, extents_max: usize },
    Other { kind: OpKind, flags: u8, fails: bool },
}

fn scripts() -> impl Strategy<Value = Vec<Script>> {
    let runs = prop::collection::vec((any::<bool>(), 1_usize..9000), 1..8);
    let extents = prop::collection::vec((1_u64..100, 0_u8..4), 1..20);
    let others = prop::sample::select(&[
        OpKind::Write,
        OpKind::Flush,
        OpKind::Trim,
        OpKind::WriteZeroes,
        OpKind::Cache,
    ]);
    let one = prop_oneof![
        (0_u64..1000, runs, any::<bool>()).prop_map(|(start, runs, fails)| Script::Read {
            start: start * 512,
            runs,
            fails
        }),
        (0_u64..1000, extents, prop_oneof![Just(1), 1_usize..30]).prop_map(
            |(start, extents, extents_max)| Script::Status {
                start: start * 512,
                extents: extents.into_iter().map(|(blocks, bits)| (blocks * 512, bits)).collect(),
                extents_max
            }
        ),
        (others, any::<u8>(), any::<bool>()).prop_map(|(kind, flags, fails)| Script::Other {
            kind,
            flags,
            fails
        }),
    ];
    prop::collection::vec(one, 1..24)
}

/// A submitted request: remaining pieces of the reply, and the expected outcome.
struct Expected {
    cookie: Cookie,
    pieces: std::collections::VecDeque<Vec<u8>>,
    bytes: Vec<u8>,
    outcome: Result<Answer, NbdErrno>,
}

impl Script {
    fn play(&self, connection: &mut Connection) -> Expected {
        match self {
            Self::Read { start, runs, fails } => read(connection, *start, runs, *fails),
            Self::Status { extents, .. } if connection.style == ReplyStyle::Simple => {
                // Without chunks there is no block status.
                let fails = extents.len() % 2 == 0;
                Self::Other { kind: OpKind::Flush, flags: 0, fails }.play(connection)
            }
            Self::Status { start, extents, extents_max } => {
                status(connection, *start, extents, *extents_max)
            }
            Self::Other { kind, flags, fails } => other(connection, *kind, *flags, *fails),
        }
    }
}

fn read(connection: &mut Connection, start: u64, runs: &[(bool, usize)], fails: bool) -> Expected {
    let mut payload = Payload::new();
    for (index, (is_zero, len)) in runs.iter().enumerate() {
        payload.push(match is_zero {
            true => Segment::Zero(*len),
            false => Segment::Data(Buf::from_bytes(&vec![index as u8 + 1; *len])),
        });
    }
    let (cookie, request) = connection.read(start, payload.len() as u64);
    let Verdict::Read { range, df } = connection.server.check(&request) else {
        panic!("a valid read is refused");
    };
    let to = connection.to(&request);
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    for chunk in read_chunks(connection.style, df, range, &payload) {
        let mut piece = Vec::new();
        chunk.encode(&mut piece, to);
        if !chunk.hole {
            piece.extend(payload.slice(chunk.skip, chunk.len as usize).to_vec());
        }
        pieces.push(piece);
    }
    let mut outcome = Ok(Answer::Done);
    if fails {
        // The last chunk fails instead.
        let last = pieces.last_mut().unwrap();
        last.clear();
        failure(last, to, NbdErrno::Io, "no such luck");
        outcome = Err(NbdErrno::Io);
    }
    Expected { cookie, pieces: pieces.into(), bytes: payload.to_vec(), outcome }
}

fn status(
    connection: &mut Connection,
    start: u64,
    extents: &[(u64, u8)],
    extents_max: usize,
) -> Expected {
    let extent =
        |(len, bits): &(u64, u8)| Extent { len: *len, hole: bits & 1 != 0, zero: bits & 2 != 0 };
    let extents: Vec<_> = extents.iter().map(extent).collect();
    let total: u64 = extents.iter().map(|extent| extent.len).sum();
    let range = range(start, (total / 2).next_multiple_of(512));
    let (cookie, request) = connection.ask(&Op::BlockStatus { range, extents_max });
    let Verdict::BlockStatus { req_one, .. } = connection.server.check(&request) else {
        panic!("a valid block status is refused");
    };
    assert_eq!(req_one, extents_max == 1);
    let (mut reply, to, query) =
        (Vec::new(), connection.to(&request), StatusQuery { range, req_one });
    block_status_chunk(&mut reply, to, MetaContext::BaseAllocation, &extents, query, true);
    // The model: the expected state of each block of the range.
    let mut want: Vec<Extent> = Vec::new();
    let mut left = range.len();
    for extent in extents {
        let len = extent.len.min(left);
        left -= len;
        match want.last_mut() {
            _ if len == 0 => {}
            Some(last) if (last.hole, last.zero) == (extent.hole, extent.zero) => last.len += len,
            _ => want.push(Extent { len, ..extent }),
        }
    }
    want.truncate(extents_max);
    let (pieces, outcome) = ([reply].into(), Ok(Answer::Extents(want)));
    Expected { cookie, pieces, bytes: Vec::new(), outcome }
}

fn other(connection: &mut Connection, kind: OpKind, flags: u8, fails: bool) -> Expected {
    let range = range(8192, 4096);
    let [fua, no_hole, fast] = [1, 2, 4].map(|bit| flags & bit != 0);
    let (op, want) = match kind {
        OpKind::Write => {
            let data = Buf::zeroed(4096).into();
            (Op::Write { range, data, fua }, Verdict::Write { range, fua })
        }
        OpKind::Trim => (Op::Trim { range, fua }, Verdict::Trim { range, fua }),
        OpKind::WriteZeroes => (
            Op::WriteZeroes { range, fua, no_hole, fast },
            Verdict::WriteZeroes { range, fua, no_hole, fast },
        ),
        OpKind::Cache => (Op::Cache { range }, Verdict::Cache { range }),
        _ => (Op::Flush, Verdict::Flush),
    };
    let (cookie, request) = connection.ask(&op);
    assert_eq!(connection.server.check(&request), want);
    let (mut reply, to) = (Vec::new(), connection.to(&request));
    match fails {
        true => failure(&mut reply, to, NbdErrno::NoSpc, "full"),
        false => success(&mut reply, to),
    }
    let outcome = if fails { Err(NbdErrno::NoSpc) } else { Ok(Answer::Done) };
    Expected { cookie, pieces: [reply].into(), bytes: Vec::new(), outcome }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn replies_arrive_in_any_order_and_in_pieces(
        style in prop::sample::select(&STYLES),
        scripts in scripts(),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 200),
        splits in prop::collection::vec(
            prop_oneof![Just(1), 1..8_usize, 8..64_usize, Just(1 << 20)], 1..8),
        in_place in any::<bool>(),
    ) {
        let mut connection = Connection::new(style);
        let mut waiting: Vec<Expected> =
            scripts.iter().map(|script| script.play(&mut connection)).collect();
        prop_assert_eq!(connection.client.in_flight(), scripts.len());
        // Chunks of different replies may be mixed, those of one reply keep their order.
        let mut wire = Vec::new();
        let mut picks = picks.iter().cycle();
        while waiting.iter().any(|expected| !expected.pieces.is_empty()) {
            let busy: Vec<_> =
                (0..waiting.len()).filter(|index| !waiting[*index].pieces.is_empty()).collect();
            let index = busy[picks.next().unwrap().index(busy.len())];
            wire.extend(waiting[index].pieces.pop_front().unwrap());
        }
        let ended = receive(&mut connection.client, &wire, &splits, in_place).unwrap();
        prop_assert_eq!(ended.len(), scripts.len());
        prop_assert_eq!(connection.client.in_flight(), 0);
        for (cookie, bytes, outcome) in ended {
            let index = waiting.iter().position(|expected| expected.cookie == cookie).unwrap();
            let expected = waiting.swap_remove(index);
            if outcome.is_ok() {
                prop_assert!(bytes == expected.bytes);
            }
            if style != ReplyStyle::Simple {
                prop_assert!(outcome.as_ref().err().is_none_or(|error| !error.message.is_empty()));
            }
            prop_assert_eq!(outcome.map_err(|error| error.errno), expected.outcome);
        }
    }
}

#[test]
fn requests_in_flight_are_bounded_and_come_back() {
    let mut client: Client<u32> = Client::new(&learnt(ReplyStyle::Simple), 2);
    let mut wire = Vec::new();
    let cookies = [5, 6].map(|state| client.submit(&Op::Flush, state, &mut wire).unwrap());
    assert!(!client.has_room());
    let len = wire.len();
    assert_eq!(client.submit(&Op::Flush, 7, &mut wire), Err(7));
    assert_eq!(wire.len(), len, "nothing is sent");
    assert_eq!(cookies.map(|cookie| client.get(cookie).copied()), [Some(5), Some(6)]);
    assert_eq!(cookies.map(Cookie::slot), [0, 1]);
    let request = Request::decode(ReplyStyle::Simple, &wire[..28]).unwrap();
    let mut reply = Vec::new();
    success(&mut reply, ReplyTo::new(ReplyStyle::Simple, &request));
    let (_, event) = client.step(&reply).unwrap();
    assert!(matches!(event, ClientEvent::Done { state: 5, .. }), "{event:?}");
    assert_eq!(client.get(cookies[0]), None);
    let again = client.submit(&Op::Flush, 8, &mut wire).unwrap();
    assert!(again != cookies[0] && again.slot() == 0);
    let mut left: Vec<_> = client.drain().collect();
    left.sort_by_key(|(_, state)| *state);
    assert_eq!(left, [(cookies[1], 6), (again, 8)]);
    assert_eq!(client.in_flight(), 0);
}

#[test]
fn requests_say_what_an_op_cannot() {
    for style in CHUNKED {
        let mut connection = Connection::new(style);
        let request = Request {
            cookie: 99,
            flags: command_flag::DF,
            command: command::READ,
            offset: 512,
            length: 1024,
        };
        let mut wire = Vec::new();
        connection.client.submit_request(request, Vec::new(), &mut wire).unwrap();
        let sent = Request::decode(style, &wire).unwrap();
        let want = Verdict::Read { range: range(512, 1024), df: true };
        assert_eq!(connection.server.check(&sent), want);
        let mut bye = Vec::new();
        connection.client.disconnect(&mut bye);
        let bye = Request::decode(style, &bye).unwrap();
        assert_eq!(connection.server.check(&bye), Verdict::Disconnect);
    }
}

#[test]
fn lengths_fit_the_headers_and_the_blocks() {
    for style in STYLES {
        let client: Reader = Client::new(&learnt(style), 1);
        assert_eq!(client.len_max(OpKind::Read), 32 << 20);
        let longest = client.len_max(OpKind::WriteZeroes);
        assert!(longest.is_multiple_of(64 << 10) && longest >= (1 << 32) - (64 << 10));
        assert!(style == ReplyStyle::Extended || longest <= u32::MAX.into());
        assert_eq!((client.size(), client.info().block), (SIZE, volume().block));
    }
    let mut odd = learnt(ReplyStyle::Extended);
    odd.block.maximum_payload = (1 << 20) + 700;
    assert_eq!(Reader::new(&odd, 1).len_max(OpKind::Write), (1 << 20) + 512);
}
