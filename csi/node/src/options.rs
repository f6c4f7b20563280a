//! Mount options, as mount(8) has them. They may be secret, so no message quotes their values.

use std::ffi::CString;
use std::os::fd::AsFd as _;

use rustix::io::Errno;
use rustix::mount::{FsOpenFlags, MountFlags, fsconfig_set_flag, fsconfig_set_string, fsopen};

use crate::Result;
use crate::error::{invalid, refused};
use crate::fs::Fs;
use crate::mountinfo::Mount;
use crate::state::fingerprint;

/// The kernel takes a page of them.
const LEN_MAX: usize = 4095;

/// What the kernel takes as flags: of a mount, or of a filesystem.
const FLAGS: &[(&str, MountFlags)] = &[
    ("ro", MountFlags::RDONLY),
    ("nosuid", MountFlags::NOSUID),
    ("nodev", MountFlags::NODEV),
    ("noexec", MountFlags::NOEXEC),
    ("noatime", MountFlags::NOATIME),
    ("nodiratime", MountFlags::NODIRATIME),
    ("relatime", MountFlags::RELATIME),
    ("strictatime", MountFlags::STRICTATIME),
    ("nosymfollow", MountFlags::NOSYMFOLLOW),
    ("lazytime", MountFlags::LAZYTIME),
    ("sync", MountFlags::SYNCHRONOUS),
    ("dirsync", MountFlags::DIRSYNC),
    ("silent", MountFlags::SILENT),
];
/// Those that belong to the filesystem, not to one of its mounts.
const OF_FILESYSTEM: MountFlags = MountFlags::LAZYTIME
    .union(MountFlags::SYNCHRONOUS)
    .union(MountFlags::DIRSYNC)
    .union(MountFlags::SILENT);
/// What is so anyway, or is for other programs.
const IGNORED: &[&str] = &[
    "", "rw", "defaults", "suid", "dev", "exec", "atime", "diratime", "async", "auto", "noauto",
    "user", "nouser", "users", "owner", "group", "_netdev", "nofail", "loud",
];
/// What would make another kind of mount, have another device written, or end the node.
const REFUSED: &[&str] = &[
    "source",
    "device",
    "journal_dev",
    "journal_path",
    "logdev",
    "rtdev",
    "errors=panic",
    "bind",
    "rbind",
    "move",
    "remount",
    "shared",
    "rshared",
    "slave",
    "rslave",
    "private",
    "rprivate",
    "unbindable",
    "runbindable",
];

/// Those of security modules, whose values mount(2) alone reads as they are written here.
const OF_SECURITY: &[&str] = &["context", "fscontext", "defcontext", "rootcontext"];

/// Mount options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    flags: MountFlags,
    data: Vec<String>,
}

impl Options {
    /// Reads options; each text may hold several, separated by commas.
    ///
    /// # Errors
    /// When they are too long, or would make another kind of mount.
    pub(crate) fn parse(texts: &[String]) -> Result<Self> {
        if texts.iter().map(|text| text.len() + 1).sum::<usize>() > LEN_MAX {
            return Err(invalid(format!("mount options are longer than {LEN_MAX} bytes")));
        }
        let mut options = Self { flags: MountFlags::empty(), data: Vec::new() };
        for option in texts.iter().flat_map(|text| split(text)) {
            if let Some((_, flag)) = FLAGS.iter().find(|(name, _)| *name == option) {
                options.flags |= *flag;
            } else if option.contains('\0') {
                return Err(invalid("a mount option has a byte 0"));
            } else if let Some(name) = REFUSED.iter().find(|name| is_called(option, name)) {
                return Err(invalid(format!("the mount option {name} cannot be used here")));
            } else if !is_ignored(option) {
                options.data.push(option.to_owned());
            }
        }
        Ok(options)
    }

