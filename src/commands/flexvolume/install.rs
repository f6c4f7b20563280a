//! `sheave flexvolume install`: puts this program where kubelet finds it as a FlexVolume driver.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use sheave_bench::output;
use sheave_core::printable;

use super::CONFIG_BESIDE;
use crate::USAGE;
use crate::log;
use crate::process::{HangUp, Signals, runtime};

/// The driver's name, unless the installation chooses another.
const DRIVER: &str = "sheave.dev/sheave";

/// What is asked for in place of an operation.
pub(super) const NAME: &str = "install";

/// Install this program as a FlexVolume driver, or upgrade it.
#[derive(Parser)]
#[command(
    no_binary_name = true,
    bin_name = "sheave flexvolume install",
    after_help = "\
kubelet never finds half a driver: the copy has a name with a point in front until it is whole.
Volumes may be mounted meanwhile. To remove the driver, remove its directory."
)]
struct Args {
    /// Kubelet's directory of volume plugins
    dir: PathBuf,
    /// The driver's name
    #[arg(long, value_name = "VENDOR/DRIVER", default_value = DRIVER, value_parser = parse_driver)]
    driver: (String, String),
    /// This node, as volumes are published to it [default: the host's name]
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    node: Option<String>,
    /// Have controller-manager attach volumes
    #[arg(long)]
    attach: bool,
    /// Wait for a signal, as a container that is to stay
    #[arg(long)]
    wait: bool,
}

pub(super) fn run(args: &[OsString]) -> ExitCode {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { USAGE.into() } else { ExitCode::SUCCESS };
        }
    };
    match install(&args).and_then(|()| if args.wait { wait() } else { Ok(()) }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::last_line(&format!("sheave: flexvolume install: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn install(args: &Args) -> Result<()> {
    if !args.dir.is_dir() {
        bail!(
            "there is no directory {}; is kubelet's directory of volume plugins elsewhere? see its \
             --volume-plugin-dir, or make it if kubelet was never started",
            printable(&args.dir)
        );
    }
    let (vendor, driver) = &args.driver;
    let dir = args.dir.join(format!("{vendor}~{driver}"));
    fs::create_dir_all(&dir).with_context(|| printable(&dir).to_string())?;
    let mut config = format!("attach = {}\n", args.attach);
    if let Some(node) = &args.node {
        config += &format!("node = \"{node}\"\n");
    }
    // Before the driver, which reads it.
    put(&dir, CONFIG_BESIDE, 0o644, |file| file.write_all(config.as_bytes()))?;
    let mut program = File::open("/proc/self/exe").context("/proc/self/exe")?;
    put(&dir, driver, 0o755, |file| io::copy(&mut program, file).map(drop))?;
    let (driver, path) = (format!("{vendor}/{driver}"), dir.join(driver));
    let attach = if args.attach { "with attach" } else { "without attach" };
    let done = format!("{}: the driver {driver}, {attach}\n", printable(&path));
    // It is installed, whether or not there is a reader.
    let _ = output::to_stdout(done);
    Ok(())
}

/// Puts a file in place of one that may be in use.
fn put(
    dir: &Path,
    name: &str,
    mode: u32,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<()> {
    let (hidden, path) = (dir.join(format!(".{name}")), dir.join(name));
    let put = || {
        let mut file = File::create(&hidden)?;
        write(&mut file)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        // It must not be open for writing when it is run.
        drop(file);
        fs::rename(&hidden, &path)
    };
    put().with_context(|| printable(&path).to_string())
}

fn wait() -> Result<()> {
    runtime()?.block_on(async {
        Signals::catch(HangUp::End)?.end(|| {}).await;
        Ok(())
    })
}

fn parse_driver(text: &str) -> Result<(String, String), String> {
    let wrong = || "write VENDOR/DRIVER, such as sheave.dev/sheave".to_owned();
    let (vendor, driver) = text.split_once('/').ok_or_else(wrong)?;
    let names = parse_name(vendor).and_then(|vendor| Ok((vendor, parse_name(driver)?)));
    names.map_err(|_| wrong())
}

/// A name as Kubernetes has them.
fn parse_name(text: &str) -> Result<String, String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    match text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(is_plain) {
        true => Ok(text.to_owned()),
        false => Err("write letters, digits, -, . and _".to_owned()),
    }
}
