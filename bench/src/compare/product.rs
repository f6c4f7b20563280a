//! The servers that are compared, and how each is started.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Serialize;

/// What a server is to the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    /// This program, compared with all others.
    Subject,
    /// The same with another setting.
    Variant,
    /// A server that others wrote.
    Peer,
    /// Not a real server: the least that one must do.
    Floor,
}

/// A server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Product {
    /// This program
    Sheave,
    /// This program, never polling
    SheavePoll0,
    /// This program on plain threads
    SheaveThreads,
    /// nbdkit with its memory, null and file plugins
    Nbdkit,
    /// qemu-nbd on io_uring
    QemuNbd,
    /// nbd-server
    NbdServer,
    /// A bare echo
    Echo,
    /// A bare echo that polls as long as this program does
    EchoPoll,
    /// A bare server on io_uring that polls as long as this program does
    Ring,
}

/// What is behind an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Volume {
    /// Memory.
    Memory,
    /// Nothing: reads zeroes, drops writes.
    Null,
    /// A file in the page cache.
    File,
    /// A file past the page cache.
    Direct,
    /// Behind TLS: memory, or a cached file for servers without volumes in memory.
    Tls,
}

/// How to start a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Recipe {
    /// Program and arguments.
    pub(crate) command: Vec<OsString>,
    /// Name of the export.
    pub(crate) export: &'static str,
    /// A configuration file to be written first.
    pub(crate) config: Option<(PathBuf, String)>,
    /// The file with the process id of a server that puts itself into the background.
    pub(crate) pid_file: Option<PathBuf>,
}

/// What recipes need to know.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    /// This program.
    pub(crate) program: &'a Path,
    /// Where to listen.
    pub(crate) socket: &'a Path,
    /// The image of a volume in a file.
    pub(crate) image: &'a Path,
    /// Size of the volume in bytes.
    pub(crate) size: u64,
    /// Directory of the certificates.
    pub(crate) certificates: &'a Path,
}

impl Volume {
    /// Whether it is in a file.
    pub(crate) fn is_file(self) -> bool {
        matches!(self, Self::File | Self::Direct)
    }
}

impl Product {
    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sheave => "sheave",
            Self::SheavePoll0 => "sheave --poll-us 0",
            Self::SheaveThreads => "sheave --engine threads",
            Self::Nbdkit => "nbdkit",
            Self::QemuNbd => "qemu-nbd",
            Self::NbdServer => "nbd-server",
            Self::Echo => "echo",
            Self::EchoPoll => "echo, polling",
            Self::Ring => "bare ring server",
        }
    }

    /// What it is to the comparison.
    pub(crate) fn role(self) -> Role {
        match self {
            Self::Sheave => Role::Subject,
            Self::SheavePoll0 | Self::SheaveThreads => Role::Variant,
            Self::Nbdkit | Self::QemuNbd | Self::NbdServer => Role::Peer,
            Self::Echo | Self::EchoPoll | Self::Ring => Role::Floor,
        }
    }

    /// The program to look for, unless it is this one.
    pub(crate) fn foreign_program(self) -> Option<&'static str> {
        match self {
            Self::Nbdkit => Some("nbdkit"),
            Self::QemuNbd => Some("qemu-nbd"),
            Self::NbdServer => Some("nbd-server"),
            _ => None,
        }
    }

    /// Whether it keeps its volume in a file when it is asked for this one.
    pub(crate) fn needs_image(self, volume: Volume) -> bool {
        volume.is_file() || (self == Self::QemuNbd && volume == Volume::Tls)
    }

    /// How to start it; `None` if it has no such volume.
    pub(crate) fn recipe(self, volume: Volume, place: Place<'_>) -> Option<Recipe> {
        match self {
            Self::Sheave => Some(sheave(volume, place, &[])),
            Self::SheavePoll0 => Some(sheave(volume, place, &["--poll-us", "0"])),
            Self::SheaveThreads => Some(sheave(volume, place, &["--engine", "threads"])),
            Self::Nbdkit => nbdkit(volume, place),
            Self::QemuNbd => qemu_nbd(volume, place),
            Self::NbdServer => nbd_server(volume, place),
            Self::Echo => floor(volume, place, "floor-echo", "0"),
            Self::EchoPoll => floor(volume, place, "floor-echo", POLL_US),
            Self::Ring if volume != Volume::Memory => None,
            Self::Ring => floor(volume, place, "floor-ring", POLL_US),
        }
    }
}

/// How long `sheave serve` polls by default.
const POLL_US: &str = "50";

fn sheave(volume: Volume, place: Place<'_>, options: &[&str]) -> Recipe {
    let Place { program, socket, image, size, certificates } = place;
    let source = match volume {
        Volume::Memory | Volume::Tls => format!("memory:?size={size}").into(),
        Volume::Null => format!("null:?size={size}").into(),
        Volume::File => image.as_os_str().to_owned(),
        Volume::Direct => {
            let mut source = image.as_os_str().to_owned();
            source.push("?direct=true");
            source
        }
    };
    let mut command = words(&[program.as_os_str(), "serve".as_ref()]);
    command.push(source);
    command.extend(words(&["--socket".as_ref(), socket.as_os_str()]));
    command.extend(options.iter().map(OsString::from));
    if volume == Volume::Tls {
        let files = [("--tls-cert", "server-cert.pem"), ("--tls-key", "server-key.pem")];
        for (option, file) in files {
            command.extend([option.into(), certificates.join(file).into_os_string()]);
        }
    }
    Recipe::plain(command)
}

