//! A client's messages, and its handling of servers of all kinds.

use sheave_core::BlockSizes;
use sheave_proto::wire::{info_type, magic, option, reply_type, transmission_flag};
use sheave_proto::{
    CONTEXTS_MAX, ClientConfig, ClientError, ClientHandshake, ClientNegotiated, ClientNext,
    ExportEntry, Goal, OPTION_REPLIES_MAX, OPTION_REPLY_LEN_MAX, ReplyStyle,
};

use crate::support::{be32, info, message, queries, string};

const BASE: &str = "base:allocation";
const SIZE: u64 = 1 << 20;

/// A client whose server we are.
struct Client(ClientHandshake);

impl Client {
    fn new(config: ClientConfig) -> Self {
        Self(ClientHandshake::new(config).unwrap())
    }

    /// A client after the greeting, and the bytes that it sent.
    fn greeted(config: ClientConfig, flags: u16) -> (Self, Vec<u8>) {
        let mut client = Self::new(config);
        let (output, next) = client.send(&greeting(flags));
        assert!(matches!(next, ClientNext::NeedMore), "{next:?}");
        (client, output)
    }

    fn send(&mut self, bytes: &[u8]) -> (Vec<u8>, ClientNext) {
        let step = self.0.step(bytes);
        assert_eq!(step.consumed, bytes.len());
        (step.output, step.next)
    }

    /// Answers an option and returns the client's next message.
    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> (Vec<u8>, ClientNext) {
        self.send(&reply(option, kind, data))
    }

    /// Acknowledges an option.
    fn ack(&mut self, option: u32) -> (Vec<u8>, ClientNext) {
        self.reply(option, reply_type::ACK, &[])
    }

    /// Describes an export of [`SIZE`] bytes and acknowledges `GO`.
    fn accept_go(&mut self) -> ClientNegotiated {
        self.reply(option::GO, reply_type::INFO, &export_info(SIZE, 1));
        match self.ack(option::GO).1 {
            ClientNext::Ready(negotiated) => *negotiated,
            next => panic!("{next:?}"),
        }
    }
}

fn greeting(flags: u16) -> Vec<u8> {
    let fields = [magic::NBD.to_be_bytes(), magic::OPTION.to_be_bytes()].concat();
    [fields.as_slice(), &flags.to_be_bytes()].concat()
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let fields = [option, kind, len].map(u32::to_be_bytes).concat();
    [magic::OPTION_REPLY.to_be_bytes().as_slice(), &fields, data].concat()
}

fn export_info(size: u64, flags: u16) -> Vec<u8> {
    [[0, 0].as_slice(), &size.to_be_bytes(), &flags.to_be_bytes()].concat()
}

fn block_info(sizes: [u32; 3]) -> Vec<u8> {
    [[0, 3].as_slice(), &sizes.map(u32::to_be_bytes).concat()].concat()
}

fn config(export: &str) -> ClientConfig {
    ClientConfig { export: export.to_owned(), ..ClientConfig::default() }
}

fn simple(export: &str) -> ClientConfig {
    ClientConfig { style: ReplyStyle::Simple, block_sizes: false, ..config(export) }
}

fn go(export: &str) -> Vec<u8> {
    let wanted = [info_type::NAME, info_type::DESCRIPTION, info_type::BLOCK_SIZE];
    message(option::GO, &info(export, &wanted))
}

#[track_caller]
fn failed(next: ClientNext) -> ClientError {
    let ClientNext::Failed(error) = next else { panic!("{next:?}") };
    error
}

