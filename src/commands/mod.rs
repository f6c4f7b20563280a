//! One file a command.

pub(crate) mod attach;
pub(crate) mod bench;
pub(crate) mod copy;
pub(crate) mod daemon;
pub(crate) mod doctor;
pub(crate) mod generate;
pub(crate) mod serve;
pub(crate) mod stats;
pub(crate) mod top;
pub(crate) mod volume;

use clap::builder::{OsStringValueParser, TypedValueParser};
use sheave_backends::volume_text;

use crate::cli::Command;

/// What is lost where /proc is not mounted, as in a bare chroot.
const NO_PROC: &str = "/proc is not mounted, so other programs that have a file open are not \
                       noticed, unless they have locked it";

/// Parses an argument that names a volume: a URL, or a path with any bytes.
fn volume_parser() -> impl TypedValueParser<Value = String> {
    OsStringValueParser::new().try_map(|argument| volume_text(&argument))
}

pub(crate) fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => serve::run(args),
        Command::Daemon(args) => daemon::run(args),
        Command::Attach(args) => attach::attach(args),
        Command::Detach(args) => attach::detach(args),
        Command::Ls(args) => attach::ls(args),
        Command::Volume(args) => volume::run(args),
        Command::Copy(args) => copy::run(args),
        Command::Stats(args) => stats::run(args),
        Command::Top(args) => top::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::ProbeUblk => Ok(crate::ublk::probe_here()?),
        Command::Helper { task } => Ok(sheave_devices::run_task(&task)?),
        Command::Completions(args) => generate::completions(args),
        Command::Man(args) => generate::man(args),
    }
}