fn nbdkit(volume: Volume, place: Place<'_>) -> Option<Recipe> {
    let Place { socket, image, size, certificates, .. } = place;
    let mut command = words(&["nbdkit".as_ref(), "--foreground".as_ref(), "--unix".as_ref()]);
    command.push(socket.into());
    if volume == Volume::Tls {
        command.push("--tls=require".into());
        command.push(joined("--tls-certificates=", certificates));
    }
    let plugin: [OsString; 2] = match volume {
        Volume::Memory | Volume::Tls => ["memory".into(), size.to_string().into()],
        Volume::Null => ["null".into(), size.to_string().into()],
        Volume::File => ["file".into(), joined("file=", image)],
        // Its file plugin has no O_DIRECT.
        Volume::Direct => return None,
    };
    command.extend(plugin);
    Some(Recipe::plain(command))
}

fn qemu_nbd(volume: Volume, place: Place<'_>) -> Option<Recipe> {
    let Place { socket, image, certificates, .. } = place;
    let cache = match volume {
        Volume::File | Volume::Tls => "--cache=writeback",
        Volume::Direct => "--cache=none",
        Volume::Memory | Volume::Null => return None,
    };
    let mut command: Vec<OsString> =
        ["qemu-nbd", "-t", "-e", "64", "-f", "raw", "--aio=io_uring"].map(OsString::from).into();
    command.push(cache.into());
    if volume == Volume::Tls {
        let object = "tls-creds-x509,id=tls0,endpoint=server,verify-peer=no,dir=";
        command.extend(["--object".into(), joined(object, certificates)]);
        command.extend(["--tls-creds".into(), "tls0".into()]);
    }
    command.extend(["-k".into(), socket.into(), image.into()]);
    Some(Recipe::plain(command))
}

fn nbd_server(volume: Volume, place: Place<'_>) -> Option<Recipe> {
    let Place { socket, image, .. } = place;
    if volume != Volume::File {
        return None;
    }
    let (config, pid_file) = (socket.with_extension("conf"), socket.with_extension("pid"));
    let text = format!(
        "[generic]\nunixsock = {}\n[disk]\nexportname = {}\nflush = true\nfua = true\n",
        socket.display(),
        image.display()
    );
    let command = words(&[
        "nbd-server".as_ref(),
        "-C".as_ref(),
        config.as_os_str(),
        "-p".as_ref(),
        pid_file.as_os_str(),
    ]);
    let recipe = Recipe::plain(command);
    let (config, pid_file) = (Some((config, text)), Some(pid_file));
    Some(Recipe { export: "disk", config, pid_file, ..recipe })
}

fn floor(volume: Volume, place: Place<'_>, name: &str, poll_us: &str) -> Option<Recipe> {
    let Place { program, socket, size, .. } = place;
    if volume == Volume::Tls {
        return None;
    }
    let mut command = words(&[program.as_os_str(), "bench".as_ref(), name.as_ref()]);
    command.extend(["--socket".into(), socket.into(), "--size".into(), size.to_string().into()]);
    command.extend(["--poll-us".into(), poll_us.into()]);
    Some(Recipe::plain(command))
}

impl Recipe {
    fn plain(command: Vec<OsString>) -> Self {
        Self { command, export: "", config: None, pid_file: None }
    }

    /// The command as one would type it.
    pub(crate) fn shown(&self) -> String {
        let quoted = |word: &OsString| {
            let word = word.to_string_lossy();
            match word.contains(['?', '&', ' ', '*']) {
                true => format!("'{word}'"),
                false => word.into_owned(),
            }
        };
        self.command.iter().map(quoted).collect::<Vec<_>>().join(" ")
    }
}

fn words(words: &[&std::ffi::OsStr]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

fn joined(before: &str, path: &Path) -> OsString {
    let mut joined = OsString::from(before);
    joined.push(path);
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(product: Product, volume: Volume) -> Option<String> {
        let place = Place {
            program: Path::new("sheave"),
            socket: Path::new("/d/s.sock"),
            image: Path::new("/d/i.img"),
            size: 1024,
            certificates: Path::new("/d/tls"),
        };
        product.recipe(volume, place).map(|recipe| recipe.shown())
    }

    #[test]
    fn commands_are_those_that_one_would_type() {
        let sheave = shown(Product::SheavePoll0, Volume::Memory).unwrap();
        assert_eq!(sheave, "sheave serve 'memory:?size=1024' --socket /d/s.sock --poll-us 0");
        let nbdkit = shown(Product::Nbdkit, Volume::File).unwrap();
        assert_eq!(nbdkit, "nbdkit --foreground --unix /d/s.sock file file=/d/i.img");
        let qemu = shown(Product::QemuNbd, Volume::Direct).unwrap();
        assert_eq!(
            qemu,
            "qemu-nbd -t -e 64 -f raw --aio=io_uring --cache=none -k /d/s.sock /d/i.img"
        );
    }

    #[test]
    fn what_a_server_lacks_is_left_out() {
        assert_eq!(shown(Product::QemuNbd, Volume::Memory), None);
        assert_eq!(shown(Product::NbdServer, Volume::Tls), None);
        assert_eq!(shown(Product::Nbdkit, Volume::Direct), None);
        assert_eq!(shown(Product::Ring, Volume::File), None);
    }
}
