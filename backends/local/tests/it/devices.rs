//! Block devices: a loop device over an image.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::OFlags;
use sheave_core::{ErrorKind, Op, Volume};
use tempfile::TempDir;

use sheave_conformance::ops::{bytes, driver, extents, range, read, trim, with_fua, write, zeroes};
use sheave_local::HANDLES_READY;
use sheave_local::{FileOptions, FileVolume};
use sheave_volumes::{OpenOptions, open};

const SIZE: u64 = 4 << 20;

/// A loop device; detached on drop.
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
        // Otherwise the next device with this number would be read-only too.
        let _ = Command::new("blockdev").arg("--setrw").arg(&self.device).status();
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

/// What another program reads of a device, and what is on it, past its page cache.
fn read_elsewhere(device: &Path, at: u64, len: usize) -> [Vec<u8>; 2] {
    [0, OFlags::DIRECT.bits() as i32].map(|flags| {
        let file = File::options().read(true).custom_flags(flags).open(device).unwrap();
        let mut memory = vec![0xff; len + 4096];
        let skip = memory.as_ptr().align_offset(4096);
        file.read_exact_at(&mut memory[skip..skip + len], at).unwrap();
        memory[skip..skip + len].to_vec()
    })
}

/// All the ways to make zeroes of 64 KiB.
fn ways() -> impl Iterator<Item = Op> {
    let range = range(1 << 16, 1 << 16);
    [false, true].into_iter().flat_map(move |fua| {
        let zeroes = [false, true].map(|no_hole| [false, true].map(|fast| (no_hole, fast)));
        let zeroes = zeroes.into_iter().flatten();
        let zeroes =
            zeroes.map(move |(no_hole, fast)| Op::WriteZeroes { range, fua, no_hole, fast });
        [Op::Trim { range, fua }].into_iter().chain(zeroes)
    })
}

#[test]
#[ignore = "needs root and a free loop device"]
fn what_was_just_written_to_a_device_can_be_zeroed() {
    let looped = Loop::new(&[]);
    for (direct, lock) in [(false, true), (true, true), (false, false), (true, false)] {
        let options = FileOptions { direct, lock, ..FileOptions::new(&looped.device) };
        let volume = FileVolume::open(&options).unwrap();
        let (mut driver, mut other) = (driver(&volume), driver(&volume));
        for (way, flushed) in ways().flat_map(|way| [(way.clone(), false), (way, true)]) {
            let case = format!("direct={direct} lock={lock} flushed={flushed} {way:?}");
            driver.run_one(write(0, &[7; 1 << 18])).expect(&case);
            if flushed {
                driver.run_one(Op::Flush).expect(&case);
            }
            // The pages are of one description, the op comes by another.
            other.run_one(way).expect(&case);
            let want = [vec![7; 1 << 16], vec![0; 1 << 16], vec![7; 1 << 17]].concat();
            assert_eq!(bytes(driver.run_one(read(0, 1 << 18))), want, "{case}");
            let [cached, _] = read_elsewhere(&looped.device, 0, 1 << 18);
            assert!(cached == want, "{case}");
            driver.run_one(Op::Flush).expect(&case);
            for found in read_elsewhere(&looped.device, 0, 1 << 18) {
                assert!(found == want, "{case}");
            }
        }
    }
}

#[test]
#[ignore = "needs root and a free loop device"]
fn a_device_that_another_program_holds_is_zeroed_all_the_same() {
    let looped = Loop::new(&[]);
    let exclusive = OFlags::EXCL.bits() as i32;
    let _held = File::options().read(true).custom_flags(exclusive).open(&looped.device).unwrap();
    let options = FileOptions { lock: false, ..FileOptions::new(&looped.device) };
    let volume = FileVolume::open(&options).unwrap();
    let mut driver = driver(&volume);
    for way in ways() {
        driver.run_one(write(0, &[7; 1 << 18])).unwrap();
        match (&way, driver.run_one(way.clone())) {
            // A trim is a hint, and a fast way may not exist.
            (Op::Trim { .. }, done) => assert!(done.is_ok(), "{way:?}"),
            (Op::WriteZeroes { fast: true, .. }, Err(error)) => {
                assert_eq!(error.kind(), ErrorKind::Unsupported, "{way:?}");
            }
            (_, done) => {
                done.unwrap();
                let found = bytes(driver.run_one(read(1 << 16, 1 << 16)));
                assert!(found.iter().all(|byte| *byte == 0), "{way:?}");
            }
        }
        driver.run_one(Op::Flush).unwrap();
    }
}

fn blockdev(setting: &str, device: &Path) {
    let set = Command::new("blockdev").arg(setting).arg(device).status();
    assert!(set.expect("blockdev runs").success());
}

#[test]
#[ignore = "needs root and a free loop device"]
fn a_device_that_the_kernel_holds_read_only_is_not_offered_for_writing() {
    let looped = Loop::new(&["--read-only"]);
    let set = Loop::new(&[]);
    blockdev("--setro", &set.device);
    for looped in [looped, set] {
        for lock in [true, false] {
            let options = FileOptions { lock, ..FileOptions::new(&looped.device) };
            let error = FileVolume::open(&options).err().expect("refused");
            assert_eq!(error.kind(), ErrorKind::Permission);
            assert!(error.to_string().contains("holds this device read-only"), "{error}");
            assert!(error.to_string().contains("read-only=true"), "{error}");
            let options = FileOptions { read_only: true, ..options };
            let volume = FileVolume::open(&options).unwrap();
            assert!(volume.info().read_only && !volume.info().can.trim);
            assert_eq!(bytes(driver(&volume).run_one(read(0, 3))), [0x11; 3]);
        }
    }
}

