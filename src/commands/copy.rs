//! `sheave copy`: any volume to any volume or image, sparse.

mod interrupt;
mod target;

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, bail, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use sheave_backends::{BlockSize, OpenOptions, VolumeSpec};
use sheave_core::{Buf, ByteRange, ErrorKind, Extent, Op, Payload, Reply, Segment, Volume};
use sheave_nbd::Remote;
use sheave_shard::Blocking;

use self::interrupt::{Interruption, Leftover};
use self::target::Target;

/// Workers take the volume in stretches of this many bytes.
const STRETCH: u64 = 64 << 20;
/// One read or write, in bytes; less if a volume's maximum payload is.
const PIECE: u64 = 1 << 20;
/// Zeroes inside data are looked for in units of this many bytes.
const ZERO_UNIT: usize = 64 << 10;

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// What to copy: a volume, an image, or an NBD URI
    from: String,
    /// Where to: likewise. An image that does not exist is made, and has its name only when it is
    /// whole. What exists is overwritten; if it is larger, its end stays as it is
    to: String,
    /// Requests at a time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
    workers: u8,
    /// No progress bar
    #[arg(long)]
    quiet: bool,
}

const EXAMPLES: &str = "\
Examples:
  sheave copy disk.img nbd://server/disk
  sheave copy 'nbd+unix:///?socket=/run/disk.sock' backup.img
  sheave copy 'nbds://server/disk?tls-certificates=/etc/pki/nbd' disk.img";

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let progress = progress(args.quiet);
    let interruption = Interruption::watch(progress.clone())?;
    ensure!(!is_same(&args.from, &args.to), "copy: source and target are the same file");
    let from = source(&args.from).context("copy")?;
    let size = from.size();
    let target = Target::open(&args.to, size, interruption.clone()).context("copy")?;
    let to = target.volume();
    if to.info().read_only {
        bail!("copy: {}: it is read-only", args.to);
    }
    if to.size() < size {
        bail!("copy: {} has {} bytes, too few for {size}", args.to, to.size());
    }
    if to.size() > size {
        let more = to.size() - size;
        eprintln!("{} is larger; its last {more} bytes are left as they are", args.to);
    }
    if !target.is_new() {
        interruption.leaves(|leftover| *leftover = Leftover::Existing(args.to.clone()));
    }
    progress.set_length(size);
    copy(from, Arc::clone(to), target.is_new(), args.workers, &progress)
        .inspect_err(|_| progress.abandon())
        .with_context(|| match target.is_new() {
            true => format!("copy {} to {}", args.from, args.to),
            false => format!("copy {} to {}, which is incomplete now", args.from, args.to),
        })?;
    target.publish().context("copy")?;
    progress.finish();
    Ok(())
}

/// Copies all of a volume. `blank` says that the target reads as zeroes everywhere.
fn copy(
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
        piece: piece(&*from, &*to),
        from,
        to,
        blank,
        next: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        error: Mutex::new(None),
        progress,
    };
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| job.work());
        }
    });
    let error = job.error.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    error.map_or(Ok(()), Err)
}

fn source(text: &str) -> anyhow::Result<Arc<dyn Volume>> {
    if is_nbd(text) {
        return remote(text);
    }
    let spec: VolumeSpec = text.parse()?;
    Ok(spec.open(&OpenOptions { read_only: true, ..OpenOptions::default() })?)
}

fn remote(text: &str) -> anyhow::Result<Arc<dyn Volume>> {
    let volume = Arc::new(Remote::open(text)?);
    // The last block of a source need not be a whole one of the target's.
    Ok(match volume.info().block.minimum {
        1 => volume,
        _ => Arc::new(BlockSize::new(volume)),
    })
}

/// Whether both are one file or device, by whatever names, or one export.
fn is_same(from: &str, to: &str) -> bool {
    if is_nbd(from) || is_nbd(to) {
        return from == to;
    }
    let file = |text: &str| {
        let spec: VolumeSpec = text.parse().ok()?;
        let found = fs::metadata(spec.file_path()?).ok()?;
        Some(match found.file_type().is_block_device() {
            true => (true, found.rdev(), 0),
            false => (false, found.dev(), found.ino()),
        })
    };
    file(from).is_some_and(|from| Some(from) == file(to))
}

