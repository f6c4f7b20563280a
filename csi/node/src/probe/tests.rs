//! The probe on images that foreign programs made, and on the same images damaged.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::regions::{BTRFS, ext_backups, xfs_backups};
use super::*;
use crate::fs::Fs;
use crate::tools::Tools;

/// An image in a directory that goes with it.
struct Image {
    path: PathBuf,
    size: u64,
    _dir: tempfile::TempDir,
}

impl Image {
    fn new(size: u64) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("image");
        File::create(&path).and_then(|file| file.set_len(size)).expect("a sparse file");
        Self { path, size, _dir: dir }
    }

    /// Runs a program on it; false where the program is not installed.
    #[track_caller]
    fn run(&self, command: &str) -> bool {
        let mut words = command.split_whitespace();
        let name = words.next().expect("a name");
        let Ok(program) = Tools::from_env().find(name) else {
            return false;
        };
        let done = Command::new(program).args(words).arg(&self.path).output().expect("started");
        assert!(done.status.success(), "{command}: {done:?}");
        true
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(&self.path).expect("the image");
        file.write_all_at(bytes, at).expect("written");
    }

    fn zero(&self, at: u64, len: usize) {
        self.write(at, &vec![0; len]);
    }

    fn content(&self) -> Content {
        parse(self.size, &read(&self.path, self.size))
    }
}

fn read(path: &Path, size: u64) -> Vec<Part> {
    let file = File::open(path).expect("the image");
    let parts = regions(size).into_iter().map(|region| {
        let mut bytes = vec![0; region.len];
        file.read_exact_at(&mut bytes, region.at).expect("read");
        Part { at: region.at, bytes }
    });
    parts.collect()
}

#[track_caller]
fn names(content: &Content) -> Vec<&'static str> {
    match content {
        Content::One(found) => vec![found.name],
        Content::Several(all) | Content::Backups(all) => {
            let mut names: Vec<_> = all.iter().map(|found| found.name).collect();
            names.dedup();
            names
        }
        Content::Empty | Content::Unknown(_) => Vec::new(),
    }
}

/// What makes each type, with several sizes of blocks, and the size of the image.
const MADE: &[(&str, &str, u64)] = &[
    ("ext4", "mkfs.ext4 -q -F", 300 << 20),
    ("ext4", "mkfs.ext4 -q -F -b 1024", 20 << 20),
    ("ext4", "mkfs.ext4 -q -F -b 2048", 80 << 20),
    ("ext3", "mkfs.ext3 -q -F", 40 << 20),
    ("ext2", "mkfs.ext2 -q -F", 40 << 20),
    ("xfs", "mkfs.xfs -q -f", 400 << 20),
    ("xfs", "mkfs.xfs -q -f", 3 << 40),
    ("btrfs", "mkfs.btrfs -q -f", 300 << 20),
    ("btrfs", "mkfs.btrfs -q -f", 1 << 40),
];

#[test]
fn rule_17_filesystems_are_found_with_their_size() {
    for &(name, command, size) in MADE {
        let image = Image::new(size);
        if !image.run(command) {
            continue;
        }
        let Content::One(found) = image.content() else {
            panic!("{command}: {:?}", image.content());
        };
        let info = found.fs.expect("what its superblock says");
        assert_eq!(found.name, name, "{command}");
        assert!(info.clean, "{command}");
        // Whole blocks, and for ext4 whole groups.
        assert!((size - size / 64..=size).contains(&info.size), "{command}: {info:?}");
    }
}

/// The start of the device is gone, as after a dd to the wrong disk.
#[test]
fn rule_17_a_filesystem_whose_start_is_gone_is_found_by_its_backups() {
    for &(name, command, size) in MADE {
        let image = Image::new(size);
        if !image.run(command) {
            continue;
        }
        // Of btrfs, the only backup of a small one is at 64 MiB.
        image.zero(0, 2 << 20);
        let content = image.content();
        assert!(matches!(content, Content::Backups(_)), "{command}: {content:?}");
        assert_eq!(names(&content), [name], "{command}");
    }
}

/// All superblocks are gone: what lies between them is enough not to be empty.
#[test]
fn rule_17_a_filesystem_without_superblocks_is_not_empty() {
    for &(_, command, size) in MADE {
        let image = Image::new(size);
        if !image.run(command) {
            continue;
        }
        let backups = ext_backups(size).map(|(_, at)| at).chain(xfs_backups(size));
        for at in backups.chain(BTRFS).chain([0]).filter(|at| at + 4096 <= size) {
            image.zero(at, 4096);
        }
        let content = image.content();
        assert!(!matches!(content, Content::Empty | Content::One(_)), "{command}: {content:?}");
    }
}

