//! Standard input and output, and FIFOs, as the source or the target of a copy.

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal as _, Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, bail, ensure};
use indicatif::ProgressBar;
use sheave_bench::output;
use sheave_core::{
    Backend, BlockSizes, ByteRange, Capabilities, Completion, Error, Io, IoDone, Op, Outcome,
    Reply, Submitted, Tag, Volume, VolumeInfo, printable,
};
use sheave_volumes::VolumeSpec;

use super::interrupt::{Interruption, Leftover};
use super::job::{PIECE, Writer, ZERO_UNIT, buffers, copy};
use super::source;
use super::target::{NewImage, Target};

/// A stream without a size, which is read or written from beginning to end.
pub(super) enum Pipe {
    /// `-`
    Standard,
    /// A FIFO.
    Named(PathBuf),
}

impl Pipe {
    /// The pipe that a FROM or TO names, if it does.
    ///
    /// # Errors
    /// When it has parameters, which only volumes have.
    pub(super) fn of(text: &str) -> Result<Option<Self>> {
        if text == "-" {
            return Ok(Some(Self::Standard));
        }
        // Opening a volume says what is wrong with it.
        let Ok(spec) = VolumeSpec::of_operator(text) else { return Ok(None) };
        let Some(path) = spec.file_path() else { return Ok(None) };
        if !path.metadata().is_ok_and(|found| found.file_type().is_fifo()) {
            return Ok(None);
        }
        ensure!(!spec.has_parameters(), "{text}: a pipe takes no parameters");
        Ok(Some(Self::Named(path.to_owned())))
    }

    fn open_input(&self) -> Result<(File, String)> {
        let Self::Named(path) = self else {
            let advice = "it is a terminal; pipe the data in, or write ./- for a file";
            ensure!(!io::stdin().is_terminal(), "standard input: {advice}");
            return Ok((own_descriptor(io::stdin())?, "standard input".to_owned()));
        };
        let name = printable(path).to_string();
        Ok((File::open(path).with_context(|| name.clone())?, name))
    }

    fn open_output(&self) -> Result<(File, String)> {
        let Self::Named(path) = self else {
            let advice = "it is a terminal; redirect it, or write ./- for a file";
            ensure!(!io::stdout().is_terminal(), "standard output: {advice}");
            return Ok((own_descriptor(io::stdout())?, "standard output".to_owned()));
        };
        let name = printable(path).to_string();
        Ok((File::options().write(true).open(path).with_context(|| name.clone())?, name))
    }
}

/// Without the standard library's buffer, which splits lines.
fn own_descriptor(stream: impl AsFd) -> Result<File> {
    Ok(stream.as_fd().try_clone_to_owned()?.into())
}

/// Writes a volume into a pipe, holes as zeroes.
///
/// # Errors
/// When the volume or the pipe fails, for example for want of a reader.
pub(super) fn send(
    from: &str,
    to: &Pipe,
    interruption: &Interruption,
    progress: &ProgressBar,
) -> Result<()> {
    let volume = source(from)?;
    let (file, name) = to.open_output()?;
    interruption.leaves(|leftover| *leftover = Leftover::Existing(name.clone()));
    progress.set_length(volume.size());
    let output = Output::new(file, name.clone(), volume.size());
    copy(volume, Arc::new(output), false, 1, progress)
        .with_context(|| format!("{from} to {name}"))?;
    interruption.leaves(|leftover| *leftover = Leftover::Done);
    Ok(())
}

/// Reads a pipe to its end into an image or volume.
///
/// # Errors
/// When the pipe or the target fails, or the target is too small.
pub(super) fn receive(
    from: &Pipe,
    to: &str,
    interruption: Interruption,
    progress: &ProgressBar,
) -> Result<()> {
    let spec = VolumeSpec::of_operator(to)?;
    // Before the target is changed: opening a FIFO waits for its writer.
    let (file, name) = from.open_input()?;
    let mut input = Input { file, name, progress };
    let Some((image, file)) = NewImage::begin(&spec, interruption.clone())? else {
        let target = Target::open(to, 0, interruption)?;
        receive_volume(&mut input, &target, to)?;
        return target.publish();
    };
    let why = "parameters are for volumes, and what comes from a pipe is written as a file";
    ensure!(!spec.has_parameters(), "{to}: {why}");
    let size =
        receive_image(&mut input, &file).with_context(|| format!("{} to {to}", input.name))?;
    // Most likely the writing command has failed.
    ensure!(
        size > 0 || !image.replaces(),
        "{}: it is empty, and {to} stays as it was; remove that first if this is meant",
        input.name
    );
    drop(file);
    image.publish()
}

/// Blocks of zeroes stay holes. Returns the number of bytes.
fn receive_image(input: &mut Input<'_>, file: &File) -> Result<u64> {
    let (mut piece, zeroes) = (vec![0; PIECE as usize], [0; ZERO_UNIT]);
    let mut at = 0;
    loop {
        let bytes = input.fill(&mut piece)?;
        for unit in bytes.chunks(ZERO_UNIT) {
            if *unit != zeroes[..unit.len()] {
                file.write_all_at(unit, at)?;
            }
            at += unit.len() as u64;
        }
        if bytes.is_empty() {
            file.set_len(at)?;
            file.sync_all()?;
            return Ok(at);
        }
    }
}

