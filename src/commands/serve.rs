//! `sheave serve`: volumes to NBD clients.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::CommandFactory as _;
use sheave_nbd::Access;
use sheave_volumes::VolumeSpec;

use super::{FencingArg, VolumeParser, with_fencing};
use crate::cli::Cli;
use crate::config::serve::{EngineArg, check_text, parse_mode};
use crate::config::{POLL_US, SHARDS};
use crate::drain::DrainArgs;
use crate::log;
use crate::open_files::raise_open_files;
use crate::process::runtime;
use crate::serve::prepare::Wanted;
use crate::serve::run::serve;
use crate::serve::settings::Settings;
use crate::systemd::passed_sockets;

#[derive(clap::Args)]
#[command(after_help = EXAMPLES, after_long_help = format!("{MANUAL}\n\n{EXAMPLES}"))]
pub(crate) struct Args {
    /// Volumes: URLs or paths
    #[arg(
        required_unless_present = "config",
        value_name = "VOLUME",
        value_parser = VolumeParser(VolumeArg::parse)
    )]
    volumes: Vec<VolumeArg>,
    /// Configuration file, with exports that change at SIGHUP; options given here count more
    #[arg(long, value_name = "F")]
    pub(crate) config: Option<PathBuf>,
    /// TCP address, all that HOST has; as often as needed; port 0 picks a free one [default:
    /// 127.0.0.1:10809]
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) listen: Vec<String>,
    /// Unix socket, as often as needed
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Vec<PathBuf>,
    /// Permission bits of unix sockets, such as 0660 [default: what the umask leaves]
    #[arg(long, value_name = "MODE", value_parser = parse_mode)]
    pub(crate) socket_mode: Option<u32>,
    /// Group of unix sockets [default: that of the process]
    #[arg(long, value_name = "NAME|GID")]
    pub(crate) socket_group: Option<String>,
    /// Export name [default: the file name]; with several volumes once for each, in order.
    ///
    /// Clients of a single export need no name; among several there is no default.
    #[arg(long = "name", value_name = "EXPORT", value_parser = |text: &str| string("name", text))]
    names: Vec<String>,
    /// Text for clients that list exports [default: none]; once for each volume, in order
    #[arg(
        long = "description",
        value_name = "TEXT",
        value_parser = |text: &str| string("description", text)
    )]
    descriptions: Vec<String>,
    /// Refuse all writes
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Open object volumes although another node has them open, which then cannot write any more
    #[arg(long)]
    pub(crate) take_over: bool,
    /// How a second writer of a volume in a bucket is kept out: by the store, which is probed, or
    /// not at all, if no other process ever opens it [default: probe]
    #[arg(long, value_enum, hide_possible_values = true, value_name = "probe|none")]
    fencing: Option<FencingArg>,
    /// Certificate chain (PEM or DER); with it clients must use TLS
    #[arg(long, value_name = "F")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Private key of the certificate (PEM or DER), without a passphrase
    #[arg(long, value_name = "F")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Authorities (PEM or DER) of which clients must show a certificate
    #[arg(long, value_name = "F")]
    pub(crate) tls_client_ca: Option<PathBuf>,
    /// Revocation lists (PEM or DER) of these authorities
    #[arg(long, value_name = "F")]
    pub(crate) tls_client_crl: Option<PathBuf>,
    /// Threads that serve connections [default: CPUs, at most 4]
    #[arg(long, value_parser = clap::value_parser!(u32).range(SHARDS))]
    pub(crate) shards: Option<u32>,
    /// Microseconds that a busy shard looks for work before it sleeps; 0 = never [default: 50]
    #[arg(long, value_parser = clap::value_parser!(u32).range(POLL_US))]
    pub(crate) poll_us: Option<u32>,
    /// Serve Prometheus metrics over HTTP at this address
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) metrics: Option<String>,
    /// How connections are run [default: auto]
    #[arg(long, value_enum)]
    pub(crate) engine: Option<EngineArg>,
    #[command(flatten)]
    pub(crate) drain: DrainArgs,
}

const EXAMPLES: &str = "\
Examples:
  sheave serve disk.img --socket /run/disk.sock --socket-mode 0660 --socket-group disk
  sheave serve 'memory:?size=1G' --listen 0.0.0.0:10809 --tls-cert cert.pem --tls-key key.pem
  sheave serve a.img b.img --listen 127.0.0.1:0        # exports a.img and b.img
  sheave serve --config serve.toml                     # exports that change by kill -HUP
  sheave serve 'disk.img?fault=read:delay=200ms:probability=0.01' --socket /tmp/slow.sock

With a socket passed by systemd (LISTEN_FDS), --listen and --socket are not needed.";

const MANUAL: &str = "\
Parameters of a VOLUME, after '?' and joined by '&' (quote it, since both mean something to shells):
  size=10G                  memory, null: its size in bytes, K, M, G, T or P
  direct=true               a file: bypass the page cache
  block=4096                an image: its logical blocks, 512 (without it), 1024, 2048 or 4096 bytes
  format=raw                a file: as it is, without a warning if it looks like qcow2 or another
  lock=false                a file: even if another program has it open for writing
  overcommit=true           memory: even if it is larger than the node's memory
  read-only=true            refuse to write
  limit-bps=100M            bytes a second, of all connections together
  limit-iops=5000           ops a second; after idling, what limits allow in 50 ms at once
  fault=RULE fault-seed=N   failures on purpose; several rules are allowed

