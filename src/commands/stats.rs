//! `sheave stats`: the counters of this user's servers.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use clap::builder::{OsStringValueParser, TypedValueParser as _};
use comfy_table::{CellAlignment, Table, presets};
use sheave_bench::output;
use sheave_core::printable;
use sheave_telemetry::{LastFailure, Stage, VolumeSnapshot, write_hgrm};
use sheave_volumes::export_name;

use crate::telemetry::{COLUMNS, ServerSnapshot, Servers, object_line, stage_rows};

/// Columns that are names; the others are numbers.
const NAME_COLUMNS: usize = 2;
/// The longest part of a file name that comes from a volume's name.
const NAME_MAX: usize = 100;

/// Show counters and latencies of the volumes that are served.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  sheave stats                      all volumes of all servers of this user
  sheave stats disk --json          one volume, whole histograms, for programs
  sheave stats --hgrm before.hgrm   before.disk.read.hgrm, …: for HdrHistogram's plotters")]
pub(crate) struct Args {
    /// Only the volume with this name
    #[arg(value_parser = OsStringValueParser::new().map(name_text))]
    volume: Option<String>,
    /// Write the latencies of each volume and op to a file in HdrHistogram's text format, in µs;
    /// names of volume and op are put before the extension
    #[arg(long, value_name = "FILE")]
    hgrm: Option<PathBuf>,
    /// Print JSON: a list of servers, with whole histograms in nanoseconds
    #[arg(long)]
    json: bool,
}

/// The name of an export; a file's name that is no text stands for that of its export.
fn name_text(argument: OsString) -> String {
    argument.into_string().unwrap_or_else(|argument| export_name(&argument))
}

/// Shows the statistics.
///
/// # Errors
/// When no server answers, none has the volume, or a file cannot be written.
pub(crate) fn run(args: Args) -> Result<()> {
    let mut servers = Servers::read().context("stats")?;
    for failure in &servers.failures {
        output::note(&format!("sheave: stats: {failure:#}"));
    }
    if let Some(volume) = &args.volume {
        servers.retain_volume(volume).context("stats")?;
    }
    if let Some(path) = &args.hgrm {
        // Standard output may be for a program.
        for written in write_files(&servers.snapshots, path).context("stats")? {
            output::note(&format!("wrote {}", printable(&written)));
        }
    }
    let text = match (args.json, &args.hgrm) {
        (true, _) => serde_json::to_string(&servers.snapshots).context("stats")? + "\n",
        (false, Some(_)) => return Ok(()),
        (false, None) => tables(&servers.snapshots),
    };
    output::to_stdout(text).context("stats")
}

fn tables(servers: &[ServerSnapshot]) -> String {
    let mut text = String::new();
    for server in servers {
        let uptime_s = server.uptime().as_secs_f64();
        let separator = if text.is_empty() { "" } else { "\n" };
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{separator}{}, process {}, up {uptime_s:.1} s; MB/s and IOPS are averages since then",
            printable(&server.program),
            server.pid
        );
        for volume in &server.volumes {
            let gauges = volume.gauges;
            let _ = write!(
                text,
                "{}: {} connections, {} bytes in flight",
                printable(&volume.name),
                gauges.connections,
                gauges.bytes_in_flight
            );
            if let Some(bytes) = gauges.held_bytes {
                let _ = write!(text, ", {bytes} bytes of memory");
            }
            if let Some(link) = gauges.link {
                let _ = write!(
                    text,
                    ", server {}, {} reconnects, {} bytes waiting, {} bytes kept until a flush",
                    link.state.name(),
                    link.reconnects,
                    link.waiting_bytes,
                    link.kept_bytes
                );
            }
            text.push('\n');
            if let Some(last) = &volume.last_failure {
                text.push_str(&storage_errors(volume, last));
            }
        }
        text.extend(server.objects.iter().map(object_line));
        let _ = writeln!(text, "{}", table(server).trim_fmt());
    }
    text
}

