//! `sheave`: one binary for serving, copying, measuring and looking at volumes.
#![forbid(unsafe_code)]

mod cli;
mod commands;
mod config;
mod daemon;
mod handover;
mod limits;
mod process;
mod protect;
mod state_dir;
mod systemd;
mod telemetry;
mod ublk;

use std::process::ExitCode;

use clap::Parser;
use sheave_core::printable;

/// What clap ends with when arguments are wrong.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    match commands::run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line: what, on what, why, what to do.
            let error_line = format!("{error:#}");
            eprintln!("sheave: {}", printable(&error_line));
            if error.is::<config::BadConfig>() { USAGE.into() } else { ExitCode::FAILURE }
        }
    }
}
