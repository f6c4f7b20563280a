//! The fuzzers' bodies over seeded random input, so that every test run exercises them. A failure
//! names the seed; the fuzzers proper look much deeper.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::bodies;

const RUNS: u64 = 20_000;

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
}

/// Random bytes among which are pieces of a dictionary.
fn input(random: &mut Random, dictionary: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..random.below(12) {
        match random.below(4) {
            0 => out.extend((0..random.below(16)).map(|_| random.next().to_le_bytes()[0])),
            1 => out.extend(std::iter::repeat_n(0, random.below(9))),
            2 => out.extend([0, 0, 0, random.below(32).to_le_bytes()[0]]),
            _ if dictionary.is_empty() => {}
            _ => out.extend(dictionary[random.below(dictionary.len())]),
        }
    }
    out
}

fn run(body: fn(&[u8]), dictionary: &[&[u8]]) {
    for seed in 0..RUNS {
        let bytes = input(&mut Random(seed), dictionary);
        let outcome = catch_unwind(AssertUnwindSafe(|| body(&bytes)));
        assert!(outcome.is_ok(), "seed {seed}, input {bytes:?}");
    }
}

const OPTIONS: [&[u8]; 6] = [
    b"\x01\x05\x03\x00\x00\x00",
    b"\x08\x00\x00\x0b\x00\x00\x05\x00\x00",
    b"IHAVEOPT",
    b"\x07\x00\x07\x00\x00\x00\x01a\x00\x00",
    b"\x0a\x00\x1c\x00\x00\x00\x01a\x00\x00\x00\x01\x00\x00\x00\x0fbase:allocation",
    b"base:allocation",
];

#[test]
fn seeded_server_handshake() {
    run(bodies::server_handshake, &OPTIONS);
}

#[test]
fn seeded_server_transmission() {
    let requests: [&[u8]; 4] = [
        b"\x25\x60\x95\x13\x00\x00\x00\x00",
        b"\x21\xe4\x1c\x71\x00\x20\x00\x01",
        b"\x25\x60\x95\x13\x00\x01\x00\x06",
        b"\x21\xe4\x1c\x71\x00\x20\x00\x07",
    ];
    run(bodies::server_transmission, &requests);
}

#[test]
fn seeded_client_handshake() {
    let replies: [&[u8]; 6] = [
        b"\x21\x07\x00NBDMAGICIHAVEOPT\0\x03",
        b"\x00\x03\xe8\x89\x04\x55\x65\xa9",
        b"\x0b\x01\x00\x0a\x01\x00",
        b"\x07\x03\x0c\x00\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x01\x07\x01\x00",
        b"\x03\x02\x05\x00\x00\x00\x01a\x03\x01\x00",
        b"\x0b\x81\x00\x08\x81\x00",
    ];
    run(bodies::client_handshake, &replies);
}

#[test]
fn seeded_client_replies() {
    let replies: [&[u8]; 5] = [
        b"\x67\x44\x66\x98\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
        b"\x66\x8e\x33\xef\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
        b"\x66\x8e\x33\xef\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x0c",
        b"\x6e\x8a\x27\x8c\x00\x00\x80\x01\x00\x00\x00\x00\x00\x00\x00\x00",
        b"\x66\x8e\x33\xef\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x14",
    ];
    run(bodies::client_replies, &replies);
}

#[test]
fn seeded_uri() {
    let pieces: [&[u8]; 14] = [
        b"nbd://",
        b"nbds+unix:///",
        b"nbd+vsock://1",
        b"?socket=",
        b"%2F",
        b"%",
        b"&tls-type=psk",
        b"&tls-psk-file=%ff",
        b"[::1]",
        b":10809",
        b"@",
        b"/",
        b"&x=",
        b"host",
    ];
    run(bodies::uri, &pieces);
}
