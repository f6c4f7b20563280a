//! `sheave`: one binary for serving, copying, measuring and inspecting volumes.
#![forbid(unsafe_code)]

mod api_status;
mod cli;
mod commands;
mod config;
mod control_api;
mod drain;
mod log;
mod open_files;
mod pending;
mod pool_calls;
mod process;
mod serve;
mod startup_taint;
mod systemd;
mod telemetry;
mod volumes_api;

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use sheave_bench::{output, signals};

/// clap's exit code for wrong arguments.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    // If that fails, only a process with such a limit notices.
    let _ = signals::ignore_file_limit();
    if let Some(args) = commands::flexvolume::Args::of_driver() {
        return commands::flexvolume::run(&args);
    }
    let outcome = match cli::Cli::try_parse() {
        Ok(cli) => {
            // Its devices are left to the next daemon, which opens their volumes.
            let has_successor = matches!(cli.command, cli::Command::Daemon(_));
            let timeout = cli.command.drain_timeout();
            let outcome = commands::run(cli.command);
            let is_at_once = outcome.as_ref().is_err_and(|error| error.is::<process::Insisted>());
            let timeout = if is_at_once { Duration::ZERO } else { timeout };
            drain::close_object_volumes(timeout, has_successor);
            // Without destructors: open volumes are of no more use.
            sheave_exec::end_all();
            outcome
        }
        Err(error) if error.use_stderr() => {
            // The exit code says it, too.
            let _ = error.print();
            return USAGE.into();
        }
        Err(help) => print_help(&help).map(|()| ExitCode::SUCCESS),
    };
    let error = match outcome {
        Ok(code) => {
            log::finish();
            return code;
        }
        Err(error) => error,
    };
    // One line: what, on what, why, what to do.
    log::last_line(&format!("sheave: {error:#}"));
    if error.is::<config::BadConfig>() { USAGE.into() } else { ExitCode::FAILURE }
}

/// Prints the requested help or version.
fn print_help(help: &clap::Error) -> anyhow::Result<()> {
    let printed = help.print().and_then(|()| io::stdout().flush());
    output::until_closed(printed).context("cannot write to standard output")
}
