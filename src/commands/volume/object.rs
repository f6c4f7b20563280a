//! `sheave volume` for object volumes, which need no daemon.

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use sheave_bench::output;
use sheave_core::{parse_size, printable};
use sheave_volumes::{
    BLOCK_BYTES, Codec, Durability, ObjectInfo, ObjectRoot as Root, ObjectSnapshot, ObjectStatus,
    StoredVolume, VolumeSpec,
};

use crate::commands::volume_parser;
use crate::telemetry::Servers;

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave volume snapshot dir:///store/disk1@monday
  sheave serve dir:///store/disk1@monday --socket /run/monday.sock

It has all that was written when it is asked for. If the volume is in use on this node, that goes
on. A snapshot is read as VOLUME@NAME, on any number of nodes at the same time.")]
pub(super) struct SnapshotArgs {
    /// VOLUME@NAME: the URL of an object volume, and the name of the snapshot
    #[arg(value_parser = volume_parser())]
    snapshot: String,
}

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave volume clone dir:///store/golden@v1 dir:///store/vm7
  sheave volume clone s3://bucket/disks/golden@v1 s3://bucket/disks/vm7 --size 40G

Nothing is copied: the clone reads the objects of its ancestors, and writes its own. So it is made
beside the volume, in the same directory, or bucket and prefix. The snapshot stays as long as the
clone exists. The command prints the clone's name.")]
pub(super) struct CloneArgs {
    /// VOLUME@NAME: the URL of an object volume, and the name of the snapshot
    #[arg(value_parser = volume_parser())]
    snapshot: String,
    /// The URL of the clone
    #[arg(value_parser = volume_parser())]
    clone: String,
    /// How long, such as 10G [default: as the snapshot]
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| parse_size(text))]
    size: Option<u64>,
}

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave volume restore dir:///store/disk1@monday

The volume must be closed: detach it first. What was written since is lost; make a snapshot of
that before, if it is to stay. All snapshots stay, older and newer ones, and so does the size. A
clone leaves the volume as it is instead: sheave volume clone.")]
pub(super) struct RestoreArgs {
    /// VOLUME@NAME: the URL of an object volume, and the name of the snapshot
    #[arg(value_parser = volume_parser())]
    snapshot: String,
}

pub(super) fn snapshot(args: &SnapshotArgs) -> Result<()> {
    let snapshot = object("snapshot", &args.snapshot)?;
    snapshot.make_snapshot()?;
    output::to_stdout(format!("{}\n", printable(&snapshot.name))).context("snapshot")
}

pub(super) fn clone(args: &CloneArgs) -> Result<()> {
    let (snapshot, clone) = (object("clone", &args.snapshot)?, object("clone", &args.clone)?);
    snapshot.make_clone(&clone, args.size)?;
    output::to_stdout(format!("{}\n", printable(&clone.name))).context("clone")
}

pub(super) fn restore(args: &RestoreArgs) -> Result<()> {
    let snapshot = object("restore", &args.snapshot)?;
    snapshot.restore()?;
    output::to_stdout(format!("{}\n", printable(&snapshot.name))).context("restore")
}

/// The object volume that a text names.
fn object(op: &'static str, text: &str) -> Result<StoredVolume> {
    match named(text)? {
        Some(volume) => Ok(volume),
        None => bail!(
            "{op}: {}: only object volumes have snapshots and clones; write dir:///… or s3://…",
            printable(text)
        ),
    }
}

/// The object volume that a text names, if it is a URL of one.
///
/// # Errors
/// When it is a URL that cannot be parsed.
pub(super) fn named(text: &str) -> Result<Option<StoredVolume>> {
    let is_url = text.split_once(':').is_some_and(|(scheme, _)| !scheme.contains('/'));
    if !is_url {
        return Ok(None);
    }
    match VolumeSpec::of_operator(text)?.object_volume()? {
        Some(volume) => Ok(Some(volume)),
        None => bail!(
            "{}: volumes of this kind are not made, described or deleted by sheave; it does that \
             for POOL/NAME, dir:///… and s3://…",
            printable(text)
        ),
    }
}

/// The durability of an object volume.
#[derive(Clone, Copy, clap::ValueEnum)]
pub(super) enum DurabilityArg {
    /// Flushes wait for the journal on this node
    Local,
    /// Flushes wait for the store
    Remote,
    /// Flushes wait for nothing
    Unsafe,
}