Of an NBD server (nbd://server/disk, nbds://…, nbd+unix:///disk?socket=PATH, nbds+unix://…) or of
one that is started for the volume (nbd+exec:?command=COMMAND; in a URL a space is %20):
  tls-certificates=DIR      ca-cert.pem, and, if the server asks, client-cert.pem and client-key.pem
  tls-hostname=NAME         the name in the server's certificate, if it is not the host's
  connections=4             1 (without it) to 16, if the server allows several
  connect-timeout=10        seconds that one attempt to connect may take
  reconnect-timeout=S       seconds until requests fail while the server is away; else they wait
  request-timeout=60        seconds until a silent server is asked again over a new connection
  replay-bytes=64M          the most bytes of writes that are kept until a flush
  directory=DIR             nbd+exec: where to run the command

Of an object volume (dir:///store/name, made by `sheave volume create`):
  cache-dir=DIR             where journal and read cache are [default: $SHEAVE_STATE_DIR/volumes]
  cache-size=10G            the most bytes of the read cache there; 0: none for this volume
  key-file=FILE             the key of an encrypted one; or key-env=VARIABLE, which has it, or
                            key-command=COMMAND, which prints it

A path is taken as it is, up to '?'. In file:///… a byte may be written %E9, and '?' as %3F. A file
whose name is no UTF-8 has an export name with such escapes.

A RULE is ops joined by '+' (read, write, flush, trim, write-zeroes, cache, block-status, any),
then error=EIO or delay=200ms, then, if need be, after=N, count=N, probability=P, range=FROM-TO;
all between colons: fault=read+write:error=EIO:after=100

At most 16384 connections are served, and 1152 may negotiate at a time, for 10 s each; more wait
until there is room. When all negotiate, one that is silent for 3 s makes room for the next. An
address (an IPv6 network /64, a user of the unix socket) gets at most seven eighths of either.
The limit of open files is raised to the hard one (`ulimit -Hn`, LimitNOFILE= in a unit).

With --config or --tls-cert, or as a service, SIGHUP reads the configuration file and the TLS files
again: volumes are opened, grown, renamed and closed, and the clients of the others notice nothing.
If anything is wrong, one line says what, and all stays as it was. Certificates, keys, authorities
and revocation lists are also read when their files change. Other options need a restart. Without
any of these SIGHUP stands for a closed terminal, and ends the server unless nohup started it.

SIGINT, SIGTERM and SIGQUIT end it: connections have 5 s to finish what they have begun, and stores
of object volumes --drain-timeout; a second one ends it at once. SIGUSR1 and SIGUSR2 are ignored.

The log goes to standard error; SHEAVE_LOG=debug tells more, such as each connection. Serving never
waits for the log: lines that cannot be written in time are lost, and a later line says how many.";

/// A volume as it was written, and parsed.
#[derive(Clone)]
struct VolumeArg {
    text: String,
    spec: VolumeSpec,
}

impl VolumeArg {
    fn parse(text: String) -> Result<Self, sheave_core::Error> {
        Ok(Self { spec: VolumeSpec::of_operator(&text)?, text })
    }
}

pub(crate) fn run(mut args: Args) -> Result<()> {
    check_counts(&args);
    if args.fencing.is_some() {
        for volume in &mut args.volumes {
            let text = with_fencing(volume.text.clone(), args.fencing).context("serve")?;
            *volume = VolumeArg::parse(text).context("serve")?;
        }
    }
    log::start();
    raise_open_files();
    // Before there are threads, since it changes the environment.
    let passed = passed_sockets().context("serve")?;
    log::start_writer();
    let settings = Settings::read(&args).context("serve")?;
    let runtime = runtime().context("serve")?;
    let outcome = runtime.block_on(serve(args, settings, passed)).context("serve");
    // Does not wait: after a second signal connections may still be busy.
    runtime.shutdown_background();
    outcome
}

impl Args {
    /// The exports of the command line.
    pub(crate) fn wanted(&self) -> Vec<Wanted> {
        let volumes = self.volumes.iter().enumerate();
        let wanted = volumes.map(|(index, VolumeArg { text, spec })| Wanted {
            place: String::new(),
            name: self.names.get(index).cloned().unwrap_or_else(|| spec.name()),
            volume: text.clone(),
            spec: spec.clone(),
            description: self.descriptions.get(index).cloned().unwrap_or_default(),
            read_only: self.read_only,
            take_over: self.take_over,
            limits: None,
            access: Access::default(),
            connections_max: None,
        });
        wanted.collect()
    }
}

/// Ends with a usage error unless names and descriptions are given for all volumes or for none.
fn check_counts(args: &Args) {
    let volumes = args.volumes.len();
    for (option, given) in
        [("--name", args.names.len()), ("--description", args.descriptions.len())]
    {
        if given == 0 || given == volumes {
            continue;
        }
        let what = format!("{option} is given {given} times for {volumes} volumes");
        let mut cli = Cli::command();
        // Builds the subcommand, so that its usage is shown.
        cli.build();
        let serve = cli.find_subcommand_mut("serve").expect("it is being run");
        serve.error(clap::error::ErrorKind::WrongNumberOfValues, what).exit();
    }
}

/// A string that goes to clients.
fn string(what: &str, text: &str) -> Result<String, String> {
    check_text(what, text).map(|()| text.to_owned())
}
