//! `sheave volume` for volumes of pools, through the daemon.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow, bail};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};
use sheave_bench::output;
use sheave_control::v1 as api;
use sheave_control::v1::get_volume_request::Key;
use sheave_core::{parse_size, printable};
use sheave_pools::SIZE_UNIT;
use sheave_volumes::{Codec, Durability};

use super::object::DurabilityArg;
use super::{object, parse_limit_bps, parse_limit_iops, places};
use crate::commands::attach::{call, limits_text, volumes};
use crate::commands::{FencingArg, KeyArgs, volume_parser, with_fencing};
use crate::process::runtime;

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave volume create fast/disk1 --size 10G && sheave attach fast/disk1
  sheave volume create dir:///store/disk1 --size 10G
  sheave volume create s3://bucket/disk1 --size 10G
  sheave volume create s3://bucket/disk2 --size 10G --compression lz4 --encryption aes-256-gcm \
    --key-file /etc/sheave/disk2.key

A pool is one of the daemon's configuration (docs/volumes.md). The same command again does nothing;
a volume of that name with another size is an error. An object volume (dir:///…) is made of files in
a directory, which is made; the one above it must exist, and a volume there is an error. That of a
bucket (s3://…), which must exist, is made of its objects. The command prints the volume's name.

A key is 64 hexadecimal digits: openssl rand -hex 32. It is needed whenever the volume is opened, as
?key-file=FILE, ?key-env=VARIABLE or ?key-command=COMMAND in the volume's URL. Without it the data
is lost.")]
pub(super) struct CreateArgs {
    /// POOL/NAME, or the URL of an object volume
    #[arg(value_parser = volume_parser())]
    volume: String,
    /// How long, such as 10G [default: as the pool's configuration says, else 1G; of an object
    /// volume none]
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| parse_size(text))]
    size: Option<u64>,
    /// Bytes read and written per second, such as 100M; 0 or none is no limit
    #[arg(long, value_name = "SIZE", value_parser = parse_limit_bps)]
    limit_bps: Option<u64>,
    /// Requests per second; 0 or none is no limit
    #[arg(long, value_name = "N", value_parser = parse_limit_iops)]
    limit_iops: Option<u64>,
    /// How a second writer of a volume in a bucket is kept out: by the store, which is probed, or
    /// not at all, if no other process ever opens it [default: probe]
    #[arg(long, value_enum, hide_possible_values = true, value_name = "probe|none")]
    fencing: Option<FencingArg>,
    /// What flushes of an object volume wait for: its journal on this node, its store, or nothing
    /// [default: local]
    #[arg(long, value_enum, hide_possible_values = true, value_name = "local|remote|unsafe")]
    durability: Option<DurabilityArg>,
    /// How an object volume compresses new blocks [default: none]
    #[arg(long, value_enum, hide_possible_values = true, value_name = "lz4|none")]
    compression: Option<CompressionArg>,
    /// Encrypt an object volume, and the journal of it
    #[arg(long, value_enum, hide_possible_values = true, value_name = "aes-256-gcm")]
    encryption: Option<EncryptionArg>,
    #[command(flatten)]
    key: KeyArgs,
}

/// How blocks are compressed.
#[derive(Clone, Copy, clap::ValueEnum)]
enum CompressionArg {
    /// By LZ4
    Lz4,
    /// Not at all
    None,
}

/// How a volume is encrypted.
#[derive(Clone, Copy, clap::ValueEnum)]
enum EncryptionArg {
    /// By AES-256 in Galois/Counter mode
    #[value(name = "aes-256-gcm")]
    Aes256Gcm,
}

