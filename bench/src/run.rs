//! `sheave bench run`: one load on one server.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use clap::builder::{OsStringValueParser, TypedValueParser};
use comfy_table::{CellAlignment, Table, presets};
use hdrhistogram::Histogram;
use serde::Serialize;
use sheave_core::printable;
use sheave_proto::ReplyStyle;
use sheave_volumes::volume_text;

use crate::load::{self, Length, Order, Outcome, Plan, Target, Workload};
use crate::output;
use crate::process::ProcessTree;
use crate::signals::Interrupt;
use crate::stats::Percentiles;
use crate::units::{self, ByteSize};

/// Errors shown of a verifying load.
const FAULTS_SHOWN_MAX: usize = 5;

/// Options of `sheave bench run`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  sheave bench run 'nbd+unix:///?socket=/tmp/s' --qd 32 --bs 4k --rw read
  sheave bench run nbd://localhost/disk --rw mixed --read-percent 70 --verify --span 1G")]
pub(crate) struct RunArgs {
    /// The server: nbd://host/export, nbd+unix:///export?socket=PATH, nbds://… with
    /// ?tls-certificates=DIR
    #[arg(value_parser = uri_parser())]
    url: String,
    /// What to do; writes overwrite what the volume holds
    #[arg(long, value_enum, default_value_t = Rw::Read)]
    rw: Rw,
    /// Reads among 100 requests of --rw mixed
    #[arg(long, value_name = "N", default_value_t = 70,
          value_parser = clap::value_parser!(u8).range(1..=99))]
    read_percent: u8,
    /// One block after the other instead of random ones
    #[arg(long)]
    sequential: bool,
    /// Bytes per request
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = parse_block_size)]
    bs: ByteSize,
    /// Requests in flight per connection
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = parse_depth)]
    qd: usize,
    /// Connections
    #[arg(long, short, value_name = "N", default_value_t = 1)]
    connections: usize,
    /// Threads that share the connections; at most the CPUs there are
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// How long to measure
    #[arg(long, value_name = "S", default_value_t = 5.0, value_parser = parse_some_seconds)]
    seconds: f64,
    /// How long to run before that
    #[arg(long, value_name = "S", default_value_t = 0.5, value_parser = parse_seconds)]
    warmup: f64,
    /// Stop after so many requests instead
    #[arg(long, value_name = "N")]
    ops: Option<u64>,
    /// Requests per second in all; without it as many as possible
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    rate: Option<f64>,
    /// Flush after so many writes of a connection
    #[arg(long, value_name = "N")]
    flush_every: Option<u64>,
    /// Use only so much of the volume, from its start
    #[arg(long, value_name = "SIZE")]
    span: Option<ByteSize>,
    /// Write checked patterns, check every read, and read everything back at the end
    #[arg(long)]
    verify: bool,
    /// Makes two runs alike
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Ask for structured replies
    #[arg(long)]
    structured: bool,
    /// Ask for extended headers
    #[arg(long)]
    extended: bool,
    /// The server's process, whose CPU time is measured; on unix sockets it is found without
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Write the latencies in HdrHistogram's text format, in microseconds
    #[arg(long, value_name = "FILE")]
    hgrm: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Rw {
    Read,
    Write,
    Mixed,
}

/// What a run gave, for programs.
#[derive(Debug, Serialize)]
struct Summary {
    url: String,
    seconds: f64,
    ops_per_s: f64,
    bytes_per_s: f64,
    read: Option<Percentiles>,
    write: Option<Percentiles>,
    flush: Option<Percentiles>,
    all: Percentiles,
    server_cpu_us_per_op: Option<f64>,
    server_resident_bytes: Option<u64>,
    client_cpu_us_per_op: f64,
    checked: u64,
    faults: u64,
    errors: u64,
}

/// Runs the load and prints what it gave.
///
/// # Errors
/// When the load fails or is interrupted, the server answered with errors, or read data was
/// wrong.
pub(crate) fn run(args: &RunArgs) -> Result<()> {
    let plan = plan(args)?;
    args.hgrm.iter().try_for_each(|path| output::check_writable(path))?;
    let interrupt = Interrupt::default();
    let outcome = load::run_unless(&plan, &interrupt, || interrupt.catch())?;
    let summary = summary(args, &plan, &outcome);
    if args.json {
        output::to_stdout(serde_json::to_string_pretty(&summary)? + "\n")?;
    } else {
        output::to_stdout(shown(&summary, &outcome))?;
    }
    if let Some(path) = &args.hgrm {
        let mut text = String::new();
        sheave_telemetry::write_hgrm(&outcome.recorder.all(), &mut text)?;
        fs::write(path, text).with_context(|| format!("write {}", printable(&path)))?;
    }
    ensure!(!interrupt.is_set(), "interrupted after {:.1} s", outcome.elapsed.as_secs_f64());
    verdict(&outcome)
}

/// The paths in a URI may hold any byte, as it is or escaped.
fn uri_parser() -> impl TypedValueParser<Value = String> {
    OsStringValueParser::new().try_map(|uri| volume_text(&uri))
}

