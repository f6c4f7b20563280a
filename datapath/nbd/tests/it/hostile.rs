//! Clients that leave in the middle, never read, or send nonsense.

use std::time::Duration;

use sheave_proto::ReplyStyle;
use sheave_proto::wire::{command, command_flag};

use crate::support::{Client, Link, Running, Setup, both_engines, pattern, wait_until};

/// A client that reads nothing for this long reads nothing more.
const PATIENCE: Duration = Duration::from_millis(300);

both_engines! {
    fn the_end_of_the_stream_at_every_place(engine) {
        let image = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let server = Setup::new(engine, image.path().to_str().unwrap()).start();
        let mut bystander = Client::new(&server);
        bystander.put(0, &pattern(1, 300_000));
        for (flags, offset, len, sent) in [
            // In a header, a short and a long payload, one that is to be skipped, a filter.
            (0, 0, 100, 10),
            (command_flag::PAYLOAD_LEN, 0, 100, 32 + 50),
            (command_flag::PAYLOAD_LEN, 0, 200_000, 32),
            (command_flag::PAYLOAD_LEN, 0, 200_000, 32 + 150_000),
            (command_flag::PAYLOAD_LEN, 1 << 20, 200_000, 32 + 150_000),
        ] {
            for reset in [false, true] {
                let style = if flags == 0 { ReplyStyle::Simple } else { ReplyStyle::Extended };
                let mut client = Client::with(link(&server, reset), style);
                let mut message = client.header(command::WRITE, flags, offset, len);
                message.resize(message.len() + len as usize, 0xff);
                client.link.queue(&message[..sent]);
                client.link.flush().unwrap();
                if reset {
                    client.link.reset();
                } else {
                    client.link.finish();
                    assert!(client.answer().unwrap().is_none(), "closed without a reply");
                }
            }
        }
        wait_until("the others are gone", || server.connections() == 1);
        assert!(bystander.bytes(0, 300_000) == pattern(1, 300_000), "nothing was written");
    }

    fn a_client_that_has_said_all_gets_all_its_replies(engine) {
        const REQUESTS: usize = 5000;
        let volume = "memory:?size=1M&fault=any:delay=30ms:probability=0.5";
        let server = Setup::new(engine, volume).start();
        let mut client = Client::new(&server);
        for number in 0..REQUESTS as u64 {
            client.read(number * 16, 16);
        }
        client.link.flush().unwrap();
        client.link.finish();
        for _ in 0..REQUESTS {
            assert_eq!(client.answer().unwrap().expect("a reply").error, None);
        }
        assert!(client.answer().unwrap().is_none());
        wait_until("the connection is gone", || server.connections() == 0);
    }

    fn a_good_bye_comes_after_all_replies(engine) {
        let volume = "memory:?size=1M&fault=any:delay=50ms:probability=0.7";
        let server = Setup::new(engine, volume).start();
        let mut client = Client::simple(&server);
        for number in 0..200 {
            client.read(number * 16, 16);
        }
        client.ask(command::DISC, 0, 0, 0);
        // Bytes behind it are ignored.
        client.link.queue(&[0; 500]);
        for _ in 0..200 {
            assert_eq!(client.answer().unwrap().expect("a reply").error, None);
        }
        assert!(client.answer().is_ok_and(|end| end.is_none()));
        wait_until("the connection is gone", || server.connections() == 0);
    }

    fn nonsense_ends_the_connection_after_what_came_before(engine) {
        let server = Setup::new(engine, "memory:?size=1M").start();
        let mut bystander = Client::new(&server);
        let mut client = Client::new(&server);
        client.read(0, 100);
        client.link.queue(&[0x55; 100]);
        assert_eq!(client.answer().unwrap().expect("a reply").error, None);
        assert!(client.answer().unwrap_or(None).is_none());
        wait_until("the connection is gone", || server.connections() == 1);
        assert_eq!(bystander.bytes(0, 4), [0; 4]);
    }

    fn a_reset_with_replies_under_way(engine) {
        let volume = "memory:?size=64M&fault=read:delay=20ms:probability=0.3";
        let server = Setup::new(engine, volume).start();
        let mut bystander = Client::new(&server);
        for _ in 0..20 {
            let mut client = Client::with(Link::tcp(server.address), Default::default());
            client.link.deaf = true;
            for number in 0..30 {
                client.read(number << 20, 1 << 20);
            }
            client.link.push(PATIENCE);
            client.link.reset();
        }
        wait_until("all but one are gone", || server.connections() == 1);
        wait_until("nothing is in flight", || {
            server.counted("disk").gauges.bytes_in_flight == 0
        });
        assert_eq!(bystander.bytes(0, 4), [0; 4]);
    }

    /// Both the bytes and the number of waiting replies are bounded.
    fn a_client_that_stops_reading_is_not_read_from_either(engine) {
        let image = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let server = Setup::new(engine, image.path().to_str().unwrap()).start();
        let mut bystander = Client::new(&server);
        bystander.put(0, &pattern(8, 1 << 20));
        for (len, requests) in [(1 << 20, 2000_usize), (1, 150_000)] {
            let mut client = Client::simple(&server);
            client.link.deaf = true;
            for _ in 0..requests {
                client.read(0, len);
            }
            let left = client.link.push(PATIENCE);
            let taken = requests - left / 28;
            // 8192 replies may wait; the sockets hold some thousand headers and replies more.
            assert!(taken < 50_000, "it took {taken} requests of {len} bytes");
            let held = || server.counted("disk").gauges.bytes_in_flight;
            wait_until("much is held", || held() >= 32 << 20 || len == 1);
            assert!(held() <= 100 << 20, "{} bytes are held", held());
            assert_eq!(bystander.bytes(0, 8), pattern(8, 8), "others go on");
            // It was only slow: it gets all replies.
            client.link.deaf = false;
            for _ in 0..requests {
                let answer = client.answer().unwrap().expect("a reply");
                assert!(answer.error.is_none() && answer.data == pattern(8, len as usize));
            }
        }
        wait_until("nothing is in flight", || {
            server.counted("disk").gauges.bytes_in_flight == 0
        });
    }
}

fn link(server: &Running, tcp: bool) -> Link {
    if tcp { Link::tcp(server.address) } else { Link::unix(&server.socket) }
}
