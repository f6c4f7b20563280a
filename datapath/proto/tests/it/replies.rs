//! The form of the server's replies.

use proptest::prelude::*;
use sheave_core::{Buf, ByteRange, Extent, NbdErrno, Payload, Segment};
use sheave_proto::reply::{
    block_status_chunk, data_chunk, error_chunk, error_offset_chunk, failure, hole_chunk,
    none_chunk, simple, success,
};
use sheave_proto::wire::{
    BLOCK_STATUS_EXTENTS_MAX, allocation_status as status, chunk_type, magic,
};
use sheave_proto::{
    HOLE_LEN_MIN, MetaContext, ReadChunk, ReplyStyle, ReplyTo, StatusQuery, read_chunks,
};

use crate::support::{be16, be32, be64, negotiated, volume};

const COOKIE: u64 = 0xfeed_face_dead_beef;
const OFFSET: u64 = 0x1234_5678_9abc_def0;

fn to(style: ReplyStyle) -> ReplyTo {
    ReplyTo { style, cookie: COOKIE, offset: OFFSET }
}

struct Chunk {
    kind: u16,
    done: bool,
    body: Vec<u8>,
}

/// Parses one chunk and checks its header. `body_missing` bytes are not there yet.
fn parse(style: ReplyStyle, wire: &[u8], body_missing: u64) -> Chunk {
    let (head, body) = wire.split_at(if style == ReplyStyle::Extended { 32 } else { 20 });
    assert_eq!(be64(&head[8..]), COOKIE);
    let len = if style == ReplyStyle::Extended {
        assert_eq!(be32(head), magic::EXTENDED_REPLY);
        assert_eq!(be64(&head[16..]), OFFSET, "the request's offset is echoed");
        be64(&head[24..])
    } else {
        assert_eq!(be32(head), magic::STRUCTURED_REPLY);
        u64::from(be32(&head[16..]))
    };
    assert_eq!(len, body.len() as u64 + body_missing);
    assert_eq!(be16(&head[4..]) & !1, 0, "no flag but DONE");
    Chunk { kind: be16(&head[6..]), done: be16(&head[4..]) == 1, body: body.to_vec() }
}

fn encode(style: ReplyStyle, body_missing: u64, put: impl Fn(&mut Vec<u8>, ReplyTo)) -> Chunk {
    let mut out = Vec::new();
    put(&mut out, to(style));
    parse(style, &out, body_missing)
}

const CHUNKED: [ReplyStyle; 2] = [ReplyStyle::Structured, ReplyStyle::Extended];

#[test]
fn r1_cookie_is_echoed_and_simple_replies_are_simple() {
    let mut out = Vec::new();
    simple(&mut out, COOKIE, None);
    simple(&mut out, COOKIE, Some(NbdErrno::NoSpc));
    for (reply, error) in out.chunks(16).zip([0, 28]) {
        assert_eq!(be32(reply), magic::SIMPLE_REPLY);
        assert_eq!((be32(&reply[4..]), be64(&reply[8..])), (error, COOKIE));
    }
    assert_eq!(out.len(), 32);
}

#[test]
fn r2_style_decides_between_simple_replies_and_chunks() {
    let wire = |style, put: fn(&mut Vec<u8>, ReplyTo)| {
        let mut out = Vec::new();
        put(&mut out, to(style));
        be32(&out)
    };
    let puts: [fn(&mut Vec<u8>, ReplyTo); 2] =
        [success, |out, to| failure(out, to, NbdErrno::Io, "broken")];
    for put in puts {
        assert_eq!(wire(ReplyStyle::Simple, put), magic::SIMPLE_REPLY);
        assert_eq!(wire(ReplyStyle::Structured, put), magic::STRUCTURED_REPLY);
        assert_eq!(wire(ReplyStyle::Extended, put), magic::EXTENDED_REPLY);
    }
}

#[test]
fn r3_none_ends_a_reply() {
    for style in CHUNKED {
        let chunk = encode(style, 0, none_chunk);
        assert_eq!((chunk.kind, chunk.done, chunk.body), (chunk_type::NONE, true, vec![]));
    }
}

