//! The processes that have a file open, as far as /proc and /sys show.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::os::unix::process::parent_id;
use std::path::Path;

use super::lock::Identity;

/// The most open files that a search looks at, so that its time is bounded on a busy machine.
const FILES_MAX: usize = 1 << 17;
/// The most ancestors that are excluded.
const ANCESTORS_MAX: usize = 64;
/// The byte that a qemu which writes holds a lock on (100 + BLK_PERM_WRITE's bit), and the one for
/// resizing.
const QEMU_WRITE_BYTES: [u64; 2] = [101, 103];

/// A process that has the file open.
#[derive(Debug)]
pub(super) struct Holder {
    pid: u32,
    name: String,
    pub(super) writes: bool,
}

impl Holder {
    /// Whether it is a child of this process.
    pub(super) fn is_child(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok();
        stat.as_deref().and_then(parent_in) == Some(std::process::id())
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.name, self.pid)
    }
}

/// Whether other programs that have a file open can be found: /proc is mounted.
#[must_use]
pub fn are_visible() -> bool {
    Path::new("/proc/self/fd").exists()
}

/// Other processes that have the file open, without ancestors of this one: a shell or a test that
/// passes us its own file does so deliberately.
pub(super) fn find(identity: &Identity) -> Vec<Holder> {
    find_all(std::slice::from_ref(identity)).into_iter().map(|(_, holder)| holder).collect()
}

/// The same for several files in one search; each holder comes with the index of its file.
pub(super) fn find_all(files: &[Identity]) -> Vec<(usize, Holder)> {
    let family = family();
    let sought = Sought {
        files,
        inodes: files.iter().map(|file| file.ino).collect(),
        has_device: files.iter().any(|file| file.rdev.is_some()),
    };
    let mut budget = FILES_MAX;
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| !family.contains(pid))
        .flat_map(|pid| held(pid, &sought, &mut budget))
        .collect()
}

struct Sought<'a> {
    files: &'a [Identity],
    inodes: HashSet<u64>,
    has_device: bool,
}

fn held(pid: u32, sought: &Sought<'_>, budget: &mut usize) -> Vec<(usize, Holder)> {
    let process = Path::new("/proc").join(pid.to_string());
    // Not readable, or gone.
    let Ok(entries) = fs::read_dir(process.join("fdinfo")) else { return Vec::new() };
    let mut found: Vec<(usize, bool)> = Vec::new();
    for entry in entries.flatten() {
        let Some(left) = budget.checked_sub(1) else { break };
        *budget = left;
        let Ok(info) = fs::read_to_string(entry.path()) else { continue };
        let Some(open) = OpenFile::parse(&info) else { continue };
        // A stat may hang on a dead network file system, so it is made only where it may match.
        let may_match =
            sought.has_device || open.ino.is_none_or(|ino| sought.inodes.contains(&ino));
        if !may_match {
            continue;
        }
        let Ok(metadata) = fs::metadata(process.join("fd").join(entry.file_name())) else {
            continue;
        };
        let identity = Identity::of(&metadata);
        let same = sought.files.iter().position(|file| file.is_same(&identity));
        let Some(index) = same else { continue };
        match found.iter_mut().find(|(other, _)| *other == index) {
            Some((_, writes)) => *writes |= open.writes,
            None => found.push((index, open.writes)),
        }
    }
    if found.is_empty() {
        return Vec::new();
    }
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    let holder = |writes| Holder { pid, name: name.trim().to_owned(), writes };
    found.into_iter().map(|(index, writes)| (index, holder(writes))).collect()
}

/// This process and its ancestors.
fn family() -> Vec<u32> {
    let mut family = vec![std::process::id()];
    let mut next = Some(parent_id());
    while let Some(pid) = next.filter(|pid| *pid != 0 && family.len() < ANCESTORS_MAX) {
        family.push(pid);
        next = fs::read_to_string(format!("/proc/{pid}/stat")).ok().as_deref().and_then(parent_in);
    }
    family
}

