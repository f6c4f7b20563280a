//! The copy from one volume to another: stretches in parallel, holes kept.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::bail;
use indicatif::ProgressBar;
use sheave_core::{Buf, ByteRange, ErrorKind, Extent, Op, Payload, Reply, Segment, Volume};
use sheave_shard::{Blocking, Buffers};

/// Workers take the volume in stretches of this many bytes.
const STRETCH: u64 = 64 << 20;
/// The length of one read or write in bytes; less if a volume's maximum payload is less.
pub(super) const PIECE: u64 = 1 << 20;
/// Memory that is used again, in bytes: what a remote volume keeps of its writes by default until
/// a flush covers them.
const BUFFERS_BYTES: usize = 64 << 20;
/// Zeroes inside data are detected in units of this many bytes.
pub(super) const ZERO_UNIT: usize = 64 << 10;

/// Copies all of a volume. `blank` says that the target reads as zeroes everywhere.
pub(super) fn copy(
    from: Arc<dyn Volume>,
    to: Arc<dyn Volume>,
    blank: bool,
    workers: u8,
    progress: &ProgressBar,
) -> anyhow::Result<()> {
    let shared = from.info().read_only || from.info().can.multi_conn;
    let workers = if shared && to.info().can.multi_conn { workers } else { 1 };
    let job = Job {
        size: from.size(),
        piece: piece(&*from).min(piece(&*to)),
        from,
        to,
        blank,
        next: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        error: Mutex::new(None),
        progress,
        buffers: buffers(),
    };
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| job.work());
        }
    });
    let error = job.error.into_inner().unwrap_or_else(PoisonError::into_inner);
    error.map_or(Ok(()), Err)
}

/// Memory of a copy, used again and again.
pub(super) fn buffers() -> Buffers {
    Buffers::new(BUFFERS_BYTES)
}

/// The length of one read or write, a power of two, so that pieces are aligned to every block size.
fn piece(volume: &dyn Volume) -> u64 {
    PIECE.min(1 << volume.info().block.maximum_payload.ilog2())
}

struct Job<'a> {
    from: Arc<dyn Volume>,
    to: Arc<dyn Volume>,
    size: u64,
    piece: u64,
    /// The target reads as zeroes everywhere.
    blank: bool,
    next: AtomicU64,
    failed: AtomicBool,
    error: Mutex<Option<anyhow::Error>>,
    progress: &'a ProgressBar,
    buffers: Buffers,
}

impl Job<'_> {
    /// Copies stretches until none are left, or one has failed in any worker.
    fn work(&self) {
        if let Err(error) = self.copy_all() {
            self.failed.store(true, Relaxed);
            let mut first = self.error.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(error);
        }
    }

    fn copy_all(&self) -> anyhow::Result<()> {
        let mut worker = Worker {
            from: Blocking::sharing(&*self.from, &self.buffers)?,
            to: Writer::open(Arc::clone(&self.to), self.blank, self.piece, &self.buffers)?,
            job: self,
        };
        while !self.failed.load(Relaxed) {
            let start = self.next.fetch_add(STRETCH, Relaxed);
            if start >= self.size {
                break;
            }
            worker.stretch(start, (start + STRETCH).min(self.size))?;
        }
        // Each worker flushes: a flush need not cover writes of another connection.
        worker.to.flush()
    }
}

struct Worker<'a> {
    from: Blocking,
    to: Writer,
    job: &'a Job<'a>,
}

