//! The fuzzers' bodies over seeded random input, so that every test run exercises them: whole
//! conversations, each corrupted in a few places. A failure names the seed; the real fuzzers search
//! much deeper.

use std::panic::{AssertUnwindSafe, catch_unwind};

use sheave_core::NbdErrno;
use sheave_proto::reply::{error_chunk, failure, simple, success};
use sheave_proto::wire::{chunk_type, command, command_flag, magic, option, reply_type};
use sheave_proto::{ReplyStyle, ReplyTo, Request};

use crate::support::{info, message, queries, string};
use crate::{bodies, client_body};

const RUNS: u64 = 20_000;
const BASE: &str = "base:allocation";

/// A small generator of random numbers (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }
}

/// One of the conversations, changed in up to three places.
fn input(random: &mut Random, conversations: &[Vec<u8>]) -> Vec<u8> {
    let mut out = conversations[random.below(conversations.len())].clone();
    for _ in 0..random.below(4) {
        let at = random.below(out.len().max(1)).min(out.len());
        let len = random.below(8).min(out.len() - at);
        match random.below(6) {
            0 => out.truncate(at),
            1 => drop(out.drain(at..at + len)),
            2 => drop(out.splice(at..at, (0..len).map(|_| 0))),
            3 => drop(out.splice(at..at, out[at..at + len].to_vec())),
            _ if at == out.len() => out.push(random.byte()),
            4 => out[at] ^= 1 << random.below(8),
            _ => out[at] = random.byte(),
        }
    }
    out
}

fn run(body: fn(&[u8]) -> bool, conversations: &[Vec<u8>]) {
    for conversation in conversations {
        assert!(body(conversation), "as it is, it works: {conversation:?}");
    }
    let mut useful = 0;
    for seed in 0..RUNS {
        let bytes = input(&mut Random(seed), conversations);
        let outcome = catch_unwind(AssertUnwindSafe(|| body(&bytes)));
        useful += u64::from(outcome.unwrap_or_else(|_| panic!("seed {seed}, input {bytes:?}")));
    }
    assert!(useful > RUNS / 10 && useful < RUNS, "{useful} runs got somewhere");
}

/// A message for bodies that put the header around it themselves.
fn framed(kind: u32, detail: u32, data: &[u8]) -> Vec<u8> {
    let error_bit = u32::from(detail & reply_type::ERROR_BIT != 0) * 192;
    let detail = (detail & 0x7f) + error_bit;
    let head = [kind, detail, u32::try_from(data.len()).unwrap()];
    [head.map(|field| u8::try_from(field).unwrap()).as_slice(), data].concat()
}

#[test]
fn seeded_server_handshake() {
    let option = |option, data: &[u8]| framed(option, 0, data);
    let context = |name| option(option::SET_META_CONTEXT, &queries(name, &["base:", BASE]));
    let go = |name| option(option::GO, &info(name, &[3, 1, 2, 77]));
    let (off, forced, selective) = (7, 7 | 1 << 3, 7 | 2 << 3);
    let structured = option(option::STRUCTURED_REPLY, &[]);
    let extended = option(option::EXTENDED_HEADERS, &[]);
    let tls = option(option::STARTTLS, &[]);
    let list = option(option::LIST, &[]);
    let contexts = option(option::LIST_META_CONTEXT, &queries("", &[]));
    let raw = [&3_u32.to_be_bytes(), message(option::GO, &info("a", &[])).as_slice()].concat();
    let conversations = [
        [vec![off, 1], structured, contexts, context("a"), list.clone(), go("a")].concat(),
        [vec![off, 5], extended.clone(), context("b"), go("nowhere"), go("b")].concat(),
        [vec![forced, 9], list, tls.clone(), extended.clone(), context("c"), go("c")].concat(),
        [vec![selective, 2], extended, go("c"), tls, go("c")].concat(),
        [vec![off & !4, 3], option(99, b"junk"), option(option::EXPORT_NAME, b"a")].concat(),
        [vec![0, 1], raw].concat(),
    ];
    run(bodies::server_handshake, &conversations);
}

