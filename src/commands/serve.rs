//! `sheave serve`: volumes to NBD clients.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::{CommandFactory as _, ValueEnum};
use sheave_backends::{OpenBatch, OpenOptions, VolumeSpec};
use sheave_nbd::{Export, Limits, Listener, Server, ServerConfig, TlsFiles, server_tls};
use sheave_shard::{EngineChoice, EngineConfig};
use sheave_telemetry::Registry;

use super::{NO_PROC, VolumeParser};
use crate::cli::Cli;
use crate::limits::raise_open_files;
use crate::process::{EndSignals, default_shards, runtime, start_log};
use crate::systemd::{Passed, passed_sockets};
use crate::telemetry::{MetricsServer, StatsSocket};

const DEFAULT_LISTEN: &str = "127.0.0.1:10809";
/// The most names of exports in a line of the log.
const NAMES_LOGGED: usize = 10;

#[derive(clap::Args)]
#[command(after_help = EXAMPLES, after_long_help = format!("{MANUAL}\n\n{EXAMPLES}"))]
pub(crate) struct Args {
    /// Volumes: URLs or paths
    #[arg(required = true, value_name = "VOLUME", value_parser = VolumeParser(VolumeArg::parse))]
    volumes: Vec<VolumeArg>,
    /// TCP address, all that HOST has; port 0 picks a free one [default: 127.0.0.1:10809]
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "socket")]
    listen: Option<String>,
    /// Unix socket, instead of TCP; the umask says who may connect
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Export name [default: the file name]; with several volumes once for each, in order.
    ///
    /// Clients of a single export need no name; among several there is no default.
    #[arg(long = "name", value_name = "EXPORT")]
    names: Vec<String>,
    /// Refuse all writes
    #[arg(long)]
    read_only: bool,
    /// Certificate chain (PEM); with it clients must use TLS
    #[arg(long, value_name = "F", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key of the certificate (PEM)
    #[arg(long, value_name = "F", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Authorities (PEM) of which clients must show a certificate
    #[arg(long, value_name = "F", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
    /// Threads that serve connections [default: CPUs, at most 4]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=64))]
    shards: Option<u8>,
    /// Microseconds that a busy shard looks for work before it sleeps; 0 = never
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    poll_us: u32,
    /// Serve Prometheus metrics over HTTP at this address
    #[arg(long, value_name = "HOST:PORT")]
    metrics: Option<String>,
    /// How connections are run
    #[arg(long, value_enum, default_value_t = EngineArg::Auto)]
    engine: EngineArg,
}

const EXAMPLES: &str = "\
Examples:
  sheave serve disk.img --socket /run/disk.sock
  sheave serve 'memory:?size=1G' --listen 0.0.0.0:10809 --tls-cert cert.pem --tls-key key.pem
  sheave serve a.img b.img --listen 127.0.0.1:0        # exports a.img and b.img
  sheave serve 'disk.img?fault=read:delay=200ms:probability=0.01' --socket /tmp/slow.sock

With a socket passed by systemd (LISTEN_FDS), --listen and --socket are not needed.";

const MANUAL: &str = "\
Parameters of a VOLUME, after '?' and joined by '&' (quote it, since both mean something to shells):
  size=10G                  memory, null: its size in bytes, K, M, G, T or P
  direct=true               a file: bypass the page cache
  lock=false                a file: even if another program has it open for writing
  read-only=true            refuse to write
  limit-bps=100M            bytes a second, of all connections together
  limit-iops=5000           ops a second
  fault=RULE fault-seed=N   failures on purpose; several rules are allowed

A path is taken as it is, up to '?'. In file:///… a byte may be written %E9, and '?' as %3F. A file
whose name is no UTF-8 has an export name with such escapes.

A RULE is ops joined by '+' (read, write, flush, trim, write-zeroes, cache, block-status, any),
then error=EIO or delay=200ms, then, if need be, after=N, count=N, probability=P, range=FROM-TO;
all between colons: fault=read+write:error=EIO:after=100

At most 16384 connections are served, and 1152 may negotiate at a time, for 10 s each; more wait
until there is room. When all negotiate, one that is silent for 3 s makes room for the next. An
address (an IPv6 network /64, a user of the unix socket) gets at most seven eighths of either.
The limit of open files is raised to the hard one (`ulimit -Hn`, LimitNOFILE= in a unit).
SIGINT and SIGTERM end it: connections have 5 s to finish what they have begun; a second signal ends
it at once. SHEAVE_LOG=debug tells more on standard error, such as each connection.";

/// A volume as it was written, and what that means.
#[derive(Clone)]
struct VolumeArg {
    text: String,
    spec: VolumeSpec,
}

