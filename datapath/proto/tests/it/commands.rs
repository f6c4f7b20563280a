//! The server's verdicts about requests.

use sheave_core::{NbdErrno, VolumeInfo};
use sheave_proto::wire::{command, command_flag as cf, transmission_flag};
use sheave_proto::{
    BadMagic, ContextSet, MetaContext, Negotiated, PAYLOAD_SKIP_MAX, ReplyStyle, Request, Verdict,
};

use crate::support::{SIZE, negotiated, volume};

const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];
const MAX: u64 = 32 << 20;
const COMMANDS: [u16; 7] = [
    command::READ,
    command::WRITE,
    command::FLUSH,
    command::TRIM,
    command::CACHE,
    command::WRITE_ZEROES,
    command::BLOCK_STATUS,
];

fn request(command: u16, flags: u16, offset: u64, length: u64) -> Request {
    Request { cookie: 7, flags, command, offset, length }
}

/// A write in the form that the style wants.
fn write(style: ReplyStyle, offset: u64, length: u64) -> Request {
    let flags = if style == ReplyStyle::Extended { cf::PAYLOAD_LEN } else { 0 };
    request(command::WRITE, flags, offset, length)
}

/// Any valid request of a command.
fn valid(style: ReplyStyle, command: u16) -> Request {
    match command {
        command::WRITE => write(style, 4096, 4096),
        command::FLUSH => request(command, 0, 0, 0),
        _ => request(command, 0, 4096, 4096),
    }
}

fn with(style: ReplyStyle, change: impl FnOnce(&mut VolumeInfo)) -> Negotiated {
    let mut info = volume();
    change(&mut info);
    negotiated(style, info)
}

#[track_caller]
fn refused(verdict: Verdict) -> (NbdErrno, u64) {
    match verdict {
        Verdict::Refuse { error, message, skip } => {
            assert!(!message.is_empty());
            (error, skip)
        }
        verdict => panic!("{verdict:?}"),
    }
}

#[test]
fn requests_survive_the_wire_and_have_a_magic_number() {
    for style in STYLES {
        let length = if style == ReplyStyle::Extended { u64::MAX } else { u32::MAX.into() };
        let sent = Request { cookie: !0, flags: 0x8001, command: 9, offset: u64::MAX - 1, length };
        let mut wire = Vec::new();
        sent.encode(style, &mut wire);
        assert_eq!(wire.len(), Request::header_len(style));
        assert_eq!(Request::decode(style, &wire), Ok(sent));
        wire[0] ^= 0x80;
        let found = u32::from_be_bytes(wire[..4].try_into().unwrap());
        assert_eq!(Request::decode(style, &wire), Err(BadMagic(found)));
    }
}

#[test]
fn requests_of_the_other_width_are_not_accepted() {
    let mut wire = Vec::new();
    valid(ReplyStyle::Extended, command::READ).encode(ReplyStyle::Extended, &mut wire);
    assert!(Request::decode(ReplyStyle::Structured, &wire[..28]).is_err());
    let mut wire = Vec::new();
    valid(ReplyStyle::Simple, command::READ).encode(ReplyStyle::Simple, &mut wire);
    wire.extend([0; 4]);
    assert!(Request::decode(ReplyStyle::Extended, &wire).is_err());
}

#[test]
fn c0_to_c7_valid_requests_are_accepted_as_they_are() {
    for style in STYLES {
        let server = with(style, |_| {});
        let part = |start, len| sheave_core::ByteRange::within(start, len, SIZE).unwrap();
        let range = part(4096, 4096);
        let verdict = |command| server.check(&valid(style, command));
        assert_eq!(verdict(command::READ), Verdict::Read { range, df: false });
        assert_eq!(verdict(command::WRITE), Verdict::Write { range, fua: false });
        assert_eq!(verdict(command::FLUSH), Verdict::Flush);
        assert_eq!(verdict(command::TRIM), Verdict::Trim { range, fua: false });
        assert_eq!(verdict(command::CACHE), Verdict::Cache { range });
        let zeroes = Verdict::WriteZeroes { range, fua: false, no_hole: false, fast: false };
        assert_eq!(verdict(command::WRITE_ZEROES), zeroes);
        let contexts = server.contexts;
        let status = Verdict::BlockStatus { range, req_one: false, contexts };
        if style != ReplyStyle::Simple {
            assert_eq!(verdict(command::BLOCK_STATUS), status);
        }
    }
}