#[test]
fn r3_data_and_hole_chunks() {
    for style in CHUNKED {
        for done in [false, true] {
            let data = encode(style, 512, |out, to| data_chunk(out, to, 77, 512, done));
            assert_eq!((data.kind, data.done), (chunk_type::OFFSET_DATA, done));
            assert_eq!((data.body.len(), be64(&data.body)), (8, 77));
            let hole = encode(style, 0, |out, to| hole_chunk(out, to, 77, u32::MAX, done));
            assert_eq!((hole.kind, hole.done), (chunk_type::OFFSET_HOLE, done));
            assert_eq!((be64(&hole.body), be32(&hole.body[8..])), (77, u32::MAX));
            assert_eq!(hole.body.len(), 12);
        }
    }
}

#[test]
fn r3_error_chunks() {
    for style in CHUNKED {
        let error = encode(style, 0, |out, to| error_chunk(out, to, NbdErrno::NoSpc, "full", true));
        assert_eq!((error.kind, error.done), (chunk_type::ERROR, true));
        assert_eq!((be32(&error.body), be16(&error.body[4..])), (28, 4));
        assert_eq!(error.body[6..], *b"full");
        let error = encode(style, 0, |out, to| {
            error_offset_chunk(out, to, NbdErrno::Io, "bad", OFFSET + 1, false);
        });
        assert_eq!((error.kind, error.done), (chunk_type::ERROR_OFFSET, false));
        assert_eq!((be32(&error.body), be16(&error.body[4..])), (5, 3));
        assert_eq!((&error.body[6..9], be64(&error.body[9..])), (b"bad".as_slice(), OFFSET + 1));
    }
}

#[test]
fn r3_error_messages_are_cut() {
    let text = "ü".repeat(4000);
    let put = |out: &mut Vec<u8>, to| error_chunk(out, to, NbdErrno::Io, &text, true);
    let error = encode(ReplyStyle::Structured, 0, put);
    assert_eq!(be16(&error.body[4..]), 4096);
    assert!(std::str::from_utf8(&error.body[6..]).is_ok());
}

/// Descriptors of a block status chunk.
fn statuses(style: ReplyStyle, extents: &[Extent], query: StatusQuery) -> Vec<(u64, u64)> {
    let chunk = encode(style, 0, |out, to| {
        block_status_chunk(out, to, MetaContext::BaseAllocation, extents, query, true);
    });
    assert!(chunk.done);
    assert_eq!(be32(&chunk.body), MetaContext::BaseAllocation.id());
    if style == ReplyStyle::Structured {
        assert_eq!(chunk.kind, chunk_type::BLOCK_STATUS);
        let descriptors = chunk.body[4..].chunks(8);
        return descriptors.map(|d| (be32(d).into(), be32(&d[4..]).into())).collect();
    }
    assert_eq!(chunk.kind, chunk_type::BLOCK_STATUS_EXT);
    let descriptors = chunk.body[8..].chunks(16);
    assert_eq!(be32(&chunk.body[4..]) as usize, descriptors.len());
    descriptors.map(|d| (be64(d), be64(&d[8..]))).collect()
}

fn query(start: u64, len: u64, req_one: bool) -> StatusQuery {
    StatusQuery { range: ByteRange::within(start, len, u64::MAX).unwrap(), req_one }
}

fn extent(len: u64, hole: bool, zero: bool) -> Extent {
    Extent { len, hole, zero }
}

#[test]
fn r7_status_bits() {
    let extents = [
        extent(512, false, false),
        extent(512, true, false),
        extent(512, false, true),
        extent(512, true, true),
    ];
    let (hole, zero) = (u64::from(status::HOLE), u64::from(status::ZERO));
    assert_eq!((hole, zero), (1, 2));
    for style in CHUNKED {
        let found = statuses(style, &extents, query(0, 2048, false));
        assert_eq!(found, [(512, 0), (512, hole), (512, zero), (512, hole | zero)]);
    }
}

#[test]
fn r7_neighbours_of_one_status_are_joined() {
    let extents = [extent(10, true, true), extent(20, true, true), extent(5, false, false)];
    for style in CHUNKED {
        assert_eq!(statuses(style, &extents, query(0, 100, false)), [(30, 3), (5, 0)]);
        assert_eq!(statuses(style, &extents, query(0, 100, true)), [(30, 3)]);
    }
}

