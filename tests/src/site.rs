//! The node engine on loop devices, and what its tests share.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sheave_node::{
    Access, Attach, Error, Fs, Kind, Node, PublishRequest, Result, StageRequest, Tools,
};

use crate::{LoopVolumes, Scratch, have, skip, unmount_below};

/// A node with volumes on loop devices. Its devices end with it.
pub struct Site {
    dir: PathBuf,
    /// The volumes.
    pub volumes: Arc<LoopVolumes>,
    /// None in a child process, which leaves all to its parent.
    scratch: Option<Scratch>,
}

impl Default for Site {
    fn default() -> Self {
        Self::new()
    }
}

impl Site {
    /// A site in a directory of its own.
    #[must_use]
    pub fn new() -> Self {
        let scratch = Scratch::new();
        for name in ["stage", "pods", "bin"] {
            fs::create_dir(scratch.path().join(name)).expect("a directory");
        }
        let mut site = Self::shared(scratch.path());
        site.scratch = Some(scratch);
        site
    }

    /// The site of a parent process, whose directory this is.
    #[must_use]
    pub fn shared(dir: impl Into<PathBuf>) -> Self {
        let dir = dir.into();
        let volumes = Arc::new(LoopVolumes::new(&dir));
        Self { dir, volumes, scratch: None }
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// An engine; a second one is what a restart makes.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn node(&self) -> Node {
        // The directories of `bin` come first.
        let tools = Tools::in_path(self.dir.join("bin").as_os_str());
        let volumes = Arc::clone(&self.volumes);
        Node::open(self.dir.join("node"), volumes, tools).expect("an engine")
    }

    /// Puts a program in the place of one of the system.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn replace_tool(&self, name: &str, script: &str) {
        let path = self.dir.join("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("a script");
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("executable");
    }

    /// Counts how often a program of the system is run, in a file.
    pub fn count_tool(&self, name: &str) {
        let real = system_path(name);
        // With -N, mkfs.xfs only tries whether it can be done.
        let count = "case \" $* \" in *\" -N \"*) ;; *) echo >>$0.count ;; esac";
        self.replace_tool(name, &format!("{count}\nexec {real} \"$@\""));
    }

    /// How often it was.
    #[must_use]
    pub fn tool_runs(&self, name: &str) -> usize {
        let count = fs::read_to_string(self.dir.join("bin").join(format!("{name}.count")));
        count.unwrap_or_default().lines().count()
    }

    /// Where volumes are staged.
    #[must_use]
    pub fn staging(&self) -> PathBuf {
        self.dir.join("stage")
    }

    /// Where a pod has its volume.
    #[must_use]
    pub fn target(&self, pod: &str) -> PathBuf {
        self.dir.join("pods").join(pod)
    }

    /// A request to stage the volume `v`.
    #[must_use]
    pub fn stage_request(&self, fs: Option<Fs>) -> StageRequest {
        StageRequest {
            volume: "v".to_owned(),
            staging: self.staging(),
            access: access(fs),
            may_format: true,
            attach: Attach { epoch: Some(1), ..Attach::default() },
            force_unstage_after: None,
            user: "csi",
        }
    }

    /// A request to publish it for a pod.
    #[must_use]
    pub fn publish_request(&self, pod: &str, fs: Option<Fs>) -> PublishRequest {
        PublishRequest {
            volume: "v".to_owned(),
            staging: self.staging(),
            target: self.target(pod),
            access: access(fs),
            read_only: false,
            is_shared: true,
            mode: String::new(),
            epoch: None,
            force_unstage_after: None,
        }
    }

    /// Checks that nothing is left of the volume `v` on this node.
    ///
    /// # Panics
    /// When something is.
    #[track_caller]
    pub fn check_bare(&self) {
        assert_eq!(self.volumes.loop_device("v"), None);
        let names = |dir: &str| -> Vec<_> {
            let entries = fs::read_dir(self.dir.join(dir)).into_iter().flatten().flatten();
            entries.map(|entry| entry.file_name()).collect()
        };
        for dir in ["node", "stage", "pods"] {
            assert!(names(dir).is_empty(), "{dir}: {:?}", names(dir));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let dir = self.dir.to_str().expect("UTF-8");
        let left: Vec<_> = mounts.lines().filter(|line| line.contains(dir)).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.scratch.is_none() {
            return;
        }
        unmount_below(&self.dir);
        self.volumes.end();
    }
}

/// Where the system has a program.
///
/// # Panics
/// When it has not.
#[must_use]
pub fn system_path(name: &str) -> String {
    let dirs = ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin"];
    let mut paths = dirs.iter().map(|dir| format!("{dir}/{name}"));
    paths.find(|path| Path::new(path).exists()).unwrap_or_else(|| panic!("{name} is missing"))
}

/// Whether the system can make and mount this type.
#[must_use]
pub fn has_fs(fs: Fs) -> bool {
    let maker = format!("mkfs.{}", fs.name());
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let is_known = known.lines().any(|line| line.trim() == fs.name());
    is_known && (have(&maker) || Path::new("/usr/sbin").join(&maker).exists())
}

/// Whether this process may grow a mounted filesystem of this type: for ext4 the kernel wants
/// `CAP_SYS_RESOURCE`, which root of a container may lack.
///
/// # Panics
/// When /proc is not there.
#[must_use]
pub fn may_grow(fs: Fs) -> bool {
    const SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").expect("proc");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective =
        u64::from_str_radix(effective.expect("CapEff").trim(), 16).expect("hexadecimal");
    fs != Fs::Ext4 || effective & 1 << SYS_RESOURCE != 0
}

fn access(fs: Option<Fs>) -> Access {
    fs.map_or(Access::Block, |fs| Access::Mount { fs, options: vec!["noatime".to_owned()] })
}

/// The types of filesystems that can be tried here; the others are skipped in this test.
#[must_use]
pub fn fs_types(test: &str) -> Vec<Fs> {
    let (here, missing): (Vec<_>, Vec<_>) = Fs::ALL.into_iter().partition(|fs| has_fs(*fs));
    for fs in missing {
        skip(&format!("{test}, {}", fs.name()), "this machine cannot make or mount it");
    }
    here
}

/// Checks that a call of the node engine is refused, and why.
///
/// # Panics
/// When it is not.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: Result<T>, why: &str) -> Error {
    let error = result.expect_err("it is refused");
    assert_eq!(error.kind(), Kind::Refused, "{error}");
    assert!(error.to_string().contains(why), "no {why:?}: {error}");
    error
}
