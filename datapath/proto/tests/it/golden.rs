//! Whole messages, byte by byte, as the specification draws them.

use sheave_core::{ByteRange, Extent, NbdErrno};
use sheave_proto::reply::{block_status_chunk, data_chunk, error_chunk, hole_chunk, simple};
use sheave_proto::wire::{command, command_flag, option};
use sheave_proto::{
    MetaContext, ReplyStyle, ReplyTo, Request, ServerHandshake, StatusQuery, TlsMode,
};

use crate::support::{Server, info, message};

/// Bytes from hexadecimal digits; blanks do not count.
fn hex(digits: &str) -> Vec<u8> {
    let digits: String = digits.split_whitespace().collect();
    (0..digits.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap())
        .collect()
}

fn to(style: ReplyStyle) -> ReplyTo {
    ReplyTo { style, cookie: 0x0102_0304_0506_0708, offset: 0x1000 }
}

fn encoded(put: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    put(&mut out);
    out
}

#[test]
fn golden_handshake() {
    assert_eq!(
        ServerHandshake::greeting().as_slice(),
        hex("4e42444d41474943 49484156454f5054 0003")
    );
    let go = hex("49484156454f5054 00000007 0000000c  00000004 6469736b 0001 0003");
    assert_eq!(message(option::GO, &info("disk", &[3])), go);
    let (output, _) = Server::new(TlsMode::Off).send(&go);
    let want = hex("0003e889045565a9 00000007 00000003 0000000c  0000 0000000040000000 0d6d
         0003e889045565a9 00000007 00000003 0000000e  0003 00000200 00001000 02000000
         0003e889045565a9 00000007 00000001 00000000");
    assert_eq!(output, want);
}

#[test]
fn golden_unknown_option() {
    let (output, _) = Server::new(TlsMode::Off).send(&hex("49484156454f5054 00000063 00000000"));
    let want = hex("0003e889045565a9 00000063 80000001 0000000e");
    assert_eq!(output[..20], want);
    assert_eq!(output[20..], *b"unknown option");
}

#[test]
fn golden_requests() {
    let mut request = Request {
        cookie: 0x0102_0304_0506_0708,
        flags: command_flag::FUA,
        command: command::WRITE,
        offset: 0x1000,
        length: 0x200,
    };
    let compact = encoded(|out| request.encode(ReplyStyle::Simple, out));
    assert_eq!(compact, hex("25609513 0001 0001 0102030405060708 0000000000001000 00000200"));
    request.flags |= command_flag::PAYLOAD_LEN;
    let extended = encoded(|out| request.encode(ReplyStyle::Extended, out));
    let want = hex("21e41c71 0021 0001 0102030405060708 0000000000001000 0000000000000200");
    assert_eq!(extended, want);
}

#[test]
fn golden_replies() {
    let reply = encoded(|out| simple(out, to(ReplyStyle::Simple).cookie, Some(NbdErrno::Inval)));
    assert_eq!(reply, hex("67446698 00000016 0102030405060708"));
    let structured = to(ReplyStyle::Structured);
    let data = encoded(|out| data_chunk(out, structured, 0x1000, 0x200, true));
    assert_eq!(data, hex("668e33ef 0001 0001 0102030405060708 00000208 0000000000001000"));
    let hole = encoded(|out| hole_chunk(out, structured, 0x1000, 0x200, false));
    let want = hex("668e33ef 0000 0002 0102030405060708 0000000c 0000000000001000 00000200");
    assert_eq!(hole, want);
    let error = encoded(|out| error_chunk(out, to(ReplyStyle::Extended), NbdErrno::Io, "x", true));
    let want = hex(
        "6e8a278c 0001 8001 0102030405060708 0000000000001000 0000000000000007 00000005 0001 78",
    );
    assert_eq!(error, want);
}

#[test]
fn golden_block_status() {
    let range = ByteRange::within(0x1000, 0x2000, 0x10000).unwrap();
    let query = StatusQuery { range, req_one: false };
    let extents = [
        Extent { len: 0x1000, hole: false, zero: false },
        Extent { len: 0x1000, hole: true, zero: true },
    ];
    let chunk = |style| {
        encoded(|out| {
            let context = MetaContext::BaseAllocation;
            block_status_chunk(out, to(style), context, &extents, query, true);
        })
    };
    let compact = hex("668e33ef 0001 0005 0102030405060708 00000014
         00000001 00001000 00000000 00001000 00000003");
    assert_eq!(chunk(ReplyStyle::Structured), compact);
    let extended = hex("6e8a278c 0001 0006 0102030405060708 0000000000001000 0000000000000028
         00000001 00000002 0000000000001000 0000000000000000 0000000000001000 0000000000000003");
    assert_eq!(chunk(ReplyStyle::Extended), extended);
}

#[test]
fn golden_magic_numbers() {
    use sheave_proto::wire::magic;
    assert_eq!(magic::NBD.to_be_bytes(), *b"NBDMAGIC");
    assert_eq!(magic::OPTION.to_be_bytes(), *b"IHAVEOPT");
    assert_eq!(magic::OLD_STYLE, 0x4202_8186_1253);
    assert_eq!(magic::OPTION_REPLY, 0x0003_e889_0455_65a9);
    let words = [
        magic::REQUEST,
        magic::SIMPLE_REPLY,
        magic::STRUCTURED_REPLY,
        magic::EXTENDED_REQUEST,
        magic::EXTENDED_REPLY,
    ];
    let want = ["25609513", "67446698", "668e33ef", "21e41c71", "6e8a278c"];
    assert_eq!(words.map(|word| format!("{word:08x}")), want);
    let reserved = [0x1256_0953, 0x9674_4668, 0x2560_9514];
    assert!(words.iter().all(|word| !reserved.contains(word)));
}

#[test]
fn golden_numbers_of_the_handshake() {
    use sheave_proto::wire::{PORT, handshake_flag, info_type, reply_type};
    assert_eq!(PORT, 10809);
    assert_eq!([handshake_flag::FIXED_NEWSTYLE, handshake_flag::NO_ZEROES], [1, 2]);
    let options = [
        option::EXPORT_NAME,
        option::ABORT,
        option::LIST,
        option::PEEK_EXPORT,
        option::STARTTLS,
        option::INFO,
        option::GO,
        option::STRUCTURED_REPLY,
        option::LIST_META_CONTEXT,
        option::SET_META_CONTEXT,
        option::EXTENDED_HEADERS,
    ];
    assert!(options.into_iter().eq(1..=11));
    let replies = [reply_type::ACK, reply_type::SERVER, reply_type::INFO, reply_type::META_CONTEXT];
    assert_eq!(replies, [1, 2, 3, 4]);
    let errors = [
        reply_type::ERR_UNSUP,
        reply_type::ERR_POLICY,
        reply_type::ERR_INVALID,
        reply_type::ERR_PLATFORM,
        reply_type::ERR_TLS_REQD,
        reply_type::ERR_UNKNOWN,
        reply_type::ERR_SHUTDOWN,
        reply_type::ERR_BLOCK_SIZE_REQD,
        reply_type::ERR_TOO_BIG,
        reply_type::ERR_EXT_HEADER_REQD,
    ];
    assert!(errors.into_iter().eq(0x8000_0001..=0x8000_000a));
    let infos = [info_type::EXPORT, info_type::NAME, info_type::DESCRIPTION, info_type::BLOCK_SIZE];
    assert_eq!(infos, [0, 1, 2, 3]);
}

#[test]
fn golden_numbers_of_transmission() {
    use sheave_proto::wire::{
        allocation_status, chunk_flag, chunk_type, command, command_flag, transmission_flag,
    };
    let flags = [
        transmission_flag::HAS_FLAGS,
        transmission_flag::READ_ONLY,
        transmission_flag::SEND_FLUSH,
        transmission_flag::SEND_FUA,
        transmission_flag::ROTATIONAL,
        transmission_flag::SEND_TRIM,
        transmission_flag::SEND_WRITE_ZEROES,
        transmission_flag::SEND_DF,
        transmission_flag::CAN_MULTI_CONN,
        transmission_flag::SEND_RESIZE,
        transmission_flag::SEND_CACHE,
        transmission_flag::SEND_FAST_ZERO,
        transmission_flag::BLOCK_STATUS_PAYLOAD,
    ];
    assert!(flags.into_iter().eq((0..13).map(|bit| 1 << bit)));
    let commands = [
        command::READ,
        command::WRITE,
        command::DISC,
        command::FLUSH,
        command::TRIM,
        command::CACHE,
        command::WRITE_ZEROES,
        command::BLOCK_STATUS,
        command::RESIZE,
    ];
    assert!(commands.into_iter().eq(0..9));
    let flags = [
        command_flag::FUA,
        command_flag::NO_HOLE,
        command_flag::DF,
        command_flag::REQ_ONE,
        command_flag::FAST_ZERO,
        command_flag::PAYLOAD_LEN,
    ];
    assert!(flags.into_iter().eq((0..6).map(|bit| 1 << bit)));
    let chunks = [
        chunk_type::NONE,
        chunk_type::OFFSET_DATA,
        chunk_type::OFFSET_HOLE,
        chunk_type::BLOCK_STATUS,
        chunk_type::BLOCK_STATUS_EXT,
        chunk_type::ERROR,
        chunk_type::ERROR_OFFSET,
    ];
    assert_eq!(chunks, [0, 1, 2, 5, 6, 0x8001, 0x8002]);
    assert_eq!(chunk_flag::DONE, 1);
    assert_eq!([allocation_status::HOLE, allocation_status::ZERO], [1, 2]);
}
