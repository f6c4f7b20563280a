//! `sheave bench compare`: this server beside others, in one run.

mod about;
mod checks;
mod fio;
mod measure;
mod product;
mod results;
mod rows;
mod server;
mod table;
pub(crate) mod tls_files;

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use rustix::process::{Resource, getrlimit, setrlimit};

use self::checks::CheckEffort;
use self::measure::Effort;
use self::product::Volume;
pub(crate) use self::product::{Product, Role};
#[cfg(test)]
pub(crate) use self::results::examples;
pub(crate) use self::results::{About, Cell, Check, Results, RowResult, floor_distance};
use self::rows::{Row, matches};
use self::server::{Launcher, Server};
pub(crate) use self::table::percent_spread;
use crate::children;
use crate::output;
use crate::placement::{Cpus, Placement};
use crate::report;
use crate::units::ByteSize;

/// Options of `sheave bench compare`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  sheave bench compare --report report.html
  sheave bench compare --rows 'mem-4k-*' --servers sheave,nbdkit,ring --placement all
  sheave bench compare --quick")]
pub(crate) struct CompareArgs {
    /// Which rows and checks; a pattern with *, several joined by commas
    #[arg(long, value_name = "GLOB", default_value = "*", value_delimiter = ',')]
    rows: Vec<String>,
    /// Which servers [default: all that are installed]
    #[arg(
        long,
        value_name = "LIST",
        value_enum,
        value_delimiter = ',',
        hide_possible_values = true
    )]
    servers: Vec<Product>,
    /// Repetitions [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: Option<u16>,
    /// Seconds per run [default: 2]
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// Where client and server run; several joined by commas, or all
    #[arg(long, value_name = "WHERE", default_value = "unpinned", value_delimiter = ',')]
    placement: Vec<PlacementArg>,
    /// Size of volumes in memory
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    size: ByteSize,
    /// Size of volumes in files; all of them together should stay well below the kernel's limit
    /// for dirty pages
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    file_size: ByteSize,
    /// Threads of the client
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// Where to put sockets and images [default: the system's directory for temporary files]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Just see that everything works: one short run, small volumes; the figures mean little
    #[arg(long)]
    quick: bool,
    /// Run fio's nbd engine on every server too
    #[arg(long)]
    fio: bool,
    /// Write a report to be looked at with a browser
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Write all figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The program to start as `sheave` [default: this one]
    #[arg(long, value_name = "PATH", hide = true)]
    program: Option<PathBuf>,
    /// List rows and servers
    #[arg(long)]
    list: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PlacementArg {
    Unpinned,
    Together,
    Apart,
    All,
}

/// What to run, and for how long.
struct Campaign {
    rows: Vec<Row>,
    checks: Vec<&'static str>,
    products: Vec<Product>,
    placements: Vec<Placement>,
    effort: Effort,
    check_effort: CheckEffort,
    size: u64,
    file_size: u64,
}

/// Runs the comparison, and prints and writes what it gave.
///
/// # Errors
/// When nothing can be compared, or a file cannot be written.
pub(crate) fn run(args: &CompareArgs) -> Result<()> {
    compare(args, &mut io::stdout())
}

fn compare(args: &CompareArgs, out: &mut dyn Write) -> Result<()> {
    if args.list {
        return output::print(out, table::list());
    }
    let mut skipped = Vec::new();
    let campaign = campaign(args, &mut skipped)?;
    args.report.iter().chain(&args.json).try_for_each(|path| output::check_writable(path))?;
    children::clean_up_on_signals()?;
    raise_descriptor_limit();
    let cpus = Cpus::ours()?;
    let dir = args.dir.clone().unwrap_or_else(env::temp_dir);
    let Effort { runs, measure, .. } = campaign.effort;
    let about = about::about(&campaign.products, &dir, runs, measure, cpus.count());
    let program = match &args.program {
        Some(program) => program.clone(),
        None => env::current_exe().context("find this program")?,
    };
    if about.is_busy(cpus.count()) {
        let load = &about.load_average;
        output::note(&format!("others are at work here (load {load}): figures will be poor"));
    }
    let mut launcher = Launcher::new(program, &dir)?;
    let mut results =
        Results { about, rows: Vec::new(), checks: Vec::new(), fio: Vec::new(), skipped };
    run_rows(&campaign, &mut launcher, &cpus, &mut results, out)?;
    run_checks(&campaign, &mut launcher, &mut results)?;
    if args.fio {
        run_fio(&campaign, &mut launcher, &mut results)?;
    }
    drop(launcher);
    ensure!(results.has_figures(), "nothing could be compared: {}", results.skipped.join("; "));
    output::print(out, table::summary(&results))?;
    write_files(args, &results)
}