#[test]
fn r7_req_one_stays_inside_the_request() {
    for style in CHUNKED {
        let one = statuses(style, &[extent(1 << 40, true, true)], query(0, 4096, true));
        assert_eq!(one, [(4096, 3)]);
    }
}

#[test]
fn r7_only_the_last_extent_goes_beyond_the_request() {
    let extents = [extent(4096, false, false), extent(1 << 30, true, true), extent(9, false, true)];
    for style in CHUNKED {
        let found = statuses(style, &extents, query(0, 8192, false));
        assert_eq!(found, [(4096, 0), (1 << 30, 3)]);
        let exact = statuses(style, &extents, query(0, 4096, false));
        assert_eq!(exact, [(4096, 0)]);
    }
}

#[test]
fn r7_compact_extents_fit_into_32_bits_and_still_cover_the_request() {
    let all = [extent(1 << 40, true, true)];
    for len in [512, 0xffff_0000, u64::from(u32::MAX)] {
        let found = statuses(ReplyStyle::Structured, &all, query(0, len, false));
        assert_eq!(found, [(len.max(0xffff_0000), 3)]);
    }
    let wide = statuses(ReplyStyle::Extended, &all, query(0, 512, false));
    assert_eq!(wide, [(1 << 40, 3)]);
}

#[test]
fn r7_without_extents_all_is_allocated() {
    for style in CHUNKED {
        for none in [[].as_slice(), &[extent(0, true, true)]] {
            assert_eq!(statuses(style, none, query(512, 4096, false)), [(4096, 0)]);
        }
    }
}

#[test]
fn r7_r8_descriptors_are_bounded() {
    let many: Vec<_> = (0..(1 << 20) + 5).map(|i| extent(1, i % 2 == 0, false)).collect();
    let found = statuses(ReplyStyle::Extended, &many, query(0, 1 << 30, false));
    assert_eq!(found.len(), BLOCK_STATUS_EXTENTS_MAX);
    let mut info = volume();
    info.block.maximum_payload = 1 << 20;
    let small = negotiated(ReplyStyle::Extended, info);
    assert_eq!(small.extents_max(false) * 16, 1 << 20);
    assert_eq!(small.extents_max(true), 1);
    let large = negotiated(ReplyStyle::Extended, volume());
    assert_eq!(large.extents_max(false), BLOCK_STATUS_EXTENTS_MAX);
}

fn payload(segments: &[(bool, usize)]) -> Payload {
    let mut payload = Payload::new();
    for (is_zero, len) in segments {
        payload.push(match is_zero {
            true => Segment::Zero(*len),
            false => Segment::Data(Buf::zeroed(*len)),
        });
    }
    payload
}

fn chunks(style: ReplyStyle, df: bool, start: u64, segments: &[(bool, usize)]) -> Vec<ReadChunk> {
    let payload = payload(segments);
    let range = ByteRange::within(start, payload.len() as u64, u64::MAX).unwrap();
    read_chunks(style, df, range, &payload).collect()
}

#[test]
fn r4_holes_are_shown_where_they_pay() {
    let (data, zero) = (false, true);
    let segments = [(data, 4096), (zero, 8192), (data, 100), (zero, 4095), (data, 1)];
    let found = chunks(ReplyStyle::Structured, false, 4096, &segments);
    let brief: Vec<_> = found.iter().map(|c| (c.at, c.skip, c.len, c.hole, c.done)).collect();
    let want = [
        (4096, 0, 4096, false, false),
        (8192, 4096, 8192, true, false),
        (16384, 12288, 4196, false, true),
    ];
    assert_eq!(brief, want);
}

#[test]
fn r4_a_read_of_nothing_but_zeroes_is_one_hole() {
    let found = chunks(ReplyStyle::Extended, false, 3, &[(true, 5000)]);
    assert_eq!(found, [ReadChunk { at: 3, skip: 0, len: 5000, hole: true, done: true }]);
    let short = chunks(ReplyStyle::Extended, false, 3, &[(true, 100)]);
    assert_eq!(short, [ReadChunk { at: 3, skip: 0, len: 100, hole: false, done: true }]);
}

