//! Each option, and the description of exports in replies.

use sheave_core::{BlockSizes, VolumeInfo};
use sheave_proto::wire::{info_type, option, reply_type, transmission_flag as flag};
use sheave_proto::{
    CloseReason, Export, ExportInfo, Exports, Negotiated, Next, ReplyStyle, TlsMode,
    transmission_flags,
};

use crate::support::{
    Reply, SIZE, Server, be16, be32, be64, info, message, queries, replies, string, volume,
};

const BASE: &str = "base:allocation";

/// The information of one type in the replies to `INFO` or `GO`.
pub(crate) fn info_of(replies: &[Reply], kind: u16) -> Option<&[u8]> {
    let mut found = replies
        .iter()
        .filter(|(reply, data)| *reply == reply_type::INFO && be16(data) == kind)
        .map(|(_, data)| &data[2..]);
    let first = found.next();
    assert!(found.next().is_none(), "information twice");
    first
}

fn choose_by_name(server: &mut Server, name: &[u8]) -> Result<(Vec<u8>, Negotiated), CloseReason> {
    let (output, next) = server.send(&message(option::EXPORT_NAME, name));
    match next {
        Next::Transmission(negotiated) => Ok((output, *negotiated)),
        Next::Close(reason) => {
            assert!(output.is_empty());
            Err(reason)
        }
        next => panic!("{next:?}"),
    }
}

#[test]
fn o1_export_name_tells_size_and_flags() {
    let mut server = Server::new(TlsMode::Off);
    let (output, negotiated) = choose_by_name(&mut server, b"tape").unwrap();
    assert_eq!(be64(&output), SIZE);
    assert_eq!(be16(&output[8..]), negotiated.transmission_flags);
    assert_eq!((negotiated.export, negotiated.style), (1, ReplyStyle::Simple));
    assert!(!negotiated.block_size_asked);
}

#[test]
fn o1_empty_export_name_is_the_default() {
    let mut server = Server::new(TlsMode::Off);
    server.exports.truncate(1);
    assert_eq!(choose_by_name(&mut server, b"").unwrap().1.export, 0);
}

/// A client that forgets the name must not write to the first volume.
#[test]
fn among_several_exports_there_is_no_default() {
    let chosen = choose_by_name(&mut Server::new(TlsMode::Off), b"");
    assert!(matches!(chosen, Err(CloseReason::ExportName(_))), "{chosen:?}");
    let mut server = Server::new(TlsMode::Off);
    for option in [option::GO, option::INFO] {
        assert_eq!(server.kind(option, &info("", &[])), reply_type::ERR_UNKNOWN);
    }
    let queries = queries("", &[BASE]);
    assert_eq!(server.kind(option::LIST_META_CONTEXT, &queries), reply_type::ERR_UNKNOWN);
    // The export of that name is chosen.
    server.exports[1].name = String::new();
    assert_eq!(server.go("").export, 1);
}

#[test]
fn o1_export_name_that_cannot_be_satisfied_terminates() {
    for name in [b"nowhere".as_slice(), b"dis", b"disk\0", b"\xff", &[b'a'; 5000], b"secret"] {
        let reason = choose_by_name(&mut Server::new(TlsMode::Off), name);
        assert!(matches!(reason, Err(CloseReason::ExportName(_))), "{name:?}");
    }
    let step = |len: usize| {
        let mut server = Server::new(TlsMode::Off);
        server.handshake.step(&message(option::EXPORT_NAME, &vec![b'a'; len]), &server.exports)
    };
    assert!(matches!(step(100_000).next, Next::Close(CloseReason::OptionTooLong(100_000))));
}

#[test]
fn o1_export_name_is_forbidden_after_extended_headers() {
    let mut server = Server::new(TlsMode::Off);
    server.agree(option::EXTENDED_HEADERS, &[]);
    assert!(choose_by_name(&mut server, b"disk").is_err());
}

#[test]
fn o2_abort_is_acknowledged_whatever_its_data() {
    for data in [b"".as_slice(), b"good-bye"] {
        let (replies, next) = Server::new(TlsMode::Forced).ask(option::ABORT, data);
        assert_eq!(replies, [(reply_type::ACK, vec![])]);
        assert!(matches!(next, Next::Close(CloseReason::Aborted)));
    }
}

#[test]
fn o3_list_names_all_visible_exports_then_acknowledges() {
    let (replies, _) = Server::new(TlsMode::Off).ask(option::LIST, &[]);
    let entry = |name: &str, text: &str| {
        (reply_type::SERVER, [string(name), text.as_bytes().to_vec()].concat())
    };
    let want =
        [entry("disk", "the disk"), entry("tape", "the tape"), (reply_type::ACK, Vec::new())];
    assert_eq!(replies, want);
}

