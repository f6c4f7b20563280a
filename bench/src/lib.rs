//! `sheave bench`: a load generator, and the comparison with other servers.
#![forbid(unsafe_code)]

mod children;
mod compare;
mod floor;
mod load;
pub mod output;
mod placement;
mod process;
mod report;
mod run;
pub mod signals;
mod stats;
mod units;

use anyhow::Result;

/// Measure NBD servers.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  sheave bench run 'nbd+unix:///?socket=/tmp/s' --qd 32 --bs 4k --rw read
  sheave bench compare --quick
  sheave bench compare --report report.html")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Put a load on a server
    Run(run::RunArgs),
    /// Compare this server with others, in one run
    Compare(compare::CompareArgs),
    /// A server that only echoes: the floor for sockets
    #[command(hide = true)]
    FloorEcho(floor::FloorArgs),
    /// A server that only moves bytes through io_uring: the floor for volumes in memory
    #[command(hide = true)]
    FloorRing(floor::FloorArgs),
}

/// Runs the command.
///
/// # Errors
/// When it fails, or what it measured does not hold.
pub fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Run(args) => run::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::FloorEcho(args) => floor::serve_echo(&args),
        Command::FloorRing(args) => floor::serve_ring(&args),
    }
}
