//! The three TLS modes, and state that must not survive from plain text into an encrypted session.

use sheave_proto::wire::{option, reply_type};
use sheave_proto::{CloseReason, Next, ReplyStyle, TlsMode};

use crate::support::{Server, info, message, queries};

const BASE: &str = "base:allocation";

#[test]
fn tls_off_never_asks_for_it() {
    let mut server = Server::new(TlsMode::Off);
    assert_eq!(server.kind(option::STARTTLS, &[]), reply_type::ERR_POLICY);
    for option in (3..12).chain([99]) {
        for data in [vec![], info("nowhere", &[]), queries("secret", &[]), info("secret", &[])] {
            assert_ne!(server.kind(option, &data), reply_type::ERR_TLS_REQD);
        }
        server = Server::new(TlsMode::Off);
    }
}

#[test]
fn tls_forced_lets_nothing_else_pass() {
    let mut server = Server::new(TlsMode::Forced);
    for option in [3, 4, 6, 7, 8, 9, 10, 11, 12, 99] {
        assert_eq!(server.kind(option, &[]), reply_type::ERR_TLS_REQD, "option {option}");
        assert_eq!(server.kind(option, &[0; 20_000]), reply_type::ERR_TLS_REQD);
    }
    let (output, next) = server.send(&message(option::EXPORT_NAME, b"disk"));
    assert!(output.is_empty());
    assert!(matches!(next, Next::Close(CloseReason::ExportName(_))));
}

#[test]
fn tls_forced_leaks_no_names() {
    let mut server = Server::new(TlsMode::Forced);
    for name in ["disk", "secret", "nowhere"] {
        let (replies, _) = server.ask(option::GO, &info(name, &[]));
        let (again, _) = server.ask(option::LIST, &[]);
        assert_eq!((replies.len(), again.len()), (1, 1));
        assert_eq!(replies[0], again[0]);
    }
}

#[test]
fn tls_selective_asks_for_it_where_the_export_is_hidden() {
    let mut server = Server::new(TlsMode::Selective);
    for option in [option::INFO, option::GO] {
        // A hidden export and an absent one must look the same.
        let (hidden, _) = server.ask(option, &info("secret", &[]));
        let (unknown, _) = server.ask(option, &info("nowhere", &[]));
        assert_eq!(hidden, unknown);
        assert_eq!(hidden[0].0, reply_type::ERR_TLS_REQD);
    }
    for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        server.agree(option::STRUCTURED_REPLY, &[]);
        assert_eq!(server.kind(option, &queries("secret", &[BASE])), reply_type::ERR_UNKNOWN);
    }
    let (replies, _) = server.ask(option::LIST, &[]);
    assert!(replies.iter().all(|(_, data)| !data.ends_with(b"the secret")));
    server.go("disk");

    let mut server = Server::new(TlsMode::Selective);
    let (output, next) = server.send(&message(option::EXPORT_NAME, b"secret"));
    assert!(output.is_empty() && matches!(next, Next::Close(_)));
}

#[test]
fn tls_once_started_never_asked_for_again_and_shows_everything() {
    for mode in [TlsMode::Forced, TlsMode::Selective] {
        let mut server = Server::new(mode);
        server.start_tls();
        assert_eq!(server.kind(option::STARTTLS, &[]), reply_type::ERR_INVALID);
        assert_eq!(server.kind(option::GO, &info("nowhere", &[])), reply_type::ERR_UNKNOWN);
        let (replies, _) = server.ask(option::LIST, &[]);
        assert_eq!(replies.len(), 4);
        let negotiated = server.go("secret");
        assert!(negotiated.tls);
        assert_eq!(negotiated.export, 2);
    }
}

#[test]
fn o5_starttls_with_data_is_invalid() {
    let mut server = Server::new(TlsMode::Forced);
    assert_eq!(server.kind(option::STARTTLS, b"x"), reply_type::ERR_INVALID);
    server.start_tls();
}

#[test]
fn o5_starttls_forgets_all_that_was_agreed() {
    let mut server = Server::new(TlsMode::Selective);
    server.agree(option::STRUCTURED_REPLY, &[]).agree(option::EXTENDED_HEADERS, &[]);
    server.agree(option::SET_META_CONTEXT, &queries("disk", &[BASE]));
    let negotiated = server.start_tls().go("disk");
    assert_eq!(negotiated.style, ReplyStyle::Simple);
    assert!(negotiated.contexts.is_empty());

    // Contexts do not come back with the style either.
    let mut server = Server::new(TlsMode::Selective);
    server.agree(option::STRUCTURED_REPLY, &[]);
    server.agree(option::SET_META_CONTEXT, &queries("disk", &[BASE]));
    server.start_tls().agree(option::STRUCTURED_REPLY, &[]);
    assert!(server.go("disk").contexts.is_empty());
}

#[test]
fn o5_starttls_leaves_injected_plain_text_unread() {
    let mut server = Server::new(TlsMode::Selective);
    let start = message(option::STARTTLS, &[]);
    let injected = [start.as_slice(), &message(option::GO, &info("disk", &[]))].concat();
    let step = server.handshake.step(&injected, &server.exports);
    assert_eq!(step.consumed, start.len());
    assert!(matches!(step.next, Next::StartTls));

    // Going on without TLS ends the handshake.
    let step = server.handshake.step(&injected[step.consumed..], &server.exports);
    assert_eq!(step.consumed, 0);
    assert!(matches!(step.next, Next::Close(CloseReason::Over)));
}