impl From<DurabilityArg> for Durability {
    fn from(arg: DurabilityArg) -> Self {
        match arg {
            DurabilityArg::Local => Self::Local,
            DurabilityArg::Remote => Self::Remote,
            DurabilityArg::Unsafe => Self::Unsafe,
        }
    }
}

pub(super) fn create(
    volume: &StoredVolume,
    size: Option<u64>,
    codec: Codec,
    durability: Durability,
) -> Result<()> {
    let size = size.context("create: the size is missing; add --size 10G")?;
    warn_if_unsafe(durability);
    volume.create(size, codec, durability)?;
    output::to_stdout(format!("{}\n", printable(&volume.name))).context("create")
}

/// Changes what flushes wait for.
pub(super) fn set(volume: &StoredVolume, durability: Durability) -> Result<()> {
    warn_if_unsafe(durability);
    Ok(volume.set_durability(durability)?)
}

fn warn_if_unsafe(durability: Durability) {
    if durability == Durability::Unsafe {
        output::note(
            "sheave: durability unsafe: flushes wait for nothing, so a power loss takes what was \
             written in the last seconds",
        );
    }
}

pub(super) fn info(volume: &StoredVolume) -> Result<Value> {
    let ObjectInfo { root, objects, stored_bytes, snapshots, live_bytes } = volume.describe()?;
    let last = &root.last;
    let snapshot = |snapshot: &ObjectSnapshot| {
        json!({
            "name": snapshot.name,
            "id": snapshot.id,
            "size_bytes": snapshot.size * BLOCK_BYTES,
            "at_ms": snapshot.at_ms,
            "is_deleting": root.snapshots.deleting.contains(&snapshot.id),
        })
    };
    if let Some(name) = &volume.snapshot {
        let mut all = snapshots.iter().flatten();
        let found = all.find(|snapshot| snapshot.name == *name);
        let mut info = snapshot(
            found
                .context("info: there is no such snapshot, or the key of the volume is missing")?,
        );
        info["name"] = json!(volume.name);
        info["uuid"] = json!(volume.identity()?);
        return Ok(info);
    }
    let ancestors: Vec<_> = root.owners.iter().map(|owner| &owner.name).collect();
    let mut info = json!({
        "name": volume.name,
        "uuid": root.volume.to_string(),
        "size_bytes": root.size_bytes(),
        "state": root.state.name(),
        "durability": root.durability.name(),
        "epoch": last.opening.epoch.0,
        "node": last.node,
        "root": root.number,
        "compression": root.codec.name(),
        "encryption": root.wrapped_key.map_or("none", |_| "aes-256-gcm"),
        "key": root.wrapped_key.map(|key| key.key_id()),
        "objects": objects,
        "stored_bytes": stored_bytes,
        "live_bytes": live_bytes,
        "snapshots": snapshots.map(|all| all.iter().map(snapshot).collect::<Vec<_>>()),
        "ancestors": ancestors,
    });
    if let (Value::Object(fields), Value::Object(live)) = (&mut info, live(&root)) {
        fields.extend(live);
    }
    Ok(info)
}

/// What only the process knows that has the volume open, if it is one of this user.
fn live(root: &Root) -> Value {
    let servers = Servers::read().unwrap_or_default();
    let uuid = root.volume.to_string();
    let is_it =
        |status: &&ObjectStatus| status.uuid == uuid && status.epoch == root.last.opening.epoch.0;
    match servers.objects().find(is_it) {
        Some(status) => json!({
            "lag_bytes": status.lag_bytes,
            "lag_writes": status.lag_writes,
            "lag_seconds": status.lag_ms as f64 / 1000.0,
            "journal_bytes": status.journal_bytes,
            "requests": status.requests,
            "deleted_objects": status.deleted_objects,
            "deleted_bytes": status.deleted_bytes,
            "moved_bytes": status.moved_bytes,
            "oldest_request_seconds": status.oldest_request_ms.map(|ms| ms as f64 / 1000.0),
            "waits_for": status.waits_for,
        }),
        // The store has everything.
        None if root.last.is_closed => json!({ "lag_bytes": 0, "lag_seconds": 0.0 }),
        None => json!({ "lag_bytes": null, "lag_seconds": null }),
    }
}