/// A line on a volume's storage errors.
fn storage_errors(volume: &VolumeSnapshot, last: &LastFailure) -> String {
    let count: u64 = volume.failures.iter().map(|failure| failure.count).sum();
    let age = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_secs(last.unix_s));
    let age_s = age.map_or(0, |age| age.as_secs());
    let (name, text) = (printable(&volume.name), printable(&last.text));
    format!("{name}: {count} storage errors, the last {age_s} s ago: {text}\n")
}

fn table(server: &ServerSnapshot) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(COLUMNS);
    let volumes = server.volumes.iter();
    table.add_rows(volumes.flat_map(|volume| stage_rows(volume, server.uptime())));
    for column in table.column_iter_mut().skip(NAME_COLUMNS) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Writes one file for each volume and op that has latencies, and prints its name.
fn write_files(servers: &[ServerSnapshot], path: &Path) -> Result<Vec<PathBuf>> {
    let mut names = BTreeSet::new();
    let mut written = Vec::new();
    for server in servers {
        for volume in &server.volumes {
            for op in &volume.ops {
                let Some(histogram) = op.stage(Stage::Total) else { continue };
                let (pid, kind) = (server.pid.to_string(), op.kind.name());
                let mut name = file_path(path, &[&volume.name, kind]);
                let mut number = 1;
                // Also for names that differ only in characters that are dropped.
                while !names.insert(name.clone()) {
                    let numbered = format!("{pid}-{number}");
                    let prefix = if number == 1 { &pid } else { &numbered };
                    name = file_path(path, &[prefix, &volume.name, kind]);
                    number += 1;
                }
                let mut text = String::new();
                write_hgrm(histogram, &mut text).context("cannot format a histogram")?;
                fs::write(&name, text)
                    .with_context(|| format!("cannot write {}", printable(&name)))?;
                written.push(name);
            }
        }
    }
    ensure!(!written.is_empty(), "no latency was recorded yet, so there is nothing to write");
    Ok(written)
}

