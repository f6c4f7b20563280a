//! The memory that volumes can use on this node.

use std::fs;
use std::path::Path;

use sheave_core::{Error, ErrorKind, Result};

use crate::spec::VolumeSpec;

const CGROUPS: &str = "/sys/fs/cgroup";

/// Checks that a volume in memory can be filled on this node, unless its text says
/// `overcommit=true`. Memory in use is not subtracted.
///
/// # Errors
/// [`ErrorKind::TooLarge`] when it is larger than the memory of the node, or than what the control
/// groups of this process allow.
pub fn check_memory(volume: &str, spec: &VolumeSpec) -> Result<()> {
    let Some(wanted) = spec.memory_wanted() else { return Ok(()) };
    match available() {
        Some(available) if wanted > available => {
            let why = format!(
                "{volume}: larger than the memory that there is ({available} bytes); make it \
                 smaller, or add overcommit=true if it will never be filled"
            );
            Err(Error::new(ErrorKind::TooLarge, "open", why))
        }
        _ => Ok(()),
    }
}

/// In bytes; `None` where `/proc` does not have it.
fn available() -> Option<u64> {
    let node = memory_total(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    Some(cgroup_limits(Path::new(CGROUPS), &own).fold(node, u64::min))
}

/// `MemTotal` of proc_meminfo(5), in bytes.
fn memory_total(meminfo: &str) -> Option<u64> {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    total.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The limits of a process's control group and of those around it (Linux's
/// Documentation/admin-guide/cgroup-v2.rst, `memory.max`).
fn cgroup_limits<'a>(root: &'a Path, own: &'a str) -> impl Iterator<Item = u64> + 'a {
    let path = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let groups = Path::new(path).ancestors();
    groups.filter_map(move |group| {
        let limit = fs::read_to_string(root.join(group).join("memory.max")).ok()?;
        limit.trim().parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_limit_around_holds() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("system.slice/sheave.service");
        fs::create_dir_all(&group).unwrap();
        fs::write(group.join("memory.max"), "max\n").unwrap();
        fs::write(root.path().join("system.slice/memory.max"), "4096\n").unwrap();
        let own = "1:cpu:/elsewhere\n0::/system.slice/sheave.service\n";
        assert_eq!(cgroup_limits(root.path(), own).collect::<Vec<_>>(), [4096]);
        assert_eq!(cgroup_limits(root.path(), "").count(), 0);
        assert_eq!(memory_total("MemTotal:       16384 kB\nMemFree: 1 kB\n"), Some(16 << 20));
    }

    #[test]
    fn a_volume_beyond_all_memory_wants_to_be_asked_for() {
        let check = |text: &str| check_memory(text, &text.parse().unwrap());
        let error = check("memory:?size=1P").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooLarge);
        assert!(error.to_string().contains("overcommit=true"), "{error}");
        for fits in ["memory:?size=1M", "memory:?size=1P&overcommit=true", "null:?size=1P", "a.img"]
        {
            check(fits).unwrap();
        }
    }
}