fn plan(args: &RunArgs) -> Result<Plan> {
    let style = match (args.extended, args.structured) {
        (true, _) => ReplyStyle::Extended,
        (false, true) => ReplyStyle::Structured,
        (false, false) => ReplyStyle::Simple,
    };
    let target = Target::parse(&args.url, style)?;
    let cpus = thread::available_parallelism()?.get();
    ensure!(args.threads <= cpus, "--threads is at most the number of CPUs, {cpus}");
    ensure!(args.connections > 0 && args.threads > 0, "--connections and --threads begin at 1");
    let workload = Workload {
        read_percent: match args.rw {
            Rw::Read => 100,
            Rw::Write => 0,
            Rw::Mixed => args.read_percent,
        },
        order: if args.sequential { Order::Sequential } else { Order::Random },
        block_size: usize::try_from(args.bs.0)?,
        queue_depth: args.qd,
        rate_per_connection: args.rate.map(|rate| rate / args.connections as f64),
        flush_every: args.flush_every,
    };
    let length = match args.ops {
        Some(ops) => Length::Ops(ops),
        None => Length::Time {
            warmup: Duration::from_secs_f64(args.warmup),
            measure: Duration::from_secs_f64(args.seconds),
        },
    };
    Ok(Plan {
        target,
        workload,
        connections: args.connections,
        threads: args.threads.min(args.connections),
        length,
        span: args.span.map(|span| span.0),
        verify: args.verify,
        seed: args.seed,
        server: args.pid.map(ProcessTree::new),
    })
}

fn summary(args: &RunArgs, plan: &Plan, outcome: &Outcome) -> Summary {
    let recorder = &outcome.recorder;
    let of =
        |histogram: &Histogram<u64>| (!histogram.is_empty()).then(|| Percentiles::of(histogram));
    let holdings = outcome.server.and_then(|server| server.holdings().ok());
    Summary {
        url: args.url.clone(),
        seconds: outcome.elapsed.as_secs_f64(),
        ops_per_s: outcome.ops_per_s(),
        bytes_per_s: outcome.bytes_per_s(plan.workload.block_size),
        read: of(&recorder.reads),
        write: of(&recorder.writes),
        flush: of(&recorder.flushes),
        all: Percentiles::of(&recorder.all()),
        server_cpu_us_per_op: outcome.server_cpu_us_per_op(),
        server_resident_bytes: holdings.map(|holdings| holdings.resident_bytes),
        client_cpu_us_per_op: outcome.client_cpu_us_per_op(),
        checked: recorder.checked_count,
        faults: recorder.fault_count,
        errors: recorder.errors.values().sum(),
    }
}

fn shown(summary: &Summary, outcome: &Outcome) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header(["", "requests", "p50", "p90", "p99", "p99.9", "max"]);
    let recorder = &outcome.recorder;
    let rows = [
        ("read", recorder.reads.len(), summary.read),
        ("write", recorder.writes.len(), summary.write),
        ("flush", recorder.flushes.len(), summary.flush),
    ];
    for (name, count, percentiles) in rows {
        let Some(Percentiles { p50_us, p90_us, p99_us, p999_us, max_us }) = percentiles else {
            continue;
        };
        let mut row = vec![name.to_owned(), count.to_string()];
        row.extend([p50_us, p90_us, p99_us, p999_us, max_us].map(units::micros));
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut out = format!(
        "{}, {}, in {:.2} s\n{table}\n",
        units::rate(summary.ops_per_s),
        units::throughput(summary.bytes_per_s),
        summary.seconds
    );
    if let Some(us) = summary.server_cpu_us_per_op {
        out += &format!("server: {} of CPU per request\n", units::micros(us));
    }
    if let Some(bytes) = summary.server_resident_bytes {
        out += &format!("server: {} resident\n", ByteSize(bytes));
    }
    let client = units::micros(summary.client_cpu_us_per_op);
    out += &format!("client: {client} of CPU per request\n");
    if summary.checked > 0 {
        out += &format!("verify: {} reads checked, {} wrong\n", summary.checked, summary.faults);
    }
    out
}

/// A run with errors has failed, however fast it was.
fn verdict(outcome: &Outcome) -> Result<()> {
    let recorder = &outcome.recorder;
    for fault in recorder.faults.iter().take(FAULTS_SHOWN_MAX) {
        output::note(&fault.to_string());
    }
    ensure!(recorder.fault_count == 0, "{} reads returned wrong data", recorder.fault_count);
    let errors: Vec<_> =
        recorder.errors.iter().map(|(errno, count)| format!("{count} × errno {errno}")).collect();
    ensure!(errors.is_empty(), "the server answered with errors: {}", errors.join(", "));
    Ok(())
}

fn parse_seconds(text: &str) -> Result<f64> {
    let seconds: f64 = text.parse()?;
    ensure!((0.0..=86_400.0).contains(&seconds), "between 0 and 86400");
    Ok(seconds)
}

fn parse_some_seconds(text: &str) -> Result<f64> {
    let seconds = parse_seconds(text)?;
    ensure!(seconds > 0.0, "more than 0");
    Ok(seconds)
}

fn parse_block_size(text: &str) -> Result<ByteSize> {
    let size: ByteSize = text.parse()?;
    ensure!(size.0 > 0, "more than 0");
    Ok(size)
}

fn parse_rate(text: &str) -> Result<f64> {
    let rate: f64 = text.parse()?;
    ensure!(rate.is_finite() && rate > 0.0, "more than 0");
    Ok(rate)
}

fn parse_depth(text: &str) -> Result<usize> {
    let depth: usize = text.parse()?;
    ensure!((1..=load::QUEUE_DEPTH_MAX).contains(&depth), "1 to {}", load::QUEUE_DEPTH_MAX);
    Ok(depth)
}