#[test]
fn o3_list_with_data_is_invalid_and_lists_nothing() {
    let (replies, _) = Server::new(TlsMode::Off).ask(option::LIST, b"x");
    assert_eq!(replies.len(), 1);
    assert_eq!(replies[0].0, reply_type::ERR_INVALID);
}

struct Unlisted(Vec<Export>);

impl Exports for Unlisted {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn export(&self, index: usize) -> Option<ExportInfo<'_>> {
        self.0.export(index)
    }

    fn may_list(&self) -> bool {
        false
    }
}

#[test]
fn o3_list_may_be_forbidden_by_policy() {
    let mut server = Server::new(TlsMode::Off);
    let exports = Unlisted(server.exports.clone());
    let step = server.handshake.step(&message(option::LIST, &[]), &exports);
    let replies = replies(option::LIST, &step.output);
    assert_eq!(replies.len(), 1);
    assert_eq!(replies[0].0, reply_type::ERR_POLICY);
}

#[test]
fn o4_peek_export_is_withdrawn() {
    let kind = Server::new(TlsMode::Off).kind(option::PEEK_EXPORT, b"disk");
    assert_eq!(kind, reply_type::ERR_UNSUP);
}

#[test]
fn o6_info_tells_what_go_tells() {
    let wanted = [info_type::NAME, info_type::BLOCK_SIZE, info_type::DESCRIPTION];
    let mut server = Server::new(TlsMode::Off);
    server.agree(option::STRUCTURED_REPLY, &[]);
    server.agree(option::SET_META_CONTEXT, &queries("disk", &[BASE]));
    for wanted in [[].as_slice(), &wanted, &wanted[1..2]] {
        let (from_info, next) = server.ask(option::INFO, &info("disk", wanted));
        assert!(matches!(next, Next::NeedMore));
        let mut twin = Server::new(TlsMode::Off);
        twin.agree(option::STRUCTURED_REPLY, &[]);
        twin.agree(option::SET_META_CONTEXT, &queries("disk", &[BASE]));
        let (from_go, _) = twin.ask(option::GO, &info("disk", wanted));
        assert_eq!(from_info, from_go);
    }
}

#[test]
fn o7_go_tells_the_export_before_it_acknowledges() {
    let mut server = Server::new(TlsMode::Off);
    let (replies, next) = server.ask(option::GO, &info("tape", &[]));
    let export = info_of(&replies, info_type::EXPORT).unwrap();
    assert_eq!(export.len(), 10);
    assert_eq!(be64(export), SIZE);
    let Next::Transmission(negotiated) = next else { panic!("{next:?}") };
    assert_eq!(be16(&export[8..]), negotiated.transmission_flags);
    assert_eq!((negotiated.export, negotiated.block_size_asked), (1, false));
    assert_eq!(*replies.last().unwrap(), (reply_type::ACK, vec![]));
}

#[test]
fn o7_go_answers_what_was_asked_and_ignores_unknown_information() {
    let wanted = [77, info_type::NAME, info_type::DESCRIPTION, info_type::BLOCK_SIZE, u16::MAX];
    let (replies, next) = Server::new(TlsMode::Off).ask(option::GO, &info("disk", &wanted));
    assert_eq!(info_of(&replies, info_type::NAME), Some(b"disk".as_slice()));
    assert_eq!(info_of(&replies, info_type::DESCRIPTION), Some(b"the disk".as_slice()));
    let block = info_of(&replies, info_type::BLOCK_SIZE).unwrap();
    assert_eq!([be32(block), be32(&block[4..]), be32(&block[8..])], [512, 4096, 32 << 20]);
    let Next::Transmission(negotiated) = next else { panic!("{next:?}") };
    assert!(negotiated.block_size_asked);
}

#[test]
fn o7_go_refuses_unknown_exports_and_malformed_data() {
    let mut server = Server::new(TlsMode::Off);
    assert_eq!(server.kind(option::GO, &info("nowhere", &[])), reply_type::ERR_UNKNOWN);
    let good = info("disk", &[info_type::NAME]);
    for len in 0..good.len() {
        assert_eq!(server.kind(option::GO, &good[..len]), reply_type::ERR_INVALID, "{len} bytes");
    }
    let trailing = [good.as_slice(), b"x"].concat();
    assert_eq!(server.kind(option::GO, &trailing), reply_type::ERR_INVALID);
    let with_nul = info("disk\0", &[]);
    assert_eq!(server.kind(option::GO, &with_nul), reply_type::ERR_INVALID);
    let mut length_past_end = good.clone();
    length_past_end[3] += 4;
    assert_eq!(server.kind(option::GO, &length_past_end), reply_type::ERR_INVALID);
    server.go("disk");
}