#[test]
fn seeded_server_transmission() {
    let volume = |style: u8, more: &[u8]| {
        let size = (1_u64 << 40).to_be_bytes();
        // Everything but read-only; minimum block 512; the size is halved once.
        [&[style, 0xfe, 9], size.as_slice(), &[0], more].concat()
    };
    let request = |style, command, flags| {
        let mut out = Vec::new();
        Request { cookie: 1, flags, command, offset: 4096, length: 8192 }.encode(style, &mut out);
        out
    };
    let commands = [command::READ, command::WRITE, command::TRIM, command::CACHE, 6, 7, 9];
    let all =
        |style: ReplyStyle, flags| commands.map(|command| request(style, command, flags)).concat();
    let mut filter =
        request(ReplyStyle::Extended, command::BLOCK_STATUS, command_flag::PAYLOAD_LEN);
    filter[24..].copy_from_slice(&12_u64.to_be_bytes());
    filter.extend([0, 0, 0, 0, 0, 0, 32, 0, 0, 0, 0, 1]);
    let conversations = [
        [volume(0, &[1]), all(ReplyStyle::Simple, 0)].concat(),
        [volume(1, &[1, 1]), all(ReplyStyle::Structured, command_flag::FUA)].concat(),
        [volume(1, &[1, 0]), all(ReplyStyle::Structured, command_flag::DF)].concat(),
        [volume(2, &[1, 0]), filter.clone(), all(ReplyStyle::Extended, 0)].concat(),
        [volume(2, &[1, 1]), all(ReplyStyle::Extended, command_flag::PAYLOAD_LEN), filter].concat(),
    ];
    run(bodies::server_transmission, &conversations);
}

#[test]
fn seeded_client_handshake() {
    let export = [0, 0, 0, 0, 0, 0, 64, 0, 0, 0, 0, 1];
    let block = [0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0];
    let ack = |option| framed(option, reply_type::ACK, &[]);
    let unsupported = |option| framed(option, reply_type::ERR_UNSUP, b"no");
    let told = |option| {
        let told = |data| framed(option, reply_type::INFO, data);
        [told(&block), told(&export), told(b"\0\x01name"), ack(option)].concat()
    };
    let context = [&[0, 0, 0, 7], BASE.as_bytes()].concat();
    let context = framed(option::SET_META_CONTEXT, reply_type::META_CONTEXT, &context);
    let context = [context, ack(option::SET_META_CONTEXT)].concat();
    let entry = framed(option::LIST, reply_type::SERVER, &string("one"));
    // Framed, all flags of the server; then the goal.
    let (list, about, go) = (97, 97 | 2, 97 | 4 | 8);
    let go_told = told(option::GO);
    let old_answer = [&export[2..], &[0; 124]].concat();
    let greeting = [magic::NBD.to_be_bytes(), magic::OPTION.to_be_bytes()].concat();
    let conversations = [
        [vec![list, 1, 0], entry.clone(), entry, ack(option::LIST)].concat(),
        [vec![about, 2, 0], told(option::INFO)].concat(),
        [vec![go, 3, 2], ack(option::EXTENDED_HEADERS), context.clone(), go_told.clone()].concat(),
        [
            vec![go, 4, 2],
            unsupported(option::EXTENDED_HEADERS),
            ack(option::STRUCTURED_REPLY),
            context,
            go_told.clone(),
        ]
        .concat(),
        [vec![go | 16, 255, 0], ack(option::STARTTLS)].concat(),
        [vec![4, 1, 2], greeting, vec![0, 0], old_answer].concat(),
    ];
    // Behind TLS there must be no more in the same piece, so that one is tried apart.
    let (tls, others) =
        (conversations[4].clone(), [&conversations[..4], &conversations[5..]].concat());
    assert!(!bodies::client_handshake(&tls));
    run(bodies::client_handshake, &others);
}

fn encode(put: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    put(&mut out);
    out
}

/// The header of an end, changed into that of another chunk without it.
fn chunk(to: ReplyTo, kind: u16, done: bool, body: &[u8]) -> Vec<u8> {
    let mut out = encode(|out| success(out, to));
    out[4..8].copy_from_slice(&(u32::from(done) << 16 | u32::from(kind)).to_be_bytes());
    let end = out.len();
    out[end - 4..].copy_from_slice(&u32::try_from(body.len()).unwrap().to_be_bytes());
    [out.as_slice(), body].concat()
}

