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
mod tls_files;

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
pub(crate) use self::rows::Metric;
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
    /// Repetitions
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
    /// Seconds per run
    #[arg(long, value_name = "S", default_value_t = 2.0)]
    seconds: f64,
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
    /// Write a report to be looked at with a browser
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Write all figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Fail if a target is missed
    #[arg(long)]
    strict: bool,
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
/// When nothing can be compared, a file cannot be written or, if it is to be so, a target is
/// missed.
pub(crate) fn run(args: &CompareArgs) -> Result<()> {
    if args.list {
        return output::print(&table::list());
    }
    let mut skipped = Vec::new();
    let campaign = campaign(args, &mut skipped)?;
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
    let mut launcher = Launcher::new(program, &dir)?;
    let mut results = Results { about, rows: Vec::new(), checks: Vec::new(), skipped };
    run_rows(&campaign, &mut launcher, &cpus, &mut results)?;
    run_checks(&campaign, &mut launcher, &mut results)?;
    drop(launcher);
    output::print(&table::summary(&results))?;
    write_files(args, &results)?;
    let missed = results.missed();
    ensure!(!args.strict || missed == 0, "{missed} targets missed");
    Ok(())
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
    let placements = match args.placement.contains(&PlacementArg::All) {
        true => Placement::ALL.to_vec(),
        false => args.placement.iter().filter_map(|arg| arg.placement()).collect(),
    };
    ensure!(args.threads > 0, "--threads begins at 1");
    ensure!((0.01..=3600.0).contains(&args.seconds), "--seconds is between 0.01 and 3600");
    let quick =
        |full: Duration, short: u64| if args.quick { Duration::from_millis(short) } else { full };
    let shrunk = |size: ByteSize| if args.quick { size.0.min(64 << 20) } else { size.0 };
    Ok(Campaign {
        rows,
        checks,
        products,
        placements,
        effort: Effort {
            runs: if args.quick { 1 } else { args.runs.into() },
            warmup: quick(Duration::from_millis(200), 30),
            measure: quick(Duration::from_secs_f64(args.seconds), 100),
            threads: args.threads,
        },
        check_effort: CheckEffort {
            connections: if args.quick { 100 } else { 1000 },
            cycles: if args.quick { 500 } else { 10_000 },
            idle: quick(Duration::from_secs(5), 500),
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
) -> Result<()> {
    for group in campaign.rows.chunk_by(|a, b| a.volume == b.volume) {
        let servers = start(campaign, launcher, group[0].volume, results)?;
        for row in group {
            for &placement in &campaign.placements {
                let skipped = &mut results.skipped;
                let result =
                    measure::row(row, placement, &servers, campaign.effort, cpus, skipped)?;
                output::print(&table::row(&result))?;
                results.rows.push(result);
            }
        }
    }
    results::judge(&mut results.rows);
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
        let mut servers = Vec::new();
        for &product in campaign.products.iter().filter(|product| product.role() != Role::Floor) {
            // A peer without volumes in memory is asked with one in a file.
            let memory = launcher.start(product, Volume::Memory, campaign.size)?;
            let server = match memory {
                None => launcher.start(product, Volume::File, campaign.file_size)?,
                found => found,
            };
            servers.extend(server);
        }
        match checks::run(id, &servers, campaign.effort, campaign.check_effort) {
            Ok(checks) => results.checks.extend(checks),
            Err(error) => results.skipped.push(format!("{error:#}")),
        }
    }
    Ok(())
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