#[test]
fn client_asks_for_the_best_first() {
    let (mut client, output) = Client::greeted(config("e"), 3);
    let want = [vec![0, 0, 0, 3], message(option::EXTENDED_HEADERS, &[])].concat();
    assert_eq!(output, want);
    let (output, _) = client.ack(option::EXTENDED_HEADERS);
    assert_eq!(output, message(option::SET_META_CONTEXT, &queries("e", &[BASE])));
    let context = [[0, 0, 0, 9].as_slice(), BASE.as_bytes()].concat();
    client.reply(option::SET_META_CONTEXT, reply_type::META_CONTEXT, &context);
    let (output, _) = client.ack(option::SET_META_CONTEXT);
    assert_eq!(output, go("e"));
    client.reply(option::GO, reply_type::INFO, &block_info([512, 4096, 1 << 20]));
    client.reply(option::GO, reply_type::INFO, b"\0\x01real name");
    client.reply(option::GO, reply_type::INFO, b"\0\x02about it");
    client.reply(option::GO, reply_type::INFO, b"\x77\x77something new");
    let negotiated = client.accept_go();
    assert_eq!(negotiated.style, ReplyStyle::Extended);
    assert_eq!((negotiated.size, negotiated.transmission_flags), (SIZE, 1));
    let block =
        BlockSizes { minimum: 512, logical: 512, preferred: 4096, maximum_payload: 1 << 20 };
    assert_eq!((negotiated.block, negotiated.block_sizes_told), (block, true));
    assert_eq!(negotiated.context(BASE), Some(9));
    assert_eq!(negotiated.name.as_deref(), Some("real name"));
    assert_eq!(negotiated.description.as_deref(), Some("about it"));
    assert!(negotiated.volume_info().can.block_status);
}

#[test]
fn client_makes_do_with_less() {
    let (mut client, _) = Client::greeted(config("e"), 3);
    let (output, _) = client.reply(option::EXTENDED_HEADERS, reply_type::ERR_UNSUP, b"?");
    assert_eq!(output, message(option::STRUCTURED_REPLY, &[]));
    let (output, _) = client.reply(option::STRUCTURED_REPLY, reply_type::ERR_POLICY, &[]);
    assert_eq!(output, go("e"));
    let negotiated = client.accept_go();
    assert_eq!(negotiated.style, ReplyStyle::Simple);
    assert_eq!(negotiated.block, BlockSizes::default());
    assert!(!negotiated.block_sizes_told && negotiated.contexts.is_empty());
}

#[test]
fn client_does_without_contexts() {
    let (mut client, _) = Client::greeted(config("e"), 3);
    client.ack(option::EXTENDED_HEADERS);
    let context = [[0, 0, 0, 9].as_slice(), BASE.as_bytes()].concat();
    client.reply(option::SET_META_CONTEXT, reply_type::META_CONTEXT, &context);
    let (output, _) = client.reply(option::SET_META_CONTEXT, reply_type::ERR_TOO_BIG, &[]);
    assert_eq!(output, go("e"));
    assert!(client.accept_go().contexts.is_empty());
}

#[test]
fn o1_client_falls_back_to_export_name() {
    for (flags, padding) in [(3, 0), (1, 124)] {
        let (mut client, _) = Client::greeted(simple("e"), flags);
        let (output, _) = client.reply(option::GO, reply_type::ERR_UNSUP, &[]);
        assert_eq!(output, message(option::EXPORT_NAME, b"e"));
        let answer = [export_info(SIZE, 5)[2..].to_vec(), vec![0; padding]].concat();
        let (_, next) = client.send(&answer);
        let ClientNext::Ready(negotiated) = next else { panic!("{next:?}") };
        assert_eq!((negotiated.size, negotiated.transmission_flags), (SIZE, 5));
    }
}

#[test]
fn o1_client_uses_export_name_where_there_is_nothing_else() {
    for flags in [0_u16, 2] {
        let (mut client, output) = Client::greeted(config("e"), flags);
        let want = [vec![0, 0, 0, flags as u8], message(option::EXPORT_NAME, b"e")].concat();
        assert_eq!(output, want);
        assert!(client.0.closed().to_string().contains("no such export"));
        let padding = if flags == 0 { 124 } else { 0 };
        let answer = [export_info(SIZE, 1)[2..].to_vec(), vec![0; padding]].concat();
        assert!(matches!(client.send(&answer).1, ClientNext::Ready(_)));
    }
}

#[test]
fn o1_client_does_not_fall_back_after_extended_headers() {
    let no_contexts = ClientConfig { contexts: vec![], ..config("e") };
    let (mut client, _) = Client::greeted(no_contexts, 3);
    client.ack(option::EXTENDED_HEADERS);
    let (output, next) = client.reply(option::GO, reply_type::ERR_UNSUP, &[]);
    assert_eq!(output, message(option::ABORT, &[]));
    assert!(matches!(failed(next), ClientError::Refused { option: option::GO, .. }));
}