#[test]
fn an_unclean_ext4_is_told_from_a_clean_one() {
    let image = Image::new(64 << 20);
    assert!(image.run("mkfs.ext4 -q -F"), "e2fsprogs is needed by the build's tests");
    let clean = |image: &Image| match image.content() {
        Content::One(Signature { fs: Some(info), .. }) => info.clean,
        content => panic!("{content:?}"),
    };
    assert!(clean(&image));
    // `s_state` without EXT2_VALID_FS, with EXT2_ERROR_FS; then the flag that a journal is to be
    // replayed.
    image.write(1024 + 58, &[0, 0]);
    assert!(!clean(&image));
    image.write(1024 + 58, &[3, 0]);
    assert!(!clean(&image));
    image.write(1024 + 58, &[1, 0]);
    assert!(clean(&image));
    image.write(1024 + 96, &[fs::read(&image.path).expect("the image")[1024 + 96] | 4]);
    assert!(!clean(&image));
}

#[test]
fn rule_17_what_others_keep_there_is_named() {
    let mbr = |image: &Image| {
        image.write(446, &[0x80, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0]);
        image.write(510, &[0x55, 0xaa]);
    };
    type Make = fn(&Image);
    let cases: &[(&str, Make)] = &[
        ("LUKS", |image| image.write(0, b"LUKS\xba\xbe\x00\x01")),
        ("LUKS", |image| image.write(0, b"LUKS\xba\xbe\x00\x02")),
        ("LUKS", |image| image.write(0x4000, b"SKUL\xba\xbe\x00\x02")),
        ("GPT", |image| image.write(512, b"EFI PART")),
        ("GPT", |image| image.write(image.size - 512, b"EFI PART")),
        ("LVM", |image| {
            image.write(512, b"LABELONE");
            image.write(512 + 24, b"LVM2 001");
        }),
        ("RAID", |image| image.write(image.size - (64 << 10), b"\xfc\x4e\x2b\xa9")),
        ("ZFS", |image| image.write(132 << 10, &0x00ba_b10c_u64.to_le_bytes())),
    ];
    for (name, make) in cases {
        let image = Image::new(8 << 20);
        assert_eq!(image.content(), Content::Empty);
        make(&image);
        assert_eq!(names(&image.content()), [*name], "{:?}", image.content());
    }
    let image = Image::new(8 << 20);
    mbr(&image);
    assert_eq!(names(&image.content()), ["MBR"]);
    let image = Image::new(8 << 20);
    assert!(image.run("mkswap"), "util-linux is needed by the build's tests");
    assert_eq!(names(&image.content()), ["swap"]);
}

#[test]
fn rule_16_a_single_byte_in_a_probed_region_is_not_empty() {
    for size in [1 << 20, 100 << 20, 10 << 40] {
        let image = Image::new(size);
        assert_eq!(image.content(), Content::Empty);
        let probed = regions(size);
        let places = [0, 1 << 19, probed[probed.len() / 2].at, size - 1];
        for at in places {
            image.write(at, b"x");
            assert_eq!(image.content(), Content::Unknown(at), "{size}");
            image.write(at, b"\0");
        }
    }
}

#[test]
fn stale_signatures_beside_a_filesystem_are_not_overlooked() {
    let image = Image::new(64 << 20);
    assert!(image.run("mkfs.ext4 -q -F"), "e2fsprogs is needed by the build's tests");
    image.write(0, b"LUKS\xba\xbe\x00\x01");
    assert_eq!(names(&image.content()), ["ext4", "LUKS"]);
}

/// Names are those of the kernel, and the engine makes no other types.
#[test]
fn the_types_of_the_engine_are_found_by_name() {
    for fs in Fs::ALL {
        assert_eq!(Fs::of_name(fs.name()), Some(fs));
        assert!(MADE.iter().any(|(name, ..)| *name == fs.name()));
    }
}

mod hostile {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// A device's content is written by others: no bytes make the parser panic.
        #[test]
        fn any_bytes_are_parsed(
            size in prop_oneof![0_u64..(3 << 20), any::<u64>()],
            at in 0_usize..(1 << 17),
            bytes in proptest::collection::vec(any::<u8>(), 0..2048),
            magic in prop_oneof![Just((1024 + 56, vec![0x53, 0xef])), Just((0, b"XFSB".to_vec())),
                Just((65536 + 64, b"_BHRfS_M".to_vec()))],
        ) {
            let mut start = vec![0; 1 << 20];
            start[at..at + bytes.len()].copy_from_slice(&bytes);
            start[magic.0..magic.0 + magic.1.len()].copy_from_slice(&magic.1);
            let parts = [Part { at: 0, bytes: start }, Part { at: size / 2, bytes }];
            let content = parse(size, &parts);
            prop_assert_ne!(content, Content::Empty);
        }
    }
}