#[test]
fn o7_go_is_never_unsupported_after_extended_headers() {
    let mut server = Server::new(TlsMode::Off);
    server.agree(option::EXTENDED_HEADERS, &[]);
    assert_eq!(server.go("disk").style, ReplyStyle::Extended);
}

#[test]
fn o8_structured_reply_changes_the_style() {
    let mut server = Server::new(TlsMode::Off);
    assert_eq!(server.kind(option::STRUCTURED_REPLY, b"x"), reply_type::ERR_INVALID);
    assert_eq!(
        server.agree(option::STRUCTURED_REPLY, &[]).go("disk").style,
        ReplyStyle::Structured
    );
}

#[test]
fn o8_structured_reply_after_extended_headers_is_refused() {
    let mut server = Server::new(TlsMode::Off);
    server.agree(option::EXTENDED_HEADERS, &[]);
    assert_eq!(server.kind(option::STRUCTURED_REPLY, &[]), reply_type::ERR_EXT_HEADER_REQD);
    assert_eq!(server.go("disk").style, ReplyStyle::Extended);
}

fn contexts(replies: &[Reply]) -> Vec<(u32, &str)> {
    let contexts = replies.iter().filter(|(kind, _)| *kind == reply_type::META_CONTEXT);
    contexts.map(|(_, data)| (be32(data), std::str::from_utf8(&data[4..]).unwrap())).collect()
}

#[test]
fn o9_list_meta_context_by_query() {
    let mut server = Server::new(TlsMode::Off);
    server.agree(option::STRUCTURED_REPLY, &[]);
    let cases: [(&[&str], usize); 9] = [
        (&[], 1),
        (&["base:"], 1),
        (&[BASE], 1),
        (&[BASE, BASE, "base:"], 1),
        (&["base:other"], 0),
        (&["qemu:", "x-own:thing", ""], 0),
        (&["base"], 0),
        (&["base:allocation:"], 0),
        (&["qemu:dirty-bitmap:b", BASE], 1),
    ];
    for (asked, count) in cases {
        let (replies, _) = server.ask(option::LIST_META_CONTEXT, &queries("disk", asked));
        assert_eq!(replies.last().unwrap().0, reply_type::ACK, "{asked:?}");
        assert_eq!(replies.len(), count + 1, "{asked:?}");
        assert!(contexts(&replies).iter().all(|context| *context == (0, BASE)));
    }
    assert!(server.go("disk").contexts.is_empty(), "listing selects nothing");
}

#[test]
fn o9_o10_malformed_meta_context_is_invalid() {
    let mut server = Server::new(TlsMode::Off);
    server.agree(option::STRUCTURED_REPLY, &[]);
    let good = queries("disk", &[BASE]);
    let cuts = [0, 3, 4, 8, 11, 12, 13, good.len() - 1];
    let mut bad: Vec<_> = cuts.iter().map(|len| good[..*len].to_vec()).collect();
    bad.push([good.as_slice(), b"x"].concat());
    for data in bad {
        assert_eq!(server.kind(option::LIST_META_CONTEXT, &data), reply_type::ERR_INVALID);
        assert_eq!(server.kind(option::SET_META_CONTEXT, &data), reply_type::ERR_INVALID);
    }
    for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        assert_eq!(server.kind(option, &queries("nowhere", &[BASE])), reply_type::ERR_UNKNOWN);
    }
}

#[test]
fn o10_set_meta_context_selects_by_name_only() {
    let cases: [(&[&str], bool); 5] = [
        (&[BASE], true),
        (&[BASE, BASE], true),
        (&["base:"], false),
        (&[], false),
        (&["x:y"], false),
    ];
    for (asked, is_selected) in cases {
        let mut server = Server::new(TlsMode::Off);
        server.agree(option::STRUCTURED_REPLY, &[]);
        let (replies, _) = server.ask(option::SET_META_CONTEXT, &queries("disk", asked));
        assert_eq!(contexts(&replies).len(), usize::from(is_selected), "{asked:?}");
        assert!(contexts(&replies).iter().all(|(id, name)| *id != 0 && *name == BASE));
        assert_eq!(replies.last().unwrap().0, reply_type::ACK);
        assert_eq!(server.go("disk").contexts.len(), usize::from(is_selected));
    }
}

