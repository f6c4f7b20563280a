//! Whether a thread that submits a request may have to wait for the disk to take it.
//!
//! A disk has room for `nr_requests` (Documentation/ABI/stable/sysfs-block). A thread that submits
//! one more waits until the disk answers, also if it asked not to: file systems submit direct I/O
//! and readahead without REQ_NOWAIT (fs/iomap/direct-io.c, mm/readahead.c). If it is a shard's
//! thread, all volumes of the shard wait. So a disk that has much to do gets further requests from
//! threads of the kernel.
//!
//! A write to the page cache may wait for a commit of the file system's journal
//! (fs/jbd2/transaction.c, `do_get_write_access`). Each sync makes one. So other threads carry out
//! such writes while a sync goes on.

use std::fs::{File, Metadata, read_dir, read_to_string};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::lock;

/// Requests for which a disk has room, if the kernel does not say (btrfs): the fewest of any.
const ROOM_DEFAULT: usize = 64;
/// File systems without a disk: tmpfs and ramfs (statfs(2)).
const IN_MEMORY: [u32; 2] = [0x0102_1994, 0x8584_58f6];

/// A disk that this process has files on.
pub(super) struct Disk {
    dev: u64,
    /// The most requests that shards submit themselves: half of its room. The other half is for
    /// requests that become several, and for other programs.
    submitted_max: usize,
    /// Requests of all backends.
    in_flight: AtomicUsize,
    /// Syncs of all backends that go on.
    syncs: AtomicUsize,
}

static DISKS: Mutex<Vec<Weak<Disk>>> = Mutex::new(Vec::new());

impl Disk {
    /// The disk of an open file, or the one that it is.
    pub(super) fn of(file: &File, metadata: &Metadata) -> Arc<Self> {
        let is_device = metadata.file_type().is_block_device();
        let dev = if is_device { metadata.rdev() } else { metadata.dev() };
        let mut disks = DISKS.lock().unwrap_or_else(PoisonError::into_inner);
        disks.retain(|disk| disk.strong_count() > 0);
        let mut known = disks.iter().filter_map(Weak::upgrade);
        if let Some(disk) = known.find(|disk| disk.dev == dev) {
            return disk;
        }
        let room = match lock::is_on(file, &IN_MEMORY) {
            true if !is_device => usize::MAX,
            _ => room(&device(dev)).unwrap_or(ROOM_DEFAULT),
        };
        let disk = Arc::new(Self::new(dev, room));
        disks.push(Arc::downgrade(&disk));
        disk
    }

    fn new(dev: u64, room: usize) -> Self {
        Self {
            dev,
            submitted_max: room / 2,
            in_flight: AtomicUsize::new(0),
            syncs: AtomicUsize::new(0),
        }
    }
}

/// What one backend has in flight there.
pub(super) struct Share {
    disk: Arc<Disk>,
    /// Its part of [`Disk::in_flight`].
    counted: usize,
    is_syncing: bool,
}

impl Share {
    pub(super) fn new(disk: &Arc<Disk>) -> Self {
        Self { disk: Arc::clone(disk), counted: 0, is_syncing: false }
    }

    /// Counts the requests of the backend, and says whether the last of them may be submitted
    /// without waiting for the disk. Those that the page cache serves count, too: only the kernel
    /// knows which these are.
    pub(super) fn has_room(&mut self, in_flight: usize) -> bool {
        self.count(in_flight);
        // Only numbers are shared between threads, and a little more or less does no harm.
        self.disk.in_flight.load(Relaxed) <= self.disk.submitted_max
    }

    /// Whether a write to the page cache may have to wait for a sync.
    pub(super) fn waits_for_sync(&self) -> bool {
        self.disk.syncs.load(Relaxed) > 0
    }

    /// Whether a sync of this backend goes on.
    pub(super) fn is_syncing(&self) -> bool {
        self.is_syncing
    }

