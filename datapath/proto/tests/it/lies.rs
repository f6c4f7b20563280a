//! The client's transmission phase against servers that break the protocol.

use sheave_core::{Extent, NbdErrno, Op};
use sheave_proto::reply::{block_status_chunk, error_chunk, none_chunk, success};
use sheave_proto::wire::BLOCK_STATUS_EXTENTS_MAX;
use sheave_proto::{Answer, ClientEvent, MetaContext, ReplyStyle, ReplyTo, StatusQuery};

use crate::support::SIZE;
use crate::transmission::{CHUNKED, Connection, STYLES, range};

/// The expected part of the error, and the bytes that the server sends.
type Lie = (&'static str, fn(ReplyTo) -> Vec<u8>);

/// Lengths and statuses.
type Descriptors = &'static [(u64, u64)];

/// A reply in the style of a connection.
fn wire(put: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    put(&mut out);
    out
}

fn data(to: ReplyTo, at: u64, len: usize, done: bool) -> Vec<u8> {
    wire(|out| {
        sheave_proto::reply::data_chunk(out, to, at, len as u32, done);
        out.resize(out.len() + len, 7);
    })
}

fn hole(to: ReplyTo, at: u64, len: u32, done: bool) -> Vec<u8> {
    wire(|out| sheave_proto::reply::hole_chunk(out, to, at, len, done))
}

/// A block status chunk of another context than ours, or with lengths that ours would not have.
fn extents(to: ReplyTo, context: u32, extents: &[(u64, u64)], done: bool) -> Vec<u8> {
    let one = [Extent { len: 512, hole: false, zero: false }];
    let query = StatusQuery { range: range(to.offset, 512), req_one: true };
    let mut out = wire(|out| {
        block_status_chunk(out, to, MetaContext::BaseAllocation, &one, query, done);
    });
    let wide = to.style == ReplyStyle::Extended;
    let (head, each) = if wide { (8, 16) } else { (4, 8) };
    out.truncate(out.len() - head - each);
    let (at, len) = (out.len(), head + each * extents.len());
    out[at - 4..].copy_from_slice(&u32::try_from(len).unwrap().to_be_bytes());
    out.extend(context.to_be_bytes());
    if wide {
        out.extend(0_u32.to_be_bytes());
    }
    for field in extents.iter().flat_map(|(len, status)| [*len, *status]) {
        match wide {
            true => out.extend(field.to_be_bytes()),
            false => out.extend(u32::try_from(field).unwrap().to_be_bytes()),
        }
    }
    out
}

#[test]
fn r1_a_reply_answers_one_request_in_flight() {
    for style in STYLES {
        let mut unknown = Connection::new(style);
        let (_, request) = unknown.ask(&Op::Flush);
        let to = ReplyTo { cookie: request.cookie ^ 1 << 40, ..unknown.to(&request) };
        let why = unknown.lie(&wire(|out| success(out, to)));
        assert!(why.contains("unknown request"), "{why}");

        // Before the slot has its first request, and ahead of its time.
        for turn in [0, 9] {
            let mut early = Connection::new(style);
            let (_, request) = early.ask(&Op::Flush);
            let to = ReplyTo { cookie: turn, ..early.to(&request) };
            let why = early.lie(&wire(|out| success(out, to)));
            assert!(why.contains("unknown request"), "{why}");
        }

        // Twice, while the slot is free and while another request has it.
        for again in [false, true] {
            let mut twice = Connection::new(style);
            let (_, request) = twice.ask(&Op::Flush);
            let reply = wire(|out| success(out, twice.to(&request)));
            assert_eq!(twice.take(&reply).unwrap().len(), 1);
            if again {
                twice.ask(&Op::Flush);
            }
            let why = twice.lie(&reply);
            assert!(why.contains("second reply"), "{why}");
            assert_eq!(twice.client.drain().count(), usize::from(again));
        }
    }
}

#[test]
fn r4_a_read_arrives_once_and_whole() {
    for style in CHUNKED {
        let lies: [Lie; 9] = [
            ("twice", |to| [data(to, 0, 4096, false), data(to, 0, 1, true)].concat()),
            ("twice", |to| [hole(to, 0, 4096, false), data(to, 4095, 1, true)].concat()),
            ("twice", |to| [data(to, 0, 8192, false), hole(to, 0, 8192, true)].concat()),
            ("outside", |to| data(to, 8192, 1, true)),
            ("outside", |to| data(to, 4096, 4097, true)),
            ("without all", |to| data(to, 0, 8191, true)),
            ("without all", |to| hole(to, 1, 8191, true)),
            ("without all", |to| wire(|out| none_chunk(out, to))),
            ("does not fit", |to| extents(to, 1, &[(8192, 0)], true)),
        ];
        for (want, lie) in lies {
            let mut connection = Connection::new(style);
            let (cookie, request) = connection.read(0, 8192);
            let why = connection.lie(&lie(connection.to(&request)));
            assert!(why.contains(want), "{want}: {why}");
            let left: Vec<_> = connection.client.drain().collect();
            assert!(left.len() == 1 && left[0].0 == cookie, "it has no answer");
        }
        // Behind the end of a reply there is no more of it.
        let mut late = Connection::new(style);
        let (_, request) = late.read(0, 512);
        let to = late.to(&request);
        let why = late.lie(&[hole(to, 0, 512, true), hole(to, 0, 512, true)].concat());
        assert!(why.contains("second reply"), "{why}");
        // A failed read need not be complete.
        let mut failed = Connection::new(style);
        let (_, request) = failed.read(0, 8192);
        let to = failed.to(&request);
        let error = wire(|out| error_chunk(out, to, NbdErrno::Io, "bad", true));
        let ended = failed.take(&[data(to, 512, 512, false), error].concat()).unwrap();
        let error = ended[0].2.as_ref().unwrap_err();
        assert_eq!(error.to_string(), "the server reports an error: I/O error: bad");
    }
}

#[test]
fn r7_a_block_status_arrives_once() {
    let status = Op::BlockStatus { range: range(0, 8192), extents_max: 100 };
    for style in CHUNKED {
        let lies: [Lie; 5] = [
            ("not selected", |to| extents(to, 2, &[(8192, 0)], true)),
            ("two block status", |to| extents(to, 1, &[(512, 0)], false).repeat(2)),
            ("without length", |to| extents(to, 1, &[(512, 0), (0, 1)], true)),
            ("without an extent", |to| wire(|out| none_chunk(out, to))),
            ("does not fit", |to| hole(to, 0, 8192, true)),
        ];
        for (want, lie) in lies {
            let mut connection = Connection::new(style);
            let (_, request) = connection.ask(&status);
            let why = connection.lie(&lie(connection.to(&request)));
            assert!(why.contains(want), "{want}: {why}");
        }
    }
}

/// A client's handling of descriptors that it did not request, or that end inside of a block.
#[test]
fn r7_extents_lie_inside_of_what_was_asked_and_end_at_blocks() {
    let extent = |len, bits: u8| Extent { len, hole: bits & 1 != 0, zero: bits & 2 != 0 };
    let cases: [(Descriptors, Vec<Extent>); 6] = [
        (&[(4096, 0), (4096, 3)], vec![extent(4096, 0), extent(4096, 3)]),
        (&[(4096, 0), (1 << 31, 3), (1 << 31, 0)], vec![extent(4096, 0), extent(4096, 3)]),
        (&[(4096, 7)], vec![extent(4096, 3)]),
        // 512 bytes are a block.
        (&[(700, 3), (4000, 0)], vec![extent(512, 3)]),
        (&[(511, 3), (4001, 0)], vec![extent(512, 0)]),
        (&[(512, 3), (1, 3), (511, 0)], vec![extent(512, 3), extent(512, 0)]),
    ];
    for style in CHUNKED {
        for (sent, want) in &cases {
            let mut connection = Connection::new(style);
            let status = Op::BlockStatus { range: range(1024, 8192), extents_max: 100 };
            let (_, request) = connection.ask(&status);
            let reply = extents(connection.to(&request), 1, sent, true);
            let ended = connection.take(&reply).unwrap();
            assert_eq!(ended[0].2, Ok(Answer::Extents(want.clone())), "{sent:?}");
        }
    }
}

#[test]
fn replies_without_end_are_ended() {
    for style in CHUNKED {
        let mut connection = Connection::new(style);
        let (_, request) = connection.read(0, 512);
        let to = connection.to(&request);
        let error = wire(|out| error_chunk(out, to, NbdErrno::Io, "again", false));
        let why = connection.lie(&error.repeat(1000));
        assert!(why.contains("too many errors"), "{why}");
    }
}

#[test]
fn a_block_status_of_a_million_extents_needs_no_more_input_than_one() {
    let mut connection = Connection::new(ReplyStyle::Extended);
    let whole = Op::BlockStatus { range: range(0, SIZE), extents_max: 3 };
    let (_, request) = connection.ask(&whole);
    let sent: Vec<_> = (0..BLOCK_STATUS_EXTENTS_MAX as u64).map(|i| (512, i % 2)).collect();
    let reply = extents(connection.to(&request), 1, &sent, true);
    let (mut from, mut ended) = (0, None);
    while ended.is_none() {
        let (consumed, event) =
            connection.client.step(&reply[from..reply.len().min(from + 64)]).unwrap();
        from += consumed;
        match event {
            ClientEvent::Done { outcome, .. } => ended = Some(outcome),
            ClientEvent::NeedMore(len) => assert!(len <= 32),
            other => panic!("{other:?}"),
        }
    }
    let Some(Ok(Answer::Extents(extents))) = ended else { panic!("{ended:?}") };
    assert_eq!(extents.len(), 3);
}