#[test]
fn c2_disconnect_needs_nothing() {
    for style in STYLES {
        for flags in [0, cf::FUA] {
            let verdict = with(style, |_| {}).check(&request(command::DISC, flags, 0, 0));
            assert_eq!(verdict, Verdict::Disconnect);
        }
    }
}

#[test]
fn c3_flush_has_neither_offset_nor_length() {
    let server = with(ReplyStyle::Structured, |_| {});
    for (offset, length) in [(0, 512), (512, 0), (512, 512)] {
        let verdict = server.check(&request(command::FLUSH, 0, offset, length));
        assert_eq!(refused(verdict), (NbdErrno::Inval, 0));
    }
}

#[test]
fn c3_to_c6_commands_that_were_not_advertised_are_invalid() {
    for style in STYLES {
        let server = with(style, |info| info.can = Default::default());
        for command in [command::FLUSH, command::TRIM, command::CACHE, command::WRITE_ZEROES] {
            let verdict = server.check(&valid(style, command));
            assert_eq!(refused(verdict), (NbdErrno::Inval, 0), "command {command}");
        }
    }
}

#[test]
fn c8_resize_and_unknown_commands_are_invalid_and_their_payload_consumed() {
    for style in STYLES {
        let server = with(style, |_| {});
        for command in [command::RESIZE, 9, 77, u16::MAX] {
            let verdict = server.check(&request(command, 0, 0, 4096));
            assert_eq!(refused(verdict), (NbdErrno::Inval, 0));
        }
    }
    let server = with(ReplyStyle::Extended, |_| {});
    let verdict = server.check(&request(77, cf::PAYLOAD_LEN, 0, 4096));
    assert_eq!(refused(verdict), (NbdErrno::Inval, 4096));
}

#[test]
fn commands_of_zero_length_succeed_but_status_of_nothing_is_invalid() {
    for style in STYLES {
        let server = with(style, |_| {});
        for offset in [0, 4096, SIZE] {
            for command in [command::READ, command::TRIM, command::CACHE, command::WRITE_ZEROES] {
                let verdict = server.check(&request(command, 0, offset, 0));
                assert_eq!(verdict, Verdict::Done, "command {command}");
            }
            assert_eq!(server.check(&write(style, offset, 0)), Verdict::Done);
            let verdict = server.check(&request(command::BLOCK_STATUS, 0, offset, 0));
            assert_eq!(refused(verdict), (NbdErrno::Inval, 0));
        }
    }
}

#[test]
fn commands_consume_the_payload_of_a_rejected_write() {
    for style in STYLES {
        let server = with(style, |info| info.read_only = true);
        assert_eq!(refused(server.check(&write(style, 0, 4096))), (NbdErrno::Perm, 4096));
        let server = with(style, |info| info.can.fua = false);
        let mut flagged = write(style, 0, 4096);
        flagged.flags |= cf::FUA;
        assert_eq!(refused(server.check(&flagged)), (NbdErrno::Inval, 4096));
        let server = with(style, |_| {});
        assert_eq!(refused(server.check(&write(style, SIZE, 512))), (NbdErrno::NoSpc, 512));
        flagged.flags |= 0x8000;
        assert_eq!(refused(server.check(&flagged)), (NbdErrno::Inval, 4096));
    }
}

#[test]
fn f0_fua_is_accepted_on_every_command_once_advertised() {
    for style in [ReplyStyle::Structured, ReplyStyle::Extended] {
        for command in COMMANDS {
            let mut asked = valid(style, command);
            asked.flags |= cf::FUA;
            let fua = match with(style, |_| {}).check(&asked) {
                Verdict::Write { fua, .. }
                | Verdict::Trim { fua, .. }
                | Verdict::WriteZeroes { fua, .. } => fua,
                Verdict::Refuse { message, .. } => panic!("command {command}: {message}"),
                _ => true,
            };
            assert!(fua, "command {command} loses the flag");
            let without = with(style, |info| info.can.fua = false);
            assert_eq!(refused(without.check(&asked)).0, NbdErrno::Inval);
        }
    }
}

