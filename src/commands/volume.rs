//! `sheave volume`: changes volumes, with or without a device.

mod check;
mod object;
mod places;
mod pool;

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::{ArgGroup, Subcommand};
use sheave_bench::output;
use sheave_control::v1::{ResizeRequest, SetLimitsRequest};
use sheave_core::parse_size;
use sheave_volumes::VolumeSpec;
use tonic::Code;

use self::object::DurabilityArg;
use super::attach::{call, connect, daemon_error, is_device, is_of_pool, target};
use super::volume_parser;
use crate::process::runtime;

/// The word that removes a limit, besides 0.
const NO_LIMIT: &str = "none";

/// Make, show, change and delete volumes.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: VolumeCommand,
}

#[derive(Subcommand)]
enum VolumeCommand {
    /// Make a volume in a pool, or an object volume
    Create(pool::CreateArgs),
    /// Tell what is known of a volume of a pool, or of an object volume
    Info(pool::InfoArgs),
    /// List the volumes of pools, or the object volumes of a place
    Ls(pool::LsArgs),
    /// Verify what is stored of an object volume
    Check(check::Args),
    /// Delete a volume of a pool, an object volume or its snapshot, with its data
    Delete(pool::DeleteArgs),
    /// Make a snapshot of an object volume, which may be in use on this node
    Snapshot(object::SnapshotArgs),
    /// Make an object volume that begins as a snapshot of another one
    Clone(object::CloneArgs),
    /// Bring an object volume back to one of its snapshots, in place
    Restore(object::RestoreArgs),
    /// Take a volume of a pool from a node that is gone
    Unpublish(pool::UnpublishArgs),
    /// Make a volume longer, and its device if it is one, while it is used
    Resize(ResizeArgs),
    /// Change how much an attached volume may do per second, while it is used, or what flushes of
    /// an object volume wait for
    Set(SetArgs),
}

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave volume resize disk.img --size 10G
  sheave volume resize /dev/nbd0 --size 10G && resize2fs /dev/nbd0
  sheave volume resize disk.img             after it has grown by other means

It prints the size in bytes. What is new reads as zeroes. A ublk device needs Linux 6.16.")]
struct ResizeArgs {
    /// A URL or a path, POOL/NAME, or a device
    #[arg(value_parser = volume_parser())]
    volume: String,
    /// How long it is to be, such as 10G; without it a device becomes as long as its volume
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| parse_size(text))]
    size: Option<u64>,
}

#[derive(clap::Args)]
#[command(
    group = ArgGroup::new("limits").required(true).multiple(true),
    after_help = "\
Examples:
  sheave volume set disk.img --limit-bps 100M --limit-iops 5000
  sheave volume set /dev/ublkb0 --limit-iops none
  sheave volume set dir:///store/disk1 --durability remote

The durability stays with an object volume; it holds from the next flush on. A limit that is not
named stays as it is. Limits hold for all I/O of the device together, at once and until it is
detached, also when another daemon serves it, and beside those of the volume's text; those of a
volume of a pool until they are changed. After idling, a device may do at once what its limits
allow in 50 ms. A request that is longer than that is not refused; those after it wait until it is
paid for."
)]
struct SetArgs {
    /// A volume as it was attached, POOL/NAME, or a device
    #[arg(value_parser = volume_parser())]
    volume: String,
    /// Bytes read and written per second, such as 100M; 0 or none lifts the limit
    #[arg(long, value_name = "SIZE", group = "limits", value_parser = parse_limit_bps)]
    limit_bps: Option<u64>,
    /// Requests per second; 0 or none lifts the limit
    #[arg(long, value_name = "N", group = "limits", value_parser = parse_limit_iops)]
    limit_iops: Option<u64>,
    /// What flushes of an object volume wait for: its journal on this node, its store, or nothing
    #[arg(
        long,
        value_enum,
        hide_possible_values = true,
        group = "limits",
        value_name = "local|remote|unsafe"
    )]
    durability: Option<DurabilityArg>,
}

fn parse_limit_bps(text: &str) -> sheave_core::Result<u64> {
    if text == NO_LIMIT { Ok(0) } else { parse_size(text) }
}

fn parse_limit_iops(text: &str) -> Result<u64, String> {
    if text == NO_LIMIT {
        return Ok(0);
    }
    text.parse().map_err(|_| format!("a whole number, or {NO_LIMIT}"))
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let done = match args.command {
        VolumeCommand::Create(args) => pool::create(args),
        VolumeCommand::Info(args) => pool::info(args),
        VolumeCommand::Ls(args) => pool::ls(args),
        VolumeCommand::Check(args) => return check::run(args),
        VolumeCommand::Delete(args) => pool::delete(args),
        VolumeCommand::Snapshot(args) => object::snapshot(&args),
        VolumeCommand::Clone(args) => object::clone(&args),
        VolumeCommand::Restore(args) => object::restore(&args),
        VolumeCommand::Unpublish(args) => pool::unpublish(args),
        VolumeCommand::Resize(args) => resize(args),
        VolumeCommand::Set(args) => set(args),
    };
    done.map(|()| ExitCode::SUCCESS)
}

fn set(args: SetArgs) -> Result<()> {
    let SetArgs { volume, limit_bps, limit_iops, durability } = args;
    if let Some(durability) = durability {
        let object = object::named(&volume)?
            .context("set: --durability is for object volumes, dir:///… and s3://…")?;
        object::set(&object, durability.into())?;
        if limit_bps.or(limit_iops).is_none() {
            return Ok(());
        }
    }
    runtime()?.block_on(async {
        if is_of_pool(&volume).await {
            return pool::set(&volume, limit_bps, limit_iops).await;
        }
        let request = SetLimitsRequest {
            target: target(&volume).await.context("set limits")?,
            bytes_per_second: limit_bps,
            ops_per_second: limit_iops,
        };
        call(connect().await?.set_limits(request)).await.map(drop)
    })
}

fn resize(args: ResizeArgs) -> Result<()> {
    let ResizeArgs { volume, size } = args;
    let runtime = runtime()?;
    if runtime.block_on(is_of_pool(&volume)) {
        let bytes = runtime.block_on(pool::resize(&volume, size))?;
        return output::to_stdout(format!("{bytes}\n")).context("resize");
    }
    let target = runtime.block_on(target(&volume)).context("resize")?;
    let bytes = match runtime.block_on(resize_device(&target, size))? {
        Some(bytes) => bytes,
        None if is_device(&target) => {
            bail!("resize: {target} is none of the daemon's devices; see: sheave ls")
        }
        // There is no daemon, or it does not have the volume.
        None => VolumeSpec::of_operator(&target)?.resize(size)?,
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
        Err(status) => Err(daemon_error(status)),
    }
}