#[test]
fn o10_set_meta_context_replaces_the_set_even_when_it_fails() {
    let failures = [queries("disk", &[]), queries("nowhere", &[BASE]), b"junk".to_vec()];
    for failure in failures.into_iter().chain([vec![0; 20_000]]) {
        let mut server = Server::new(TlsMode::Off);
        server.agree(option::STRUCTURED_REPLY, &[]);
        server.agree(option::SET_META_CONTEXT, &queries("disk", &[BASE]));
        server.kind(option::SET_META_CONTEXT, &failure);
        assert!(server.go("disk").contexts.is_empty());
    }
}

#[test]
fn o10_set_meta_context_is_for_one_export_name() {
    for (name, count) in [("disk", 1), ("tape", 0)] {
        let mut server = Server::new(TlsMode::Off);
        server.agree(option::EXTENDED_HEADERS, &[]);
        server.agree(option::SET_META_CONTEXT, &queries("disk", &[BASE]));
        assert_eq!(server.go(name).contexts.len(), count, "{name}");
    }
}

#[test]
fn o10_set_meta_context_needs_structured_replies() {
    let mut server = Server::new(TlsMode::Off);
    let data = queries("disk", &[BASE]);
    assert_eq!(server.kind(option::SET_META_CONTEXT, &data), reply_type::ERR_INVALID);
    assert!(server.agree(option::STRUCTURED_REPLY, &[]).go("disk").contexts.is_empty());
}

#[test]
fn o11_extended_headers_need_nothing_before_and_supersede_structured_replies() {
    let mut server = Server::new(TlsMode::Off);
    assert_eq!(server.kind(option::EXTENDED_HEADERS, b"x"), reply_type::ERR_INVALID);
    assert_eq!(server.agree(option::EXTENDED_HEADERS, &[]).go("disk").style, ReplyStyle::Extended);
    let mut server = Server::new(TlsMode::Off);
    server.agree(option::STRUCTURED_REPLY, &[]).agree(option::EXTENDED_HEADERS, &[]);
    assert_eq!(server.go("disk").style, ReplyStyle::Extended);
}

#[test]
fn replies_errors_come_with_text_for_people() {
    let mut server = Server::new(TlsMode::Off);
    for (option, data) in [(99, vec![]), (option::GO, info("nowhere", &[]))] {
        let (replies, _) = server.ask(option, &data);
        let (kind, text) = &replies[0];
        assert!(*kind >= 1 << 31 && !text.is_empty());
        assert!(std::str::from_utf8(text).is_ok());
    }
}

/// The flags of a volume that can do everything, after `change`, to a client that negotiated
/// `style` and block status.
fn flags(style: ReplyStyle, change: impl FnOnce(&mut VolumeInfo)) -> u16 {
    let mut info = volume();
    change(&mut info);
    let contexts = crate::support::negotiated(style, info.clone()).contexts;
    transmission_flags(&info, style, contexts)
}

#[test]
fn t0_to_t12_flags_follow_the_volume() {
    type Change = fn(&mut VolumeInfo);
    let all = flags(ReplyStyle::Extended, |_| {});
    let cases: [(u16, Change); 7] = [
        (flag::SEND_FLUSH, |info| info.can.flush = false),
        (flag::SEND_FUA, |info| info.can.fua = false),
        (flag::SEND_TRIM, |info| info.can.trim = false),
        (flag::CAN_MULTI_CONN, |info| info.can.multi_conn = false),
        (flag::SEND_CACHE, |info| info.can.cache = false),
        (flag::SEND_FAST_ZERO, |info| info.can.fast_zero = false),
        (flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO, |info| info.can.write_zeroes = false),
    ];
    for (bits, change) in cases {
        assert_eq!(all & bits, bits);
        assert_eq!(flags(ReplyStyle::Extended, change), all & !bits);
    }
    let rotational = flags(ReplyStyle::Extended, |info| info.rotational = true);
    assert_eq!(rotational, all | flag::ROTATIONAL);
    assert_eq!(all & flag::SEND_RESIZE, 0);
}

#[test]
fn t0_has_flags_is_always_set() {
    let nothing = |info: &mut VolumeInfo| info.can = Default::default();
    assert_eq!(flags(ReplyStyle::Simple, nothing), flag::HAS_FLAGS);
}

#[test]
fn t1_read_only_offers_no_writes() {
    let read_only = flags(ReplyStyle::Structured, |info| info.read_only = true);
    let writes = flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
    assert_eq!(read_only & writes, 0);
    assert_ne!(read_only & flag::READ_ONLY, 0);
}

