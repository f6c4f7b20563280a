//! `sheave volume` for object volumes, which need no daemon.

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use sheave_bench::output;
use sheave_core::printable;
use sheave_volumes::{
    Codec, ObjectInfo, ObjectRoot as Root, ObjectStatus, StoredVolume, VolumeSpec,
};

use crate::telemetry::Servers;

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

pub(super) fn create(volume: &StoredVolume, size: Option<u64>, codec: Codec) -> Result<()> {
    let size = size.context("create: the size is missing; add --size 10G")?;
    volume.create(size, codec)?;
    output::to_stdout(format!("{}\n", printable(&volume.name))).context("create")
}

pub(super) fn info(volume: &StoredVolume) -> Result<Value> {
    let ObjectInfo { root, objects, stored_bytes } = volume.describe()?;
    let last = &root.last;
    let mut info = json!({
        "name": volume.name,
        "uuid": root.volume.to_string(),
        "size_bytes": root.size_bytes(),
        "state": root.state.name(),
        "epoch": last.opening.epoch.0,
        "node": last.node,
        "root": root.number,
        "compression": root.codec.name(),
        "encryption": root.wrapped_key.map_or("none", |_| "aes-256-gcm"),
        "key": root.wrapped_key.map(|key| key.key_id()),
        "objects": objects,
        "stored_bytes": stored_bytes,
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
            "oldest_request_seconds": status.oldest_request_ms.map(|ms| ms as f64 / 1000.0),
            "waits_for": status.waits_for,
        }),
        // The store has everything.
        None if root.last.is_closed => json!({ "lag_bytes": 0, "lag_seconds": 0.0 }),
        None => json!({ "lag_bytes": null, "lag_seconds": null }),
    }
}
