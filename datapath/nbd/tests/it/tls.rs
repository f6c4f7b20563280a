//! Encrypted connections.

use std::io;
use std::sync::LazyLock;
use std::time::Duration;

use rustls::SupportedProtocolVersion;
use rustls::version::{TLS12, TLS13};
use sheave_proto::wire::command;
use sheave_proto::{ClientConfig, ReplyStyle};
use sheave_shard::EngineChoice;

use crate::support::{
    Certificates, Client, Link, Random, Running, Setup, both_engines, pattern, wait_until,
};

static CERTIFICATES: LazyLock<Certificates> = LazyLock::new(Certificates::new);
static STRANGERS: LazyLock<Certificates> = LazyLock::new(Certificates::new);

fn server(engine: EngineChoice, volume: &str) -> Running {
    Setup { tls: Some(CERTIFICATES.server()), ..Setup::new(engine, volume) }.start()
}

fn connect(
    server: &Running,
    own: Option<&Certificates>,
    version: &'static SupportedProtocolVersion,
) -> io::Result<Client> {
    let config =
        ClientConfig { tls: true, style: ReplyStyle::Structured, ..ClientConfig::default() };
    let link = Link::unix(&server.socket);
    Client::negotiate(link, config, Some(CERTIFICATES.client(own, version)))
}

fn client(server: &Running) -> Client {
    connect(server, Some(&CERTIFICATES), &TLS13).unwrap()
}

both_engines! {
    fn reads_and_writes_of_all_lengths(engine) {
        let image = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        image.as_file().set_len(40 << 20).unwrap();
        for version in [&TLS12, &TLS13] {
            for volume in ["memory:?size=40M", image.path().to_str().unwrap()] {
                let server = server(engine, volume);
                let mut client = connect(&server, Some(&CERTIFICATES), version).unwrap();
                for len in [1, 512, 16_383, 16_384, 16_385, 70_000, 1 << 20, 32 << 20] {
                    let bytes = pattern(len as u64, len);
                    client.put(777, &bytes);
                    assert!(client.bytes(777, len as u64) == bytes, "{len} bytes");
                }
                client.ask(command::DISC, 0, 0, 0);
                assert!(client.answer().unwrap().is_none());
                assert!(client.link.is_closed_by_tls(), "the server says good-bye");
            }
        }
    }

    fn thousands_of_requests_in_flight(engine) {
        let server = server(engine, "memory:?size=1M&fault=read:delay=1ms:probability=0.1");
        let mut client = client(&server);
        let bytes = pattern(6, 1 << 20);
        for (number, part) in bytes.chunks(4096).enumerate() {
            client.write(0, number as u64 * 4096, part);
        }
        while client.in_flight() > 0 {
            assert_eq!(client.answer().unwrap().expect("a reply").error, None);
        }
        let mut random = Random(99);
        for _ in 0..20_000 {
            client.read(random.below((1 << 20) - 3000), 1 + random.below(3000));
            while client.in_flight() > 3000 {
                check_read(&mut client, &bytes);
            }
        }
        while client.in_flight() > 0 {
            check_read(&mut client, &bytes);
        }
    }

    fn only_known_clients_are_let_in_and_none_in_plain_text(engine) {
        let server = server(engine, "memory:?size=1M");
        for version in [&TLS12, &TLS13] {
            assert!(connect(&server, None, version).is_err(), "without a certificate");
            assert!(connect(&server, Some(&STRANGERS), version).is_err(), "of another authority");
        }
        let config = ClientConfig::default();
        let plain = Client::negotiate(Link::unix(&server.socket), config, None);
        let error = plain.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("TLS"), "{error}");
        assert_eq!(client(&server).bytes(0, 3), [0; 3]);
    }

    /// A client may wait for the server to close the connection after both have sent close_notify.
    fn a_good_bye_in_tls_ends_the_connection(engine) {
        let server = server(engine, "memory:?size=1M&fault=read:delay=100ms");
        for version in [&TLS12, &TLS13] {
            let mut client = connect(&server, Some(&CERTIFICATES), version).unwrap();
            client.read(0, 1000);
            client.link.flush().unwrap();
            client.link.close_tls();
            assert_eq!(client.answer().unwrap().expect("the reply before").data, [0; 1000]);
            assert!(client.answer().unwrap().is_none());
            assert!(client.link.is_closed_by_tls());
        }
        wait_until("both are gone", || server.connections() == 0);
    }

    /// More bytes than are taken at once, with close_notify right behind them.
    fn a_good_bye_comes_after_all_requests(engine) {
        const REQUESTS: u64 = 3000;
        let server = server(engine, "memory:?size=1M&fault=any:delay=30ms:probability=0.5");
        let mut client = client(&server);
        for number in 0..REQUESTS {
            client.read(number * 16, 16);
        }
        client.link.close_tls();
        for _ in 0..REQUESTS {
            assert_eq!(client.answer().unwrap().expect("a reply").error, None);
        }
        assert!(client.answer().unwrap().is_none());
    }

    fn the_end_without_a_good_bye(engine) {
        let server = server(engine, "memory:?size=1M");
        for sent in [0, 10, 28, 5000] {
            let mut client = client(&server);
            let mut write = client.header(command::WRITE, 0, 0, 100_000);
            write.resize(write.len() + 100_000, 1);
            client.link.queue(&write[..sent]);
            client.link.flush().unwrap();
            client.link.finish();
            assert!(client.answer().unwrap().is_none());
        }
        wait_until("all are gone", || server.connections() == 0);
        let mut broken = client(&server);
        broken.link.break_tls();
        assert!(broken.answer().unwrap_or(None).is_none());
        wait_until("it is gone too", || server.connections() == 0);
    }

    fn a_client_that_stops_reading_is_not_read_from_either(engine) {
        let image = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let server = server(engine, image.path().to_str().unwrap());
        let mut bystander = client(&server);
        let mut client = client(&server);
        client.link.deaf = true;
        for _ in 0..2000 {
            client.read(0, 1 << 20);
        }
        client.link.push(Duration::from_millis(300));
        let held = || server.counted("disk").gauges.bytes_in_flight;
        wait_until("much is held", || held() >= 32 << 20);
        assert!(held() <= 100 << 20, "{} bytes are held", held());
        assert_eq!(bystander.bytes(0, 8), [0; 8], "others go on");
        client.link.deaf = false;
        for _ in 0..2000 {
            assert_eq!(client.answer().unwrap().expect("a reply").error, None);
        }
        wait_until("nothing is in flight", || {
            server.counted("disk").gauges.bytes_in_flight == 0
        });
    }

    fn stopping_says_good_bye(engine) {
        let mut server = server(engine, "memory:?size=1M&fault=read:delay=200ms");
        let (mut busy, mut idle) = (client(&server), client(&server));
        for number in 0..50 {
            busy.read(number, 8);
        }
        busy.link.flush().unwrap();
        wait_until("it is asked", || server.counted("disk").gauges.bytes_in_flight > 0);
        let took = server.stop();
        assert!(took < sheave_shard::STOP_GRACE, "stopping took {took:?}");
        for _ in 0..50 {
            assert_eq!(busy.answer().unwrap().expect("a reply").error, None);
        }
        for client in [&mut busy, &mut idle] {
            assert!(client.answer().unwrap().is_none());
            assert!(client.link.is_closed_by_tls());
        }
    }
}

fn check_read(client: &mut Client, bytes: &[u8]) {
    let answer = client.answer().unwrap().expect("a reply");
    let start = answer.request.offset as usize;
    assert!(answer.error.is_none() && answer.data == bytes[start..start + answer.data.len()]);
}
