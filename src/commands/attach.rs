//! `sheave attach`, `detach` and `ls`: clients of the daemon.

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use clap::ValueEnum;
use comfy_table::{CellAlignment, Table, presets};
use sheave_bench::output;
use sheave_control::v1::{
    AttachRequest, DetachRequest, Device, Front, ListDevicesRequest, ListPoolsRequest,
};
use sheave_control::{ControlClient, VolumesClient};
use sheave_core::printable;
use sheave_pools::VolumeId;
use sheave_volumes::{ObjectStatus, VolumeSpec};
use tonic::{Code, Response, Status};

use super::{FencingArg, volume_parser, with_fencing};
use crate::control_api::control_socket;
use crate::drain::{DrainArgs, POLL, Progress, what_is_left};
use crate::process::runtime;
use crate::telemetry::{RuntimeDir, Servers};

/// How long a client waits before it prints what it waits for.
const HINT_AFTER: Duration = Duration::from_secs(10);

/// Make a volume a block device and print its path.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave attach disk.img                        prints /dev/ublkb0
  mkfs.ext4 $(sheave attach 'memory:?size=1G')
  sheave attach fast/disk1                      a volume of a pool

Attaching the same volume once more prints the same device.")]
pub(crate) struct AttachArgs {
    /// A URL, a path or POOL/NAME
    #[arg(value_parser = volume_parser())]
    volume: String,
    /// How the device is made
    #[arg(long, value_enum, default_value_t = FrontArg::Auto)]
    front: FrontArg,
    /// Make it read-only, in the kernel too
    #[arg(long)]
    read_only: bool,
    /// Open an object volume although another node has it open, which then cannot write any more
    #[arg(long)]
    take_over: bool,
    /// How a second writer of a volume in a bucket is kept out: by the store, which is probed, or
    /// not at all, if no other process ever opens it [default: probe]
    #[arg(long, value_enum, hide_possible_values = true, value_name = "probe|none")]
    fencing: Option<FencingArg>,
}

/// End a block device.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave detach /dev/ublkb0
  sheave detach disk.img")]
pub(crate) struct DetachArgs {
    /// A device, or a volume as it was attached
    #[arg(value_parser = volume_parser())]
    target: String,
    /// Even if it is in use; its I/O then fails
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    drain: DrainArgs,
}

/// List the block devices of the daemon.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave ls
  sheave ls --json")]
pub(crate) struct LsArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum FrontArg {
    /// What this node can do best
    Auto,
    /// The kernel's ublk driver
    Ublk,
    /// The kernel's NBD client
    Nbd,
}

pub(crate) fn attach(args: AttachArgs) -> Result<()> {
    let front = match args.front {
        FrontArg::Auto => Front::Unspecified,
        FrontArg::Ublk => Front::Ublk,
        FrontArg::Nbd => Front::Nbd,
    };
    let volume = with_fencing(args.volume, args.fencing).context("attach")?;
    let device = runtime()?.block_on(async {
        let request = AttachRequest {
            volume: target(&volume).await.context("attach")?,
            front: front.into(),
            read_only: args.read_only,
            take_over: args.take_over,
            // It is an argument of this command.
            from_operator: true,
            ..AttachRequest::default()
        };
        let answer = call(connect().await?.attach(request)).await?;
        answer.device.context("attach: the daemon named no device")
    })?;
    output::to_stdout(format!("{}\n", device.path)).context("attach")
}

pub(crate) fn detach(args: DetachArgs) -> Result<()> {
    runtime()?.block_on(async {
        // Its pool may be in the configuration no more.
        let is_id = args.target.parse::<VolumeId>().is_ok();
        let target =
            if is_id { args.target } else { target(&args.target).await.context("detach")? };
        let mut daemon = connect().await?;
        let volume = call(daemon.list_devices(ListDevicesRequest {})).await?.devices.into_iter();
        let mut volume = volume.filter(|device| [&device.path, &device.volume].contains(&&target));
        let volume = volume.next().map(|device| location(&device).to_owned());
        let request = DetachRequest { target, force: args.force };
        call(daemon.detach(request)).await?;
        if let Some(volume) = volume {
            wait_for_store(&volume, args.drain.timeout()).await;
        }
        Ok(())
    })
}

