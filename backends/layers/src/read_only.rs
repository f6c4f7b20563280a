//! Refuses every op that writes.

use std::sync::Arc;

use sheave_core::{
    Backend, ByteRange, Completion, Io, IoDone, Layer, Nanos, Op, OpKind, Payload, Result,
    Submitted, Tag, Volume, VolumeInfo,
};

/// A volume that cannot be written through this layer.
pub struct ReadOnly {
    inner: Arc<dyn Volume>,
    info: VolumeInfo,
}

impl ReadOnly {
    /// Wraps a volume.
    pub fn new(inner: Arc<dyn Volume>) -> Self {
        let mut info = inner.info().clone();
        info.read_only = true;
        info.can.fua = false;
        info.can.trim = false;
        info.can.write_zeroes = false;
        info.can.fast_zero = false;
        Self { inner, info }
    }
}

impl Layer for ReadOnly {
    fn inner(&self) -> &Arc<dyn Volume> {
        &self.inner
    }

    fn info(&self) -> &VolumeInfo {
        &self.info
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        let inner = self.inner.backend()?;
        Ok(Box::new(ReadOnlyBackend { inner, info: self.info.clone() }))
    }

    fn takes_registered(&self, kind: OpKind, range: ByteRange) -> bool {
        !kind.is_write() && self.inner.takes_registered(kind, range)
    }
}

struct ReadOnlyBackend {
    inner: Box<dyn Backend>,
    info: VolumeInfo,
}

impl Backend for ReadOnlyBackend {
    fn info(&self) -> &VolumeInfo {
        &self.info
    }

    fn write_buffer(&mut self, range: ByteRange, io: &mut dyn Io) -> Result<Payload> {
        // Never the inner volume's own memory, since the write is refused afterwards.
        io.buffer(range.len() as usize).map(Payload::from)
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if op.kind().is_write() {
            return Submitted::Done(Err(op.read_only_error()));
        }
        self.inner.submit(op, tag, io)
    }

    fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        self.inner.io_done(done, io);
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        self.inner.reap(io)
    }

    fn deadline(&self) -> Option<Nanos> {
        self.inner.deadline()
    }
}