/// The reply to a read that fails in several ways.
fn failing_read(to: ReplyTo) -> Vec<u8> {
    let data = [4096_u64.to_be_bytes().as_slice(), &[9; 40]].concat();
    let hole = [5000_u64.to_be_bytes().as_slice(), &[0, 0, 1, 0]].concat();
    let at = [&[0, 0, 0, 5, 0, 2, b'n', b'o'], 6000_u64.to_be_bytes().as_slice()].concat();
    let chunks = [
        chunk(to, chunk_type::OFFSET_DATA, false, &data),
        chunk(to, chunk_type::OFFSET_HOLE, false, &hole),
        encode(|out| error_chunk(out, to, NbdErrno::Io, "bad", false)),
        chunk(to, chunk_type::ERROR_OFFSET, false, &at),
        encode(|out| failure(out, to, NbdErrno::Io, "end")),
    ];
    chunks.concat()
}

/// The reply to a read of 8192 bytes, backwards.
fn whole_read(to: ReplyTo) -> Vec<u8> {
    let data = [4096_u64.to_be_bytes().as_slice(), &[9; 192]].concat();
    let hole = [4288_u64.to_be_bytes().as_slice(), &8000_u32.to_be_bytes()].concat();
    let chunks = [
        chunk(to, chunk_type::OFFSET_HOLE, false, &hole),
        chunk(to, chunk_type::OFFSET_DATA, true, &data),
    ];
    chunks.concat()
}

#[test]
fn seeded_client_transmission() {
    // A volume that can do everything and has blocks of 512 bytes, the requests, and how the
    // replies are cut.
    let setup = |style: u8, commands: &[u8]| {
        let word = |value: u64| value.to_be_bytes();
        let count = u8::try_from(commands.len()).unwrap();
        let request = |command: &u8| {
            [&[0, *command], word(4096).as_slice(), &[0], &word(8192), &[0]].concat()
        };
        [
            [&[style, 0xfe, 9], word(1 << 40).as_slice(), &[0, count - 1]].concat(),
            commands.iter().flat_map(request).collect(),
            vec![61],
        ]
        .concat()
    };
    // The cookies of the first request and of the second.
    let (one, two) = (1, 1 << 32 | 1);
    let to = |style, cookie| ReplyTo { style, cookie, offset: 4096 };
    let compact = [[0, 0, 0, 1].as_slice(), &[0, 0, 16, 0, 0, 0, 0, 3].repeat(3)].concat();
    let wide = [0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 3].repeat(3);
    let wide = [[0, 0, 0, 1, 0, 0, 0, 3].as_slice(), &wide].concat();
    let other = [&[0, 0, 0, 7], &wide[4..]].concat();
    let data = encode(|out| {
        simple(out, two, None);
        simple(out, one, None);
        out.extend([7; 8192]);
    });
    let (structured, extended) = (ReplyStyle::Structured, ReplyStyle::Extended);
    let statuses = [
        chunk(to(extended, one), chunk_type::BLOCK_STATUS_EXT, false, &other),
        failing_read(to(extended, two)),
        chunk(to(extended, one), chunk_type::BLOCK_STATUS_EXT, true, &wide),
    ];
    let failed = encode(|out| simple(out, one, Some(NbdErrno::NoSpc)));
    let conversations = [
        [setup(0, &[0, 2]), data].concat(),
        [setup(1, &[2]), failed].concat(),
        [setup(1, &[0, 0]), failing_read(to(structured, one)), whole_read(to(structured, two))]
            .concat(),
        [setup(2, &[2, 0]), whole_read(to(extended, two)), failing_read(to(extended, one))]
            .concat(),
        [setup(1, &[1]), chunk(to(structured, one), chunk_type::BLOCK_STATUS, true, &compact)]
            .concat(),
        [setup(2, &[1, 0]), statuses.concat()].concat(),
    ];
    run(client_body::client_transmission, &conversations);
}

#[test]
fn seeded_uri() {
    let uris = [
        "nbd://example.com:10809/export",
        "nbds://user@[2001:db8::1]:7/a%20b//c?tls-type=x509&tls-hostname=h&tls-verify-peer=0",
        "nbd+unix:///?socket=%00/abstract&x-trial=%C3%A9",
        "nbds+unix:///e?socket=/run/s&tls-psk-file=%ff/k&tls-type=psk&connections=4",
        "nbd+vsock://2:4444/disk?tls-certificates=/etc/pki",
        "nbd:",
    ];
    run(bodies::uri, &uris.map(|uri| uri.as_bytes().to_vec()));
}