/// Waits until the daemon has written an object volume to its store.
async fn wait_for_store(volume: &str, within: Duration) {
    let begun = Instant::now();
    let mut progress = Progress::new(begun);
    let mut opening = None;
    loop {
        let servers = Servers::read().unwrap_or_default();
        // Another process may open it as soon as it is closed.
        let is_it = |object: &&ObjectStatus| {
            object.name == volume && opening.is_none_or(|epoch| epoch == object.epoch)
        };
        let Some(status) = servers.objects().find(is_it) else { return };
        opening = Some(status.epoch);
        let left = [(status.name.clone(), status.lag_bytes)];
        if begun.elapsed() >= within {
            let line = what_is_left(volume, status.lag_bytes, status.waits_for.as_deref());
            return output::note(&format!("{line}; the daemon goes on with it"));
        }
        if let Some(line) = progress.line(&left, Instant::now()) {
            output::note(&line);
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Where a device's volume is, without parameters: the name of an object volume.
fn location(device: &Device) -> &str {
    device.volume.split('?').next().unwrap_or_default()
}

pub(crate) fn ls(args: LsArgs) -> Result<()> {
    let devices = runtime()?.block_on(async {
        let answer = call(connect().await?.list_devices(ListDevicesRequest {})).await?;
        Ok::<_, anyhow::Error>(answer.devices)
    })?;
    // What an object volume waits for is in the statistics of its process.
    let servers = Servers::read().unwrap_or_default();
    let waits_for = |device: &Device| {
        let object = servers.objects().find(|object| object.name == location(device))?;
        object.waits_for.clone()
    };
    let text = if args.json { json(&devices, waits_for) } else { table(&devices, waits_for) };
    output::to_stdout(text).context("ls")
}

pub(super) async fn connect() -> Result<ControlClient> {
    let socket = socket()?;
    sheave_control::connect(&socket).await.map_err(|error| no_daemon(&socket, error))
}

/// The daemon's volumes of pools.
pub(super) async fn volumes() -> Result<VolumesClient> {
    let socket = socket()?;
    sheave_control::connect_volumes(&socket).await.map_err(|error| no_daemon(&socket, error))
}

fn socket() -> Result<PathBuf> {
    let dir = RuntimeDir::locate();
    dir.exists()?;
    Ok(control_socket(&dir))
}

fn no_daemon(
    socket: &Path,
    error: impl std::error::Error + Send + Sync + 'static,
) -> anyhow::Error {
    let cause = anyhow::Error::new(error);
    let (at, why) = (printable(&socket), cause.root_cause());
    let advice = match rustix::process::geteuid().is_root() {
        true => "start one: sheave daemon",
        false => "devices are for root: sudo sheave …",
    };
    anyhow!("no daemon at {at} ({why}); {advice}")
}

/// Whether it is POOL/NAME of a pool that the daemon has. A path of that form is written `./a/b`.
pub(super) async fn is_of_pool(text: &str) -> bool {
    let Some((pool, _)) = text.split_once('/') else { return false };
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if pool.is_empty() || !pool.chars().all(is_plain) {
        return false;
    }
    let Ok(mut client) = volumes().await else { return false };
    // A daemon of an older version has none.
    let known = client.list_pools(ListPoolsRequest {}).await;
    known.is_ok_and(|known| known.into_inner().pools.iter().any(|known| known.name == pool))
}

/// The answer to a call, however long it takes; prints what it waits for when that is long.
pub(super) async fn call<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T> {
    let mut call = pin!(call);
    let answer = match tokio::time::timeout(HINT_AFTER, &mut call).await {
        Ok(answer) => answer,
        Err(_) => {
            output::note(
                "sheave: the daemon does not answer yet; waiting (see: systemctl status sheave)",
            );
            call.await
        }
    };
    Ok(answer.map_err(daemon_error)?.into_inner())
}

/// The daemon's own message, without that of the protocol.
pub(super) fn daemon_error(status: Status) -> anyhow::Error {
    match status.source() {
        None if status.code() == Code::Unimplemented && status.message().is_empty() => {
            anyhow!("the daemon is of another version and has no such command; restart it")
        }
        None => anyhow!("{}", status.message()),
        // Messages of the transport are about streams and frames.
        Some(_) => anyhow!("the daemon has ended without an answer; see what it did: sheave ls"),
    }
}

/// A device, or a volume by a name that the daemon can use.
pub(super) async fn target(text: &str) -> Result<String> {
    if is_device(text) || is_of_pool(text).await { Ok(text.to_owned()) } else { absolute(text) }
}

pub(super) fn is_device(text: &str) -> bool {
    text.starts_with("/dev/")
}

/// A volume by a name that the daemon, in another directory, can use.
fn absolute(volume: &str) -> Result<String> {
    Ok(VolumeSpec::of_operator(volume)?.absolute()?)
}

fn table(devices: &[Device], waits_for: impl Fn(&Device) -> Option<String>) -> String {
    if devices.is_empty() {
        return "no devices\n".to_owned();
    }
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_header(["DEVICE", "FRONT", "BYTES", "MEMORY", "MODE", "LIMITS", "VOLUME"]);
    for bytes in table.column_iter_mut().skip(2).take(2) {
        bytes.set_cell_alignment(CellAlignment::Right);
    }
    for device in devices {
        let mode = match (device.read_only, device.waiting.is_empty()) {
            (_, false) => "waits",
            (true, _) => "ro",
            (false, _) => "rw",
        };
        let bytes = device.size_bytes.to_string();
        let held = device.held_bytes.map_or_else(|| "-".to_owned(), |held| held.to_string());
        let limits = limits_text(device.limit_bytes_per_second, device.limit_ops_per_second);
        let is_of_pool = !device.volume_id.is_empty();
        let volume = if is_of_pool { &device.volume_id } else { &device.volume };
        let mut volume = printable(volume).to_string();
        if let Some(why) = waits_for(device) {
            volume += &format!(" ({})", printable(&why));
        }
        table.add_row([&device.path, front(device), &bytes, &held, mode, &limits, &volume]);
    }
    format!("{table}\n")
}

fn json(devices: &[Device], waits_for: impl Fn(&Device) -> Option<String>) -> String {
    let list: Vec<_> = devices
        .iter()
        .map(|device| {
            serde_json::json!({
                "device": device.path,
                "front": front(device),
                "size_bytes": device.size_bytes,
                "read_only": device.read_only,
                "volume": device.volume,
                "volume_id": (!device.volume_id.is_empty()).then_some(&device.volume_id),
                "held_bytes": device.held_bytes,
                "limit_bps": limit(device.limit_bytes_per_second),
                "limit_iops": limit(device.limit_ops_per_second),
                "waiting": (!device.waiting.is_empty()).then_some(&device.waiting),
                "storage_waits_for": waits_for(device),
            })
        })
        .collect();
    format!("{}\n", serde_json::Value::from(list))
}

/// Both limits, for a table; 0 is none.
pub(super) fn limits_text(bps: u64, iops: u64) -> String {
    let bps = limit(bps).map(|limit| format!("{limit} B/s"));
    let iops = limit(iops).map(|limit| format!("{limit} op/s"));
    let both: Vec<_> = bps.into_iter().chain(iops).collect();
    if both.is_empty() { "-".to_owned() } else { both.join(", ") }
}

/// `None` if there is none.
fn limit(value: u64) -> Option<u64> {
    (value != 0).then_some(value)
}

fn front(device: &Device) -> &'static str {
    match device.front() {
        Front::Nbd => "nbd",
        Front::Fake => "fake",
        Front::Ublk => "ublk",
        Front::Unspecified => "?",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_told_from_a_file_whose_url_names_one() {
        let target = |text| runtime().unwrap().block_on(target(text)).unwrap();
        assert_eq!(target("/dev/ublkb0"), "/dev/ublkb0");
        assert_eq!(target("file:///dev/%E9"), "file:///dev/%E9");
        assert!(target("a.img").starts_with('/'));
    }

    #[test]
    fn limits_are_shown_with_their_units() {
        assert_eq!(limits_text(0, 0), "-");
        assert_eq!(limits_text(0, 500), "500 op/s");
        assert_eq!(limits_text(1 << 20, 500), "1048576 B/s, 500 op/s");
    }

    #[test]
    fn a_daemon_without_the_command_is_of_another_version() {
        let error = |message| daemon_error(Status::unimplemented(message)).to_string();
        let told = error("");
        assert!(told.contains("another version"), "{told}");
        assert_eq!(error("no such front"), "no such front");
    }
}