#[test]
fn f1_to_f4_flags_are_valid_for_their_command_only() {
    let allowed = |command| match command {
        command::READ => cf::DF,
        command::WRITE_ZEROES => cf::NO_HOLE | cf::FAST_ZERO,
        command::BLOCK_STATUS => cf::REQ_ONE,
        _ => 0,
    };
    for style in [ReplyStyle::Structured, ReplyStyle::Extended] {
        let server = with(style, |_| {});
        for command in COMMANDS {
            for bit in (1..16).map(|shift| 1 << shift).filter(|bit| *bit != cf::PAYLOAD_LEN) {
                let mut asked = valid(style, command);
                asked.flags |= bit;
                let is_refused = matches!(server.check(&asked), Verdict::Refuse { .. });
                assert_eq!(is_refused, allowed(command) & bit == 0, "{command} flag {bit:#x}");
            }
        }
    }
}

#[test]
fn f1_to_f4_flags_reach_the_verdict() {
    let server = with(ReplyStyle::Structured, |_| {});
    let zeroes = request(command::WRITE_ZEROES, cf::NO_HOLE | cf::FAST_ZERO, 0, 512);
    let verdict = server.check(&zeroes);
    assert!(matches!(verdict, Verdict::WriteZeroes { no_hole: true, fast: true, .. }));
    let verdict = server.check(&request(command::READ, cf::DF, 0, 512));
    assert!(matches!(verdict, Verdict::Read { df: true, .. }));
    let verdict = server.check(&request(command::BLOCK_STATUS, cf::REQ_ONE, 0, 512));
    assert!(matches!(verdict, Verdict::BlockStatus { req_one: true, .. }));
}

#[test]
fn f2_f4_flags_that_were_not_advertised_are_invalid() {
    let server = with(ReplyStyle::Structured, |info| info.can.fast_zero = false);
    let verdict = server.check(&request(command::WRITE_ZEROES, cf::FAST_ZERO, 0, 512));
    assert_eq!(refused(verdict).0, NbdErrno::Inval);
    let server = with(ReplyStyle::Simple, |_| {});
    let verdict = server.check(&request(command::READ, cf::DF, 0, 512));
    assert_eq!(refused(verdict).0, NbdErrno::Inval);
}

#[test]
fn f5_payload_flag_means_nothing_without_extended_headers() {
    for style in [ReplyStyle::Simple, ReplyStyle::Structured] {
        let server = with(style, |_| {});
        let verdict = server.check(&request(command::READ, cf::PAYLOAD_LEN, 0, 512));
        assert_eq!(refused(verdict), (NbdErrno::Inval, 0));
        let verdict = server.check(&request(command::WRITE, cf::PAYLOAD_LEN, 0, 512));
        assert_eq!(refused(verdict), (NbdErrno::Inval, 512));
    }
}

#[test]
fn r9_extended_write_without_payload_flag_is_invalid_and_has_no_payload() {
    let server = with(ReplyStyle::Extended, |_| {});
    let verdict = server.check(&request(command::WRITE, 0, 0, 512));
    assert_eq!(refused(verdict), (NbdErrno::Inval, 0));
    let verdict = server.check(&request(command::WRITE, 0, 0, u64::MAX));
    assert_eq!(refused(verdict), (NbdErrno::Inval, 0));
}

#[test]
fn r9_extended_payload_on_other_commands_is_consumed_and_invalid() {
    let server = with(ReplyStyle::Extended, |_| {});
    for command in COMMANDS.into_iter().filter(|command| *command != command::WRITE) {
        for length in [1, 4096, MAX] {
            let verdict = server.check(&request(command, cf::PAYLOAD_LEN, 0, length));
            assert_eq!(refused(verdict), (NbdErrno::Inval, length), "command {command}");
        }
    }
}

#[test]
fn r9_extended_payload_beyond_the_maximum_disconnects() {
    let server = with(ReplyStyle::Extended, |_| {});
    for command in COMMANDS.into_iter().chain([77]) {
        for length in [MAX + 1, u64::from(u32::MAX) + 1, u64::MAX] {
            let verdict = server.check(&request(command, cf::PAYLOAD_LEN, 0, length));
            assert!(matches!(verdict, Verdict::Drop(_)), "command {command}");
        }
    }
    let verdict = server.check(&write(ReplyStyle::Extended, 0, MAX));
    assert!(matches!(verdict, Verdict::Write { .. }));
}

#[test]
fn r9_extended_lengths_may_need_64_bits() {
    let server = Negotiated { size: 1 << 50, ..with(ReplyStyle::Extended, |_| {}) };
    for command in [command::TRIM, command::WRITE_ZEROES, command::CACHE, command::BLOCK_STATUS] {
        let verdict = server.check(&request(command, 0, 0, 1 << 50));
        assert!(!matches!(verdict, Verdict::Refuse { .. } | Verdict::Drop(_)));
    }
}

