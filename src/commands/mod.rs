//! The commands, one file each.

pub(crate) mod attach;
pub(crate) mod bench;
pub(crate) mod copy;
pub(crate) mod csi;
pub(crate) mod daemon;
pub(crate) mod docker_plugin;
pub(crate) mod doctor;
pub(crate) mod exports;
pub(crate) mod flexvolume;
pub(crate) mod generate;
pub(crate) mod serve;
pub(crate) mod stats;
pub(crate) mod top;
pub(crate) mod volume;

use std::ffi::OsStr;
use std::io;
use std::process::ExitCode;

use clap::builder::TypedValueParser;
use clap::error::ErrorKind;
use sheave_core::printable;
use sheave_volumes::volume_text;

use crate::cli::Command;

/// The warning where /proc is not mounted, as in a bare chroot.
pub(crate) const NO_PROC: &str = "\
    /proc is not mounted, so other programs that have a file open are not noticed, \
    unless they have locked it";

/// The name of this node, as kubelet has it by default: the host's, in lower case.
fn node_name() -> io::Result<String> {
    let name = rustix::system::uname().nodename().to_string_lossy().trim().to_lowercase();
    match name.is_empty() {
        true => Err(io::Error::other("the host has no name; configure the node's, or --node-id")),
        false => Ok(name),
    }
}

/// Parses an argument that names a volume: a URL, or a path with any bytes.
fn volume_parser() -> VolumeParser<String> {
    VolumeParser(Ok)
}

/// Parses an argument by its [`volume_text`]. Unlike clap's parsers, it escapes a wrong one in its
/// message.
#[derive(Clone)]
struct VolumeParser<T>(fn(String) -> sheave_core::Result<T>);

impl<T: Clone + Send + Sync + 'static> TypedValueParser for VolumeParser<T> {
    type Value = T;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<T, clap::Error> {
        volume_text(value).and_then(self.0).map_err(|error| {
            let name = argument.map(ToString::to_string).unwrap_or_default();
            let what = format!("invalid value '{}' for '{name}': {error}\n", printable(value));
            clap::Error::raw(ErrorKind::ValueValidation, what).with_cmd(command)
        })
    }
}

/// How a second writer of a volume in a bucket is kept out.
#[derive(Clone, Copy, clap::ValueEnum)]
enum FencingArg {
    /// By the store, which is probed
    Probe,
    /// It is not: no other process may ever open the volume
    None,
}

/// The text of a volume with what the option says, so that a daemon's record of it has that, too.
///
/// # Errors
/// When it is no volume in a bucket.
fn with_fencing(volume: String, fencing: Option<FencingArg>) -> anyhow::Result<String> {
    let Some(fencing) = fencing else { return Ok(volume) };
    if !volume.starts_with("s3:") {
        anyhow::bail!("{}: --fencing is for volumes in buckets, s3://…", printable(&volume));
    }
    let joint = if volume.contains('?') { '&' } else { '?' };
    let value = match fencing {
        FencingArg::Probe => "probe",
        FencingArg::None => "none",
    };
    Ok(format!("{volume}{joint}fencing={value}"))
}

/// Where the key of an encrypted object volume is.
#[derive(clap::Args, Default)]
#[group(multiple = false)]
struct KeyArgs {
    /// The file of its key
    #[arg(long, value_name = "FILE")]
    key_file: Option<std::path::PathBuf>,
    /// The variable that has its key, in the process that opens it
    #[arg(long, value_name = "VARIABLE")]
    key_env: Option<String>,
    /// The command that prints its key
    #[arg(long, value_name = "COMMAND")]
    key_command: Option<String>,
}

impl KeyArgs {
    /// The text of a volume with where its key is.
    fn add_to(&self, volume: String) -> String {
        let file = self.key_file.as_ref().map(|file| ("key-file", file.as_os_str()));
        let variable = self.key_env.as_ref().map(|name| ("key-env", name.as_ref()));
        let command = self.key_command.as_ref().map(|text| ("key-command", text.as_ref()));
        let Some((name, value)) = file.or(variable).or(command) else { return volume };
        let joint = if volume.contains('?') { '&' } else { '?' };
        format!("{volume}{joint}{name}={}", sheave_volumes::parameter_value(value))
    }
}

pub(crate) fn run(command: Command) -> anyhow::Result<ExitCode> {
    let done = match command {
        Command::Flexvolume(args) => return Ok(flexvolume::run(&args)),
        Command::Volume(args) => return volume::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Daemon(args) => daemon::run(args),
        Command::Attach(args) => attach::attach(args),
        Command::Detach(args) => attach::detach(args),
        Command::Ls(args) => attach::ls(args),
        Command::Csi(args) => csi::run(args),
        Command::DockerPlugin(args) => docker_plugin::run(args),
        Command::Copy(args) => copy::run(args),
        Command::Exports(args) => exports::run(args),
        Command::Stats(args) => stats::run(args),
        Command::Top(args) => top::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Helper { task } => Ok(sheave_daemon::run_task(&task)?),
        Command::RunProgram { parent, command } => Err(sheave_exec::exec(parent, &command).into()),
        Command::Completions(args) => generate::completions(args),
        Command::Man(args) => generate::man(args),
    };
    done.map(|()| ExitCode::SUCCESS)
}
