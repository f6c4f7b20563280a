//! The counters agree with the requests of the client.

use sheave_core::OpKind;
use sheave_proto::wire::command;
use sheave_telemetry::Stage;

use crate::support::{Client, Setup, both_engines, wait_until};

both_engines! {
    fn counts_bytes_and_errors(engine) {
        let image = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let file = format!("{}?fault=read:error=EIO:count=3", image.path().display());
        for volume in ["memory:?size=1M&fault=read:error=EIO:count=3", &file] {
            let server = Setup::new(engine, volume).start();
            let mut clients = [Client::new(&server), Client::simple(&server)];
            wait_until("both are served", || server.connections() == 2);
            for client in &mut clients {
                for number in 0..300 {
 client.read(number * 10, 1000);
 }
                for number in 0..200 {
 client.write(0, number * 100, &[1; 100]);
 }
                for _ in 0..7 {
 client.flush();
 }
                for _ in 0..5 {
 client.ask(command::TRIM, 0, 0, 65_536);
 }
                for _ in 0..4 {
 client.ask(command::WRITE_ZEROES, 0, 0, 131_072);
 }
                for _ in 0..3 {
 client.ask(command::CACHE, 0, 0, 4096);
 }
                while client.in_flight() > 0 {
                    client.answer().unwrap().expect("a reply");
                }
            }
            clients[0].ask(command::BLOCK_STATUS, 0, 0, 4096);
            clients[0].only_answer();
            // Refused before any volume sees it.
            clients[0].read(1 << 20, 1);
            assert!(clients[0].only_answer().error.is_some());

            let counted = server.counted("disk");
            for (kind, count, bytes, errors) in [
                (OpKind::Read, 600, 597_000, 3),
                (OpKind::Write, 400, 40_000, 0),
                (OpKind::Flush, 14, 0, 0),
                (OpKind::Trim, 10, 10 * 65_536, 0),
                (OpKind::WriteZeroes, 8, 8 * 131_072, 0),
                (OpKind::Cache, 6, 0, 0),
                (OpKind::BlockStatus, 1, 0, 0),
            ] {
                let op = counted.op(kind).unwrap_or_else(|| panic!("no {}", kind.name()));
                assert_eq!((op.count(), op.bytes, op.errors), (count, bytes, errors), "{op:?}");
                for (stage, histogram) in op.stages() {
                    assert_eq!(histogram.len(), count, "{} of {op:?}", stage.name());
                }
                let backend = op.stage(Stage::Backend).expect("the stage");
                let total = op.stage(Stage::Total).expect("the stage");
                assert!(backend.max() <= total.max(), "a part is shorter than the whole");
            }
            drop(clients);
            wait_until("both are gone", || server.connections() == 0);
            let gauges = server.counted("disk").gauges;
            assert_eq!((gauges.connections, gauges.bytes_in_flight), (0, 0));
        }
    }

    fn time_spent_waiting_is_part_of_the_total(engine) {
        let volume = "memory:?size=1M&fault=read:delay=50ms";
        let server = Setup::new(engine, volume).start();
        let mut client = Client::new(&server);
        for _ in 0..10 {
 client.bytes(0, 8);
 }
        let counted = server.counted("disk");
        let total = counted.op(OpKind::Read).and_then(|op| op.stage(Stage::Total)).expect("reads");
        assert!(total.min() >= 50_000_000, "{} ns", total.min());
    }

    fn bytes_in_flight_are_shown_while_they_are(engine) {
        let volume = "memory:?size=64M&fault=read:delay=400ms:range=0-8M";
        let server = Setup::new(engine, volume).start();
        let mut client = Client::new(&server);
        for number in 0..8 {
 client.read(number << 20, 1 << 20);
 }
        client.link.flush().unwrap();
        wait_until("eight megabytes are in flight", || {
            server.counted("disk").gauges.bytes_in_flight == 8 << 20
        });
        for _ in 0..8 {
 client.answer().unwrap().expect("a reply");
 }
        wait_until("none is", || server.counted("disk").gauges.bytes_in_flight == 0);
        // Nor after a client that left in the middle.
        for number in 0..8 {
 client.read(number << 20, 1 << 20);
 }
        client.link.flush().unwrap();
        drop(client);
        wait_until("it is gone", || server.connections() == 0);
        assert_eq!(server.counted("disk").gauges.bytes_in_flight, 0);
    }
}
