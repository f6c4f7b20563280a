//! What must be true of a node between any two calls.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use sheave_control::v1 as control;

use super::claim::{Claim, Known, Kubelet, Use};

/// What is there: of the daemon and its pools.
pub(super) struct Found {
    /// Volumes of the pool, by name.
    pub(super) volumes: BTreeMap<String, control::Volume>,
    /// Paths of devices, by the ids of their volumes.
    pub(super) devices: BTreeMap<String, PathBuf>,
}

/// A mount of this namespace: where, and of what.
struct Mount {
    target: PathBuf,
    source: PathBuf,
}

impl Found {
    pub(super) fn new(volumes: Vec<control::Volume>, devices: Vec<control::Device>) -> Self {
        let (count, device_count) = (volumes.len(), devices.len());
        let volumes: BTreeMap<_, _> =
            volumes.into_iter().map(|volume| (volume.name.clone(), volume)).collect();
        assert_eq!(volumes.len(), count, "two volumes have one name");
        let devices: BTreeMap<_, _> =
            devices.into_iter().map(|device| (device.volume_id, device.path.into())).collect();
        assert_eq!(devices.len(), device_count, "a volume has two devices");
        Self { volumes, devices }
    }

    /// Checks all claims.
    ///
    /// # Panics
    /// When something is left, missing, doubled, or of another volume.
    #[track_caller]
    pub(super) fn check(&self, claims: &mut [Claim], kubelet: &Kubelet) {
        self.check_volumes(claims);
        self.check_devices(claims);
        let mounts = own_mounts(&kubelet.dir);
        let mut expected = BTreeSet::new();
        for claim in claims.iter() {
            let staging = kubelet.staging(claim);
            if claim.staged != Known::No && claim.used != Use::Block {
                expected.insert(staging.clone());
            }
            if claim.staged == Known::Yes && claim.used != Use::Block {
                self.check_place(claim, &mounts, &staging);
            }
            for pod in claim.pods.iter().filter(|pod| pod.mount != Known::No) {
                let target = kubelet.target(claim, pod);
                if pod.mount == Known::Yes {
                    self.check_place(claim, &mounts, &target);
                }
                expected.insert(target);
            }
        }
        let left: Vec<_> = mounts.iter().map(|mount| &mount.target).collect();
        let left: Vec<_> = left.into_iter().filter(|target| !expected.contains(*target)).collect();
        assert!(left.is_empty(), "mounts are left: {left:?}");
    }

    #[track_caller]
    fn check_volumes(&self, claims: &mut [Claim]) {
        for (name, volume) in &self.volumes {
            let claim = claims.iter_mut().find(|claim| claim.name == *name && !claim.is_gone());
            let claim = claim.unwrap_or_else(|| panic!("volume {name} has leaked"));
            match &claim.volume {
                Some(known) => assert_eq!(known.volume_id, volume.id, "{name} has another id"),
                None => assert_eq!(claim.made, Known::Perhaps, "{name} was not asked for"),
            }
            assert!(volume.epoch >= claim.epoch, "{name}: its epoch has become lower");
            claim.epoch = volume.epoch;
            let nodes = volume.publications.len();
            match claim.attached {
                Known::Yes => assert_eq!(nodes, 1, "{name} is published"),
                Known::No => assert_eq!(nodes, 0, "{name} is published to a node"),
                Known::Perhaps => {}
            }
            let wanted = match claim.used {
                Use::Block => "block",
                Use::Filesystem(fs) => fs,
            };
            let is_known = claim.staged != Known::Yes || volume.formatted == wanted;
            assert!(is_known && (volume.formatted == wanted || volume.formatted.is_empty()));
            assert!(claim.staged != Known::Yes || !volume.formatting, "{name}: half of it");
        }
        let is_there = |claim: &Claim| self.volumes.contains_key(&claim.name);
        for claim in claims.iter().filter(|claim| claim.volume.is_some() && !claim.deleted) {
            assert!(is_there(claim), "{} is lost", claim.name);
        }
    }

    #[track_caller]
    fn check_devices(&self, claims: &[Claim]) {
        for (id, path) in &self.devices {
            let claim = claims.iter().find(|claim| claim.volume.is_some() && claim.id() == id);
            let is_used = claim.is_some_and(|claim| claim.staged != Known::No);
            assert!(is_used, "device {} of volume {id} is left", path.display());
        }
        for claim in claims.iter().filter(|claim| claim.staged == Known::Yes) {
            assert!(self.devices.contains_key(claim.id()), "{} has no device", claim.name);
        }
    }

    /// Checks that a place shows the device of a volume, once.
    #[track_caller]
    fn check_place(&self, claim: &Claim, mounts: &[Mount], place: &Path) {
        let what = place.display();
        let here: Vec<_> = mounts.iter().filter(|mount| mount.target == place).collect();
        assert_eq!(here.len(), 1, "mounts at {what}");
        let device = &self.devices[claim.id()];
        let number = fs::metadata(device).expect("its device").rdev();
        let shown = match claim.used {
            Use::Filesystem(_) => fs::metadata(&here[0].source),
            Use::Block => fs::symlink_metadata(place),
        };
        let shown = shown.unwrap_or_else(|error| panic!("{what}: its source: {error}"));
        assert!(shown.file_type().is_block_device(), "{what} is of no device");
        assert_eq!(shown.rdev(), number, "{what} is of another device than {}", device.display());
    }
}

/// The mounts below a directory (proc_pid_mountinfo(5)).
fn own_mounts(dir: &Path) -> Vec<Mount> {
    let text = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let parse = |line: &str| {
        let (place, what) = line.split_once(" - ").expect("a separator");
        let target = place.split(' ').nth(4).expect("a mount point");
        let source = what.split(' ').nth(1).expect("a source");
        Mount { target: target.into(), source: source.into() }
    };
    let all = text.lines().map(parse);
    all.filter(|mount| mount.target.starts_with(dir)).collect()
}
