//! Random ops, in a form that can be shrunk and shown.

use proptest::prelude::*;
use sheave_core::{Buf, ByteRange, Op, PAGE_SIZE, Payload, Segment};

use super::{Driver, Engine};

/// The most batches in a run, and ops in a batch.
const BATCHES_MAX: usize = 24;
const ACTIONS_MAX: usize = 5;
/// Longest op.
const LEN_MAX: u64 = 200_000;
/// Bugs are likeliest at multiples of these, plus or minus a byte.
const EDGES: [u64; 3] = [512, 4096, 64 << 10];

/// Ops that are in flight together. They do not overlap, so that their outcomes are certain.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    /// Which of the two backends runs it.
    pub(super) second: bool,
    actions: Vec<Action>,
}

#[derive(Clone, Debug)]
struct Action {
    range: ByteRange,
    what: What,
    fua: bool,
}

#[derive(Clone, Debug)]
enum What {
    Read,
    Write { seed: u8, memory: Memory },
    Flush,
    Trim,
    WriteZeroes { no_hole: bool, fast: bool },
    Cache,
    BlockStatus { extents_max: usize },
}

/// The memory of a write's data.
#[derive(Clone, Debug)]
enum Memory {
    /// Memory of the backend.
    WriteBuffer,
    /// Memory at an odd address.
    Odd,
    /// Several pieces.
    Pieces,
    /// Partly zero segments.
    ZeroSegments,
}

/// Runs on a volume of `size` bytes whose ops are aligned to `block`.
pub(super) fn batches(size: u64, block: u64) -> impl Strategy<Value = Vec<Batch>> {
    let actions = prop::collection::vec(action(size, block), 1..=ACTIONS_MAX);
    let batch = (any::<bool>(), actions).prop_map(|(second, actions)| Batch { second, actions });
    prop::collection::vec(batch, 1..=BATCHES_MAX)
}

fn action(size: u64, block: u64) -> impl Strategy<Value = Action> {
    (range(size, block), what(), any::<bool>()).prop_map(|(range, what, fua)| Action {
        range,
        what,
        fua,
    })
}

fn range(size: u64, block: u64) -> impl Strategy<Value = ByteRange> {
    let near_edge = (any::<prop::sample::Index>(), 0..EDGES.len(), 0..3_u64);
    let start = prop_oneof![
        0..size,
        near_edge.prop_map(move |(index, edge, shift)| {
            let edges = size.div_ceil(EDGES[edge]);
            let at = index.index(edges as usize) as u64 * EDGES[edge];
            (at + shift).saturating_sub(1).min(size - 1)
        }),
        Just(size - 1),
    ];
    let len = prop_oneof![1..16_u64, 500..530_u64, 1..3_u64.pow(9), 1..=LEN_MAX];
    (start, len).prop_map(move |(start, len)| {
        let end = (start + len).min(size);
        let range = ByteRange::within(start, end - start, size).expect("cut at the end");
        range.widened(block, size)
    })
}

fn what() -> impl Strategy<Value = What> {
    let memory = prop_oneof![
        4 => Just(Memory::WriteBuffer),
        1 => Just(Memory::Odd),
        1 => Just(Memory::Pieces),
        1 => Just(Memory::ZeroSegments),
    ];
    prop_oneof![
        4 => Just(What::Read),
        6 => (any::<u8>(), memory).prop_map(|(seed, memory)| What::Write { seed, memory }),
        1 => Just(What::Flush),
        2 => Just(What::Trim),
        3 => any::<(bool, bool)>().prop_map(|(no_hole, fast)| What::WriteZeroes { no_hole, fast }),
        1 => Just(What::Cache),
        2 => (1..20_usize).prop_map(|extents_max| What::BlockStatus { extents_max }),
    ]
}

impl Batch {
    /// The ops, without those that overlap one before them.
    pub(super) fn ops<E: Engine>(&self, driver: &mut Driver<E>) -> Vec<Op> {
        let mut taken: Vec<ByteRange> = Vec::new();
        let mut ops = Vec::new();
        for action in &self.actions {
            if !taken.iter().any(|other| other.overlaps(action.range)) {
                taken.push(action.range);
                ops.push(action.op(driver));
            }
        }
        ops
    }
}

impl Action {
    fn op<E: Engine>(&self, driver: &mut Driver<E>) -> Op {
        let (range, fua) = (self.range, self.fua);
        match self.what {
            What::Read => Op::Read { range, into: None },
            What::Write { seed, ref memory } => {
                let bytes = pattern(seed, range);
                Op::Write { range, data: memory.payload(range, &bytes, driver), fua }
            }
            What::Flush => Op::Flush,
            What::Trim => Op::Trim { range, fua },
            What::WriteZeroes { no_hole, fast } => Op::WriteZeroes { range, fua, no_hole, fast },
            What::Cache => Op::Cache { range },
            What::BlockStatus { extents_max } => Op::BlockStatus { range, extents_max },
        }
    }
}

impl Memory {
    fn payload<E: Engine>(
        &self,
        range: ByteRange,
        bytes: &[u8],
        driver: &mut Driver<E>,
    ) -> Payload {
        let mut out = Payload::new();
        let (head, tail) = bytes.split_at(bytes.len() / 3);
        match self {
            Self::WriteBuffer => {
                let buffer = driver.write_buffer(range);
                assert_eq!(buffer.len(), bytes.len(), "a write buffer is as long as its range");
                buffer.copy_in(0, bytes);
                return buffer;
            }
            Self::Odd => {
                let buf = Buf::zeroed(bytes.len() + 3);
                buf.copy_in(3, bytes);
                out.push(Segment::Data(buf.slice(3, bytes.len())));
            }
            Self::Pieces => {
                out.push(Segment::Data(Buf::from_bytes(head)));
                out.push(Segment::Data(Buf::from_bytes(tail)));
            }
            Self::ZeroSegments => {
                out.push(Segment::Zero(head.len()));
                out.push(Segment::Data(Buf::from_bytes(tail)));
                if tail.len() > PAGE_SIZE {
                    // Zeroes at both ends, and as many bytes in all.
                    let last = tail.len() - PAGE_SIZE;
                    let keep = out.slice(0, head.len() + last);
                    out = keep;
                    out.push(Segment::Zero(PAGE_SIZE));
                }
            }
        }
        out
    }
}

/// Bytes that differ by position; sometimes zeroes, which are a special case.
fn pattern(seed: u8, range: ByteRange) -> Vec<u8> {
    if seed.is_multiple_of(8) {
        return vec![0; range.len() as usize];
    }
    let byte = |at: u64| (at.wrapping_mul(31) ^ (at >> 9)) as u8 ^ seed;
    (range.start()..range.end()).map(byte).collect()
}
