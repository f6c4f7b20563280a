//! A server that gets no more memory.

use std::thread;

use serde_json::Value;
use sheave_tests::{Serve, Server, Wire, both_engines, cmd, errno};

const MIB: usize = 1 << 20;
/// Address space of the server in KiB; more than it needs by a few hundred MiB.
const ADDRESS_SPACE: &str = "ulimit -v 900000 && exec \"$@\"";

both_engines! {
    fn a_full_memory_volume_harms_nothing_else(engine) {
        let mut server = Serve::new("memory:?size=8G").args("null:?size=1M").engine(engine)
            .through(&["bash", "-c", ADDRESS_SPACE, "-"]).unix();
        let mut other = connect(&server, "null");
        let mut clients: Vec<Wire> = (0..8).map(|_| connect(&server, "memory")).collect();
        let data = vec![7; 32 * MIB];
        let wrote: Vec<usize> = thread::scope(|scope| {
            let fill = |(lane, wire): (usize, &mut Wire)| fill(wire, (lane as u64) << 30, &data);
            let writers: Vec<_> = clients.iter_mut().enumerate()
                .map(|client| scope.spawn(move || fill(client))).collect();
            writers.into_iter().map(|writer| writer.join().expect("a writer")).collect()
        });
        assert!(wrote.iter().sum::<usize>() >= 128 * MIB, "{wrote:?}");
        assert_eq!(other.read(0, 512).expect("a reply"), Ok(vec![0; 512]), "the other export");
        for wire in &mut clients {
            assert_eq!(wire.read(0, 512).expect("a reply").map(|bytes| bytes.len()), Ok(512));
        }

        let full = held_bytes(&server);
        assert!(full >= 128 << 20, "{full} bytes are held");

        for lane in 0..8 {
            clients[0].request(cmd::TRIM, 9, lane << 30, 1 << 30).expect("a request");
            assert_eq!(clients[0].simple_reply(9).expect("a reply"), 0);
        }
        let trimmed = held_bytes(&server);
        // The index stays.
        assert!(trimmed < 16 << 20, "{trimmed} bytes are held after a trim");
        for wire in &mut clients {
            assert_eq!(wire.write(5 * MIB as u64, &data[..MIB]).expect("a reply"), 0, "room again");
        }
        let mut late = connect(&server, "memory");
        let read = late.read(5 * MIB as u64, MIB as u32).expect("a reply").expect("data");
        assert!(read == data[..MIB], "what was written");
        assert!(server.interrupt().success(), "{}", server.log());
    }
}

/// Writes until there is no room; how many bytes were written.
fn fill(wire: &mut Wire, from: u64, data: &[u8]) -> usize {
    for count in 0..32 {
        let at = from + (count * data.len()) as u64;
        match wire.write(at, data).expect("a reply") {
            0 => {}
            error => {
                assert!(error == errno::ENOSPC || error == errno::ENOMEM, "{error}");
                return count * data.len();
            }
        }
    }
    panic!("a gigabyte was written by each of eight, beyond the limit");
}

/// What `stats` says that the volume holds.
fn held_bytes(server: &Server) -> u64 {
    let stats: Value =
        serde_json::from_str(&server.sheave("stats memory --json").ok()).expect("JSON");
    stats[0]["volumes"][0]["held_bytes"].as_u64().expect("a number")
}

fn connect(server: &Server, export: &str) -> Wire {
    let mut wire = Wire::connect(server).expect("a connection");
    wire.handshake().expect("a greeting");
    wire.go(export).expect("an export");
    wire
}