fn campaign(args: &CompareArgs, skipped: &mut Vec<String>) -> Result<Campaign> {
    let wanted = |id: &str| args.rows.iter().any(|pattern| matches(pattern, id));
    let rows: Vec<_> = rows::all().into_iter().filter(|row| wanted(row.id)).collect();
    let checks: Vec<_> = checks::IDS.into_iter().filter(|id| wanted(id)).collect();
    ensure!(!rows.is_empty() || !checks.is_empty(), "no row matches; see --list");
    let mut products = match args.servers.is_empty() {
        true => Product::value_variants().to_vec(),
        false => args.servers.clone(),
    };
    for (product, program) in about::missing(&products) {
        skipped.push(format!("{program} is not installed"));
        products.retain(|kept| *kept != product);
    }
    ensure!(!products.is_empty(), "nothing can be compared: {}", skipped.join(", "));
    let placements = match args.placement.contains(&PlacementArg::All) {
        true => Placement::ALL.to_vec(),
        false => args.placement.iter().filter_map(|arg| arg.placement()).collect(),
    };
    ensure!(args.threads > 0, "--threads begins at 1");
    let (runs, seconds) = if args.quick { (1, 0.1) } else { (5, 2.0) };
    let (runs, seconds) = (args.runs.unwrap_or(runs), args.seconds.unwrap_or(seconds));
    ensure!((0.01..=3600.0).contains(&seconds), "--seconds is between 0.01 and 3600");
    let quick =
        |full_ms, quick_ms| Duration::from_millis(if args.quick { quick_ms } else { full_ms });
    let shrunk = |size: ByteSize| if args.quick { size.0.min(64 << 20) } else { size.0 };
    Ok(Campaign {
        rows,
        checks,
        products,
        placements,
        effort: Effort {
            runs: runs.into(),
            warmup: quick(200, 30),
            measure: Duration::from_secs_f64(seconds),
            threads: args.threads,
        },
        check_effort: CheckEffort {
            connections: if args.quick { 100 } else { 1000 },
            cycles: if args.quick { 500 } else { 10_000 },
            idle: quick(5000, 500),
        },
        size: shrunk(args.size),
        file_size: shrunk(args.file_size),
    })
}

/// Runs the rows, volume by volume.
fn run_rows(
    campaign: &Campaign,
    launcher: &mut Launcher,
    cpus: &Cpus,
    results: &mut Results,
    out: &mut dyn Write,
) -> Result<()> {
    for group in campaign.rows.chunk_by(|a, b| a.volume == b.volume) {
        let servers = start(campaign, launcher, group[0].volume, results)?;
        for row in group {
            for &placement in &campaign.placements {
                let skipped = &mut results.skipped;
                let result =
                    measure::row(row, placement, &servers, campaign.effort, cpus, skipped)?;
                output::print(out, table::row(&result))?;
                results.rows.push(result);
            }
        }
    }
    Ok(())
}

/// Starts all servers that have such a volume, and fills it.
fn start(
    campaign: &Campaign,
    launcher: &mut Launcher,
    volume: Volume,
    results: &mut Results,
) -> Result<Vec<Server>> {
    let mut servers = Vec::new();
    for &product in &campaign.products {
        let size = match product.needs_image(volume) {
            true => campaign.file_size,
            false => campaign.size,
        };
        let started = launcher.start(product, volume, size).and_then(|server| {
            let keeps =
                volume != Volume::Null && !matches!(product, Product::Echo | Product::EchoPoll);
            server.iter().filter(|_| keeps).try_for_each(|server| server.fill(size))?;
            Ok(server)
        });
        match started {
            Ok(server) => servers.extend(server),
            // Without our own there is nothing to compare with.
            Err(error) if product.role() == Role::Subject => return Err(error),
            Err(error) => results.skipped.push(format!("{}: {error:#}", product.name())),
        }
    }
    Ok(servers)
}

/// Runs the checks, each on fresh servers: what a load left behind is not what they ask for.
fn run_checks(campaign: &Campaign, launcher: &mut Launcher, results: &mut Results) -> Result<()> {
    for id in &campaign.checks {
        let servers = start_real(campaign, launcher, results)?;
        match checks::run(id, &servers, campaign.effort, campaign.check_effort) {
            Ok(checks) => results.checks.extend(checks),
            Err(error) => results.skipped.push(format!("{error:#}")),
        }
    }
    Ok(())
}

/// Runs fio's nbd engine on every server.
fn run_fio(campaign: &Campaign, launcher: &mut Launcher, results: &mut Results) -> Result<()> {
    for server in start_real(campaign, launcher, results)? {
        match fio::jobs(&server, campaign.effort.measure) {
            Ok(found) => results.fio.extend(found),
            Err(error) => results.skipped.push(format!("{}: {error:#}", server.product.name())),
        }
    }
    Ok(())
}