impl Worker<'_> {
    fn stretch(&mut self, mut at: u64, end: u64) -> anyhow::Result<()> {
        while at < end && !self.job.failed.load(Relaxed) {
            for extent in self.extents(at, end)? {
                let len = extent.len.min(end - at);
                let range = self.range(at, len);
                match extent.zero {
                    true => self.to.zero(range)?,
                    false => self.data(range)?,
                }
                at += len;
                self.job.progress.inc(len);
            }
        }
        Ok(())
    }

    /// The extents from `at` on, up to `end` at most.
    fn extents(&mut self, at: u64, end: u64) -> anyhow::Result<Vec<Extent>> {
        let all_data = vec![Extent { len: end - at, hole: false, zero: false }];
        if !self.job.from.info().can.block_status {
            return Ok(all_data);
        }
        let op = Op::BlockStatus { range: self.range(at, end - at), extents_max: 1024 };
        match self.from.run(op)? {
            Reply::Extents(extents) if !extents.is_empty() => {
                let mut at = at;
                Ok(extents
                    .into_iter()
                    .take_while(|extent| {
                        let inside = at < end;
                        at = at.saturating_add(extent.len);
                        inside
                    })
                    .collect())
            }
            _ => Ok(all_data),
        }
    }

    fn data(&mut self, range: ByteRange) -> anyhow::Result<()> {
        for range in range.pieces(self.job.piece) {
            let Reply::Data(payload) = self.from.run(Op::Read { range, into: None })? else {
                bail!("the source did not answer a read with data");
            };
            self.to.write(range, &payload)?;
            self.from.recycle(payload);
        }
        Ok(())
    }

    fn range(&self, start: u64, len: u64) -> ByteRange {
        ByteRange::within(start, len, self.job.size).expect("copied ranges lie inside the source")
    }
}

/// One connection to a target.
pub(super) struct Writer {
    volume: Arc<dyn Volume>,
    io: Blocking,
    /// It reads as zeroes everywhere.
    blank: bool,
    can_zero: bool,
    piece: u64,
}

impl Writer {
    pub(super) fn open(
        volume: Arc<dyn Volume>,
        blank: bool,
        piece: u64,
        buffers: &Buffers,
    ) -> anyhow::Result<Self> {
        let io = Blocking::sharing(&*volume, buffers)?;
        let can_zero = volume.info().can.write_zeroes;
        Ok(Self { volume, io, blank, can_zero, piece })
    }

    /// Writes these bytes; as [`Writer::write`].
    pub(super) fn write_bytes(&mut self, range: ByteRange, bytes: &[u8]) -> anyhow::Result<()> {
        let buf = self.io.buffer(bytes.len())?;
        buf.copy_in(0, bytes);
        let payload = buf.into();
        self.write(range, &payload)?;
        self.io.recycle(payload);
        Ok(())
    }

    /// Writes non-zero data, and zeroes the rest.
    pub(super) fn write(&mut self, range: ByteRange, payload: &Payload) -> anyhow::Result<()> {
        let mut at = 0;
        for (len, zero) in zero_runs(payload) {
            let run = range.part(at as u64, len as u64);
            if zero {
                self.zero(run)?;
            } else {
                for range in run.pieces(self.piece) {
                    let skip = at + (range.start() - run.start()) as usize;
                    let data = payload.slice(skip, range.len() as usize);
                    self.io.run(Op::Write { range, data, fua: false })?;
                }
            }
            at += len;
        }
        Ok(())
    }

    pub(super) fn zero(&mut self, range: ByteRange) -> anyhow::Result<()> {
        if self.blank || range.is_empty() {
            return Ok(());
        }
        if self.can_zero {
            let op = Op::WriteZeroes { range, fua: false, no_hole: false, fast: false };
            match self.io.run(op) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Unsupported => self.can_zero = false,
                Err(error) => return Err(error.into()),
            }
        }
        for range in range.pieces(self.piece) {
            let data = Buf::try_zeroed(range.len() as usize)?.into();
            self.io.run(Op::Write { range, data, fua: false })?;
        }
        Ok(())
    }

    /// Makes the writes of this connection durable, if the target can.
    pub(super) fn flush(&mut self) -> anyhow::Result<()> {
        if self.volume.info().can.flush {
            self.io.run(Op::Flush)?;
        }
        Ok(())
    }
}

/// Lengths of the runs that are zero or not, in units of [`ZERO_UNIT`].
pub(super) fn zero_runs(payload: &Payload) -> Vec<(usize, bool)> {
    let mut runs: Vec<(usize, bool)> = Vec::new();
    let total = payload.len();
    for at in (0..total).step_by(ZERO_UNIT) {
        let len = ZERO_UNIT.min(total - at);
        let unit = payload.slice(at, len);
        let zero = unit.segments().iter().all(|segment| match segment {
            Segment::Zero(_) => true,
            Segment::Data(buf) => buf.is_zero(),
        });
        match runs.last_mut() {
            Some((have, kind)) if *kind == zero => *have += len,
            _ => runs.push((len, zero)),
        }
    }
    runs
}
