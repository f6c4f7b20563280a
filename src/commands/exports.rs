//! `sheave exports`: what the servers of this user offer, and to which clients.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::HumanBytes;
use serde::Serialize;
use sheave_bench::output;
use sheave_core::printable;

use crate::telemetry::{ClientEntry, ExportEntry, ServerSnapshot, Servers};

const COLUMNS: [&str; 7] =
    ["EXPORT", "SIZE", "CLIENT", "CERTIFICATE", "CONNECTED", "READ", "WRITTEN"];
/// The columns that are numbers.
const NUMBER_COLUMNS: [usize; 4] = [1, 4, 5, 6];

/// List the exports of running servers, and their clients.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  sheave exports                    all exports of all servers of this user
  sheave exports --json             the same for programs

A client is its address, or its process and user at a unix socket; its certificate is the first name
in it. READ and WRITTEN count the data of its requests that succeeded.")]
pub(crate) struct Args {
    /// Print JSON: a list of servers, with sizes in bytes and times in milliseconds
    #[arg(long)]
    json: bool,
}

/// A server, as `--json` prints it.
#[derive(Serialize)]
struct Server<'a> {
    pid: u32,
    program: &'a str,
    exports: &'a [ExportEntry],
}

/// Lists them.
///
/// # Errors
/// When no server answers.
pub(crate) fn run(args: Args) -> Result<()> {
    let servers = Servers::read().context("exports")?;
    for failure in &servers.failures {
        output::note(&format!("sheave: exports: {failure:#}"));
    }
    let text = if args.json {
        serde_json::to_string(&servers.snapshots.iter().map(server).collect::<Vec<_>>())
            .context("exports")?
            + "\n"
    } else {
        tables(&servers.snapshots)
    };
    output::to_stdout(text).context("exports")
}

fn server(snapshot: &ServerSnapshot) -> Server<'_> {
    let ServerSnapshot { pid, program, exports, .. } = snapshot;
    Server { pid: *pid, program, exports }
}

fn tables(servers: &[ServerSnapshot]) -> String {
    let mut text = String::new();
    for server in servers.iter().filter(|server| !server.exports.is_empty()) {
        let separator = if text.is_empty() { "" } else { "\n" };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{separator}{}, process {}", printable(&server.program), server.pid);
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header(COLUMNS);
        table.add_rows(server.exports.iter().flat_map(rows));
        for column in NUMBER_COLUMNS {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let _ = writeln!(text, "{}", table.trim_fmt());
    }
    text
}

/// A row for each client, or one for an export that has none.
fn rows(export: &ExportEntry) -> Vec<[String; 7]> {
    let size = HumanBytes(export.size_bytes).to_string();
    let none = || "-".to_owned();
    let row = |client: Option<&ClientEntry>| {
        let of = |take: &dyn Fn(&ClientEntry) -> String| client.map_or_else(none, take);
        [
            printable(&export.name).to_string(),
            size.clone(),
            of(&|client| printable(&client.peer).to_string()),
            of(&|client| {
                client.certificate.as_ref().map_or_else(none, |name| printable(name).to_string())
            }),
            of(&|client| duration(client.connected_ms)),
            of(&|client| HumanBytes(client.bytes_read).to_string()),
            of(&|client| HumanBytes(client.bytes_written).to_string()),
        ]
    };
    match &export.clients[..] {
        [] => vec![row(None)],
        clients => clients.iter().map(|client| row(Some(client))).collect(),
    }
}

/// Hours, minutes and seconds.
fn duration(ms: u64) -> String {
    let s = ms / 1000;
    format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sheave_telemetry::Registry;

    use super::*;

    #[test]
    fn each_client_has_a_row_and_no_name_commands_the_terminal() {
        let client = ClientEntry {
            peer: "10.0.0.1:5".to_owned(),
            certificate: Some("backup\u{1b}[2J".to_owned()),
            connected_ms: 3_723_999,
            bytes_read: 2048,
            bytes_written: 0,
        };
        let other = ClientEntry { certificate: None, ..client.clone() };
        let export = |name: &str, clients| ExportEntry {
            name: name.to_owned(),
            description: String::new(),
            size_bytes: 1 << 20,
            read_only: false,
            connections_max: None,
            clients,
        };
        let exports = vec![export("a\nb", vec![client, other]), export("idle", Vec::new())];
        let server =
            ServerSnapshot::of(&Registry::new(), Duration::from_secs(1)).with_exports(exports);
        let text = tables(&[server]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 5, "{text}");
        let words: Vec<_> = lines[2].split_whitespace().collect();
        let want =
            ["a\\nb", "1.00", "MiB", "10.0.0.1:5", "backup\\u{1b}[2J", "1:02:03", "2.00", "KiB"];
        assert_eq!(words[..8], want);
        assert!(lines[4].trim_start().starts_with("idle"), "{text}");
        assert!(!text.contains('\u{1b}'));
    }
}