#[derive(clap::Args)]
pub(super) struct InfoArgs {
    /// POOL/NAME or POOL/UUID, or the URL of an object volume
    #[arg(value_parser = volume_parser())]
    volume: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave volume ls
  sheave volume ls fast
  sheave volume ls dir:///store
  sheave volume ls s3://bucket/prefix --long

Of the object volumes in a directory, or in a bucket below a prefix, it reads the newest roots: two
requests for each volume. With --long it lists their objects, too.")]
pub(super) struct LsArgs {
    /// Only of this pool, or the place of object volumes: dir:///store, s3://bucket/prefix
    #[arg(value_name = "POOL|PLACE", value_parser = volume_parser())]
    place: Option<String>,
    /// Show what object volumes have stored
    #[arg(long)]
    long: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
#[command(after_help = "\
Its data is gone then. A volume that is a device, or published to a node, is refused. One that does
not exist is an error here. VOLUME@NAME is a snapshot of an object volume: one with clones is
refused, and so is a volume with snapshots.")]
pub(super) struct DeleteArgs {
    /// POOL/NAME or POOL/UUID, or the URL of an object volume
    #[arg(value_parser = volume_parser())]
    volume: String,
    /// Delete an object volume although a node has it open, which then cannot use it any more
    #[arg(long)]
    take_over: bool,
}

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave volume unpublish shared/db --node worker-1

For a node that does not end its use itself: it is gone, or was renamed. While the volume is open or
a device, this is refused. What Kubernetes has attached by CSI, Kubernetes detaches.")]
pub(super) struct UnpublishArgs {
    /// POOL/NAME or POOL/UUID
    volume: String,
    /// The node, as in `sheave volume info`
    #[arg(long)]
    node: String,
}

pub(super) fn create(args: CreateArgs) -> Result<()> {
    let CreateArgs { volume, size, limit_bps, limit_iops, fencing, .. } = args;
    let (compression, encryption) = (args.compression, args.encryption);
    let durability = args.durability;
    let volume = args.key.add_to(with_fencing(volume, fencing).context("create")?);
    if let Some(object) = object::named(&volume)? {
        if limit_bps.or(limit_iops).is_some() {
            bail!("create: an object volume has no limits of its own; add ?limit-bps= to its URL");
        }
        if encryption.is_some() != object.key.is_some() {
            bail!(
                "create: an encrypted volume has a key: --encryption aes-256-gcm --key-file FILE"
            );
        }
        let codec = match compression {
            Some(CompressionArg::Lz4) => Codec::Lz4,
            Some(CompressionArg::None) | None => Codec::Plain,
        };
        let durability = durability.map(Durability::from).unwrap_or_default();
        return object::create(&object, size, codec, durability);
    }
    if compression.is_some() || encryption.is_some() || durability.is_some() {
        bail!("create: --compression, --encryption and --durability are for object volumes");
    }
    let wrong = || anyhow!("create: {}: write POOL/NAME", printable(&volume));
    let (pool, name) = volume.split_once('/').ok_or_else(wrong)?;
    let request = api::CreateVolumeRequest {
        pool: pool.to_owned(),
        name: name.to_owned(),
        required_bytes: size.unwrap_or_default(),
        // So that another size is another volume.
        limit_bytes: size.map_or(0, |size| size.next_multiple_of(SIZE_UNIT)),
        limit_bytes_per_second: limit_bps.unwrap_or_default(),
        limit_ops_per_second: limit_iops.unwrap_or_default(),
        ..api::CreateVolumeRequest::default()
    };
    runtime()?.block_on(async { call(volumes().await?.create_volume(request)).await })?;
    output::to_stdout(format!("{}\n", printable(&volume))).context("create")
}

pub(super) fn info(args: InfoArgs) -> Result<()> {
    let json = match object::named(&args.volume)? {
        Some(object) => object::info(&object)?,
        None => json(&runtime()?.block_on(find(&args.volume))?),
    };
    let text = match &json {
        Value::Object(fields) if !args.json => {
            let line = |(key, value): (&String, &Value)| match value {
                Value::String(text) => format!("{key}: {}\n", printable(text)),
                other => format!("{key}: {other}\n"),
            };
            fields.iter().map(line).collect()
        }
        _ => format!("{json}\n"),
    };
    output::to_stdout(text).context("info")
}

pub(super) fn ls(args: LsArgs) -> Result<()> {
    let LsArgs { place, long, json: as_json } = args;
    let pool = place.unwrap_or_default();
    if pool.contains(':') {
        return places::ls(&pool, long, as_json);
    }
    if long {
        bail!("ls: --long is for the place of object volumes");
    }
    let (found, troubles) = runtime()?.block_on(async {
        let (mut client, mut found, mut troubles) = (volumes().await?, Vec::new(), BTreeMap::new());
        let mut page_token = String::new();
        loop {
            let request =
                api::ListVolumesRequest { pool: pool.clone(), page_token, ..Default::default() };
            let answer = call(client.list_volumes(request)).await?;
            found.extend(answer.volumes);
            let of_page = answer.troubles.into_iter();
            troubles.extend(of_page.map(|trouble| (trouble.pool, trouble.message)));
            page_token = answer.next_page_token;
            if page_token.is_empty() {
                return Ok::<_, anyhow::Error>((found, troubles));
            }
        }
    })?;
    let text = if as_json {
        format!("{}\n", Value::from(found.iter().map(json).collect::<Vec<_>>()))
    } else {
        table(&found)
    };
    output::to_stdout(text).context("ls")?;
    let missing: Vec<_> = troubles.iter().map(|(pool, why)| of_pool(pool, why)).collect();
    match missing.is_empty() {
        true => Ok(()),
        false => Err(anyhow!("ls: volumes are missing in the list: {}", missing.join("; "))),
    }
}

/// What is wrong with a pool, which the message may name already.
fn of_pool(pool: &str, why: &str) -> String {
    let prefix = format!("pool {pool}: ");
    if why.starts_with(&prefix) { why.to_owned() } else { prefix + why }
}

pub(super) fn delete(args: DeleteArgs) -> Result<()> {
    if let Some(object) = object::named(&args.volume)? {
        return Ok(object.delete(args.take_over)?);
    }
    if args.take_over {
        bail!("delete: --take-over is for object volumes");
    }
    runtime()?.block_on(async {
        let id = find(&args.volume).await?.id;
        call(volumes().await?.delete_volume(api::DeleteVolumeRequest { id, uses: None })).await
    })?;
    Ok(())
}

pub(super) fn unpublish(args: UnpublishArgs) -> Result<()> {
    let UnpublishArgs { volume, node } = args;
    runtime()?.block_on(async {
        let found = find(&volume).await?;
        if found.publications.iter().all(|has| has.node != node) {
            let (volume, node) = (printable(&volume), printable(&node));
            return Err(anyhow!("unpublish: {volume}: it is not published to node {node}"));
        }
        let request = api::UnpublishVolumeRequest { id: found.id, node, claim: None };
        call(volumes().await?.unpublish_volume(request)).await.map(drop)
    })
}

/// Makes a volume longer, and its device; its size in bytes then.
pub(super) async fn resize(volume: &str, size: Option<u64>) -> Result<u64> {
    let found = find(volume).await?;
    if let Some(size) = size.filter(|size| *size < found.size_bytes) {
        let has = found.size_bytes;
        let why = format!("has {has} bytes; to make it {size} would cut data off");
        return Err(anyhow!("resize: {}: {why}", printable(volume)));
    }
    let request = api::ResizeVolumeRequest {
        id: found.id,
        required_bytes: size.unwrap_or_default(),
        limit_bytes: 0,
    };
    let answer = call(volumes().await?.resize_volume(request)).await?;
    Ok(answer.volume.context("resize: the daemon named no volume")?.size_bytes)
}

/// Changes the limits of a volume, and of its device.
pub(super) async fn set(volume: &str, bps: Option<u64>, iops: Option<u64>) -> Result<()> {
    let request = api::SetVolumeRequest {
        id: find(volume).await?.id,
        limit_bytes_per_second: bps,
        limit_ops_per_second: iops,
    };
    call(volumes().await?.set_volume(request)).await.map(drop)
}

async fn find(volume: &str) -> Result<api::Volume> {
    let request = api::GetVolumeRequest { key: Some(Key::Name(volume.to_owned())) };
    let answer = call(volumes().await?.get_volume(request)).await?;
    answer.volume.context("the daemon named no volume")
}

fn json(volume: &api::Volume) -> Value {
    let publications: Vec<_> = volume
        .publications
        .iter()
        .map(|has| {
            json!({
                "node": has.node,
                "epoch": has.epoch,
                "read_only": has.read_only,
                "block": has.block,
                "claim": has.claim,
                "mode": has.mode().as_str_name().trim_start_matches("ACCESS_MODE_"),
            })
        })
        .collect();
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    json!({
        "id": volume.id,
        "name": volume.name,
        "pool": volume.pool,
        "size_bytes": (volume.size_bytes != 0).then_some(volume.size_bytes),
        "formatted": some(&volume.formatted),
        "epoch": volume.epoch,
        "publications": publications,
        "limit_bps": (volume.limit_bytes_per_second != 0).then_some(volume.limit_bytes_per_second),
        "limit_iops": (volume.limit_ops_per_second != 0).then_some(volume.limit_ops_per_second),
        "device": some(&volume.device),
        "trouble": some(&volume.trouble),
    })
}

fn table(volumes: &[api::Volume]) -> String {
    if volumes.is_empty() {
        return "no volumes\n".to_owned();
    }
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_header(["VOLUME", "BYTES", "HOLDS", "LIMITS", "NODES", "DEVICE"]);
    if let Some(bytes) = table.column_mut(1) {
        bytes.set_cell_alignment(CellAlignment::Right);
    }
    let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    for volume in volumes {
        let nodes: Vec<_> = volume.publications.iter().map(|has| has.node.clone()).collect();
        let limits = limits_text(volume.limit_bytes_per_second, volume.limit_ops_per_second);
        let device = if volume.trouble.is_empty() { &volume.device } else { &volume.trouble };
        table.add_row([
            match volume.name.as_str() {
                "" => volume.id.clone(),
                name => printable(&format!("{}/{name}", volume.pool)).to_string(),
            },
            match volume.size_bytes {
                0 => "-".to_owned(),
                bytes => bytes.to_string(),
            },
            or_dash(volume.formatted.clone()),
            limits,
            or_dash(printable(&nodes.join(", ")).to_string()),
            or_dash(device.clone()),
        ]);
    }
    format!("{table}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_named_once() {
        for why in ["pool fast: its storage hangs", "its storage hangs"] {
            assert_eq!(of_pool("fast", why), "pool fast: its storage hangs");
        }
    }
}