fn receive_volume(input: &mut Input<'_>, target: &Target, to: &str) -> Result<()> {
    let volume = target.volume();
    let (info, size) = (volume.info(), volume.size());
    ensure!(!info.read_only, "{to}: it is read-only");
    target.begin_overwriting(to);
    let payload_max = u64::from(info.block.maximum_payload).max(1);
    let piece = PIECE.min(1 << payload_max.ilog2());
    let mut writer = Writer::open(Arc::clone(volume), false, piece, &buffers())?;
    let (mut piece, mut at) = (vec![0; PIECE as usize], 0);
    let mut copy = || {
        loop {
            let bytes = input.fill(&mut piece)?;
            let Ok(range) = ByteRange::within(at, bytes.len() as u64, size) else {
                bail!("the input is longer than its {size} bytes");
            };
            if bytes.is_empty() {
                return writer.flush();
            }
            writer.write_bytes(range, bytes)?;
            at = range.end();
        }
    };
    copy().with_context(|| format!("{} to {to}, which is incomplete now", input.name))?;
    if at < size {
        let more = size - at;
        output::note(&format!("{to} is larger; its last {more} bytes are left as they are"));
    }
    Ok(())
}

/// The reading side.
struct Input<'a> {
    file: File,
    name: String,
    progress: &'a ProgressBar,
}

impl Input<'_> {
    /// Reads until the piece is full or the input has ended.
    fn fill<'b>(&mut self, piece: &'b mut [u8]) -> Result<&'b [u8]> {
        let mut have = 0;
        while have < piece.len() {
            match self.file.read(&mut piece[have..]) {
                Ok(0) => break,
                Ok(count) => have += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).with_context(|| self.name.clone()),
            }
        }
        self.progress.inc(have as u64);
        Ok(&piece[..have])
    }
}

/// The writing side, as a volume that takes sequential writes from one backend.
struct Output {
    size: u64,
    info: VolumeInfo,
    stream: Arc<Mutex<Stream>>,
}

struct Stream {
    file: File,
    name: String,
    /// Bytes written.
    at: u64,
    buffer: Vec<u8>,
}

impl Output {
    fn new(file: File, name: String, size: u64) -> Self {
        // Redirected to a file or device: a flush makes the data durable.
        let is_storage = file
            .metadata()
            .is_ok_and(|found| found.file_type().is_file() || found.file_type().is_block_device());
        let can = Capabilities { flush: is_storage, write_zeroes: true, ..Default::default() };
        let info = VolumeInfo {
            block: BlockSizes::default(),
            read_only: false,
            rotational: false,
            volatile: false,
            identity: None,
            can,
        };
        let stream = Stream { file, name, at: 0, buffer: vec![0; PIECE as usize] };
        Self { size, info, stream: Arc::new(Mutex::new(stream)) }
    }
}

impl Volume for Output {
    fn size(&self) -> u64 {
        self.size
    }

    fn grow(&self) -> sheave_core::Result<u64> {
        Ok(self.size)
    }

    fn info(&self) -> &VolumeInfo {
        &self.info
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        &[]
    }

    fn backend(&self) -> sheave_core::Result<Box<dyn Backend>> {
        Ok(Box::new(OutputBackend { info: self.info.clone(), stream: Arc::clone(&self.stream) }))
    }
}

struct OutputBackend {
    info: VolumeInfo,
    stream: Arc<Mutex<Stream>>,
}

impl Backend for OutputBackend {
    fn info(&self) -> &VolumeInfo {
        &self.info
    }

    fn submit(&mut self, op: Op, _: Tag, _: &mut dyn Io) -> Submitted {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        Submitted::Done(stream.run(&op))
    }

    fn io_done(&mut self, _: IoDone, _: &mut dyn Io) {
        unreachable!("it starts no I/O of an engine")
    }

    fn reap(&mut self, _: &mut dyn Io) -> Option<Completion> {
        None
    }
}

impl Stream {
    fn run(&mut self, op: &Op) -> Outcome {
        let done = match op {
            Op::Write { range, data, .. } => range.pieces(PIECE).try_for_each(|piece| {
                let (skip, len) = ((piece.start() - range.start()) as usize, piece.len() as usize);
                data.slice(skip, len).copy_out(&mut self.buffer[..len]);
                self.append(piece)
            }),
            Op::WriteZeroes { range, .. } => {
                self.buffer.fill(0);
                range.pieces(PIECE).try_for_each(|piece| self.append(piece))
            }
            Op::Flush => self.file.sync_data(),
            _ => Err(ErrorKind::Unsupported.into()),
        };
        done.map_err(|error| Error::from_io("write", &*self.name, error))?;
        Ok(Reply::Done)
    }

    fn append(&mut self, range: ByteRange) -> io::Result<()> {
        assert_eq!(range.start(), self.at, "a pipe is written in order");
        self.file.write_all(&self.buffer[..range.len() as usize])?;
        self.at = range.end();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use sheave_volumes::path_text;

    use super::*;

    #[test]
    fn pipes_are_told_from_files() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo\n");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, 0o600.into()).unwrap();
        let url = path_text(&fifo);
        assert!(matches!(Pipe::of("-").unwrap(), Some(Pipe::Standard)));
        assert!(matches!(Pipe::of(&url).unwrap(), Some(Pipe::Named(path)) if path == fifo));
        for other in ["./-", "memory:?size=1", "nbd://-/", "/no/such/file", "no such: volume"] {
            assert!(Pipe::of(other).unwrap().is_none(), "{other}");
        }
        let error = Pipe::of(&format!("{url}?limit-bps=1M")).err().unwrap().to_string();
        assert!(error.ends_with("fifo%0A?limit-bps=1M: a pipe takes no parameters"), "{error}");
    }
}
