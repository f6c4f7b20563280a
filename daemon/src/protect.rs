//! What a process needs that is a disk: memory is freed by writing to it, and file systems lie on
//! it, so it must depend on neither.

mod mounts;

use std::env;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{Resource, Rlimit, configure_io_flusher_behavior, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities};

/// Killed for want of memory only if nothing else can be.
const OOM_SCORE_ADJ: &str = "-1000";

/// A way to be independent, and what it means to be without.
struct Protection {
    enable: fn() -> Result<()>,
    without: &'static str,
}

const PROTECTIONS: &[Protection] = &[
    Protection {
        enable: leave_directory,
        without: "the file system of the working directory cannot be unmounted while this runs",
    },
    Protection {
        enable: flush_io,
        without: "a node that is short of memory may wait for its own devices for ever",
    },
    Protection {
        enable: lock_memory,
        without: "memory is not locked; where the node swaps, its devices stall",
    },
    Protection {
        enable: outlive_others,
        without: "the kernel may kill this process when memory is short, and its devices with it",
    },
    Protection {
        enable: open_files,
        without: "there may be too few files for many devices (LimitNOFILE=65536)",
    },
    Protection {
        enable: mounts::separate,
        without: "mounts are shared with others; where these end, this process may wait for its \
                  own device when it ends",
    },
];

/// Makes this process fit to serve the node's own disks, and warns of what it cannot have.
///
/// Must be called while there is one thread: those to come inherit what it does.
pub fn protect() {
    for Protection { enable, without } in PROTECTIONS {
        if let Err(error) = enable() {
            tracing::warn!("{without}: {error:#}");
        }
    }
}

/// It may be on a device of ours.
fn leave_directory() -> Result<()> {
    env::set_current_dir("/").context("cannot change to /")
}

/// Memory that these threads ask the kernel for is never freed by writing to a device first, and
/// their own writes are not throttled for pages that wait for them.
fn flush_io() -> Result<()> {
    configure_io_flusher_behavior(true).context("PR_SET_IO_FLUSHER wants CAP_SYS_RESOURCE")
}

/// The program is read from its disk now, and pages that it will use stay once they are there.
/// Memory that is not used costs nothing.
fn lock_memory() -> Result<()> {
    let wanted = "locking memory wants CAP_IPC_LOCK, or no limit (LimitMEMLOCK=infinity)";
    let limit = getrlimit(Resource::Memlock);
    // All that is allowed.
    let _ = setrlimit(Resource::Memlock, Rlimit { current: limit.maximum, ..limit });
    let may = capabilities(None).context(wanted)?.effective.contains(CapabilitySet::IPC_LOCK);
    // With a limit, memory would be refused when the limit is reached, and the process would end.
    ensure!(may || limit.maximum.is_none(), wanted);
    mlockall(MlockAllFlags::CURRENT).context("mlockall of what there is")?;
    mlockall(MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT).context("mlockall of what will be")
}

/// A device takes some. The usual limit is for programs that use select(2), unlike this one.
fn open_files() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
        .context("cannot open as many files as the hard limit allows")
}

fn outlive_others() -> Result<()> {
    fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ)
        .with_context(|| format!("oom_score_adj {OOM_SCORE_ADJ} wants CAP_SYS_RESOURCE"))
}