    /// A sync of this backend begins or ends.
    pub(super) fn set_syncing(&mut self, is_syncing: bool) {
        match (self.is_syncing, is_syncing) {
            (false, true) => self.disk.syncs.fetch_add(1, Relaxed),
            (true, false) => self.disk.syncs.fetch_sub(1, Relaxed),
            _ => 0,
        };
        self.is_syncing = is_syncing;
    }

    /// Requests have completed.
    pub(super) fn completed(&mut self, in_flight: usize) {
        if in_flight < self.counted {
            self.count(in_flight);
        }
    }

    fn count(&mut self, in_flight: usize) {
        if in_flight != self.counted {
            self.disk.in_flight.fetch_add(in_flight.wrapping_sub(self.counted), Relaxed);
            self.counted = in_flight;
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.count(0);
        self.set_syncing(false);
    }
}

/// Requests for which the device with this directory in sysfs has room. One that consists of others
/// (dm, md) submits to them in the thread that submits to it, so the least of them counts.
fn room(device: &Path) -> Option<usize> {
    let parts = read_dir(device.join("slaves")).into_iter().flatten().flatten();
    let least = parts.filter_map(|part| room(&part.path())).min();
    least.or_else(|| attribute_of(device, "queue/nr_requests")?.parse().ok())
}

/// A property of a device, or of the whole device of a partition, from sysfs.
pub(super) fn attribute(dev: u64, name: &str) -> Option<String> {
    attribute_of(&device(dev), name)
}

fn device(dev: u64) -> PathBuf {
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

fn attribute_of(device: &Path, name: &str) -> Option<String> {
    let paths = [device.join(name), device.join("..").join(name)];
    let text = paths.iter().find_map(|path| read_to_string(path).ok())?;
    Some(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir, create_dir_all, write};
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn requests_of_all_backends_count_until_they_complete() {
        let disk = Arc::new(Disk::new(7, 8));
        let (mut one, mut other) = (Share::new(&disk), Share::new(&disk));
        assert!((1..=4).all(|count| one.has_room(count)));
        assert!(!one.has_room(5), "half of its room");
        assert!(!other.has_room(1), "it is the same disk");
        one.completed(2);
        assert!(other.has_room(2) && !other.has_room(3));
        drop(one);
        assert!(other.has_room(4));
        other.completed(0);
        assert_eq!(disk.in_flight.load(Relaxed), 0);
    }

    #[test]
    fn files_of_a_file_system_are_on_one_disk() {
        let files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
        let [one, other] = files.map(|file| Disk::of(&file, &file.metadata().unwrap()));
        assert!(Arc::ptr_eq(&one, &other) && one.submitted_max > 0);
    }

    #[test]
    fn the_least_room_of_the_parts_of_a_device_counts() {
        let dir = tempfile::tempdir().unwrap();
        let device = |name: &str, room: &str| {
            let path = dir.path().join(name);
            create_dir_all(path.join("queue")).unwrap();
            write(path.join("queue/nr_requests"), room).unwrap();
            create_dir(path.join("slaves")).unwrap();
            path
        };
        let (mapped, raid) = (device("dm-0", "128\n"), device("md0", "128\n"));
        let (fast, slow) = (device("nvme0n1", "1023\n"), device("sda", "62\n"));
        create_dir(slow.join("sda1")).unwrap();
        for (of, part) in
            [(&mapped, raid.clone()), (&raid, fast.clone()), (&raid, slow.join("sda1"))]
        {
            symlink(&part, of.join("slaves").join(part.file_name().unwrap())).unwrap();
        }
        assert_eq!([&mapped, &raid, &fast].map(|device| room(device)), [62, 62, 1023].map(Some));
        assert_eq!(room(&dir.path().join("none")), None);
    }

    #[test]
    fn files_in_memory_have_no_disk_to_wait_for() {
        let Ok(file) = tempfile::tempfile_in("/dev/shm") else { return };
        let disk = Disk::of(&file, &file.metadata().unwrap());
        assert!(disk.submitted_max > ROOM_DEFAULT || !lock::is_on(&file, &IN_MEMORY));
    }
}
