//! `sheave volume check`: verifies what is stored of an object volume.

use std::fmt::Write as _;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use sheave_bench::output;
use sheave_core::printable;
use sheave_volumes::object_check::{Fault, Options, Progress, Report, Sum};

use super::object;
use crate::commands::copy::{MEASURED, progress};
use crate::commands::volume_parser;

/// Runs of blocks that a line names.
const SPANS_SHOWN_MAX: usize = 8;

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave volume check dir:///store/disk1
  sheave volume check s3://bucket/disk1 --fast

It opens nothing and needs no daemon. All objects that the volume needs are read, the data, too:
that costs as many requests as reading the volume. Of a volume that is open, what its newest root
has is checked; what is in a journal is not. The end code is 0 if all is right, else 1, with a line
for each fault: the object, what is wrong, and which blocks cannot be read because of it.")]
pub(super) struct Args {
    /// The URL of an object volume
    #[arg(value_parser = volume_parser())]
    volume: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Read no data: only what says where they are, and whether they are there
    #[arg(long)]
    fast: bool,
    /// Remove objects that came after another opening had begun in their place, and never counted,
    /// if there is no fault
    #[arg(long)]
    repair: bool,
    /// No progress bar
    #[arg(long)]
    quiet: bool,
}

pub(super) fn run(args: Args) -> Result<ExitCode> {
    let Args { volume, json, fast, repair, quiet } = args;
    let Some(volume) = object::named(&volume)? else {
        bail!("check: {}: it is no object volume, dir:///… or s3://…", printable(&volume));
    };
    let bar = progress(quiet, MEASURED);
    let show = |Progress { read_bytes, all_bytes }: Progress| {
        bar.set_length(all_bytes);
        bar.set_position(read_bytes);
    };
    let options = Options { reads_data: !fast, repairs: repair, key: None, progress: &show };
    let checked = volume.check(options);
    bar.finish_and_clear();
    let report = checked?;
    let text = match json {
        true => format!("{}\n", to_json(&volume.name, &report)),
        false => to_text(&volume.name, &report),
    };
    output::to_stdout(text).context("check")?;
    Ok(if report.faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn to_json(name: &str, report: &Report) -> Value {
    let sum = |sum: Sum| json!({ "objects": sum.objects, "bytes": sum.bytes });
    let fault = |fault: &Fault| {
        let spans =
            fault.spans.iter().map(|span| json!({ "block": span.start, "blocks": span.blocks }));
        json!({ "key": fault.key, "why": fault.why, "blocks": spans.collect::<Vec<_>>() })
    };
    let root = report.root.as_ref();
    json!({
        "name": name,
        "uuid": root.map(|root| root.volume.to_string()),
        "root": root.map(|root| root.number),
        "state": root.map(|root| root.state.name()),
        "has_read_data": report.has_read_data,
        "read_bytes": report.read_bytes,
        "live_bytes": report.live_bytes,
        "needed": sum(report.needed),
        "dead": sum(report.dead),
        "late": sum(report.late),
        "removed": report.removed,
        "faults": report.faults.iter().map(fault).collect::<Vec<_>>(),
    })
}

fn to_text(name: &str, report: &Report) -> String {
    let mut text = String::new();
    for fault in &report.faults {
        let Fault { key, why, .. } = fault;
        let _ = writeln!(text, "{}: {}{}", printable(key), printable(why), blocks_of(fault));
    }
    let Report { read_bytes, live_bytes, needed, dead, late, removed, .. } = report;
    let name = printable(name);
    let _ = match &report.root {
        None => writeln!(text, "{name}: its newest root is damaged"),
        Some(root) if root.last.is_closed => writeln!(text, "{name}: root {}, closed", root.number),
        Some(root) => writeln!(
            text,
            "{name}: root {}; it is open on node {}, so this is what is in the store",
            root.number,
            printable(&root.last.node)
        ),
    };
    let Sum { objects, bytes } = needed;
    let _ = writeln!(text, "needed: {objects} objects, {bytes} bytes, of them {live_bytes} live");
    let _ = match report.has_read_data {
        true => writeln!(text, "read: {read_bytes} bytes of data"),
        false => writeln!(text, "read: no data"),
    };
    let _ = writeln!(text, "garbage: {} objects, {} bytes", dead.objects, dead.bytes);
    if late.objects > 0 {
        let Sum { objects, bytes } = late;
        let _ = match (*removed > 0, report.faults.is_empty()) {
            (true, _) => writeln!(text, "came too late: {objects} objects, {removed} removed"),
            (false, true) => writeln!(
                text,
                "came too late: {objects} objects, {bytes} bytes; --repair removes them"
            ),
            (false, false) => writeln!(text, "came too late: {objects} objects, {bytes} bytes"),
        };
    }
    let _ = match report.faults.len() {
        0 => writeln!(text, "no faults"),
        count => writeln!(text, "faults: {count}"),
    };
    text
}

/// Which blocks a fault affects.
fn blocks_of(fault: &Fault) -> String {
    if fault.spans.is_empty() {
        return String::new();
    }
    let shown = fault.spans.iter().take(SPANS_SHOWN_MAX).map(|span| match span.blocks {
        1 => span.start.to_string(),
        _ => format!("{}-{}", span.start, span.end() - 1),
    });
    let shown = shown.collect::<Vec<_>>().join(", ");
    let more = if fault.spans.len() > SPANS_SHOWN_MAX { ", …" } else { "" };
    format!("; {} blocks of 4 KiB cannot be read: {shown}{more}", fault.blocks())
}