fn is_nbd(text: &str) -> bool {
    text.starts_with("nbd") && text.contains("://")
}

fn piece(from: &dyn Volume, to: &dyn Volume) -> u64 {
    let longest = from.info().block.maximum_payload.min(to.info().block.maximum_payload);
    // A power of two, so that pieces are aligned to every block size.
    PIECE.min(1 << longest.ilog2())
}

fn progress(quiet: bool) -> ProgressBar {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let bar = ProgressBar::with_draw_target(Some(0), target);
    let style = "{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    bar.with_style(ProgressStyle::with_template(style).expect("a template that parses"))
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
}

impl Job<'_> {
    /// Copies stretches until there are none, or one has failed anywhere.
    fn work(&self) {
        if let Err(error) = self.copy_all() {
            self.failed.store(true, Relaxed);
            let mut first = self.error.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            first.get_or_insert(error);
        }
    }

    fn copy_all(&self) -> anyhow::Result<()> {
        let mut worker = Worker {
            from: Blocking::open(&*self.from)?,
            to: Blocking::open(&*self.to)?,
            can_zero: self.to.info().can.write_zeroes,
            job: self,
        };
        while !self.failed.load(Relaxed) {
            let start = self.next.fetch_add(STRETCH, Relaxed);
            if start >= self.size {
                break;
            }
            worker.stretch(start, (start + STRETCH).min(self.size))?;
        }
        // Every worker for itself: a flush need not cover what another connection wrote.
        if self.to.info().can.flush {
            worker.to.run(Op::Flush)?;
        }
        Ok(())
    }
}

struct Worker<'a> {
    from: Blocking,
    to: Blocking,
    can_zero: bool,
    job: &'a Job<'a>,
}

impl Worker<'_> {
    fn stretch(&mut self, mut at: u64, end: u64) -> anyhow::Result<()> {
        while at < end && !self.job.failed.load(Relaxed) {
            for extent in self.extents(at, end)? {
                let len = extent.len.min(end - at);
                let range = self.range(at, len);
                match extent.zero {
                    true => self.zero(range)?,
                    false => self.data(range)?,
                }
                at += len;
                self.job.progress.inc(len);
            }
        }
        Ok(())
    }

    /// What is between `at` and `end`, at least from `at` on.
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
            self.write(range, &payload)?;
            for segment in payload.into_segments() {
                if let Segment::Data(buf) = segment {
                    self.from.recycle(buf);
                }
            }
        }
        Ok(())
    }

    /// Writes what is not zero, and zeroes the rest.
    fn write(&mut self, range: ByteRange, payload: &Payload) -> anyhow::Result<()> {
        let mut at = 0;
        let runs = zero_runs(payload);
        for (len, zero) in runs {
            let part = range.part(at as u64, len as u64);
            if zero {
                self.zero(part)?;
            } else {
                let data = payload.slice(at, len);
                self.to.run(Op::Write { range: part, data, fua: false })?;
            }
            at += len;
        }
        Ok(())
    }

    fn zero(&mut self, range: ByteRange) -> anyhow::Result<()> {
        if self.job.blank || range.is_empty() {
            return Ok(());
        }
        if self.can_zero {
            let op = Op::WriteZeroes { range, fua: false, no_hole: false, fast: false };
            match self.to.run(op) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Unsupported => self.can_zero = false,
                Err(error) => return Err(error.into()),
            }
        }
        for range in range.pieces(self.job.piece) {
            let data = Buf::zeroed(range.len() as usize).into();
            self.to.run(Op::Write { range, data, fua: false })?;
        }
        Ok(())
    }

    fn range(&self, start: u64, len: u64) -> ByteRange {
        ByteRange::within(start, len, self.job.size).expect("copied ranges lie inside the source")
    }
}

/// Lengths of the runs that are zero or not, in units of [`ZERO_UNIT`].
fn zero_runs(payload: &Payload) -> Vec<(usize, bool)> {
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

#[cfg(test)]
mod tests;