#[test]
fn h1_client_answers_no_flag_that_it_does_not_know() {
    let (_, output) = Client::greeted(config(""), 0xffff);
    assert_eq!(be32(&output), 3);
}

#[test]
fn client_tells_what_is_not_nbd() {
    let (_, next) = Client::new(config("")).send(b"HTTP/1.1 400 Bad R");
    assert_eq!(failed(next), ClientError::NotNbd);
    let old = [magic::NBD.to_be_bytes(), magic::OLD_STYLE.to_be_bytes()].concat();
    let (_, next) = Client::new(config("")).send(&[old.as_slice(), &[0, 0]].concat());
    assert!(matches!(failed(next), ClientError::TooOld(_)));
}

#[test]
fn client_refuses_servers_too_old_for_its_goal() {
    let configs = [
        ClientConfig { tls: true, ..config("") },
        ClientConfig { goal: Goal::List, ..config("") },
        ClientConfig { goal: Goal::Info, ..config("") },
    ];
    for config in configs {
        let (_, next) = Client::new(config).send(&greeting(0));
        assert!(matches!(failed(next), ClientError::TooOld(_)));
    }
}

#[test]
fn o3_client_lists() {
    let (mut client, output) = Client::greeted(ClientConfig { goal: Goal::List, ..config("") }, 3);
    assert_eq!(output[4..], message(option::LIST, &[]));
    client.reply(option::LIST, reply_type::SERVER, &string("one"));
    let with_text = [string("two").as_slice(), b"the second"].concat();
    client.reply(option::LIST, reply_type::SERVER, &with_text);
    let (output, next) = client.ack(option::LIST);
    assert_eq!(output, message(option::ABORT, &[]));
    let ClientNext::Listed(entries) = next else { panic!("{next:?}") };
    let entry = |name: &str, text: &str| ExportEntry {
        name: name.to_owned(),
        description: text.to_owned(),
    };
    assert_eq!(entries, [entry("one", ""), entry("two", "the second")]);
}

#[test]
fn o6_client_asks_for_information_only() {
    let config = ClientConfig { goal: Goal::Info, ..simple("e") };
    let (mut client, output) = Client::greeted(config, 3);
    assert_eq!(be32(&output[12..]), option::INFO);
    client.reply(option::INFO, reply_type::INFO, &export_info(SIZE, 1));
    let (output, next) = client.ack(option::INFO);
    assert_eq!(output, message(option::ABORT, &[]));
    assert!(matches!(next, ClientNext::Info(negotiated) if negotiated.size == SIZE));
}

#[test]
fn o6_client_lists_the_contexts_of_an_export() {
    for is_refused in [false, true] {
        let config = ClientConfig { goal: Goal::Info, contexts: vec![], ..config("e") };
        let (mut client, _) = Client::greeted(config, 3);
        let (output, _) = client.ack(option::EXTENDED_HEADERS);
        // Without a query the server names all.
        assert_eq!(output, message(option::LIST_META_CONTEXT, &queries("e", &[])));
        let names = ["base:allocation", "qemu:allocation-depth"];
        for name in names {
            let context = [&0_u32.to_be_bytes(), name.as_bytes()].concat();
            client.reply(option::LIST_META_CONTEXT, reply_type::META_CONTEXT, &context);
        }
        let (output, _) = match is_refused {
            true => client.reply(option::LIST_META_CONTEXT, reply_type::ERR_UNSUP, &[]),
            false => client.ack(option::LIST_META_CONTEXT),
        };
        assert_eq!(be32(&output[8..]), option::INFO);
        client.reply(option::INFO, reply_type::INFO, &export_info(SIZE, 1));
        let (_, ClientNext::Info(negotiated)) = client.ack(option::INFO) else { panic!("no end") };
        let found: Vec<_> = negotiated.contexts.iter().map(|(_, name)| &**name).collect();
        assert_eq!(found, if is_refused { &[][..] } else { &names[..] });
    }
}

