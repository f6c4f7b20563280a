//! `sheave`: one binary for serving, copying, measuring and looking at volumes.
#![forbid(unsafe_code)]

mod cli;
mod commands;
mod daemon;
mod process;
mod protect;
mod telemetry;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    match commands::run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line: what, on what, why, what to do.
            eprintln!("sheave: {error:#}");
            ExitCode::FAILURE
        }
    }
}
