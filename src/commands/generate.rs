//! `sheave completions` and `sheave man`: what clap knows, in other forms.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::CommandFactory;

use crate::cli::Cli;

#[derive(clap::Args)]
pub(crate) struct Completions {
    /// The shell
    shell: clap_complete::Shell,
}

#[derive(clap::Args)]
pub(crate) struct Man {
    /// Directory to write sheave.1 and a page for each command to
    directory: PathBuf,
}

pub(crate) fn completions(args: Completions) -> anyhow::Result<()> {
    clap_complete::generate(args.shell, &mut Cli::command(), "sheave", &mut std::io::stdout());
    Ok(())
}

pub(crate) fn man(args: Man) -> anyhow::Result<()> {
    let place = args.directory.display().to_string();
    std::fs::create_dir_all(&args.directory).with_context(|| format!("man: {place}"))?;
    clap_mangen::generate_to(Cli::command(), &args.directory)
        .with_context(|| format!("man: {place}"))?;
    Ok(())
}