    /// Refuses what this kernel does not know, before anything is done to a device. Where it cannot
    /// be asked (Linux before 5.2, and filesystems that are older), mounting finds it.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) for an option, which is not quoted, and
    /// [`Kind::Refused`](crate::Kind::Refused) for a filesystem.
    pub(crate) fn check(&self, fs: Fs) -> Result<()> {
        let context = match fsopen(fs.name(), FsOpenFlags::FSOPEN_CLOEXEC) {
            Ok(context) => context,
            Err(Errno::NODEV) => {
                let why = format!("this kernel has no {}; load its module", fs.name());
                return Err(refused(why));
            }
            Err(_) => return Ok(()),
        };
        let is_of_filesystem =
            |option: &&String| !OF_SECURITY.iter().any(|name| is_called(option, name));
        for option in self.data.iter().filter(is_of_filesystem) {
            let set = match option.split_once('=') {
                Some((name, value)) => fsconfig_set_string(context.as_fd(), name, value),
                None => fsconfig_set_flag(context.as_fd(), option.as_str()),
            };
            if set == Err(Errno::INVAL) {
                let len = option.len();
                let why = format!("{} knows no mount option like one of {len} bytes", fs.name());
                return Err(invalid(format!("{why} that is asked for; correct the class")));
            }
        }
        Ok(())
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.flags.contains(MountFlags::RDONLY)
    }

    /// The same, read-only.
    pub(crate) fn read_only(mut self) -> Self {
        self.flags |= MountFlags::RDONLY;
        self
    }

    /// The same with an option of the filesystem.
    pub(crate) fn with(mut self, option: &str) -> Self {
        self.data.push(option.to_owned());
        self
    }

    /// For mount(2).
    pub(crate) fn flags(&self) -> MountFlags {
        self.flags
    }

    /// Those of one mount of a filesystem that is mounted already.
    pub(crate) fn own_flags(&self) -> MountFlags {
        self.flags - OF_FILESYSTEM
    }

    /// Those that a mount has.
    pub(crate) fn of_mount(mount: &Mount) -> MountFlags {
        let has = FLAGS.iter().filter(|(name, _)| mount.has_option(name));
        has.fold(MountFlags::empty(), |flags, (_, flag)| flags | *flag)
    }

    /// For mount(2).
    pub(crate) fn data(&self) -> CString {
        CString::new(self.data.join(",")).expect("checked when it was parsed")
    }

    /// A number that differs for different options.
    pub(crate) fn fingerprint(&self) -> u32 {
        fingerprint(format!("{:x} {}", self.flags.bits(), self.data.join(",")).as_bytes())
    }
}

fn is_ignored(option: &str) -> bool {
    IGNORED.contains(&option) || option.starts_with("x-") || option.starts_with("X-")
}

/// Whether an option has this name, or is this text.
fn is_called(option: &str, name: &str) -> bool {
    option == name || option.split_once('=').is_some_and(|(own, _)| own == name)
}

/// Splits at commas outside quotes: the categories of an SELinux context have commas.
fn split(text: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |c| {
        quoted ^= c == '"';
        c == ',' && !quoted
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(texts: &[&str]) -> Result<Options> {
        Options::parse(&texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn options_become_flags_and_data() {
        let context = r#"context="system_u:object_r:container_file_t:s0:c10,c20""#;
        let options = parse(&["noatime,discard", "rw", "x-systemd.automount", context, "sync"])
            .expect("good");
        assert_eq!(options.flags(), MountFlags::NOATIME | MountFlags::SYNCHRONOUS);
        assert_eq!(options.own_flags(), MountFlags::NOATIME);
        assert_eq!(options.data().to_str(), Ok(&*format!("discard,{context}")));
        assert!(!options.is_read_only() && options.clone().read_only().is_read_only());
        let other = parse(&["noatime"]).expect("good");
        assert_ne!(other.fingerprint(), options.fingerprint());
    }

    #[test]
    fn rule_09_contexts_that_differ_in_a_category_are_told_apart() {
        let context = |category: &str| {
            let option =
                format!(r#"context="system_u:object_r:container_file_t:s0:c1,{category}""#);
            parse(&[&option]).expect("good").fingerprint()
        };
        assert_eq!(context("c2"), context("c2"));
        assert_ne!(context("c2"), context("c3"));
    }

    #[test]
    fn rule_14_refused_options_are_not_quoted() {
        let secret = "password=hunter2\0";
        let error = parse(&[secret]).unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
        for refused in ["noatime,remount", "errors=panic", "journal_dev=8", "device=/dev/sda"] {
            let error = parse(&[refused]).unwrap_err();
            assert!(error.to_string().contains("cannot be used here"), "{error}");
        }
        assert!(parse(&["errors=remount-ro,X-mount.mkdir"]).is_ok());
        assert!(parse(&[&"a".repeat(LEN_MAX)]).is_err());
    }
}
