//! `sheave volume`: volumes themselves, whether they are devices or not.

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;
use sheave_bench::output;
use sheave_control::v1::ResizeRequest;
use sheave_core::parse_size;
use tonic::Code;

use super::attach::{connect, is_device, said, target};
use super::volume_parser;
use crate::process::runtime;

/// Change volumes.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: VolumeCommand,
}

#[derive(Subcommand)]
enum VolumeCommand {
    /// Make a volume longer, and its device if it is one, while it is used
    Resize(ResizeArgs),
}

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave volume resize disk.img --size 10G
  sheave volume resize /dev/nbd0 --size 10G && resize2fs /dev/nbd0
  sheave volume resize disk.img             after it has grown by other means

It prints the size in bytes. What is new reads as zeroes. A ublk device needs Linux 6.16.")]
struct ResizeArgs {
    /// A URL or a path; or a device
    #[arg(value_parser = volume_parser())]
    volume: String,
    /// How long it is to be, such as 10G; without it a device becomes as long as its volume
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| parse_size(text))]
    size: Option<u64>,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let VolumeCommand::Resize(ResizeArgs { volume, size }) = args.command;
    let target = target(&volume).context("resize")?;
    let bytes = match runtime()?.block_on(resize_device(&target, size))? {
        Some(bytes) => bytes,
        None if is_device(&target) => {
            bail!("resize: {target} is none of the daemon's devices; see: sheave ls")
        }
        // There is no daemon, or it does not know the volume.
        None => sheave_volumes::resize(&target, size)?,
    };
    output::to_stdout(format!("{bytes}\n")).context("resize")
}

/// `None` if it is not a device of a daemon here.
async fn resize_device(target: &str, size: Option<u64>) -> Result<Option<u64>> {
    let Ok(mut daemon) = connect().await else { return Ok(None) };
    let request = ResizeRequest { target: target.to_owned(), size_bytes: size };
    match daemon.resize(request).await {
        Ok(answer) => {
            let device =
                answer.into_inner().device.context("resize: the daemon named no device")?;
            Ok(Some(device.size_bytes))
        }
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(said(status)),
    }
}
