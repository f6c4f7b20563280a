//! `sheave copy`: any volume to any volume or image, sparse.

mod interrupt;
mod job;
mod pipe;
mod target;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use sheave_bench::output;
use sheave_core::Volume;
use sheave_volumes::{OpenOptions, VolumeSpec};

use self::interrupt::Interruption;
use self::pipe::Pipe;
use self::target::Target;
use super::{NO_PROC, volume_parser};

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// What to copy: a volume, an image, an NBD URI, or - for standard input
    #[arg(value_parser = volume_parser())]
    from: String,
    /// Where to: likewise, or - for standard output.
    ///
    /// An image gets its name only when it is whole; one that exists is then replaced, and keeps
    /// owner and mode. Devices and exports are overwritten; the end of a larger one stays as it is.
    #[arg(value_parser = volume_parser())]
    to: String,
    /// Requests at a time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
    workers: u8,
    /// No progress bar
    #[arg(long)]
    quiet: bool,
}

/// How long a server may be unreachable, unless the URI says otherwise (`reconnect-timeout=`).
const AWAY_MAX: Duration = Duration::from_secs(60);
/// Connections to a server that allows several: as many as workers by default.
const CONNECTIONS: usize = 4;

const EXAMPLES: &str = "\
Examples:
  sheave copy disk.img nbd://server/disk
  sheave copy 'nbd+unix:///?socket=/run/disk.sock' backup.img
  sheave copy 'nbds://server/disk?tls-certificates=/etc/pki/nbd' disk.img
  sheave copy 'nbd+exec:?command=qemu-nbd%20-f%20qcow2%20disk.qcow2' disk.img
  sheave copy nbd://server/disk - | zstd > disk.zst
  zstd -dc disk.zst | sheave copy - disk.img

A pipe or FIFO is read to its end and written from its beginning, holes as zeroes. Blocks of zeroes
in the input become holes of an image. An input without a byte replaces no image, since the command
before it has most likely failed. A file that is called - is ./-

A server that goes away and comes back within 60 s (reconnect-timeout=S in its URI) ends no copy.";

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let from = Pipe::of(&args.from).context("copy")?;
    let to = Pipe::of(&args.to).context("copy")?;
    ensure!(from.is_none() || to.is_none(), "copy: both are pipes; one must be a volume or image");
    let progress = progress(args.quiet, if from.is_some() { ENDLESS } else { MEASURED });
    let interruption = Interruption::watch(progress.clone())?;
    if !sheave_local::are_holders_visible() {
        output::note(&format!("sheave: copy: {NO_PROC}"));
    }
    let copied = match (&from, &to) {
        (Some(from), _) => pipe::receive(from, &args.to, interruption, &progress),
        (None, Some(to)) => pipe::send(&args.from, to, &interruption, &progress),
        (None, None) => volumes(&args, interruption, &progress),
    };
    match &copied {
        Ok(()) => progress.finish(),
        Err(_) => progress.abandon(),
    }
    copied.context("copy")
}

fn volumes(args: &Args, interruption: Interruption, progress: &ProgressBar) -> anyhow::Result<()> {
    let Args { from, to, .. } = args;
    let is_same = VolumeSpec::of_operator(from)?.is_same_place(&VolumeSpec::of_operator(to)?);
    ensure!(!is_same, "source and target are the same file or export");
    let volume = source(from)?;
    let size = volume.size();
    let target = Target::open(to, size, interruption)?;
    ensure!(!target.volume().info().read_only, "{to}: it is read-only");
    let room = target.volume().size();
    ensure!(room >= size, "{to} has {room} bytes, too few for the {size} of {from}");
    if room > size {
        let more = room - size;
        output::note(&format!("{to} is larger; its last {more} bytes are left as they are"));
    }
    target.begin_overwriting(to);
    progress.set_length(size);
    let (is_new, incomplete) = match target.is_new() {
        true => (true, ""),
        false => (false, ", which is incomplete now"),
    };
    job::copy(volume, Arc::clone(target.volume()), is_new, args.workers, progress)
        .with_context(|| format!("{from} to {to}{incomplete}"))?;
    target.publish()
}

/// Unlike a disk, a copy fails when its server does not come back, and uses several connections.
fn open_options() -> OpenOptions {
    OpenOptions {
        away_max: Some(AWAY_MAX),
        connections: Some(CONNECTIONS),
        ..OpenOptions::default()
    }
}

fn source(text: &str) -> anyhow::Result<Arc<dyn Volume>> {
    let options = OpenOptions { read_only: true, ..open_options() };
    Ok(VolumeSpec::of_operator(text)?.open(&options)?)
}

/// Progress of a copy whose size is known, and of another.
pub(super) const MEASURED: &str = "{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
const ENDLESS: &str = "{spinner} {bytes} {bytes_per_sec}";

/// A bar of that style on standard error, if that is a terminal.
pub(super) fn progress(quiet: bool, style: &str) -> ProgressBar {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let bar = ProgressBar::with_draw_target(Some(0), target);
    bar.with_style(ProgressStyle::with_template(style).expect("a template that parses"))
}

#[cfg(test)]
mod tests;