#[test]
#[ignore = "needs root and a free loop device"]
fn a_device_that_becomes_read_only_says_so_to_its_clients() {
    let looped = Loop::new(&[]);
    for direct in [false, true] {
        let options = FileOptions { direct, ..FileOptions::new(&looped.device) };
        let volume = FileVolume::open(&options).unwrap();
        let mut driver = driver(&volume);
        driver.run_one(with_fua(write(0, &[7; 4096]))).unwrap();
        blockdev("--setro", &looped.device);
        for op in [write(0, &[8; 4096]), with_fua(write(0, &[8; 4096])), trim(0, 4096)] {
            let error = driver.run_one(op).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
        }
        for way in ways() {
            let error = driver.run_one(way).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
        }
        assert_eq!(bytes(driver.run_one(read(0, 4096))), [7; 4096]);
        blockdev("--setrw", &looped.device);
        driver.run_one(with_fua(write(0, &[9; 4096]))).unwrap();
    }
}

#[test]
#[ignore = "needs root and a free loop device"]
fn a_device_grows_for_backends_that_exist_already() {
    let looped = Loop::new(&[]);
    for (direct, to) in [(false, 2 * SIZE), (true, 3 * SIZE)] {
        let options = FileOptions { direct, ..FileOptions::new(&looped.device) };
        let volume = FileVolume::open(&options).unwrap();
        let mut driver = driver(&volume);
        File::options().write(true).open(&looped.image).unwrap().set_len(to).unwrap();
        let had = volume.grow().unwrap();
        assert_eq!(had, volume.size());
        assert!(had < to, "the device has not looked yet");
        let look = Command::new("losetup").arg("-c").arg(&looped.device).status();
        assert!(look.expect("losetup runs").success());
        assert_eq!((volume.grow().unwrap(), volume.size()), (to, to));
        driver.run_one(with_fua(write(to - 8192, &[5; 8192]))).unwrap();
        assert_eq!(bytes(driver.run_one(read(to - 8192, 8192))), [5; 8192]);
        drop(driver);
    }
}

#[test]
#[ignore = "needs root and a free loop device"]
fn a_direct_device_takes_its_own_blocks() {
    let looped = Loop::new(&["--sector-size", "4096"]);
    let url = format!("{}?direct=true", looped.device.display());
    let volume = open(&url, &OpenOptions::default()).unwrap();
    assert_eq!(volume.info().block.minimum, 4096);
    assert_eq!(volume.info().block.logical, 4096);
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

/// A file system on a thin disk that is full: writes reach the page cache, and their write-back
/// fails.
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
fn a_backend_that_comes_late_reports_what_was_lost_before() {
    let leaky = Leaky::new();
    let image = File::create(leaky.image()).unwrap();
    image.set_len(64 << 20).unwrap();
    let volume = FileVolume::open(&FileOptions::new(leaky.image())).unwrap();
    // All descriptions that are as old as the volume.
    let mut early: Vec<_> = (0..HANDLES_READY).map(|_| driver(&volume)).collect();
    leaky.fill();
    early[0].run_one(write(32 << 20, &[7; 65536])).unwrap();
    // Another description gets the error; the kernel then reports nothing to new descriptions.
    image.sync_all().unwrap_err();
    let error = driver(&volume).run_one(Op::Flush).unwrap_err();
    assert!(error.to_string().contains("may be lost"), "{error}");
    early[0].run_one(Op::Flush).unwrap_err();
}

#[test]
#[ignore = "needs root and a free loop device"]
fn files_that_cannot_be_written_say_what_to_do() {
    let run = |program: &str, args: &[&str], path: &Path| {
        let ended = Command::new(program).args(args).arg(path).status();
        assert!(ended.expect("it runs").success(), "{program} {args:?}");
    };
    let check = |path: &Path| {
        let error = FileVolume::open(&FileOptions::new(path)).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
        assert!(error.to_string().contains("read-only=true"), "{error}");
        let options = FileOptions { read_only: true, ..FileOptions::new(path) };
        let volume = FileVolume::open(&options).unwrap();
        assert_eq!(bytes(driver(&volume).run_one(read(0, 3))), [0x11; 3]);
    };
    let dir = TempDir::new_in("/var/tmp").unwrap();
    let path = dir.path().join("a.img");
    std::fs::write(&path, [0x11; 4096]).unwrap();
    for (set, clear) in [("+i", "-i"), ("+a", "-a")] {
        run("chattr", &[set], &path);
        check(&path);
        run("chattr", &[clear], &path);
    }
    let mounted = dir.path().join("mounted");
    std::fs::create_dir(&mounted).unwrap();
    run("mount", &["-t", "tmpfs", "none"], &mounted);
    let path = mounted.join("a.img");
    std::fs::write(&path, [0x11; 4096]).unwrap();
    run("mount", &["-o", "remount,ro"], &mounted);
    check(&path);
    run("umount", &[], &mounted);
}

#[test]
#[ignore = "needs root and a free loop device"]
fn a_device_has_the_logical_block_of_what_is_below() {
    for sector in [512, 1024, 2048, 4096] {
        let looped = Loop::new(&["--sector-size", &sector.to_string()]);
        for parameters in
            ["", "?direct=true", "?read-only=true&limit-iops=99999&fault=any:delay=1us"]
        {
            let url = format!("{}{parameters}", looped.device.display());
            let volume = open(&url, &OpenOptions::default()).unwrap();
            assert_eq!(volume.info().block.logical, sector, "{url}");
        }
        let url = format!("{}?block=2048", looped.device.display());
        match open(&url, &OpenOptions::default()) {
            Ok(volume) => assert_eq!((volume.info().block.logical, sector <= 2048), (2048, true)),
            Err(error) => {
                assert!(sector > 2048 && error.kind() == ErrorKind::Invalid, "{error}");
            }
        }
    }
}
