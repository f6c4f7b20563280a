//! The command line.

use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::{commands, drain};

/// Serves files, block devices and memory as disks, over NBD.
#[derive(Parser)]
#[command(name = "sheave", version, max_term_width = 100, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
VOLUME is a URL or a path: 'memory:?size=1G', 'null:?size=1T', /images/a.img,
'file:///images/a.img?direct=true' (quoted, since '?' and '&' mean something to shells);
nbd://server/disk, nbds://, nbd+unix:// and nbds+unix:// name an export of an NBD server, and
'nbd+exec:?command=qemu-nbd%20-f%20qcow2%20disk.qcow2' one of a server that is started for it.
`sheave serve --help` has the parameters.

Examples:
  sheave serve disk.img --socket /tmp/disk.sock
  nbdinfo 'nbd+unix:///?socket=/tmp/disk.sock'
  sheave stats";

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Serve volumes to NBD clients
    Serve(commands::serve::Args),
    /// Own the block devices of this node
    Daemon(commands::daemon::Args),
    /// Make a volume a block device
    Attach(commands::attach::AttachArgs),
    /// End a block device
    Detach(commands::attach::DetachArgs),
    /// List block devices
    Ls(commands::attach::LsArgs),
    /// Make, list, change and delete volumes
    Volume(commands::volume::Args),
    /// Serve volumes of pools to Kubernetes (CSI)
    Csi(commands::csi::Args),
    /// Mount volumes of pools for Kubernetes (FlexVolume)
    Flexvolume(commands::flexvolume::Args),
    /// Serve volumes of pools to Docker
    DockerPlugin(commands::docker_plugin::Args),
    /// Copy a volume or image to another, sparse
    Copy(commands::copy::Args),
    /// List exports of running servers and their clients
    Exports(commands::exports::Args),
    /// Show latencies and throughput of running servers
    Stats(commands::stats::Args),
    /// Watch running servers
    Top(commands::top::Args),
    /// Generate load, compare servers, write a report
    Bench(commands::bench::Args),
    /// Tell what this node can do, and what to do about what it cannot
    Doctor(commands::doctor::Args),
    /// Wait for a device on behalf of the daemon
    #[command(name = sheave_daemon::HELPER, hide = true)]
    Helper {
        /// JSON
        task: String,
    },
    /// Become the program of a volume
    #[command(name = sheave_exec::HELPER, hide = true)]
    RunProgram {
        /// The process that asks for it
        parent: u32,
        /// For /bin/sh
        command: String,
    },
    /// Print shell completions
    Completions(commands::generate::Completions),
    /// Write man pages
    Man(commands::generate::Man),
}

impl Command {
    /// How long its end waits for the stores of object volumes.
    pub(crate) fn drain_timeout(&self) -> Duration {
        match self {
            Self::Serve(args) => args.drain.timeout(),
            Self::Daemon(args) => args.drain.timeout(),
            _ => drain::TIMEOUT_DEFAULT,
        }
    }
}
