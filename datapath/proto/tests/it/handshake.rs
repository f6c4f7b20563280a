//! Greeting, client flags, and the rules that hold for all options.

use sheave_proto::wire::{magic, option, reply_type};
use sheave_proto::{CloseReason, HandshakeLimits, Next, OPTION_SKIP_MAX, ServerHandshake, TlsMode};

use crate::support::{Server, be16, be64, exports, info, message, queries};

fn close_reason(next: Next) -> CloseReason {
    let Next::Close(reason) = next else { panic!("{next:?}") };
    reason
}

#[test]
fn h1_greeting_offers_fixed_newstyle_and_no_zeroes_only() {
    let greeting = ServerHandshake::greeting();
    assert_eq!(be64(&greeting), magic::NBD);
    assert_eq!(be64(&greeting[8..]), magic::OPTION);
    assert_eq!(be16(&greeting[16..]), 0b11);
}

#[test]
fn h2_unknown_client_flag_drops() {
    for bit in 2..32 {
        let mut handshake = ServerHandshake::new(TlsMode::Off, HandshakeLimits::default());
        let step = handshake.step(&(1_u32 << bit | 3).to_be_bytes(), &exports());
        assert_eq!(close_reason(step.next), CloseReason::UnknownFlags(1 << bit));
        assert!(step.output.is_empty());
    }
}

#[test]
fn h3_client_without_fixed_newstyle_is_served_without_tls() {
    let mut server = Server::with_flags(TlsMode::Selective, 0);
    assert_eq!(server.kind(option::STARTTLS, &[]), reply_type::ERR_INVALID);
    let (output, next) = server.send(&message(option::EXPORT_NAME, b"disk"));
    assert!(matches!(next, Next::Transmission(_)));
    assert_eq!(output.len(), 8 + 2 + 124);
}

