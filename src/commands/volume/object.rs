//! `sheave volume` for object volumes, which need no daemon.

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use sheave_bench::output;
use sheave_core::printable;
use sheave_volumes::{ObjectInfo, StoredVolume, VolumeSpec};

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

pub(super) fn create(volume: &StoredVolume, size: Option<u64>) -> Result<()> {
    let size = size.context("create: the size is missing; add --size 10G")?;
    volume.create(size)?;
    output::to_stdout(format!("{}\n", printable(&volume.name))).context("create")
}

pub(super) fn info(volume: &StoredVolume) -> Result<Value> {
    let ObjectInfo { root, objects, stored_bytes } = volume.describe()?;
    let last = &root.last;
    Ok(json!({
        "name": volume.name,
        "uuid": root.volume.to_string(),
        "size_bytes": root.size_bytes(),
        "state": root.state.name(),
        "epoch": last.opening.epoch.0,
        "node": last.node,
        "root": root.number,
        "objects": objects,
        "stored_bytes": stored_bytes,
    }))
}