#[test]
fn o2_client_says_goodbye_when_refused() {
    for code in [reply_type::ERR_UNKNOWN, reply_type::ERR_SHUTDOWN, reply_type::ERR_TLS_REQD] {
        let (mut client, _) = Client::greeted(simple("e"), 3);
        let (output, next) = client.reply(option::GO, code, b"because");
        assert_eq!(output, message(option::ABORT, &[]));
        let message = "because".to_owned();
        let error = failed(next);
        assert!(error.to_string().contains("because"));
        assert_eq!(error, ClientError::Refused { option: option::GO, code, message });
    }
}

#[test]
fn h9_client_stops_at_once_when_the_server_shuts_down() {
    let (mut client, _) = Client::greeted(config("e"), 3);
    let (output, next) = client.reply(option::EXTENDED_HEADERS, reply_type::ERR_SHUTDOWN, &[]);
    assert_eq!(output, message(option::ABORT, &[]));
    assert!(matches!(failed(next), ClientError::Refused { .. }));
}

#[test]
fn tls_client_stops_at_once_when_the_server_wants_tls() {
    let (mut client, _) = Client::greeted(config("e"), 3);
    let (output, next) = client.reply(option::EXTENDED_HEADERS, reply_type::ERR_TLS_REQD, &[]);
    assert_eq!(output, message(option::ABORT, &[]));
    assert!(failed(next).to_string().contains("it wants TLS"));
}

#[test]
fn tls_client_starts_it_first_and_speaks_again_after_it() {
    let (mut client, output) = Client::greeted(ClientConfig { tls: true, ..simple("e") }, 3);
    assert_eq!(output[4..], message(option::STARTTLS, &[]));
    assert!(matches!(client.ack(option::STARTTLS).1, ClientNext::StartTls));
    let output = client.0.tls_started();
    assert_eq!(be32(&output[8..]), option::GO);
    assert!(client.accept_go().tls);
}

#[test]
fn tls_client_never_goes_on_without_it() {
    for code in [reply_type::ERR_UNSUP, reply_type::ERR_POLICY, reply_type::ERR_INVALID] {
        let (mut client, _) = Client::greeted(ClientConfig { tls: true, ..config("e") }, 3);
        let (output, next) = client.reply(option::STARTTLS, code, &[]);
        assert_eq!(output, message(option::ABORT, &[]));
        assert!(matches!(failed(next), ClientError::Refused { .. }));
    }
}

#[test]
fn tls_client_refuses_plain_text_behind_the_acknowledgement() {
    let (mut client, _) = Client::greeted(ClientConfig { tls: true, ..config("e") }, 3);
    let ack = reply(option::STARTTLS, reply_type::ACK, &[]);
    let injected = [ack.as_slice(), &reply(option::GO, reply_type::ACK, &[])].concat();
    let step = client.0.step(&injected);
    assert_eq!(step.consumed, ack.len());
    assert!(matches!(failed(step.next), ClientError::Violation(_)));
}

#[test]
fn violations_of_servers_are_found() {
    let ack = |option| reply(option, reply_type::ACK, &[]);
    let info = |data: &[u8]| reply(option::GO, reply_type::INFO, data);
    let mut bad_magic = ack(option::GO);
    bad_magic[0] = 1;
    let mut too_long = ack(option::GO);
    let len = u32::try_from(OPTION_REPLY_LEN_MAX + 1).unwrap();
    too_long[16..].copy_from_slice(&len.to_be_bytes());
    let no_flags = [info(&export_info(SIZE, 0)), ack(option::GO)].concat();
    let cases = [
        bad_magic,
        too_long,
        ack(option::LIST),
        ack(option::GO), // without describing the export
        no_flags,
        reply(option::GO, reply_type::ACK, b"x"),
        reply(option::GO, reply_type::SERVER, &string("x")),
        reply(option::GO, 77, &[]),
        info(&[]),
        info(&export_info(SIZE, 1)[..11]),
        info(&[export_info(SIZE, 1).as_slice(), b"x"].concat()),
        info(b"\0\x01\xff"),
        info(b"\0\x02\0"),
        info(&block_info([512, 4096, 1 << 20])[..13]),
        info(&block_info([0, 4096, 1 << 20])),
        info(&block_info([3, 4096, 1 << 20])),
        info(&block_info([128 << 10, 128 << 10, 1 << 20])),
        info(&block_info([1, 256, 1 << 20])),
        info(&block_info([4096, 512, 1 << 20])),
        info(&block_info([512, 4096, 512])),
    ];
    for (index, bytes) in cases.iter().enumerate() {
        let (mut client, _) = Client::greeted(simple("e"), 3);
        let mut rest = bytes.as_slice();
        let next = loop {
            let step = client.0.step(rest);
            rest = &rest[step.consumed..];
            match step.next {
                ClientNext::NeedMore if !rest.is_empty() => {}
                next => break next,
            }
        };
        assert!(matches!(failed(next), ClientError::Violation(_)), "case {index}");
    }
}