/// Starts every server that is no floor, empty. One without volumes in memory gets a file.
fn start_real(
    campaign: &Campaign,
    launcher: &mut Launcher,
    results: &mut Results,
) -> Result<Vec<Server>> {
    let mut servers = Vec::new();
    for &product in campaign.products.iter().filter(|product| product.role() != Role::Floor) {
        let started = match launcher.start(product, Volume::Memory, campaign.size) {
            Ok(None) => launcher.start(product, Volume::File, campaign.file_size),
            started => started,
        };
        match started {
            Ok(server) => servers.extend(server),
            Err(error) if product.role() == Role::Subject => return Err(error),
            Err(error) => results.skipped.push(format!("{}: {error:#}", product.name())),
        }
    }
    Ok(servers)
}

fn write_files(args: &CompareArgs, results: &Results) -> Result<()> {
    let json = args.json.iter().map(|path| Ok((path, serde_json::to_string_pretty(results)?)));
    let html = args.report.iter().map(|path| Ok((path, report::html(results))));
    json.chain(html).try_for_each(|file: Result<(&PathBuf, String)>| {
        let (path, text) = file?;
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    })
}

/// A thousand connections take more descriptors than processes have by default. Servers inherit
/// the limit. If it cannot be raised, the check of idle connections says what is missing.
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}

impl PlacementArg {
    fn placement(self) -> Option<Placement> {
        match self {
            Self::Unpinned => Some(Placement::Unpinned),
            Self::Together => Some(Placement::Together),
            Self::Apart => Some(Placement::Apart),
            Self::All => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;
    use serde_json::Value;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: CompareArgs,
    }

    fn parse(line: &str) -> CompareArgs {
        Cli::parse_from(std::iter::once("compare").chain(line.split_whitespace())).args
    }

    /// Runs a comparison in `dir`. The program under test is not this crate's, so others are
    /// compared here. Answers what it wrote as JSON.
    fn compared(dir: &Path, options: &str) -> Value {
        let (json, html) = (dir.join("c.json"), dir.join("c.html"));
        let shown = dir.display();
        let args = parse(&format!(
            "--quick --dir {shown} --json {shown}/c.json --report {shown}/c.html {options}"
        ));
        compare(&args, &mut io::sink()).unwrap();
        assert!(fs::read_to_string(&html).unwrap().contains("nbdkit"));
        let found: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
        assert_eq!(found["skipped"], Value::Array(Vec::new()));
        found
    }

    fn count(value: &Value) -> usize {
        value.as_array().map_or(0, Vec::len)
    }

    #[test]
    fn peers_are_compared_and_nothing_is_left_behind() {
        let dir = tempfile::TempDir::new().unwrap();
        let found = compared(
            dir.path(),
            "--size 16M --file-size 16M --servers nbdkit,qemu-nbd,nbd-server \
             --placement unpinned,together --rows file-4k-qd32-write,tls-1m-qd8-read,idle-*",
        );
        // A row of three servers and one of two, at two placements.
        let rows = found["rows"].as_array().unwrap();
        let cells: Vec<_> = rows.iter().map(|row| count(&row["cells"])).collect();
        assert_eq!(cells, [2, 2, 3, 3]);
        assert!(rows.iter().all(|row| row["cells"][0]["ops_per_s"]["median"].as_f64() > Some(1.0)));
        assert_eq!(count(&found["checks"]), 3 * 3);
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }

    #[test]
    fn fio_verifies_a_server() {
        let dir = tempfile::TempDir::new().unwrap();
        // The job writes 64 MiB.
        let options = "--servers nbdkit --rows churn --fio --size 64M";
        let found = compared(dir.path(), options);
        assert_eq!(count(&found["checks"]), 1);
        let jobs = found["fio"].as_array().unwrap();
        assert!(jobs.iter().any(|job| job["job"] == "verify" && job["way"] == "read"));
    }

    #[test]
    fn files_that_cannot_be_written_are_found_before_the_run() {
        for option in ["--json", "--report"] {
            let args = parse(&format!("--quick {option} /nowhere/out"));
            let refused = compare(&args, &mut io::sink()).unwrap_err();
            assert!(refused.to_string().contains("/nowhere/out"), "{refused:#}");
        }
    }

    #[test]
    fn a_comparison_of_nothing_is_refused() {
        let refused = compare(&parse("--rows no-such-row"), &mut io::sink());
        assert!(refused.unwrap_err().to_string().contains("--list"));
    }
}