#[test]
fn r6_df_and_simple_replies_have_one_chunk_of_data() {
    let segments = [(true, 1 << 20), (false, 4096), (true, 1 << 20)];
    let styles =
        [(ReplyStyle::Simple, false), (ReplyStyle::Structured, true), (ReplyStyle::Extended, true)];
    for (style, df) in styles {
        let len = (2 << 20) + 4096;
        let want = ReadChunk { at: 0, skip: 0, len, hole: false, done: true };
        assert_eq!(chunks(style, df, 0, &segments), [want]);
    }
}

#[test]
fn r5_chunks_in_mid_reply_leave_room_for_an_error() {
    let mut out = Vec::new();
    let chunk = ReadChunk { at: OFFSET, skip: 0, len: 512, hole: false, done: false };
    chunk.encode(&mut out, to(ReplyStyle::Structured));
    out.extend([0; 512]);
    let data = parse(ReplyStyle::Structured, &out, 0);
    assert!(!data.done);
    let put = |out: &mut Vec<u8>, to| failure(out, to, NbdErrno::Io, "");
    assert!(encode(ReplyStyle::Structured, 0, put).done);
}

proptest! {
    #[test]
    fn r4_chunks_cover_the_read_once_and_in_order(
        start in 0_u64..100_000,
        segments in prop::collection::vec((any::<bool>(), 1_usize..20_000), 1..20),
        df in any::<bool>(),
    ) {
        let payload = payload(&segments);
        let total = payload.len();
        let found = chunks(ReplyStyle::Structured, df, start, &segments);
        let mut skip = 0;
        for (index, chunk) in found.iter().enumerate() {
            prop_assert_eq!((chunk.at, chunk.skip), (start + skip as u64, skip));
            prop_assert!(chunk.len > 0);
            prop_assert_eq!(chunk.done, index + 1 == found.len());
            // Holes are zeroes, and worth a chunk.
            let part = payload.slice(skip, chunk.len as usize);
            let is_zero = part.segments().iter().all(|s| matches!(s, Segment::Zero(_)));
            prop_assert!(!chunk.hole || is_zero && u64::from(chunk.len) >= HOLE_LEN_MIN);
            // Boundaries are those of blocks, but for the ends of the read.
            prop_assert!(skip == 0 || chunk.at.is_multiple_of(HOLE_LEN_MIN));
            skip += chunk.len as usize;
        }
        prop_assert_eq!(skip, total);
        // Neighbours differ, so there are as few chunks as can be.
        prop_assert!(found.windows(2).all(|pair| pair[0].hole != pair[1].hole));
    }

    #[test]
    fn r7_descriptors_keep_the_rules(
        start in 0_u64..1 << 40,
        len in 1_u64..u64::from(u32::MAX),
        req_one in any::<bool>(),
        extents in prop::collection::vec(
            (1_u64..1 << 33, any::<bool>(), any::<bool>()).prop_map(|(l, h, z)| extent(l, h, z)),
            1..20,
        ),
    ) {
        for style in CHUNKED {
            let found = statuses(style, &extents, query(start, len, req_one));
            prop_assert!(!found.is_empty() && found.len() <= extents.len());
            prop_assert!(found.iter().all(|(len, _)| *len > 0));
            let (_, all_but_last) = found.split_last().unwrap();
            prop_assert!(all_but_last.iter().map(|(len, _)| len).sum::<u64>() < len);
            prop_assert!(found.windows(2).all(|pair| pair[0].1 != pair[1].1));
            if req_one {
                prop_assert!(found.len() == 1 && found[0].0 <= len);
            }
            // Every byte described has the status of its extent.
            let mut at = 0;
            for (len, status) in found {
                let mut end = 0;
                for extent in &extents {
                    let begin = end;
                    end += extent.len;
                    if begin < at + len && end > at {
                        let known = MetaContext::BaseAllocation.status(extent);
                        prop_assert_eq!(u64::from(known), status);
                    }
                }
                at += len;
            }
        }
    }
}
