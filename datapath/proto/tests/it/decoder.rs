//! A client's decoding of replies.

use sheave_core::NbdErrno;
use sheave_proto::wire::{BLOCK_STATUS_EXTENTS_MAX, chunk_type, command, command_flag, magic};
use sheave_proto::{
    COVERAGE_GAPS_MAX, Decoded, REPLY_LEN_MAX, ReadCoverage, ReplyBody, ReplyDecoder, ReplyError,
    ReplyEvent, ReplyStyle, Request,
};

const COOKIE: u64 = 42;
const AT: u64 = 4096;
const LEN: u64 = 8192;

fn request(command: u16) -> Request {
    Request { cookie: COOKIE, flags: 0, command, offset: AT, length: LEN }
}

fn chunk(style: ReplyStyle, flags: u16, kind: u16, body: &[u8]) -> Vec<u8> {
    let mut out = match style {
        ReplyStyle::Extended => magic::EXTENDED_REPLY.to_be_bytes().to_vec(),
        _ => magic::STRUCTURED_REPLY.to_be_bytes().to_vec(),
    };
    out.extend(flags.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(COOKIE.to_be_bytes());
    match style {
        ReplyStyle::Extended => {
            out.extend(AT.to_be_bytes());
            out.extend((body.len() as u64).to_be_bytes());
        }
        _ => out.extend(u32::try_from(body.len()).unwrap().to_be_bytes()),
    }
    out.extend(body);
    out
}

fn simple(error: u32) -> Vec<u8> {
    [magic::SIMPLE_REPLY.to_be_bytes().as_slice(), &error.to_be_bytes(), &COOKIE.to_be_bytes()]
        .concat()
}

fn decode<'a>(
    style: ReplyStyle,
    wire: &'a [u8],
    request: Request,
) -> Result<Decoded<'a>, ReplyError> {
    let pending = |cookie| (cookie == COOKIE).then_some(request);
    ReplyDecoder::new(style).decode(wire, pending)
}

