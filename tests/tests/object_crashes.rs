//! Object volumes whose process is killed at any moment: what was acknowledged is there afterwards.

use std::collections::BTreeMap;

use rustix::process::Signal;
use sheave_tests::{Run, Scratch, Serve, Wire, both_engines, cmd, request_header, sheave};

const BLOCK: usize = 4096;
/// Blocks of the volume.
const BLOCKS: u64 = 16 << 10;
/// Writes that are under way at the same time.
const DEPTH: usize = 8;

/// What each block has, by the numbers of the writes: each write fills its blocks with its number.
#[derive(Default)]
struct Model {
    acknowledged: BTreeMap<u64, u64>,
    /// Writes without an answer, with their first block and count, in the order of their sending.
    sent: Vec<(u64, u64, u64)>,
    next: u64,
}

impl Model {
    /// A new write.
    fn begin(&mut self, block: u64, count: u64) -> (u64, Vec<u8>) {
        self.next += 1;
        self.sent.push((self.next, block, count));
        (self.next, self.next.to_le_bytes().repeat(BLOCK / 8 * count as usize))
    }

    fn acknowledge(&mut self, number: u64) {
        let at = self.sent.iter().position(|(sent, ..)| *sent == number).expect("a write");
        let (_, block, count) = self.sent.remove(at);
        self.acknowledged.extend((block..block + count).map(|block| (block, number)));
    }

    /// Compares the volume, whose writes without an answer may have been done.
    fn check(&mut self, wire: &mut Wire) {
        const STEP: u64 = 64;
        for first in (0..BLOCKS).step_by(STEP as usize) {
            let read = wire.read(first * BLOCK as u64, (STEP as usize * BLOCK) as u32);
            let bytes = read.expect("a reply").expect("its data");
            for (block, bytes) in (first..).zip(bytes.chunks(BLOCK)) {
                let (number, rest) = bytes.split_first_chunk().expect("a number");
                let found = u64::from_le_bytes(*number);
                assert!(rest.chunks(8).all(|next| next == number), "block {block} is mixed");
                let known = self.acknowledged.get(&block).copied().unwrap_or_default();
                let mut sent = self.sent.iter().filter(|(number, ..)| *number == found);
                let is_sent = sent.any(|(_, at, count)| (*at..at + count).contains(&block));
                assert!(found == known || is_sent, "block {block}: {found}, not {known}");
                if found > 0 {
                    self.acknowledged.insert(block, found);
                }
            }
        }
        self.sent.clear();
    }
}

/// Writes some blocks at many places, and long runs.
fn write_some(wire: &mut Wire, model: &mut Model, random: &mut u64, batches: usize) {
    for batch in 0..batches {
        send_batch(wire, model, random, if batch % 5 == 4 { 200 } else { 1 });
        for _ in 0..DEPTH {
            take_reply(wire, model).expect("a reply");
        }
        if batch % 7 == 3 {
            wire.request(cmd::FLUSH, 0, 0, 0).expect("send");
            assert_eq!(wire.simple_reply(0).expect("a reply"), 0, "flush");
        }
    }
}

/// Sends writes that do not overlap.
fn send_batch(wire: &mut Wire, model: &mut Model, random: &mut u64, count_max: u64) {
    let part = BLOCKS / DEPTH as u64;
    for index in 0..DEPTH as u64 {
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        let count = 1 + *random % count_max;
        let block = index * part + (*random >> 20) % (part - count);
        let (number, bytes) = model.begin(block, count);
        let at = block * BLOCK as u64;
        wire.send(&request_header(0, cmd::WRITE, number, at, bytes.len() as u32)).expect("send");
        wire.send(&bytes).expect("send");
    }
}

fn take_reply(wire: &mut Wire, model: &mut Model) -> std::io::Result<()> {
    let (error, number) = wire.any_simple_reply()?;
    assert_eq!(error, 0, "write {number}");
    model.acknowledge(number);
    Ok(())
}

fn kill_and_check(engine: &str) {
    let scratch = Scratch::on_disk();
    let place = format!("dir://{}", scratch.file("volume"));
    let size = (BLOCKS * BLOCK as u64).to_string();
    Run::new(sheave()).args("volume create").arg(&place).args("--size").arg(size).ok();
    let volume = |cache: &str| format!("{place}?cache-dir={}", scratch.file(cache));
    let serve = |cache: &str| Serve::new(volume(cache)).engine(engine).unix();
    let (mut model, mut random) = (Model::default(), 0x1234_5678_9abc_def1);
    for round in 0..6 {
        let mut server = serve("cache");
        let mut wire = Wire::ready(&server).expect("a client");
        model.check(&mut wire);
        write_some(&mut wire, &mut model, &mut random, 3 + round * 8);
        // Some of the last writes are answered, some are on their way.
        send_batch(&mut wire, &mut model, &mut random, 60);
        for _ in 0..round {
            take_reply(&mut wire, &mut model).expect("a reply");
        }
        server.kill();
        while take_reply(&mut wire, &mut model).is_ok() {}
    }
    let mut server = serve("cache");
    let mut wire = Wire::ready(&server).expect("a client");
    model.check(&mut wire);
    write_some(&mut wire, &mut model, &mut random, 5);
    drop(wire);
    assert!(server.end(Signal::TERM).success());
    // An orderly end leaves everything in the store: another node finds it there.
    let server = serve("elsewhere");
    let mut wire = Wire::ready(&server).expect("a client");
    model.check(&mut wire);
    assert!(model.acknowledged.len() > 1000, "{}", model.acknowledged.len());
}

both_engines! {
    fn a_killed_process_loses_nothing_acknowledged(engine) {
        kill_and_check(engine);
    }
}
