//! Protection of a process that is a disk: the kernel frees memory by writing to it, and file
//! systems are on it, so it must depend on neither.

mod mounts;

use std::env;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{Resource, Rlimit, configure_io_flusher_behavior, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities};

/// The kernel kills it for want of memory only if it can kill nothing else.
const OOM_SCORE_ADJ: &str = "-1000";

/// A protection, and the consequence of being without it.
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

/// Protects this process, and warns of each protection that it cannot have.
///
/// Call it while there is one thread: later threads inherit the settings.
pub fn protect() {
    for Protection { enable, without } in PROTECTIONS {
        if let Err(error) = enable() {
            tracing::warn!("{without}: {error:#}");
        }
    }
}

/// The working directory may be on one of our devices.
fn leave_directory() -> Result<()> {
    env::set_current_dir("/").context("cannot change to /")
}

/// The kernel never frees memory for these threads by writing to a device, and does not throttle
/// their own writes for dirty pages that depend on them.
fn flush_io() -> Result<()> {
    configure_io_flusher_behavior(true).context("PR_SET_IO_FLUSHER wants CAP_SYS_RESOURCE")
}

/// The program is read from its disk now, and pages stay in memory once they are used. Unused
/// memory costs nothing.
fn lock_memory() -> Result<()> {
    let wanted = "locking memory wants CAP_IPC_LOCK, or no limit (LimitMEMLOCK=infinity)";
    let limit = getrlimit(Resource::Memlock);
    // Up to the hard limit.
    let _ = setrlimit(Resource::Memlock, Rlimit { current: limit.maximum, ..limit });
    let may = capabilities(None).context(wanted)?.effective.contains(CapabilitySet::IPC_LOCK);
    // With a limit, memory would be refused when the limit is reached, and the process would end.
    ensure!(may || limit.maximum.is_none(), wanted);
    mlockall(MlockAllFlags::CURRENT).context("mlockall of what there is")?;
    mlockall(MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT).context("mlockall of what will be")
}

/// A device takes some descriptors. The usual limit is for programs that use select(2), unlike this
/// one.
fn open_files() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
        .context("cannot open as many files as the hard limit allows")
}

fn outlive_others() -> Result<()> {
    fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ)
        .with_context(|| format!("oom_score_adj {OOM_SCORE_ADJ} wants CAP_SYS_RESOURCE"))
}
