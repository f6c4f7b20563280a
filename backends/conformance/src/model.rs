//! A model of a volume, a vector, with which the answers of a real one are compared.

use sheave_core::{ByteRange, ErrorKind, Extent, Op, Outcome, Payload, Reply};

/// The length of reads of the whole volume at the end.
const SURVEY: u64 = 1 << 16;

pub(super) struct Model {
    bytes: Vec<u8>,
    /// Trimmed since it was written: reads as it was, or as zero.
    trimmed: Vec<bool>,
}

impl Model {
    /// A volume of this many zeroes.
    pub(super) fn new(size: u64) -> Self {
        let size = usize::try_from(size).expect("a volume that fits into memory");
        Self { bytes: vec![0; size], trimmed: vec![false; size] }
    }

    /// Ops that read the whole volume.
    pub(super) fn survey(&self) -> Vec<Op> {
        let size = self.bytes.len() as u64;
        let all = ByteRange::within(0, size, size).expect("all of it");
        let reads = all.pieces(SURVEY).map(|range| Op::Read { range, into: None });
        let status = [1, 1000].map(|extents_max| Op::BlockStatus { range: all, extents_max });
        reads.chain(status).collect()
    }

    /// Compares an outcome with the expected one, and applies the op to the model.
    pub(super) fn check(&mut self, op: &Op, outcome: Outcome) -> Result<(), String> {
        let reply = match (op, outcome) {
            (Op::WriteZeroes { fast: true, .. }, Err(error))
                if error.kind() == ErrorKind::Unsupported =>
            {
                return Ok(());
            }
            (_, Err(error)) => return Err(format!("failed: {error}")),
            (_, Ok(reply)) => reply,
        };
        match (op, reply) {
            (Op::Read { range, .. }, Reply::Data(data)) => self.check_read(*range, &data),
            (Op::BlockStatus { range, extents_max }, Reply::Extents(extents)) => {
                self.check_extents(*range, *extents_max, &extents)
            }
            (Op::Write { range, data, .. }, Reply::Done) => {
                self.set(*range, &data.to_vec());
                Ok(())
            }
            (Op::WriteZeroes { range, .. }, Reply::Done) => {
                self.set(*range, &vec![0; range.len() as usize]);
                Ok(())
            }
            (Op::Trim { range, .. }, Reply::Done) => {
                self.trimmed[indices(*range)].fill(true);
                Ok(())
            }
            (Op::Flush | Op::Cache { .. }, Reply::Done) => Ok(()),
            (_, reply) => Err(format!("answered with {reply:?}")),
        }
    }

    fn set(&mut self, range: ByteRange, bytes: &[u8]) {
        self.bytes[indices(range)].copy_from_slice(bytes);
        self.trimmed[indices(range)].fill(false);
    }

    fn check_read(&mut self, range: ByteRange, data: &Payload) -> Result<(), String> {
        if data.len() as u64 != range.len() {
            return Err(format!("{} bytes instead of {}", data.len(), range.len()));
        }
        for (at, got) in indices(range).zip(data.to_vec()) {
            let want = self.bytes[at];
            if got != want && !(self.trimmed[at] && got == 0) {
                return Err(format!("byte {at} is {got:#04x}, not {want:#04x}"));
            }
        }
        Ok(())
    }

    fn check_extents(
        &self,
        range: ByteRange,
        extents_max: usize,
        extents: &[Extent],
    ) -> Result<(), String> {
        if extents.is_empty() || extents.len() > extents_max {
            return Err(format!("{} extents, not 1 to {extents_max}", extents.len()));
        }
        let mut at = range.start();
        for extent in extents {
            if extent.len == 0 || at >= range.end() {
                return Err(format!("{extent:?} at {at} in {range:?}"));
            }
            let end = at.checked_add(extent.len).filter(|end| *end <= self.bytes.len() as u64);
            let end = end.ok_or_else(|| format!("{extent:?} at {at} leaves the volume"))?;
            // An op of the same batch may change bytes beyond the range.
            let (from, to) = (at as usize, end.min(range.end()) as usize);
            let is_zero = (from..to).all(|at| self.bytes[at] == 0 || self.trimmed[at]);
            if extent.zero && !is_zero {
                return Err(format!("{extent:?} at {at} is not zero"));
            }
            at = end;
        }
        Ok(())
    }
}

fn indices(range: ByteRange) -> std::ops::Range<usize> {
    range.start() as usize..range.end() as usize
}