#[test]
fn h4_zeroes_follow_export_name_unless_both_sides_left_them_out() {
    for (flags, padding) in [(0_u32, 124), (1, 124), (2, 0), (3, 0)] {
        let mut server = Server::with_flags(TlsMode::Off, flags);
        let (output, _) = server.send(&message(option::EXPORT_NAME, b"disk"));
        assert_eq!(output.len(), 10 + padding);
        assert!(output[10..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn h4_zeroes_never_follow_go() {
    for flags in 0..4 {
        let mut server = Server::with_flags(TlsMode::Off, flags);
        let (replies, next) = server.ask(option::GO, &info("disk", &[]));
        assert!(matches!(next, Next::Transmission(_)));
        assert_eq!(*replies.last().unwrap(), (reply_type::ACK, vec![]));
    }
}

#[test]
fn h6_unknown_option_is_unsupported_and_its_data_consumed() {
    for option in [0, option::PEEK_EXPORT, 12, 77, u32::MAX] {
        let mut server = Server::new(TlsMode::Off);
        for len in [0, 1, 16 << 10, (16 << 10) + 1, OPTION_SKIP_MAX as usize] {
            assert_eq!(server.kind(option, &vec![0x49; len]), reply_type::ERR_UNSUP);
        }
        server.go("disk");
    }
}

#[test]
fn h6_data_of_known_options_is_consumed_too_when_it_is_too_long() {
    let long = vec![0; 100_000];
    let mut server = Server::new(TlsMode::Off);
    let cases = [
        (option::LIST, reply_type::ERR_INVALID),
        (option::STARTTLS, reply_type::ERR_INVALID),
        (option::STRUCTURED_REPLY, reply_type::ERR_INVALID),
        (option::EXTENDED_HEADERS, reply_type::ERR_INVALID),
        (option::INFO, reply_type::ERR_TOO_BIG),
        (option::GO, reply_type::ERR_TOO_BIG),
        (option::LIST_META_CONTEXT, reply_type::ERR_TOO_BIG),
        (option::SET_META_CONTEXT, reply_type::ERR_TOO_BIG),
    ];
    for (option, kind) in cases {
        assert_eq!(server.kind(option, &long), kind, "option {option}");
    }
    let (replies, next) = server.ask(option::ABORT, &long);
    assert_eq!(replies, [(reply_type::ACK, vec![])]);
    assert_eq!(close_reason(next), CloseReason::Aborted);
}

#[test]
fn h7_repeated_options_are_harmless() {
    let mut server = Server::new(TlsMode::Off);
    server.agree(option::STRUCTURED_REPLY, &[]).agree(option::STRUCTURED_REPLY, &[]);
    server.agree(option::EXTENDED_HEADERS, &[]).agree(option::EXTENDED_HEADERS, &[]);
    server.go("disk");
}

#[test]
fn h8_server_goes_on_after_errors() {
    let mut server = Server::new(TlsMode::Off);
    for _ in 0..10 {
        assert_eq!(server.kind(option::GO, &info("nowhere", &[])), reply_type::ERR_UNKNOWN);
        assert_eq!(server.kind(option::GO, b"junk"), reply_type::ERR_INVALID);
        assert_eq!(server.kind(option::LIST, b"junk"), reply_type::ERR_INVALID);
        assert_eq!(server.kind(99, b"junk"), reply_type::ERR_UNSUP);
    }
    server.go("disk");
}

#[test]
fn h8_disconnects_only_for_violations_and_floods() {
    let mut server = Server::new(TlsMode::Off);
    let (output, next) = server.send(&[0x55; 16]);
    assert!(output.is_empty());
    assert!(matches!(close_reason(next), CloseReason::BadMagic(0x5555_5555_5555_5555)));

    let mut server = Server::new(TlsMode::Off);
    let long = message(77, &vec![0; OPTION_SKIP_MAX as usize + 1]);
    let step = server.handshake.step(&long, &server.exports);
    assert_eq!(step.consumed, 16);
    assert_eq!(close_reason(step.next), CloseReason::OptionTooLong(OPTION_SKIP_MAX + 1));
}

#[test]
fn h9_shutting_down_refuses_all_but_abort() {
    let mut server = Server::new(TlsMode::Selective);
    server.handshake.shut_down();
    for option in (3..=12).chain([99]) {
        assert_eq!(server.kind(option, &[]), reply_type::ERR_SHUTDOWN, "option {option}");
        assert_eq!(server.kind(option, &[0; 20_000]), reply_type::ERR_SHUTDOWN);
    }
    let (replies, next) = server.ask(option::ABORT, &[]);
    assert_eq!(replies, [(reply_type::ACK, vec![])]);
    assert_eq!(close_reason(next), CloseReason::Aborted);

    let mut server = Server::new(TlsMode::Off);
    server.handshake.shut_down();
    let (output, next) = server.send(&message(option::EXPORT_NAME, b"disk"));
    assert!(output.is_empty());
    assert!(matches!(close_reason(next), CloseReason::ExportName(_)));
}

#[test]
fn hardening_options_are_counted() {
    let limits = HandshakeLimits { options_max: 5, ..HandshakeLimits::default() };
    let mut server = Server::new(TlsMode::Off);
    server.handshake = ServerHandshake::new(TlsMode::Off, limits);
    server.send(&3_u32.to_be_bytes());
    for _ in 0..5 {
        assert_eq!(server.kind(99, &[]), reply_type::ERR_UNSUP);
    }
    let (output, next) = server.send(&message(99, &[]));
    assert!(output.is_empty());
    assert_eq!(close_reason(next), CloseReason::TooManyOptions(5));
}

#[test]
fn hardening_a_handshake_that_is_over_stays_over() {
    let mut server = Server::new(TlsMode::Off);
    server.go("disk");
    let step = server.handshake.step(&message(option::LIST, &[]), &server.exports);
    assert_eq!((step.consumed, step.output), (0, vec![]));
    assert_eq!(close_reason(step.next), CloseReason::Over);
}

#[test]
fn hardening_a_step_stops_where_transmission_begins() {
    let mut server = Server::new(TlsMode::Off);
    let go = message(option::GO, &info("disk", &[]));
    let with_request = [go.as_slice(), &[0xaa; 28]].concat();
    let step = server.handshake.step(&with_request, &server.exports);
    assert_eq!(step.consumed, go.len());
    assert!(matches!(step.next, Next::Transmission(_)));
}

#[test]
fn hardening_absurd_counts_cost_nothing() {
    let mut server = Server::new(TlsMode::Off);
    server.agree(option::STRUCTURED_REPLY, &[]);
    let mut data = queries("disk", &[]);
    let at = data.len() - 4;
    data[at..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(server.kind(option::SET_META_CONTEXT, &data), reply_type::ERR_INVALID);
    let mut data = info("disk", &[]);
    data[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(server.kind(option::GO, &data), reply_type::ERR_INVALID);
}