#[test]
fn t8_read_only_volumes_have_nothing_to_flush_across_connections() {
    let alone = |read_only| {
        flags(ReplyStyle::Simple, |info| {
            info.read_only = read_only;
            info.can.multi_conn = false;
        }) & flag::CAN_MULTI_CONN
    };
    assert_eq!(alone(false), 0);
    assert_ne!(alone(true), 0);
}

#[test]
fn t7_df_needs_more_than_simple_replies() {
    assert_eq!(flags(ReplyStyle::Simple, |_| {}) & flag::SEND_DF, 0);
    assert_ne!(flags(ReplyStyle::Structured, |_| {}) & flag::SEND_DF, 0);
    assert_ne!(flags(ReplyStyle::Extended, |_| {}) & flag::SEND_DF, 0);
}

#[test]
fn t12_block_status_payload_needs_extended_headers_and_a_context() {
    assert_eq!(flags(ReplyStyle::Structured, |_| {}) & flag::BLOCK_STATUS_PAYLOAD, 0);
    assert_ne!(flags(ReplyStyle::Extended, |_| {}) & flag::BLOCK_STATUS_PAYLOAD, 0);
    let without_context = Server::new(TlsMode::Off).agree(option::EXTENDED_HEADERS, &[]).go("disk");
    assert_eq!(without_context.transmission_flags & flag::BLOCK_STATUS_PAYLOAD, 0);
}

pub(crate) fn go_with_sizes(size: u64, block: BlockSizes, wanted: &[u16]) -> Vec<Reply> {
    let mut server = Server::new(TlsMode::Off);
    server.exports[0].size = size;
    server.exports[0].info.block = block;
    server.ask(option::GO, &info("disk", wanted)).0
}

#[test]
fn sizes_that_have_no_place_in_the_protocol_are_not_told() {
    let good = volume().block;
    let bad = [
        BlockSizes { minimum: 0, ..good },
        BlockSizes { minimum: 1000, ..good },
        BlockSizes { minimum: 128 << 10, preferred: 128 << 10, ..good },
        BlockSizes { preferred: 256, minimum: 1, ..good },
        BlockSizes { logical: 256, ..good },
        BlockSizes { logical: 1536, ..good },
        BlockSizes { logical: 8192, ..good },
        BlockSizes { logical: 128 << 10, preferred: 128 << 10, ..good },
        BlockSizes { preferred: 5000, ..good },
        BlockSizes { minimum: 8192, preferred: 4096, ..good },
        BlockSizes { maximum_payload: 4096, ..good },
        BlockSizes { preferred: 1 << 20, maximum_payload: 1 << 19, ..good },
    ];
    for block in bad {
        let replies = go_with_sizes(SIZE, block, &[]);
        assert_eq!(replies.len(), 1, "{block:?}");
        assert_eq!(replies[0].0, reply_type::ERR_PLATFORM);
    }
    assert_eq!(go_with_sizes(1 << 63, good, &[])[0].0, reply_type::ERR_PLATFORM);
    let unlimited = BlockSizes { maximum_payload: u32::MAX, ..good };
    assert_eq!(go_with_sizes(SIZE, unlimited, &[]).last().unwrap().0, reply_type::ACK);
}

#[test]
fn sizes_clients_that_do_not_ask_are_served_and_told_that_any_alignment_is_fine() {
    let replies = go_with_sizes(SIZE, volume().block, &[]);
    assert_eq!(replies.last().unwrap().0, reply_type::ACK);
    let block = info_of(&replies, info_type::BLOCK_SIZE).unwrap();
    assert_eq!(be32(block), 1);
}

#[test]
fn sizes_minimum_divides_the_size() {
    for (size, minimum) in [(SIZE, 512), (1000, 8), (1 << 10, 512), (3, 1), (0, 512)] {
        let replies = go_with_sizes(size, volume().block, &[info_type::BLOCK_SIZE]);
        let block = info_of(&replies, info_type::BLOCK_SIZE).unwrap();
        assert_eq!(be32(block), minimum, "size {size}");
    }
}

#[test]
fn sizes_strings_are_cut_to_4096_bytes_between_characters() {
    let mut server = Server::new(TlsMode::Off);
    server.exports[0].description = "é".repeat(3000) + "x";
    let (replies, _) = server.ask(option::GO, &info("disk", &[info_type::DESCRIPTION]));
    let text = info_of(&replies, info_type::DESCRIPTION).unwrap();
    assert_eq!(std::str::from_utf8(text).unwrap(), "é".repeat(2048));
}
