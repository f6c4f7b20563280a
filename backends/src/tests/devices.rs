//! Block devices: a loop device over an image.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use sheave_core::{ErrorKind, Op, Volume};
use tempfile::TempDir;

use super::{bytes, driver, extents, range, read, trim, with_fua, write, zeroes};
use crate::file::HANDLES_READY;
use crate::{FileOptions, FileVolume, OpenOptions, open};

const SIZE: u64 = 4 << 20;

/// A loop device, detached in the end.
struct Loop {
    device: PathBuf,
    image: PathBuf,
    _dir: TempDir,
}

impl Loop {
    fn new(args: &[&str]) -> Self {
        let dir = TempDir::new_in("/var/tmp").unwrap();
        let image = dir.path().join("a.img");
        std::fs::write(&image, vec![0x11; SIZE as usize]).unwrap();
        let output = Command::new("losetup")
            .args(args)
            .args(["-f", "--show"])
            .arg(&image)
            .output()
            .expect("losetup runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        Self { device, image, _dir: dir }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

#[test]
#[ignore = "needs root and a free loop device"]
fn a_device_is_served_with_all_its_ops() {
    let looped = Loop::new(&[]);
    let volume = FileVolume::open(&FileOptions::new(&looped.device)).unwrap();
    assert_eq!(volume.size(), SIZE);
    assert!(!volume.info().can.block_status);
    let mut driver = driver(&volume);
    driver.run_one(with_fua(write(1000, b"hello"))).unwrap();
    // Not aligned to the device's sectors, which its fallocate would refuse.
    driver.run_one(zeroes(999, 3)).unwrap();
    driver.run_one(trim(4096 - 7, 3)).unwrap();
    driver.run_one(with_fua(trim(4096, 8192))).unwrap();
    driver.run_one(zeroes(1 << 20, 1 << 20)).unwrap();
    assert_eq!(bytes(driver.run_one(read(998, 8))), b"\x11\0\0\0llo\x11");
    assert_eq!(bytes(driver.run_one(read((1 << 20) - 1, 3))), [0x11, 0, 0]);
    assert_eq!(bytes(driver.run_one(read(4096 - 7, 4))), [0x11; 4]);
    let status = Op::BlockStatus { range: range(0, SIZE), extents_max: 9 };
    assert_eq!(extents(driver.run_one(status)), [(SIZE, false, false)]);
    driver.run_one(Op::Flush).unwrap();
}

#[test]
#[ignore = "needs root and a free loop device"]
fn a_direct_device_takes_its_own_blocks() {
    let looped = Loop::new(&["--sector-size", "4096"]);
    let url = format!("{}?direct=true", looped.device.display());
    let volume = open(&url, &OpenOptions::default()).unwrap();
    assert_eq!(volume.info().block.minimum, 4096);
    let mut driver = driver(&*volume);
    driver.run_one(with_fua(write(4000, b"over the edge of a block"))).unwrap();
    driver.run_one(with_fua(write(4090, &[0; 10]))).unwrap();
    assert_eq!(bytes(driver.run_one(read(3999, 6))), b"\x11over ");
    assert_eq!(bytes(driver.run_one(read(4089, 12)))[..11], [0x11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
#[ignore = "needs root and a free loop device"]
fn an_image_behind_a_loop_device_is_in_use() {
    let looped = Loop::new(&[]);
    let refused = |options: &FileOptions, who: &str| {
        let error = FileVolume::open(options).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains(who), "{error}");
    };
    let image = FileOptions::new(&looped.image);
    let device = looped.device.display().to_string();
    refused(&image, &device);
    refused(&FileOptions { read_only: true, ..image }, &device);
    // The device itself has one writer too, under any name.
    let alias = looped.image.with_file_name("alias");
    std::os::unix::fs::symlink(&looped.device, &alias).unwrap();
    let first = FileVolume::open(&FileOptions::new(&looped.device)).unwrap();
    refused(&FileOptions::new(&alias), "this process");
    drop(first);
    drop(FileVolume::open(&FileOptions::new(&alias)).unwrap());
}

#[test]
#[ignore = "needs root and a free loop device"]
fn a_mounted_device_is_left_alone() {
    let looped = Loop::new(&[]);
    let mkfs = Command::new("mkfs.ext4").arg("-q").arg(&looped.device).status();
    assert!(mkfs.expect("mkfs.ext4 runs").success());
    let mountpoint = TempDir::new().unwrap();
    let mount = Command::new("mount").arg(&looped.device).arg(mountpoint.path()).status();
    assert!(mount.expect("mount runs").success());
    let opened = FileVolume::open(&FileOptions::new(&looped.device)).map(drop);
    let umount = Command::new("umount").arg(mountpoint.path()).status();
    assert!(umount.expect("umount runs").success());
    let error = opened.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("unmount it"), "{error}");
}

/// A file system whose disk is full though it does not know it: writes reach the page cache, and
/// are lost on their way to the disk.
struct Leaky {
    dir: TempDir,
    device: String,
}

impl Leaky {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let run = |program: &str, args: &[&str]| {
            let output = Command::new(program).args(args).output().expect("it runs");
            assert!(output.status.success(), "{program} {args:?}: {output:?}");
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        };
        let (small, disk, mounted) = (path("small"), path("small/disk"), path("mounted"));
        std::fs::create_dir(&small).unwrap();
        std::fs::create_dir(&mounted).unwrap();
        run("mount", &["-t", "tmpfs", "-o", "size=24m", "none", &small]);
        run("truncate", &["-s", "512M", &disk]);
        let device = run("losetup", &["--direct-io=on", "-f", "--show", &disk]);
        let leaky = Self { dir, device };
        let options = "lazy_itable_init=0,nodiscard";
        run("mkfs.ext4", &["-q", "-O", "^has_journal", "-E", options, "-N", "64", &leaky.device]);
        run("mount", &["-o", "noauto_da_alloc,errors=continue", &leaky.device, &mounted]);
        leaky
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("mounted/a.img")
    }

    fn fill(&self) {
        let mut filler = File::create(self.dir.path().join("small/filler")).unwrap();
        while filler.write_all(&[0xff; 65536]).is_ok() {}
    }
}

impl Drop for Leaky {
    fn drop(&mut self) {
        let umount = |name: &str| {
            let _ = Command::new("umount").arg("-l").arg(self.dir.path().join(name)).status();
        };
        umount("mounted");
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
        umount("small");
    }
}

#[test]
#[ignore = "needs root and a free loop device"]
fn a_backend_that_comes_late_tells_of_what_was_lost_before() {
    let leaky = Leaky::new();
    let image = File::create(leaky.image()).unwrap();
    image.set_len(64 << 20).unwrap();
    let volume = FileVolume::open(&FileOptions::new(leaky.image())).unwrap();
    // All descriptions that are as old as the volume.
    let mut early: Vec<_> = (0..HANDLES_READY).map(|_| driver(&volume)).collect();
    leaky.fill();
    early[0].run_one(write(32 << 20, &[7; 65536])).unwrap();
    // Somebody else is told of the failure, after which the kernel tells new descriptions nothing.
    image.sync_all().unwrap_err();
    let error = driver(&volume).run_one(Op::Flush).unwrap_err();
    assert!(error.to_string().contains("may be lost"), "{error}");
    early[0].run_one(Op::Flush).unwrap_err();
}
