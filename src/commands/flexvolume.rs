//! `sheave flexvolume`: one call of a FlexVolume driver.

mod install;

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt as _;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitCode};
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use serde::Deserialize;
use sheave_bench::output;
use sheave_client::Daemon;
use sheave_core::printable;
use sheave_flexvolume::{Answer, Call, Driver, NotACall, Tidier};
use sheave_volumes::state_dir;
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;

use super::{attach, node_name};
use crate::USAGE;
use crate::process::runtime;

/// The configuration, unless one is beside the installed driver.
const CONFIG: &str = "/etc/sheave/flexvolume.toml";
/// The name of one that is.
const CONFIG_BESIDE: &str = "flexvolume.toml";

/// Mount volumes of pools for Kubernetes' FlexVolume, which calls this.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave flexvolume init
  sheave flexvolume install /usr/libexec/kubernetes/kubelet-plugins/volume/exec
  sheave flexvolume mount /var/lib/kubelet/pods/UID/volumes/sheave.dev~sheave/data \\
      '{\"volume\": \"fast/db\", \"kubernetes.io/fsType\": \"ext4\"}'

The answer is one JSON object. Copied to VENDOR~DRIVER/DRIVER in kubelet's directory of volume
plugins, this program is the driver; see docs/flexvolume.md.")]
pub(crate) struct Args {
    /// init, attach, detach, waitforattach, isattached, mountdevice, unmountdevice, mount, unmount,
    /// expandvolume or expandfs, with its arguments; tidy, after killed calls; or install
    #[arg(value_name = "OP", trailing_var_arg = true, allow_hyphen_values = true)]
    call: Vec<OsString>,
    /// Where the installed driver is.
    #[arg(skip)]
    dir: Option<PathBuf>,
}

/// What differs between nodes.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    /// This node, as volumes are published to it; kubelet's default if it is absent.
    node: Option<String>,
    /// Whether controller-manager attaches volumes.
    #[serde(default)]
    attach: bool,
}

impl Args {
    /// Those of this process, if it was started as an installed driver: `VENDOR~DRIVER/DRIVER`.
    pub(crate) fn of_driver() -> Option<Self> {
        let mut args = env::args_os();
        let program = PathBuf::from(args.next()?);
        let dir = program.parent()?;
        let (_, driver) = dir.file_name()?.to_str()?.rsplit_once('~')?;
        let is_driver = !driver.is_empty() && program.file_name()? == driver;
        is_driver.then(|| Self { call: args.collect(), dir: Some(dir.to_owned()) })
    }
}

pub(crate) fn run(args: &Args) -> ExitCode {
    if args.dir.is_none() && args.call.first().is_some_and(|call| call == install::NAME) {
        return install::run(&args.call[1..]);
    }
    // Kubelet reads standard error, too, and a release build ends at once, so a panic is answered
    // here.
    panic::set_hook(Box::new(|panicked| {
        let at = panicked.location().map(ToString::to_string).unwrap_or_default();
        print(&Answer::failure(&format!("this program has a bug: it panicked at {at}")));
        process::exit(1);
    }));
    let (answer, failed) = match Call::parse(&args.call) {
        Err(NotACall::Unknown) => (Answer::not_supported(), 1),
        Err(NotACall::Wrong(why)) => (Answer::failure(&why), USAGE),
        Ok(call) => {
            let failure = |error| Answer::failure(&format!("{error:#}"));
            (done(args, call).unwrap_or_else(failure), 1)
        }
    };
    print(&answer);
    if answer.is_success() { ExitCode::SUCCESS } else { failed.into() }
}

fn print(answer: &Answer) {
    // Without a reader, nothing can be reported.
    let _ = output::to_stdout(answer.to_json() + "\n");
}

fn done(args: &Args, call: Call) -> Result<Answer> {
    let config = Config::load(args.dir.as_deref())?;
    if call == Call::Init {
        // Kubelet drops a driver whose init fails, and the daemon may be started later.
        return Ok(Answer::initialized(config.attach));
    }
    let runtime = runtime()?;
    let answer = runtime.block_on(async {
        let (volumes, devices) = (attach::volumes().await?, attach::connect().await?);
        let daemon = Daemon::new(Handle::current(), volumes, devices);
        let node = config.node.map_or_else(node_name, Ok)?;
        let state_dir = state_dir()?;
        let own_dir = state_dir.join("flexvolume");
        let tidier = tidier(args.dir.is_some());
        let called = spawn_blocking(move || {
            let node_dir = state_dir.join("node");
            let driver = Driver::open(daemon, node, config.attach, node_dir, &own_dir, tidier)?;
            driver.call(&call)
        });
        Ok(called.await??)
    });
    // Does not wait: work may be blocked by a dead disk.
    runtime.shutdown_background();
    answer
}

/// This program, as it was started, in another process.
fn tidier(is_driver: bool) -> Tidier {
    let args: &[_] = if is_driver { &["tidy"] } else { &["flexvolume", "tidy"] };
    Arc::new(move || {
        let mut command = Command::new("/proc/self/exe");
        command.arg0(env::args_os().next().unwrap_or_default()).args(args);
        command
    })
}

impl Config {
    fn load(driver_dir: Option<&Path>) -> Result<Self> {
        let beside = driver_dir.map(|dir| dir.join(CONFIG_BESIDE));
        for path in beside.into_iter().chain([PathBuf::from(CONFIG)]) {
            let what = || format!("configuration {}", printable(&path));
            match fs::read_to_string(&path) {
                Ok(text) => {
                    let parsed = toml::from_str(&text);
                    return parsed.map_err(|error| anyhow!("{}: {}", what(), error.message()));
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(what),
            }
        }
        Ok(Self::default())
    }
}