/// The parent in the text of /proc/PID/stat: the second field after the name in parentheses.
fn parent_in(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// An open file as fdinfo shows it.
struct OpenFile {
    /// Since Linux 5.14.
    ino: Option<u64>,
    writes: bool,
}

impl OpenFile {
    fn parse(info: &str) -> Option<Self> {
        const ACCESS_MODE: u32 = 0o3;
        const PATH_ONLY: u32 = 0o10_000_000;
        let field = |name| {
            let line = info.lines().find_map(|line| line.strip_prefix(name));
            line.map(|value: &str| value.trim())
        };
        let flags = u32::from_str_radix(field("flags:")?, 8).ok()?;
        let ino = field("ino:").and_then(|ino| ino.parse().ok());
        (flags & PATH_ONLY == 0).then_some(Self { ino, writes: flags & ACCESS_MODE != 0 })
    }
}

/// The locks of this machine (/proc/locks). They also show locks of processes that are hidden from
/// us.
pub(super) fn locks() -> String {
    fs::read_to_string("/proc/locks").unwrap_or_default()
}

/// The index of a file that a qemu program has open for writing, by its locks. They are shared
/// ones, unlike ours.
pub(super) fn qemu_writes(locks: &str, files: &[Identity]) -> Option<usize> {
    let by_inode: HashMap<String, usize> = files.iter().map(inode_in_locks).zip(0..).collect();
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, "OFDLCK", _, "READ", _, inode, first, last] = fields[..] else { return None };
        let (first, last) = (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?);
        let writes = QEMU_WRITE_BYTES.iter().any(|byte| (first..=last).contains(byte));
        by_inode.get(inode).copied().filter(|_| writes)
    })
}

/// The name of a file in /proc/locks.
fn inode_in_locks(file: &Identity) -> String {
    let (major, minor) = (rustix::fs::major(file.dev), rustix::fs::minor(file.dev));
    format!("{major:02x}:{minor:02x}:{}", file.ino)
}

/// A loop device that writes to one of the files, and the index of the file.
pub(super) fn loop_device(files: &[Identity]) -> Option<(usize, String)> {
    fs::read_dir("/sys/block").ok()?.flatten().find_map(|entry| {
        let device = entry.path();
        let backing = fs::read_to_string(device.join("loop/backing_file")).ok()?;
        let read_only = fs::read_to_string(device.join("ro")).is_ok_and(|ro| ro.trim() == "1");
        let metadata = fs::metadata(backing.trim_end_matches('\n')).ok()?;
        let identity = Identity::of(&metadata);
        let index = files.iter().position(|file| file.is_same(&identity))?;
        (!read_only).then(|| (index, format!("/dev/{}", entry.file_name().to_string_lossy())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_qemu_locks() {
        // As shown by qemu-nbd 7.2, with and without --read-only.
        let writer = "1: POSIX  ADVISORY  WRITE 8968 fe:00:9977948 0 EOF\n\
                      2: OFDLCK ADVISORY  READ -1 fe:00:9977946 203 203\n\
                      3: OFDLCK ADVISORY  READ -1 fe:00:9977946 100 101\n";
        let reader = "2: OFDLCK ADVISORY  READ -1 fe:00:9977946 203 203\n\
                      3: OFDLCK ADVISORY  READ -1 fe:00:9977946 100 100\n";
        let file = |ino| Identity { dev: rustix::fs::makedev(0xfe, 0), ino, rdev: None };
        assert_eq!(qemu_writes(writer, &[file(9_977_946)]), Some(0));
        assert_eq!(qemu_writes(writer, &[file(1), file(9_977_948), file(9_977_946)]), Some(2));
        assert_eq!(qemu_writes(writer, &[file(9_977_948)]), None);
        assert_eq!(qemu_writes(reader, &[file(9_977_946)]), None);
        let own = "1: OFDLCK ADVISORY  WRITE -1 fe:00:9977946 0 4611686018427387903\n";
        assert_eq!(qemu_writes(own, &[file(9_977_946)]), None);
        assert_eq!(qemu_writes("", &[file(1)]), None);
    }

    #[test]
    fn reads_fdinfo_and_stat() {
        let open = OpenFile::parse("pos:\t0\nflags:\t02100002\nmnt_id:\t27\nino:\t42\n").unwrap();
        assert!(open.writes && open.ino == Some(42));
        assert!(!OpenFile::parse("flags:\t0100000\n").unwrap().writes);
        assert!(OpenFile::parse("flags:\t012000002\n").is_none(), "O_PATH");
        assert_eq!(parent_in("17 (a ) b) S 4 17 17 0"), Some(4));
        assert_eq!(family()[..2], [std::process::id(), parent_id()]);
    }
}