/// Decodes all of `wire`, and checks that every shorter prefix needs more.
#[track_caller]
fn event<'a>(style: ReplyStyle, wire: &'a [u8], request: Request) -> ReplyEvent<'a> {
    for len in 0..wire.len() {
        match decode(style, &wire[..len], request) {
            Ok(Decoded::NeedMore(needed)) => assert!(needed > len && needed <= wire.len()),
            other => panic!("{len} of {} bytes: {other:?}", wire.len()),
        }
    }
    match decode(style, wire, request) {
        Ok(Decoded::Event { consumed, event }) => {
            assert_eq!((consumed, event.cookie), (wire.len(), COOKIE));
            event
        }
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn is_violation(style: ReplyStyle, wire: &[u8], request: Request) {
    let result = decode(style, wire, request);
    assert!(matches!(result, Err(ReplyError::Violation(_))), "{result:?}");
}

fn at_len(at: u64, len: u32) -> Vec<u8> {
    [at.to_be_bytes().as_slice(), &len.to_be_bytes()].concat()
}

const CHUNKED: [ReplyStyle; 2] = [ReplyStyle::Structured, ReplyStyle::Extended];
const READ: u16 = command::READ;

#[test]
fn r2_simple_replies() {
    let wire = simple(0);
    let len = u32::try_from(LEN).unwrap();
    let read = event(ReplyStyle::Simple, &wire, request(READ));
    assert_eq!((read.body, read.done), (ReplyBody::Data { at: AT, len }, true));
    for style in [ReplyStyle::Simple, ReplyStyle::Structured] {
        let write = event(style, &wire, request(command::WRITE));
        assert_eq!((write.body, write.done), (ReplyBody::Success, true));
    }
    let empty = Request { length: 0, ..request(READ) };
    assert_eq!(event(ReplyStyle::Simple, &wire, empty).body, ReplyBody::Success);
    let wire = simple(28);
    let failed = event(ReplyStyle::Simple, &wire, request(READ));
    let body = ReplyBody::Error { errno: NbdErrno::NoSpc, message: "", at: None };
    assert_eq!((failed.body, failed.done), (body, true));
}

#[test]
fn r2_simple_reply_to_a_structured_read_is_a_violation_even_if_it_fails() {
    for error in [0, 22] {
        is_violation(ReplyStyle::Structured, &simple(error), request(READ));
    }
    is_violation(ReplyStyle::Structured, &simple(0), request(command::BLOCK_STATUS));
}

#[test]
fn r2_replies_of_another_style_are_violations() {
    let structured = chunk(ReplyStyle::Structured, 1, chunk_type::NONE, &[]);
    let extended = chunk(ReplyStyle::Extended, 1, chunk_type::NONE, &[]);
    let cases = [
        (ReplyStyle::Simple, structured.clone()),
        (ReplyStyle::Simple, extended.clone()),
        (ReplyStyle::Structured, extended),
        (ReplyStyle::Extended, structured),
        (ReplyStyle::Extended, simple(0)),
        (ReplyStyle::Simple, vec![0; 16]),
    ];
    for (style, wire) in cases {
        let result = decode(style, &wire, request(READ));
        assert!(matches!(result, Err(ReplyError::BadMagic(_))), "{result:?}");
    }
}

#[test]
fn r1_unknown_cookies_are_violations() {
    let none = |_| None;
    let decoder = ReplyDecoder::new(ReplyStyle::Structured);
    for wire in [simple(0), chunk(ReplyStyle::Structured, 1, chunk_type::NONE, &[])] {
        assert_eq!(decoder.decode(&wire, none), Err(ReplyError::UnknownCookie(COOKIE)));
    }
}

#[test]
fn r3_none_must_be_last_and_empty() {
    for style in CHUNKED {
        let wire = chunk(style, 1, chunk_type::NONE, &[]);
        let end = event(style, &wire, request(READ));
        assert_eq!((end.body, end.done), (ReplyBody::Success, true));
        is_violation(style, &chunk(style, 0, chunk_type::NONE, &[]), request(READ));
        is_violation(style, &chunk(style, 1, chunk_type::NONE, b"x"), request(READ));
    }
}

#[test]
fn r3_unknown_chunk_flags_are_ignored() {
    for style in CHUNKED {
        let wire = chunk(style, 0x8001, chunk_type::NONE, &[]);
        assert!(event(style, &wire, request(READ)).done);
    }
}

#[test]
fn r3_data_is_announced_not_buffered() {
    for style in CHUNKED {
        let mut wire =
            chunk(style, 1, chunk_type::OFFSET_DATA, &[&AT.to_be_bytes()[..], &[7; 512]].concat());
        wire.truncate(wire.len() - 512);
        let data = event(style, &wire, request(READ));
        assert_eq!((data.body, data.done), (ReplyBody::Data { at: AT, len: 512 }, true));
    }
}

#[test]
fn r3_holes() {
    for style in CHUNKED {
        let wire = chunk(style, 0, chunk_type::OFFSET_HOLE, &at_len(AT + 512, 512));
        let hole = event(style, &wire, request(READ));
        assert_eq!((hole.body, hole.done), (ReplyBody::Hole { at: AT + 512, len: 512 }, false));
        let hole = |body: &[u8]| chunk(style, 0, chunk_type::OFFSET_HOLE, body);
        is_violation(style, &hole(&at_len(AT, 0)), request(READ));
        is_violation(style, &hole(&at_len(AT, 1)[..11]), request(READ));
        is_violation(style, &hole(&[&at_len(AT, 1)[..], b"x"].concat()), request(READ));
    }
}

#[test]
fn r4_chunks_outside_of_the_request_are_violations() {
    let len = u32::try_from(LEN).unwrap();
    for style in CHUNKED {
        for (at, len) in [(AT - 1, 1), (AT, len + 1), (AT + LEN, 1), (u64::MAX, 2), (0, len)] {
            let hole = chunk(style, 0, chunk_type::OFFSET_HOLE, &at_len(at, len));
            is_violation(style, &hole, request(READ));
            let body = [at.to_be_bytes().as_slice(), &vec![0; len as usize]].concat();
            is_violation(style, &chunk(style, 0, chunk_type::OFFSET_DATA, &body), request(READ));
        }
        let empty = chunk(style, 0, chunk_type::OFFSET_DATA, &AT.to_be_bytes());
        is_violation(style, &empty, request(READ));
    }
}

#[test]
fn r4_content_for_other_commands_is_a_violation() {
    for style in CHUNKED {
        for command in [command::WRITE, command::FLUSH, command::BLOCK_STATUS] {
            let hole = chunk(style, 0, chunk_type::OFFSET_HOLE, &at_len(AT, 512));
            is_violation(style, &hole, request(command));
        }
        let status = chunk(style, 1, chunk_type::BLOCK_STATUS, &[0; 12]);
        is_violation(style, &status, request(READ));
    }
}

#[test]
fn r4_unknown_chunks_are_violations_unless_they_are_errors() {
    for style in CHUNKED {
        for kind in [3, 4, 7, 0x7fff] {
            is_violation(style, &chunk(style, 0, kind, &[0; 32]), request(READ));
        }
        let body = [0, 0, 0, 5, 0, 2, b'n', b'o', 1, 2, 3];
        let wire = chunk(style, 1, 0x8fff, &body);
        let error = event(style, &wire, request(READ)).body;
        assert_eq!(error, ReplyBody::Error { errno: NbdErrno::Io, message: "no", at: None });
    }
}

#[test]
fn r3_errors() {
    for style in CHUNKED {
        let wire = chunk(style, 1, chunk_type::ERROR, &[0, 0, 0, 28, 0, 4, b'f', b'u', b'l', b'l']);
        let error = event(style, &wire, request(command::WRITE)).body;
        let want = ReplyBody::Error { errno: NbdErrno::NoSpc, message: "full", at: None };
        assert_eq!(error, want);
        let with_offset = |at: u64| [[0, 0, 0, 5, 0, 0].as_slice(), &at.to_be_bytes()].concat();
        let wire = chunk(style, 0, chunk_type::ERROR_OFFSET, &with_offset(AT + 9));
        let error = event(style, &wire, request(READ)).body;
        let want = ReplyBody::Error { errno: NbdErrno::Io, message: "", at: Some(AT + 9) };
        assert_eq!(error, want);
        for at in [AT - 1, AT + LEN] {
            let wire = chunk(style, 0, chunk_type::ERROR_OFFSET, &with_offset(at));
            is_violation(style, &wire, request(READ));
        }
        let not_text = chunk(style, 1, chunk_type::ERROR, &[0, 0, 0, 5, 0, 1, 0xff]);
        let error = event(style, &not_text, request(READ)).body;
        assert_eq!(error, ReplyBody::Error { errno: NbdErrno::Io, message: "", at: None });
    }
}

#[test]
fn r3_malformed_errors_are_violations() {
    for style in CHUNKED {
        let bodies: [&[u8]; 4] =
            [&[0, 0, 0, 5, 0], &[0, 0, 0, 5, 0, 1], &[0, 0, 0, 0, 0, 0], &[0; 100_000]];
        for body in bodies {
            is_violation(style, &chunk(style, 1, chunk_type::ERROR, body), request(READ));
        }
        let short = [0, 0, 0, 5, 0, 0, 1, 2, 3];
        is_violation(style, &chunk(style, 1, chunk_type::ERROR_OFFSET, &short), request(READ));
    }
}

fn status(style: ReplyStyle, count: u32, extents: &[(u64, u64)]) -> Vec<u8> {
    let mut body = 3_u32.to_be_bytes().to_vec();
    if style == ReplyStyle::Extended {
        body.extend(count.to_be_bytes());
        for (len, status) in extents {
            body.extend(len.to_be_bytes());
            body.extend(status.to_be_bytes());
        }
        return chunk(style, 1, chunk_type::BLOCK_STATUS_EXT, &body);
    }
    for field in extents.iter().flat_map(|(len, status)| [*len, *status]) {
        body.extend(u32::try_from(field).unwrap().to_be_bytes());
    }
    chunk(style, 1, chunk_type::BLOCK_STATUS, &body)
}

#[test]
fn r7_block_status() {
    let asked = request(command::BLOCK_STATUS);
    let extents = [(4096, 0), (1 << 31, 3)];
    for style in CHUNKED {
        for count in [2, 0] {
            let wire = status(style, count, &extents);
            let decoder = ReplyDecoder::new(style);
            let (head, descriptors) = wire.split_at(wire.len() - 2 * decoder.descriptor_len());
            let body = event(style, head, asked).body;
            assert_eq!(body, ReplyBody::BlockStatus { context: 3, count: 2 });
            let found = descriptors.chunks(decoder.descriptor_len());
            let found = found.map(|bytes| decoder.descriptor(bytes).unwrap().unwrap());
            assert_eq!(found.collect::<Vec<_>>(), extents);
            let short = &descriptors[1..decoder.descriptor_len()];
            assert_eq!(decoder.descriptor(short), Ok(None));
            assert!(decoder.descriptor(&[0; 16]).is_err(), "an extent without length");
        }
        is_violation(style, &status(style, 0, &[]), asked);
        is_violation(style, &chunk(style, 1, chunk_type::BLOCK_STATUS, &[1, 2, 3]), asked);
        let one = Request { flags: command_flag::REQ_ONE, ..asked };
        is_violation(style, &status(style, 2, &extents), one);
    }
    is_violation(ReplyStyle::Extended, &status(ReplyStyle::Extended, 7, &extents), asked);
    let ragged = chunk(ReplyStyle::Structured, 1, chunk_type::BLOCK_STATUS, &[1; 13]);
    is_violation(ReplyStyle::Structured, &ragged, asked);
}

#[test]
fn r9_block_status_has_the_width_of_the_style() {
    let asked = request(command::BLOCK_STATUS);
    let narrow = chunk(ReplyStyle::Extended, 1, chunk_type::BLOCK_STATUS, &[1; 12]);
    is_violation(ReplyStyle::Extended, &narrow, asked);
    let wide = chunk(ReplyStyle::Structured, 1, chunk_type::BLOCK_STATUS_EXT, &[1; 24]);
    is_violation(ReplyStyle::Structured, &wide, asked);
}

#[test]
fn r9_extended_replies_echo_the_offset() {
    let wire = chunk(ReplyStyle::Extended, 1, chunk_type::NONE, &[]);
    let elsewhere = Request { offset: AT + 1, ..request(command::WRITE) };
    is_violation(ReplyStyle::Extended, &wire, elsewhere);
}

#[test]
fn r8_lengths_are_bounded_before_anything_is_waited_for() {
    for style in CHUNKED {
        let kind = match style {
            ReplyStyle::Extended => chunk_type::BLOCK_STATUS_EXT,
            _ => chunk_type::BLOCK_STATUS,
        };
        let mut wire = chunk(style, 1, kind, &[0; 8]);
        let end = wire.len() - 8;
        let most = if style == ReplyStyle::Extended {
            8 + 16 * BLOCK_STATUS_EXTENTS_MAX as u32
        } else {
            4 + 8 * BLOCK_STATUS_EXTENTS_MAX as u32
        };
        wire[end - 4..end].copy_from_slice(&most.to_be_bytes());
        let asked = request(command::BLOCK_STATUS);
        let Ok(Decoded::Event { event, .. }) = decode(style, &wire, asked) else {
            panic!("the longest chunk is refused");
        };
        let count = BLOCK_STATUS_EXTENTS_MAX as u32;
        assert_eq!(event.body, ReplyBody::BlockStatus { context: 0, count });
        wire[end - 4..end].copy_from_slice(&(most + 1).to_be_bytes());
        is_violation(style, &wire, request(command::BLOCK_STATUS));
    }
    let mut wire = chunk(ReplyStyle::Extended, 1, chunk_type::ERROR, &[]);
    let most = REPLY_LEN_MAX - wire.len();
    wire[24..].copy_from_slice(&(most as u64).to_be_bytes());
    let longest = decode(ReplyStyle::Extended, &wire, request(READ));
    assert_eq!(longest, Ok(Decoded::NeedMore(REPLY_LEN_MAX)));
    wire[24..].copy_from_slice(&(most as u64 + 1).to_be_bytes());
    is_violation(ReplyStyle::Extended, &wire, request(READ));
    let mut wire = chunk(ReplyStyle::Extended, 0, chunk_type::OFFSET_DATA, &[]);
    wire[24..].copy_from_slice(&u64::MAX.to_be_bytes());
    is_violation(ReplyStyle::Extended, &wire, request(READ));
}

#[test]
fn r4_coverage_finds_gaps_and_overlaps() {
    let whole = || ReadCoverage::new(&request(READ));
    let mut in_order = whole();
    for at in (AT..AT + LEN).step_by(512) {
        assert!(!in_order.is_complete());
        in_order.add(at, 512).unwrap();
    }
    assert!(in_order.is_complete());

    let mut backwards = whole();
    for piece in (0..LEN / 512).rev() {
        let at = AT + piece * 512;
        assert!(!backwards.is_complete());
        backwards.add(at, 512).unwrap();
        assert!(backwards.add(at, 512).is_err());
    }
    assert!(backwards.is_complete());

    let mut scattered = whole();
    scattered.add(AT + 1024, 512).unwrap();
    for (at, len) in [(AT, 1025), (AT + 1535, 2), (AT + 1024, 1), (AT + 1000, 600), (AT, 8193)] {
        assert!(scattered.add(at, len).is_err(), "{at}+{len}");
    }
    scattered.add(AT, 1024).unwrap();
    scattered.add(AT + 2048, u32::try_from(LEN - 2048).unwrap()).unwrap();
    assert!(!scattered.is_complete());
    scattered.add(AT + 1536, 512).unwrap();
    assert!(scattered.is_complete());
}

#[test]
fn r4_coverage_is_bounded() {
    let long = Request { length: 1 << 30, ..request(READ) };
    let mut coverage = ReadCoverage::new(&long);
    for piece in 0..COVERAGE_GAPS_MAX as u64 {
        coverage.add(AT + 2 * piece + 1, 1).unwrap();
    }
    let last = AT + 2 * COVERAGE_GAPS_MAX as u64 + 1;
    assert!(coverage.add(last, 1).is_err());
    assert!(coverage.add(AT, 1).is_ok(), "gaps may be closed at any time");
    assert!(coverage.add(last, 1).is_ok());
}

#[test]
fn r2_header_len_min_is_the_shortest_reply() {
    let min = |style| ReplyDecoder::new(style).header_len_min();
    let mins = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended].map(min);
    assert_eq!(mins, [16, 16, 32]);
}
