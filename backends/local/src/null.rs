//! A volume that reads as zeroes and discards writes.

use std::sync::Arc;

use sheave_core::{
    Backend, BlockSizes, Capabilities, Completion, Io, IoDone, Op, Payload, Reply, Result, Segment,
    Submitted, Tag, Volume, VolumeInfo,
};

use sheave_core::extents::{ExtentList, empty_range_outcome, hole};

use crate::memory::fixed_size;

/// Reads zeroes, discards writes; for measuring everything but storage.
#[derive(Debug)]
pub struct Null {
    size: u64,
    info: Arc<VolumeInfo>,
}

impl Null {
    /// A null volume of `size` bytes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let can = Capabilities::ALL;
        let block = BlockSizes::default();
        let info = VolumeInfo {
            block,
            read_only: false,
            rotational: false,
            volatile: false,
            identity: None,
            can,
        };
        Self { size, info: Arc::new(info) }
    }
}

impl Volume for Null {
    fn info(&self) -> &VolumeInfo {
        &self.info
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn grow(&self) -> Result<u64> {
        Ok(self.size)
    }

    fn extend(&self, _: u64) -> Result<()> {
        Err(fixed_size())
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        &[]
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        Ok(Box::new(NullBackend { info: Arc::clone(&self.info) }))
    }
}

struct NullBackend {
    info: Arc<VolumeInfo>,
}

impl Backend for NullBackend {
    fn info(&self) -> &VolumeInfo {
        &self.info
    }

    fn submit(&mut self, op: Op, _: Tag, io: &mut dyn Io) -> Submitted {
        if let Some(outcome) = empty_range_outcome(&op) {
            return Submitted::Done(outcome);
        }
        Submitted::Done(match op {
            Op::Read { range, .. } => {
                let mut zeroes = Payload::new();
                // A front never asks for more than the maximum payload, a 32-bit number.
                zeroes.push(Segment::Zero(range.len() as usize));
                Ok(Reply::Data(zeroes))
            }
            Op::BlockStatus { range, extents_max } => {
                let mut list = ExtentList::new(extents_max);
                list.push(hole(range.len()));
                list.into_reply()
            }
            Op::Write { data, .. } => {
                io.recycle(data);
                Ok(Reply::Done)
            }
            _ => Ok(Reply::Done),
        })
    }

    fn io_done(&mut self, _: IoDone, _: &mut dyn Io) {
        // Nothing is ever started.
    }

    fn reap(&mut self, _: &mut dyn Io) -> Option<Completion> {
        None
    }
}
