//! Stops in order, with clients and volumes in any state.

use std::time::Duration;

use sheave_core::OpKind;
use sheave_proto::ReplyStyle;
use sheave_shard::STOP_GRACE;

use crate::support::{Client, GIVEN_UP, Link, Running, Setup, both_engines, pattern, wait_until};

/// The number of answers until the connection ends.
fn answers(client: &mut Client) -> u64 {
    let mut count = 0;
    while let Ok(Some(answer)) = client.answer() {
        assert_eq!(answer.error, None);
        count += 1;
    }
    count
}

/// Writes without a pause until the connection ends; returns the number of answered writes.
fn write_for_ever(server: &Running, tcp: bool) -> u64 {
    let link = if tcp { Link::tcp(server.address) } else { Link::unix(&server.socket) };
    let mut client = Client::with(link, ReplyStyle::Structured);
    let mut answered = 0;
    let bytes = pattern(5, 4096);
    for number in 0.. {
        client.write(0, number % 200 * 4096, &bytes);
        if client.in_flight() < 64 {
            continue;
        }
        match client.answer() {
            Ok(Some(answer)) => assert_eq!(answer.error, None),
            Ok(None) => return answered,
            // No more requests are taken, but replies may still arrive.
            Err(_) => return answered + answers(&mut client),
        }
        answered += 1;
    }
    unreachable!("it never ends by itself")
}

both_engines! {
    /// The client gets a reply for everything that the volume has done.
    fn under_load_no_reply_is_lost(engine) {
        for volume in ["memory:?size=1M", "memory:?size=1M&fault=write:delay=2ms:probability=0.2"] {
            let mut server = Setup::new(engine, volume).start();
            let answered: u64 = std::thread::scope(|scope| {
                let server = &mut server;
                let registry = std::sync::Arc::clone(&server.registry);
                let threads: Vec<_> = (0..4)
                    .map(|number| {
                        let peek = server.peek();
                        scope.spawn(move || write_for_ever(&peek, number % 2 == 0))
                    })
                    .collect();
                wait_until("all are busy", || {
                    let counted = registry.snapshot().remove(0);
                    let writes = counted.op(OpKind::Write).map_or(0, |writes| writes.count());
                    // A client that still negotiates is disconnected without an answer.
                    counted.gauges.connections == 4 && writes > 1000
                });
                let took = server.stop();
                assert!(took < STOP_GRACE, "stopping took {took:?}");
                threads.into_iter().map(|thread| thread.join().unwrap()).sum()
            });
            let counted = server.counted("disk");
            let writes = counted.op(OpKind::Write).expect("writes").count();
            assert_eq!(writes, answered, "done and answered on {volume}");
            assert_eq!(counted.gauges.connections, 0);
        }
    }

    fn what_is_delayed_is_still_answered(engine) {
        let volume = "memory:?size=1M&fault=read:delay=700ms";
        let mut server = Setup::new(engine, volume).start();
        let mut clients: Vec<_> = (0..3).map(|_| Client::new(&server)).collect();
        for client in &mut clients {
            for number in 0..100 {
 client.read(number * 10, 10);
 }
            client.link.flush().unwrap();
        }
        wait_until("all is asked", || {
            server.counted("disk").gauges.bytes_in_flight == 3 * 100 * 10
        });
        let took = server.stop();
        assert!(took < STOP_GRACE, "stopping took {took:?}");
        for client in &mut clients {
            assert_eq!(answers(client), 100);
        }
    }

    fn what_takes_too_long_is_given_up(engine) {
        let volume = "memory:?size=1M&fault=read:delay=3600s";
        let mut server = Setup::new(engine, volume).start();
        let mut client = Client::new(&server);
        client.read(0, 10);
        client.link.flush().unwrap();
        wait_until("it is asked", || server.counted("disk").gauges.bytes_in_flight > 0);
        let took = server.stop();
        assert!(took < GIVEN_UP, "stopping took {took:?}");
    }

    fn a_client_that_never_reads_cannot_hold_it_up(engine) {
        let mut server = Setup::new(engine, "memory:?size=64M").start();
        let mut client = Client::simple(&server);
        client.link.deaf = true;
        for _ in 0..60 {
 client.read(0, 1 << 20);
 }
        client.link.push(Duration::from_millis(200));
        let took = server.stop();
        assert!(took < GIVEN_UP, "stopping took {took:?}");
        let gauges = server.counted("disk").gauges;
        assert_eq!((gauges.connections, gauges.bytes_in_flight), (0, 0));
    }

    fn idle_clients_and_half_written_requests_end_at_once(engine) {
        let mut server = Setup::new(engine, "memory:?size=64M").start();
        let mut clients: Vec<_> = (0..20).map(|_| Client::simple(&server)).collect();
        for (number, client) in clients.iter_mut().enumerate() {
            let write = client.header(sheave_proto::wire::command::WRITE, 0, 0, 300_000);
            let part = [&write[..], &[1; 200_000]].concat();
            let parts = [&write[..0], &write[..13], &write[..], &part];
            client.link.queue(parts[number % 4]);
            client.link.flush().unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
        let took = server.stop();
        assert!(took < STOP_GRACE, "stopping took {took:?}");
        for client in &mut clients {
            assert!(client.answer().unwrap_or(None).is_none());
        }
    }
}