impl VolumeArg {
    fn parse(text: String) -> Result<Self, sheave_core::Error> {
        Ok(Self { spec: text.parse()?, text })
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum EngineArg {
    /// io_uring where the kernel has it, else threads
    Auto,
    /// io_uring or fail
    Uring,
    /// A thread a connection
    Threads,
}

impl From<EngineArg> for EngineChoice {
    fn from(arg: EngineArg) -> Self {
        match arg {
            EngineArg::Auto => Self::Auto,
            EngineArg::Uring => Self::Uring,
            EngineArg::Threads => Self::Threads,
        }
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    check_names(&args);
    start_log();
    raise_open_files();
    let passed = passed_sockets().context("serve")?;
    let runtime = runtime().context("serve")?;
    let outcome = runtime.block_on(serve(args, passed)).context("serve");
    // Not waited for: after a second signal connections may still be busy.
    runtime.shutdown_background();
    outcome
}

async fn serve(args: Args, passed: Vec<Passed>) -> anyhow::Result<()> {
    if !sheave_backends::are_holders_visible() {
        tracing::warn!("{NO_PROC}");
    }
    let args = Arc::new(args);
    let opening = Arc::clone(&args);
    let exports = tokio::select! {
        // A disk may take its time.
        opened = tokio::task::spawn_blocking(move || open_volumes(&opening)) => opened??,
        signal = signals.end(|| {}) => {
            tracing::info!("ending: {signal}");
            return Ok(());
        }
    };
    let names: Vec<String> = exports.iter().map(|export| export.name.clone()).collect();
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(cert), Some(key)) => {
            let client_ca = args.tls_client_ca.clone();
            Some(server_tls(&TlsFiles { cert: cert.clone(), key: key.clone(), client_ca })?)
        }
        _ => None,
    };
    let registry = Arc::new(Registry::new());
    let engine = EngineConfig {
        choice: args.engine.into(),
        shards: args.shards.map_or_else(default_shards, usize::from),
        poll_us: args.poll_us,
    };
    let config = ServerConfig { exports, tls, engine, limits: Limits::default() };
    let mut server = Server::start(config, &registry)?;
    let _metrics = match &args.metrics {
        Some(address) => Some(MetricsServer::start(address, Arc::clone(&registry))?),
        None => None,
    };
    let _stats = match StatsSocket::start(registry) {
        Ok(socket) => Some(socket),
        Err(error) => {
            // Serving matters more than being watched.
            tracing::warn!("no statistics for `sheave stats`: {error:#}");
            None
        }
    };
    // Last, since whoever can connect may ask for statistics next.
    let (exports, engine) = (summary(&names), server.engine());
    for listener in listeners(&args, passed)? {
        tracing::info!(exports, listener = listener.name(), engine, "serving");
        server.listen(listener);
    }
    tracing::info!("ending: {}", signals.end(|| {}).await);
    tokio::select! {
        () = server.stop() => Ok(()),
        signal = signals.insisted(|| {}) => {
            bail!("a second signal, {signal}, ended it before all connections were done")
        }
    }
}

fn open_volumes(args: &Args) -> anyhow::Result<Vec<Export>> {
    let options = OpenOptions { read_only: args.read_only, ..OpenOptions::default() };
    let batch = OpenBatch::begin();
    let mut exports = Vec::with_capacity(args.volumes.len());
    for (index, VolumeArg { text, spec }) in args.volumes.iter().enumerate() {
        let volume = spec.open(&options)?;
        let name = args.names.get(index).cloned().unwrap_or_else(|| spec.name());
        exports.push(Export { name, description: text.clone(), volume });
    }
    batch.check()?;
    Ok(exports)
}

/// Ends with a usage error unless there is a name for each volume, or none.
fn check_names(args: &Args) {
    let (names, volumes) = (args.names.len(), args.volumes.len());
    if names != 0 && names != volumes {
        let what = format!("--name is given {names} times for {volumes} volumes");
        let mut cli = Cli::command();
        // So that the usage is that of this command.
        cli.build();
        let serve = cli.find_subcommand_mut("serve").expect("it is being run");
        serve.error(clap::error::ErrorKind::WrongNumberOfValues, what).exit();
    }
}

/// Sockets passed by the service manager, else what the command line says.
fn listeners(args: &Args, passed: Vec<Passed>) -> anyhow::Result<Vec<Listener>> {
    let take = |passed| match passed {
        Passed::Unix(socket) => Listener::from_unix(socket),
        Passed::Tcp(socket) => Listener::from_tcp(socket),
    };
    let mut listeners = passed
        .into_iter()
        .map(take)
        .collect::<Result<Vec<_>, _>>()
        .context("a socket passed by the service manager")?;
    if let Some(path) = &args.socket {
        listeners.push(Listener::unix(path)?);
    } else if let Some(address) = &args.listen {
        listeners.extend(Listener::tcp(address)?);
    } else if listeners.is_empty() {
        listeners.extend(Listener::tcp(DEFAULT_LISTEN)?);
    }
    Ok(listeners)
}

/// Names for the log, which needs not have a thousand of them.
fn summary(names: &[String]) -> String {
    let shown = names.len().min(NAMES_LOGGED);
    let shown_names = names[..shown].join(", ");
    match names.len() - shown {
        0 => shown_names,
        more => format!("{shown_names} and {more} more"),
    }
}
