//! Lengths around every threshold, and messages cut at every byte.

use std::time::Duration;

use sheave_proto::wire::command;
use sheave_proto::{ReplyStyle, Request};

use crate::support::{Client, Link, Setup, both_engines, pattern};

const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];
/// Thresholds: a page, a TLS record, a long write, the threads' and the ring's receive buffers, a
/// chunk of a memory volume, the longest payload.
const EDGES: [usize; 8] = [512, 4096, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 1 << 20, 32 << 20];

/// Long enough for the server to have received all sent bytes.
const A_MOMENT: Duration = Duration::from_millis(1);

both_engines! {
    fn writes_and_reads_around_every_threshold(engine) {
        let image = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        image.as_file().set_len(96 << 20).unwrap();
        let image = image.path().to_str().unwrap();
        for volume in ["memory:?size=96M", image] {
            let server = Setup::new(engine, volume).start();
            let mut client = Client::new(&server);
            for (number, edge) in EDGES.into_iter().enumerate() {
                for len in [edge - 1, edge, edge + 1] {
                    if len > 32 << 20 {
                        continue;
                    }
                    let bytes = pattern((number * 7 + len) as u64, len);
                    // Between short ones, in one go.
                    client.write(0, 5, b"before");
                    client.write(0, 1001, &bytes);
                    client.write(0, 90 << 20, b"after");
                    for _ in 0..3 {
                        assert_eq!(client.answer().unwrap().expect("a reply").error, None);
                    }
                    assert!(client.bytes(1001, len as u64) == bytes, "{len} bytes of {volume}");
                    assert_eq!(client.bytes(5, 6), b"before");
                    assert_eq!(client.bytes(90 << 20, 5), b"after");
                }
            }
        }
    }

    fn a_header_cut_at_every_byte(engine) {
        let server = Setup::new(engine, "memory:?size=4M").start();
        for style in STYLES {
            let mut client = Client::with(Link::unix(&server.socket), style);
            client.put(0, &pattern(9, 8192));
            for cut in 1..Request::header_len(style) {
                let header = client.header(command::READ, 0, cut as u64, 77);
                send_cut(&mut client, &header, cut);
                assert_eq!(client.only_answer().data, &pattern(9, 8192)[cut..cut + 77]);
            }
        }
    }

    /// After a long write the next header is received alone.
    fn a_header_behind_a_long_write_cut_at_every_byte(engine) {
        let server = Setup::new(engine, "memory:?size=4M").start();
        for style in STYLES {
            let mut client = Client::with(Link::unix(&server.socket), style);
            let long = pattern(3, 300_000);
            for cut in 1..Request::header_len(style) {
                client.put(100, &long);
                let header = client.header(command::READ, 0, 100 + cut as u64, 1000);
                send_cut(&mut client, &header, cut);
                assert!(client.only_answer().data == long[cut..cut + 1000], "{style:?} at {cut}");
            }
        }
    }

    fn payloads_that_trickle_in(engine) {
        let image = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let server = Setup::new(engine, image.path().to_str().unwrap()).start();
        let mut client = Client::simple(&server);
        let bytes = pattern(4, 200_000);
        for (step, len) in [(1, 60), (999, 40_000), (7777, 200_000)] {
            let header = client.header(command::WRITE, 0, 3, len as u64);
            let all = [&header[..], &bytes[..len]].concat();
            for part in all.chunks(step) {
                client.link.queue(part);
                client.link.flush().unwrap();
                std::thread::sleep(Duration::from_micros(200));
            }
            assert_eq!(client.only_answer().error, None);
            assert!(client.bytes(3, len as u64) == bytes[..len], "in steps of {step}");
        }
    }

    fn a_filter_that_trickles_in(engine) {
        let server = Setup::new(engine, "memory:?size=4M").start();
        let mut client = Client::new(&server);
        let context = client.negotiated.context("base:allocation").expect("the context");
        let filter = [&4096_u64.to_be_bytes()[..], &context.to_be_bytes()].concat();
        let flags = sheave_proto::wire::command_flag::PAYLOAD_LEN;
        let header =
            client.header(command::BLOCK_STATUS, flags, 8192, filter.len() as u64);
        for byte in header.iter().chain(&filter) {
            client.link.queue(&[*byte]);
            client.link.flush().unwrap();
        }
        let answer = client.only_answer();
        assert_eq!(answer.error, None);
        assert!(answer.extents.iter().map(|extent| extent.len).sum::<u64>() >= 4096);
    }

    fn the_payload_of_a_refused_write_is_skipped(engine) {
        let server = Setup::new(engine, "memory:?size=1M").start();
        let mut client = Client::simple(&server);
        client.put(0, b"untouched");
        for len in [1, 4096, 300_000, 33 << 20] {
            // Beyond the end, or longer than any.
            client.write(0, (1 << 20) - 1 + (len == 1) as u64, &vec![0xff; len]);
            client.read(0, 9);
            let refused = client.answer().unwrap().expect("a reply");
            assert!(refused.error.is_some(), "{len} bytes");
            assert_eq!(client.only_answer().data, b"untouched");
        }
    }
}

/// Sends a message in two parts.
fn send_cut(client: &mut Client, message: &[u8], cut: usize) {
    for part in [&message[..cut], &message[cut..]] {
        client.link.queue(part);
        client.link.flush().unwrap();
        std::thread::sleep(A_MOMENT);
    }
}
