//! Whether a directory can be shared by nodes: whether a lock there holds between them, and a node
//! that has lost one cannot write any more (docs/decisions/0016).

use std::fs;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use sheave_core::{Error, ErrorKind, Result, printable};

/// The mounts of this process (proc_pid_mountinfo(5)).
const MOUNTS: &str = "/proc/self/mountinfo";
/// A setting of the NFS client: it takes lost locks back, as if none had had them meanwhile.
const RECOVERS_LOCKS: &str = "/sys/module/nfs/parameters/recover_lost_locks";
/// `STATX_MNT_ID`, since Linux 5.8 (statx(2)).
const MOUNT_ID: StatxFlags = StatxFlags::from_bits_retain(0x1000);

/// Judges the file system of a directory: an error says why nodes cannot share it.
pub type Judge = fn(&Path) -> Result<()>;

/// Judges by what this node's kernel says of the directory's mount.
///
/// # Errors
/// [`ErrorKind::Unsupported`] where exclusive use by one node cannot be proven.
pub fn judge(dir: &Path) -> Result<()> {
    let fail = |error| Error::from_io("pool", printable(&dir).to_string(), error);
    let found = statx(CWD, dir, AtFlags::empty(), MOUNT_ID).map_err(|errno| fail(errno.into()))?;
    let mounts = fs::read_to_string(MOUNTS).map_err(fail)?;
    // The module's parameters are there once a file system of its kind is mounted.
    let recovers = fs::read_to_string(RECOVERS_LOCKS).is_ok_and(|text| text.starts_with('Y'));
    let mount = mounts.lines().find_map(|line| Mount::parse(line, found.stx_mnt_id));
    let why = match mount {
        Some(mount) => mount.why_not(recovers),
        None => Some("its mount is not known".to_owned()),
    };
    match why {
        None => Ok(()),
        Some(why) => {
            let why = format!(
                "the pool is shared by nodes (shared = true), and its directory {} cannot be: \
                 {why}",
                printable(&dir)
            );
            Err(Error::new(ErrorKind::Unsupported, "pool", why))
        }
    }
}

/// What is known of a mount.
struct Mount<'a> {
    kind: &'a str,
    options: Vec<&'a str>,
}

impl<'a> Mount<'a> {
    /// A line of mountinfo, if it is of the mount with this id.
    fn parse(line: &'a str, id: u64) -> Option<Self> {
        let (mount, rest) = line.split_once(" - ")?;
        let mut mount = mount.split(' ');
        mount.next().filter(|has| has.parse() == Ok(id))?;
        let of_mount = mount.nth(4)?;
        let mut rest = rest.split(' ');
        let kind = rest.next()?;
        let of_kind = rest.nth(1).unwrap_or_default();
        Some(Self { kind, options: of_mount.split(',').chain(of_kind.split(',')).collect() })
    }

    fn has(&self, option: &str) -> bool {
        self.options.contains(&option)
    }

    /// Why nodes cannot share it; `None` if they can.
    fn why_not(&self, recovers_locks: bool) -> Option<String> {
        let local = self
            .options
            .iter()
            .find(|option| option.strip_prefix("local_lock=").is_some_and(|kind| kind != "none"));
        let why = match self.kind {
            "nfs4" if recovers_locks => format!(
                "{RECOVERS_LOCKS} is Y, so a node goes on to write after it has lost its lock; \
                 write N there"
            ),
            "nfs4" if self.has("nocto") => "it is mounted with nocto, so nodes see old records; \
                                            mount it without"
                .to_owned(),
            "nfs4" if local.is_some() => {
                "it is mounted with local locks; mount it without local_lock".to_owned()
            }
            "nfs4" | "ceph" => return None,
            "nfs" => "NFS version 3 does not stop a node that has lost its lock; mount it with \
                      vers=4.2"
                .to_owned(),
            "cifs" | "smb3" => "an SMB client that has lost its lock goes on to write once it is \
                                connected again; use NFS version 4 or CephFS"
                .to_owned(),
            "ext2" | "ext3" | "ext4" | "xfs" | "btrfs" | "zfs" | "bcachefs" | "f2fs" | "tmpfs"
            | "ramfs" | "overlay" | "squashfs" | "erofs" | "vfat" | "exfat" | "ntfs3" => {
                let kind = self.kind;
                format!("{kind} is a file system of this node alone; leave out shared, or mount it")
            }
            kind => format!(
                "it is not known whether locks of {} hold between nodes; they do on NFS version 4 \
                 and CephFS",
                printable(kind)
            ),
        };
        Some(why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why_not(kind: &str, options: &str, recovers: bool) -> Option<String> {
        let line = format!("36 35 0:55 / /mnt rw,noatime shared:1 - {kind} server:/x {options}");
        assert!(Mount::parse(&line, 3).is_none());
        Mount::parse(&line, 36).expect("a mount").why_not(recovers)
    }

    #[test]
    fn only_where_a_lost_lock_stops_a_node_can_nodes_share() {
        let nfs = "rw,vers=4.2,rsize=1048576,hard,proto=tcp,local_lock=none,addr=10.0.0.1";
        assert_eq!(why_not("nfs4", nfs, false), None);
        assert_eq!(why_not("ceph", "rw,name=a,secret=<hidden>,acl", false), None);
        for (kind, options, recovers, want) in [
            ("nfs4", nfs, true, "write N there"),
            ("nfs4", "rw,vers=4.0,nocto,local_lock=none", false, "nocto"),
            ("nfs4", "rw,local_lock=flock", false, "local_lock"),
            ("nfs", "rw,vers=3,local_lock=none", false, "vers=4.2"),
            ("nfs", "rw,vers=3,nolock,local_lock=all", false, "vers=4.2"),
            ("cifs", "rw,vers=3.1.1", false, "NFS version 4"),
            ("smb3", "rw,nobrl", false, "NFS version 4"),
            ("ext4", "rw", false, "of this node alone"),
            ("tmpfs", "rw", false, "of this node alone"),
            ("fuse.sshfs", "rw", false, "not known"),
            ("9p", "rw", false, "not known"),
        ] {
            let why = why_not(kind, options, recovers).expect(kind);
            assert!(why.contains(want), "{kind} {options}: {why}");
        }
    }

    #[test]
    fn a_directory_of_this_node_is_not_shared() {
        let dir = tempfile::tempdir().unwrap();
        let refused = judge(dir.path()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        assert!(refused.to_string().contains("shared = true"), "{refused}");
    }
}