/// `lat.hgrm` with "disk" and "read" becomes `lat.disk.read.hgrm`.
fn file_path(path: &Path, parts: &[&str]) -> PathBuf {
    let mut name = OsString::from(path.file_stem().unwrap_or_default());
    for part in parts {
        let plain = |c: char| if c.is_ascii_alphanumeric() || "-_".contains(c) { c } else { '_' };
        name.push(".");
        name.push(part.chars().take(NAME_MAX).map(plain).collect::<String>());
    }
    name.push(".");
    name.push(path.extension().unwrap_or_else(|| OsStr::new("hgrm")));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sheave_core::{Error, ErrorKind, Link, LinkGauges, LinkState, OpKind};
    use sheave_telemetry::Registry;

    use super::*;

    fn server() -> ServerSnapshot {
        let registry = Registry::new();
        let recorder = registry.volume("disk").recorder();
        recorder.record_n(OpKind::Read, Stage::Total, 20_000, 5);
        recorder.record(OpKind::Write, Stage::Total, 30_000);
        recorder.add_bytes(OpKind::Read, 10_000_000);
        recorder.add_error(OpKind::Trim);
        ServerSnapshot::of(&registry, Duration::from_secs(10))
    }

    #[test]
    fn the_table_has_a_line_for_each_op() {
        let text = tables(&[server()]);
        let lines: Vec<Vec<_>> =
            text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert!(text.lines().next().unwrap().contains("up 10.0 s"), "{text}");
        assert_eq!(lines[1].join(" "), "disk: 0 connections, 0 bytes in flight");
        assert_eq!(lines[2][..4], ["VOLUME", "OP", "COUNT", "ERRORS"]);
        let read =
            ["disk", "read", "5", "0", "1.00", "0.50", "20.5", "20.5", "20.5", "20.5", "20.5"];
        assert_eq!(lines[3], read);
        assert_eq!(lines[4][1..4], ["write", "1", "0"]);
        assert_eq!(lines[5][1..4], ["trim", "0", "1"]);
        assert_eq!(lines.len(), 6);
    }

    #[test]
    fn the_last_storage_error_is_named() {
        let registry = Registry::new();
        let (volume, error) = (
            registry.volume("disk"),
            Error::new(ErrorKind::NoSpace, "write", "a.img: No space left on device"),
        );
        volume.show_held_bytes(Some(Arc::new(65_536.into())));
        let link = Arc::<Link>::default();
        let state = LinkState::Down;
        link.set(LinkGauges { state, reconnects: 3, waiting_bytes: 4096, kept_bytes: 512 });
        volume.show_link(Some(link));
        for _ in 0..3 {
            volume.recorder().note_failure(OpKind::Write, &error, 1, 1_700_000_000);
        }
        let text = tables(&[ServerSnapshot::of(&registry, Duration::from_secs(10))]);
        let mut lines = text.lines().skip(1);
        let held = "disk: 0 connections, 0 bytes in flight, 65536 bytes of memory, server down, \
                    3 reconnects, 4096 bytes waiting, 512 bytes kept until a flush";
        assert_eq!(lines.next(), Some(held));
        let line = lines.next().unwrap();
        assert!(line.starts_with("disk: 3 storage errors, the last "), "{line}");
        assert!(line.ends_with(" s ago: write: a.img: No space left on device"), "{line}");
    }

    #[test]
    fn each_op_with_latencies_gets_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lat.hgrm");
        let written = write_files(&[server(), server()], &path).unwrap();
        let pid = std::process::id();
        let expected = ["lat.disk.read", "lat.disk.write"]
            .map(str::to_owned)
            .into_iter()
            .chain(["disk.read", "disk.write"].map(|name| format!("lat.{pid}.{name}")));
        let expected: Vec<_> =
            expected.map(|name| dir.path().join(format!("{name}.hgrm"))).collect();
        assert_eq!(written, expected);
        let text = fs::read_to_string(&written[0]).unwrap();
        assert!(text.contains("20.479 1.000000000000          5\n"), "{text}");

        let missing = dir.path().join("missing").join("lat.hgrm");
        let error = format!("{:#}", write_files(&[server()], &missing).unwrap_err());
        assert!(error.contains("lat.disk.read.hgrm: No such file"), "{error}");
        assert!(write_files(&[], &path).is_err());
    }

    #[test]
    fn names_act_on_no_terminal_and_are_whole_in_json() {
        let registry = Registry::new();
        let name = "a\n\x1b]0;b\x07";
        registry.volume(name).recorder().record(OpKind::Read, Stage::Total, 1);
        let server = ServerSnapshot::of(&registry, Duration::from_secs(1));
        let text = tables(std::slice::from_ref(&server));
        assert!(text.chars().all(|c| c == '\n' || sheave_core::is_plain(c)), "{text:?}");
        assert!(text.contains(r"a\n\u{1b}]0;b\u{7} "), "{text}");
        let json = serde_json::to_string(&[&server]).unwrap();
        assert!(json.contains(r#""a\n\u001b]0;b\u0007""#), "{json}");
    }

    #[test]
    fn each_of_several_names_that_look_alike_gets_its_file() {
        let registry = Registry::new();
        for name in ["a/b", "a b", "a\nb", "a.b"] {
            registry.volume(name).recorder().record(OpKind::Read, Stage::Total, 1);
        }
        let dir = tempfile::tempdir().unwrap();
        let server = ServerSnapshot::of(&registry, Duration::from_secs(1));
        let written = write_files(&[server], &dir.path().join("lat.hgrm")).unwrap();
        let files: BTreeSet<_> = written.iter().collect();
        assert_eq!((files.len(), fs::read_dir(&dir).unwrap().count()), (4, 4), "{written:?}");
    }

    #[test]
    fn no_name_leaves_its_directory() {
        let path = file_path(Path::new("out/lat"), &["../../etc/passwd", "read"]);
        assert_eq!(path, Path::new("out/lat.______etc_passwd.read.hgrm"));
        let long = file_path(Path::new("lat.txt"), &[&"é".repeat(300)]);
        assert_eq!(long.to_str().unwrap().len(), "lat..txt".len() + NAME_MAX);
    }
}
