//! `sheave completions` and `sheave man`: clap's command definitions in other forms.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::CommandFactory;
use sheave_bench::output;
use sheave_core::printable;

use crate::cli::Cli;

#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheave completions bash > /etc/bash_completion.d/sheave
  sheave completions zsh > ~/.zfunc/_sheave")]
pub(crate) struct Completions {
    /// The shell
    shell: clap_complete::Shell,
}

#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheave man /usr/local/share/man/man1")]
pub(crate) struct Man {
    /// Directory to write sheave.1 and a page for each command to
    directory: PathBuf,
}

pub(crate) fn completions(args: Completions) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "sheave", &mut script);
    output::to_stdout(script).context("completions")
}

pub(crate) fn man(args: Man) -> anyhow::Result<()> {
    let place = printable(&args.directory).to_string();
    std::fs::create_dir_all(&args.directory).with_context(|| format!("man: {place}"))?;
    clap_mangen::generate_to(Cli::command(), &args.directory)
        .with_context(|| format!("man: {place}"))?;
    Ok(())
}