/// The payload of a block status request.
fn filter(len: u64, ids: &[u32]) -> Vec<u8> {
    let ids = ids.iter().flat_map(|id| id.to_be_bytes());
    len.to_be_bytes().into_iter().chain(ids).collect()
}

#[test]
fn r9_block_status_filter_chooses_contexts() {
    let server = with(ReplyStyle::Extended, |_| {});
    let asked = request(command::BLOCK_STATUS, cf::PAYLOAD_LEN | cf::REQ_ONE, 4096, 12);
    assert_eq!(server.check(&asked), Verdict::BlockStatusFilter { payload_len: 12 });
    let id = MetaContext::BaseAllocation.id();
    let verdict = server.block_status_filter(&asked, &filter(1 << 20, &[id]));
    let range = sheave_core::ByteRange::within(4096, 1 << 20, SIZE).unwrap();
    let contexts = server.contexts;
    assert_eq!(verdict, Verdict::BlockStatus { range, req_one: true, contexts });
    // Without ids there is nothing to report.
    assert_eq!(server.block_status_filter(&asked, &filter(1 << 20, &[])), Verdict::Done);
}

#[test]
fn r9_block_status_filter_of_the_wrong_form_is_consumed_and_invalid() {
    let server = with(ReplyStyle::Extended, |_| {});
    for len in [0, 1, 4, 7, 9, 10, 11, 13, 16, 20, 4096] {
        let asked = request(command::BLOCK_STATUS, cf::PAYLOAD_LEN, 0, len);
        assert_eq!(refused(server.check(&asked)), (NbdErrno::Inval, len), "{len} bytes");
    }
    let asked = request(command::BLOCK_STATUS, cf::PAYLOAD_LEN, 0, 12);
    let id = MetaContext::BaseAllocation.id();
    let bad = [
        filter(4096, &[id, id]),
        filter(4096, &[0]),
        filter(4096, &[id + 1]),
        filter(4096, &[u32::MAX]),
        filter(0, &[id]),
        filter(SIZE + 1, &[id]),
        filter(u64::MAX, &[id]),
        filter(4096, &[id])[..11].to_vec(),
        vec![0; 7],
        vec![],
    ];
    for payload in bad {
        let verdict = server.block_status_filter(&asked, &payload);
        assert_eq!(refused(verdict), (NbdErrno::Inval, 0), "{payload:?}");
    }
}

#[test]
fn r9_block_status_filter_needs_its_transmission_flag() {
    let mut server = with(ReplyStyle::Extended, |_| {});
    server.transmission_flags &= !transmission_flag::BLOCK_STATUS_PAYLOAD;
    let asked = request(command::BLOCK_STATUS, cf::PAYLOAD_LEN, 0, 12);
    assert_eq!(refused(server.check(&asked)), (NbdErrno::Inval, 12));
}

#[test]
fn r7_block_status_without_contexts_is_invalid() {
    for style in STYLES {
        let mut server = with(style, |_| {});
        server.contexts = ContextSet::EMPTY;
        let verdict = server.check(&valid(style, command::BLOCK_STATUS));
        assert_eq!(refused(verdict), (NbdErrno::Inval, 0));
    }
}

#[test]
fn errors_past_the_end() {
    let past = [(SIZE, 512), (SIZE - 512, 1024), (SIZE + 512, 0), (u64::MAX - 511, 512)];
    for style in STYLES {
        let server = with(style, |_| {});
        for (offset, length) in past {
            let verdict = |command| server.check(&request(command, 0, offset, length));
            assert_eq!(refused(server.check(&write(style, offset, length))).0, NbdErrno::NoSpc);
            assert_eq!(refused(verdict(command::WRITE_ZEROES)).0, NbdErrno::NoSpc);
            for command in [command::READ, command::TRIM, command::CACHE, command::BLOCK_STATUS] {
                assert_eq!(refused(verdict(command)).0, NbdErrno::Inval, "command {command}");
            }
        }
    }
}

#[test]
fn errors_read_only() {
    for style in STYLES {
        let server = with(style, |info| info.read_only = true);
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(refused(server.check(&valid(style, command))).0, NbdErrno::Perm);
        }
        for command in [command::READ, command::FLUSH, command::CACHE] {
            let verdict = server.check(&valid(style, command));
            assert!(!matches!(verdict, Verdict::Refuse { .. }), "command {command}");
        }
    }
}

