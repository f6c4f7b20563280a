//! `sheave volume ls` of the place of object volumes: a directory, or a bucket below a prefix.

use std::thread;

use anyhow::{Context as _, Result, anyhow, bail};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};
use sheave_bench::output;
use sheave_core::{percent_encode, printable};
use sheave_volumes::{ObjectRoot as Root, StoredVolume, VolumeSpec};

use super::object;

/// Names of a place that are looked at.
const NAMES_MAX: usize = 10_000;
/// Volumes that are asked for at the same time.
const WORKERS: usize = 8;
/// The name of a volume in the place, whether there is one or not.
const ANY: &str = "volume";

/// A volume of a place.
struct Row {
    name: String,
    found: sheave_core::Result<Found>,
}

struct Found {
    root: Root,
    /// Objects and their bytes, if that was asked for.
    stored: Option<(u64, u64)>,
}

/// Lists the volumes of a place.
///
/// # Errors
/// When it cannot be listed, or some of them cannot be read.
pub(super) fn ls(place: &str, long: bool, as_json: bool) -> Result<()> {
    let (location, query) = place.split_at(place.find('?').unwrap_or(place.len()));
    let below = |name: &str| format!("{}/{name}{query}", location.trim_end_matches('/'));
    let any = object::named(&below(ANY)).context("ls")?;
    let any = any.with_context(|| format!("ls: {}: it is no place", printable(place)))?;
    let names = any.siblings(NAMES_MAX).context("ls")?;
    let has_more = names.len() == NAMES_MAX;
    let is_kept = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let volume = |name: String| {
        let text = below(&percent_encode(name.as_bytes(), is_kept));
        // What cannot be a volume's name is none.
        VolumeSpec::of_operator(&text).ok()?.object_volume().ok()?
    };
    let rows = rows(names.into_iter().filter_map(volume).collect(), long);
    let text = match as_json {
        true => format!("{}\n", Value::from(rows.iter().map(to_json).collect::<Vec<_>>())),
        false => table(&rows, long),
    };
    output::to_stdout(text).context("ls")?;
    if has_more {
        bail!("ls: {}: only the first {NAMES_MAX} names were looked at", printable(place));
    }
    match rows.iter().find_map(|row| row.found.as_ref().err()) {
        None => Ok(()),
        Some(error) => Err(anyhow!("ls: not all of them can be read: {error}")),
    }
}

/// What is known of volumes, without those that do not exist.
fn rows(volumes: Vec<StoredVolume>, long: bool) -> Vec<Row> {
    let row = |volume: &StoredVolume| {
        let found = match volume.root() {
            Ok(None) => return None,
            Ok(Some(root)) if !long => Ok(Found { root, stored: None }),
            Ok(Some(_)) => volume.describe().map(|info| Found {
                root: info.root,
                stored: Some((info.objects, info.stored_bytes)),
            }),
            Err(error) => Err(error),
        };
        Some(Row { name: volume.name.clone(), found })
    };
    let share = volumes.len().div_ceil(WORKERS).max(1);
    thread::scope(|scope| {
        let workers: Vec<_> = volumes
            .chunks(share)
            .map(|some| scope.spawn(move || some.iter().filter_map(row).collect::<Vec<_>>()))
            .collect();
        let rows = workers.into_iter().map(|worker| worker.join().expect("it does not panic"));
        rows.flatten().collect()
    })
}

fn to_json(row: &Row) -> Value {
    match &row.found {
        Err(error) => json!({ "name": row.name, "trouble": error.to_string() }),
        Ok(Found { root, stored }) => {
            let mut value = json!({
                "name": row.name,
                "uuid": root.volume.to_string(),
                "size_bytes": root.size_bytes(),
                "state": root.state.name(),
                "epoch": root.last.opening.epoch.0,
                "node": root.last.node,
            });
            if let Some((objects, bytes)) = stored {
                value["objects"] = (*objects).into();
                value["stored_bytes"] = (*bytes).into();
            }
            value
        }
    }
}

fn table(rows: &[Row], long: bool) -> String {
    if rows.is_empty() {
        return "no volumes\n".to_owned();
    }
    let mut table = Table::new();
    let header = ["VOLUME", "BYTES", "STATE", "NODE", "STORED", "OBJECTS"];
    let columns = if long { header.len() } else { header.len() - 2 };
    table.load_style(presets::NOTHING).set_header(&header[..columns]);
    for column in [1, 4, 5] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for Row { name, found } in rows {
        let name = printable(name).to_string();
        let mut cells = match found {
            Err(error) => vec![name, "-".to_owned(), format!("{error}"), "-".to_owned()],
            Ok(Found { root, .. }) => {
                let node = printable(&root.last.node).to_string();
                vec![name, root.size_bytes().to_string(), root.state.name().to_owned(), node]
            }
        };
        if long {
            let stored = found.as_ref().ok().and_then(|found| found.stored);
            let text =
                |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |n| n.to_string());
            cells.push(text(stored.map(|(_, bytes)| bytes)));
            cells.push(text(stored.map(|(objects, _)| objects)));
        }
        table.add_row(cells);
    }
    format!("{table}\n")
}
