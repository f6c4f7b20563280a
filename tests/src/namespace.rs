//! Tests that mount run in a mount namespace of their own, so that nothing is left of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::{Run, have, skip};

/// A whole test; each of its waits has a limit of its own.
const TIMEOUT: Duration = Duration::from_secs(900);
/// Set in the process that has its own namespace.
const INSIDE: &str = "SHEAVE_TEST_NAMESPACE";
/// Names the part of a test that a child process is to do.
const PART: &str = "SHEAVE_TEST_PART";
/// Names its directory.
const DIR: &str = "SHEAVE_TEST_DIR";

/// Runs the body of the test of this name, which starts with its modules, in a mount namespace of
/// its own. Where this machine lets nothing be mounted, the test is skipped.
///
/// # Panics
/// When the body panics.
pub fn in_namespace(test: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    if let Some(reason) = cannot_mount() {
        return skip(test, &reason);
    }
    let this = std::env::current_exe().expect("the test's own program");
    let done = Run::new("unshare")
        .args("--mount --propagation private --")
        .arg(this)
        .args("--nocapture --exact")
        .arg(test)
        .env(INSIDE, "1")
        .timeout(TIMEOUT)
        .output();
    assert!(done.status.success(), "{}", done.describe());
    assert!(done.stdout.contains("1 passed"), "no test {test}: {}", done.describe());
    // What is skipped inside is seen outside.
    crate::note(&done.stderr);
}

/// The same for a test that needs block devices of the stand-in for a kernel.
///
/// # Panics
/// When the body panics.
pub fn on_devices(test: &str, body: impl FnOnce()) {
    if have("nbdfuse") {
        return in_namespace(test, body);
    }
    skip(test, "nbdfuse (libnbd-bin) is not installed");
}

/// A command that runs a part of the test of this name in the same namespace, in a process that
/// may be killed: [`part`] is this text there, and [`parents_dir`] this directory.
///
/// # Panics
/// When the test does not know its own program.
#[must_use]
pub fn child(test: &str, part: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("the test's own program"));
    command.args(["--nocapture", "--exact", test]).env(PART, part).env(DIR, dir);
    command
}

/// The part that this process is to do, if it is a child of a test.
#[must_use]
pub fn part() -> Option<String> {
    std::env::var(PART).ok()
}

/// The directory of the test whose child this process is.
///
/// # Panics
/// When it is none.
#[must_use]
pub fn parents_dir() -> PathBuf {
    std::env::var_os(DIR).expect("a child of a test").into()
}

/// Takes away all mounts below a directory, also busy ones. A test that failed has left them, and
/// nothing else ends them once their daemon is gone.
pub fn unmount_below(dir: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let targets: Vec<_> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    // The files of a stand-in's devices end with their devices.
    let is_left = |target: &&str| Path::new(target).starts_with(dir) && !target.ends_with(".file");
    for target in targets.into_iter().filter(is_left).rev() {
        let _ = Run::new("umount").arg("--lazy").arg(target).output();
    }
}

/// The mounts below a directory. Those that are left end with this, which must go before the daemon
/// of their devices.
pub struct Mounts(PathBuf);

impl Mounts {
    /// Those of this directory.
    #[must_use]
    pub fn below(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    /// Where they are, but for those of a stand-in for a kernel.
    ///
    /// # Panics
    /// When they cannot be read.
    #[must_use]
    pub fn targets(&self) -> Vec<PathBuf> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let targets = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
        let is_own = |target: &PathBuf| target.extension().is_none_or(|kind| kind != "file");
        targets.filter(|target| target.starts_with(&self.0) && is_own(target)).collect()
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        unmount_below(&self.0);
    }
}

fn cannot_mount() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("it mounts, which needs root".to_owned());
    }
    for program in ["unshare", "losetup", "mkfs.ext4"] {
        if !have(program) && !Path::new("/usr/sbin").join(program).exists() {
            return Some(format!("{program} is not installed"));
        }
    }
    if fs::metadata("/dev/loop-control").is_err() {
        return Some("there are no loop devices".to_owned());
    }
    let mounted = Run::new("unshare").args("--mount --propagation private mount -t tmpfs x /mnt");
    let mounted = mounted.output();
    (!mounted.status.success()).then(|| format!("nothing can be mounted: {}", mounted.stderr))
}