#[test]
fn errors_unaligned_is_invalid_for_those_who_know_the_block_size_only() {
    for style in [ReplyStyle::Structured, ReplyStyle::Extended] {
        for (offset, length) in [(1, 512), (512, 1), (511, 1), (0, 513)] {
            for command in COMMANDS.into_iter().filter(|command| *command != command::FLUSH) {
                let mut asked = valid(style, command);
                (asked.offset, asked.length) = (offset, length);
                let mut server = with(style, |_| {});
                let verdict = server.check(&asked);
                assert!(!matches!(verdict, Verdict::Refuse { .. }), "command {command}");
                server.block_size_asked = true;
                let want = (NbdErrno::Inval, asked.payload_len(style));
                assert_eq!(refused(server.check(&asked)), want);
            }
        }
    }
}

#[test]
fn sizes_unaligned_end_of_the_volume_can_be_reached() {
    let mut server = Negotiated { size: 1000, ..with(ReplyStyle::Simple, |_| {}) };
    server.block_size_asked = true;
    let verdict = server.check(&request(command::READ, 0, 992, 8));
    assert!(matches!(verdict, Verdict::Read { .. }));
}

#[test]
fn sizes_payload_of_32_mib_is_fine_and_longer_ones_do_not_disconnect() {
    for style in [ReplyStyle::Simple, ReplyStyle::Structured] {
        let server = with(style, |_| {});
        assert!(matches!(server.check(&write(style, 0, MAX)), Verdict::Write { .. }));
        for length in [MAX + 1, PAYLOAD_SKIP_MAX] {
            assert_eq!(refused(server.check(&write(style, 0, length))), (NbdErrno::Inval, length));
        }
        for length in [PAYLOAD_SKIP_MAX + 1, u32::MAX.into()] {
            assert!(matches!(server.check(&write(style, 0, length)), Verdict::Drop(_)));
        }
    }
}

#[test]
fn sizes_reads_beyond_the_maximum_payload_are_refused() {
    let server = with(ReplyStyle::Structured, |_| {});
    let read = |flags, length| server.check(&request(command::READ, flags, 0, length));
    assert!(matches!(read(0, MAX), Verdict::Read { .. }));
    assert_eq!(refused(read(0, MAX + 512)), (NbdErrno::Inval, 0));
}

#[test]
fn r6_df_overflows_only_beyond_64_kib() {
    let server = with(ReplyStyle::Structured, |info| info.block.maximum_payload = 64 << 10);
    let read = |length| server.check(&request(command::READ, cf::DF, 0, length));
    assert!(matches!(read(64 << 10), Verdict::Read { df: true, .. }));
    assert_eq!(refused(read((64 << 10) + 512)), (NbdErrno::Overflow, 0));
}

#[test]
fn sizes_trim_and_zeroes_beyond_the_maximum_payload_are_fine() {
    let kernel_max = (4 << 30) - 512;
    for style in STYLES {
        let server = Negotiated { size: 1 << 40, ..with(style, |_| {}) };
        for command in [command::TRIM, command::WRITE_ZEROES, command::CACHE] {
            let verdict = server.check(&request(command, 0, 0, kernel_max));
            assert!(!matches!(verdict, Verdict::Refuse { .. } | Verdict::Drop(_)));
        }
    }
}

#[test]
fn errors_enotsup_never_comes_from_here() {
    // Only a backend may return it, and only for a request with the fast flag.
    for style in STYLES {
        let server = with(style, |info| info.can = Default::default());
        for command in 0..20 {
            for flags in 0..64 {
                if let Verdict::Refuse { error, .. } =
                    server.check(&request(command, flags, 0, 512))
                {
                    assert!(error != NbdErrno::NotSup && error != NbdErrno::NoMem);
                }
            }
        }
    }
}

#[test]
fn durability_fua_reaches_every_op_that_writes() {
    for style in STYLES {
        let server = with(style, |_| {});
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            for fua_flag in [0, cf::FUA] {
                let mut asked = valid(style, command);
                asked.flags |= fua_flag;
                let fua = match server.check(&asked) {
                    Verdict::Write { fua, .. }
                    | Verdict::Trim { fua, .. }
                    | Verdict::WriteZeroes { fua, .. } => fua,
                    verdict => panic!("{verdict:?}"),
                };
                assert_eq!(fua, fua_flag != 0);
            }
        }
    }
}