#[test]
fn violations_in_lists_and_contexts_are_found() {
    let list = || Client::greeted(ClientConfig { goal: Goal::List, ..config("") }, 3).0;
    for entry in [b"".as_slice(), b"\0\0\0", b"\0\0\0\x05four", b"\0\0\0\x01\0", b"\0\0\0\x01\xff"]
    {
        let (_, next) = list().reply(option::LIST, reply_type::SERVER, entry);
        assert!(matches!(failed(next), ClientError::Violation(_)), "{entry:?}");
    }
    let mut client = list();
    for _ in 0..OPTION_REPLIES_MAX {
        let (_, next) = client.reply(option::LIST, reply_type::SERVER, &string(""));
        assert!(matches!(next, ClientNext::NeedMore));
    }
    let head = &reply(option::LIST, reply_type::SERVER, &string(""))[..20];
    assert!(matches!(failed(client.send(head).1), ClientError::Violation(_)));

    let mut client = Client::greeted(config("e"), 3).0;
    client.ack(option::EXTENDED_HEADERS);
    let set = option::SET_META_CONTEXT;
    client.reply(set, reply_type::META_CONTEXT, b"\0\0\0\x01a:b");
    let (_, next) = client.reply(set, reply_type::META_CONTEXT, b"\0\0\0\x01c:d");
    assert!(matches!(failed(next), ClientError::Violation(_)), "one id twice");

    let mut client = Client::greeted(config("e"), 3).0;
    client.ack(option::EXTENDED_HEADERS);
    let context =
        |id: usize| [&u32::try_from(id).unwrap().to_be_bytes(), b"a:b".as_slice()].concat();
    for id in 0..CONTEXTS_MAX {
        client.reply(set, reply_type::META_CONTEXT, &context(id));
    }
    let (_, next) = client.reply(set, reply_type::META_CONTEXT, &context(CONTEXTS_MAX));
    assert!(matches!(failed(next), ClientError::Violation(_)), "too many");
}

#[test]
fn t7_t11_t12_client_ignores_flags_that_contradict_what_was_negotiated() {
    use transmission_flag as flag;
    let (mut client, _) = Client::greeted(simple("e"), 3);
    let odd = flag::SEND_FAST_ZERO | flag::SEND_DF | flag::BLOCK_STATUS_PAYLOAD;
    let sane = flag::HAS_FLAGS | flag::SEND_FLUSH | 1 << 15;
    client.reply(option::GO, reply_type::INFO, &export_info(SIZE, odd | sane));
    let (_, next) = client.ack(option::GO);
    let ClientNext::Ready(negotiated) = next else { panic!("{next:?}") };
    assert_eq!(negotiated.transmission_flags, sane);
    assert!(negotiated.volume_info().can.flush && !negotiated.volume_info().can.fast_zero);
}

#[test]
fn client_refuses_names_that_have_no_place_on_the_wire() {
    for name in ["a".repeat(4097), "a\0b".to_owned()] {
        let error = ClientHandshake::new(config(&name)).unwrap_err();
        assert!(matches!(error, ClientError::Config(_)));
        let bad = ClientConfig { contexts: vec![name], ..config("") };
        assert!(matches!(ClientHandshake::new(bad), Err(ClientError::Config(_))));
    }
    let many = ClientConfig { contexts: vec![BASE.to_owned(); CONTEXTS_MAX + 1], ..config("") };
    assert!(matches!(ClientHandshake::new(many), Err(ClientError::Config(_))));
}

#[test]
fn client_that_is_done_stays_done() {
    let (mut client, _) = Client::greeted(simple("e"), 3);
    client.accept_go();
    let step = client.0.step(b"more");
    assert_eq!(step.consumed, 0);
    assert_eq!(failed(step.next), ClientError::Over);
}
