//! Images in the formats of other programs. They are served as raw bytes, which is rarely intended.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// The alignment of memory, offsets and lengths for direct I/O.
const ALIGN: usize = 4096;

/// The offset of a format's magic number, the number, and `qemu-img`'s name of the format.
const MAGICS: [(usize, &[u8], &str); 11] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, VHD, "vpc"),
    (64, &0xbeda_107f_u32.to_le_bytes(), "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"SheepdogInode", "sheepdog"),
];

/// The magic number of an expanding VHD, and of the footer behind the data of a fixed one.
const VHD: &[u8] = b"conectix";
const VHD_FOOTER_LEN: u64 = 512;

/// Logs a warning when a file most likely has one of these formats.
pub(super) fn warn_of_others(name: &str, file: &File, size: u64) {
    if let Some(format) = of(file, size) {
        tracing::warn!(
            volume = name,
            "this looks like a {format} image, and clients get the file itself, not the disk in \
             it: serve it with qemu-nbd, or convert it with qemu-img convert -O raw; with \
             format=raw there is no warning"
        );
    }
}

/// The format that a file most likely has. None if it cannot be read.
fn of(file: &File, size: u64) -> Option<&'static str> {
    let is = |bytes: &[u8], at: usize, magic: &[u8]| bytes.get(at..at + magic.len()) == Some(magic);
    let first = read(file, 0);
    if let Some((_, _, name)) = MAGICS.iter().find(|(at, magic, _)| is(&first, *at, magic)) {
        return Some(name);
    }
    let footer = size.checked_sub(VHD_FOOTER_LEN)?;
    let skip = footer % ALIGN as u64;
    is(&read(file, footer - skip), skip as usize, VHD).then_some("vpc")
}

/// The available bytes of one aligned piece.
fn read(file: &File, at: u64) -> Vec<u8> {
    let mut memory = vec![0; 2 * ALIGN];
    let skip = memory.as_ptr().align_offset(ALIGN);
    let read = file.read_at(&mut memory[skip..skip + ALIGN], at).unwrap_or(0);
    memory[skip..skip + read].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_bytes(bytes: &[u8]) -> Option<&'static str> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        std::fs::write(&path, bytes).unwrap();
        of(&File::open(path).unwrap(), bytes.len() as u64)
    }

    #[test]
    fn formats_are_known_by_their_magic_numbers() {
        for (at, magic, name) in MAGICS {
            let mut image = vec![0; 10_000];
            image[at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(of_bytes(&image), Some(name));
            image[at] ^= 1;
            assert_eq!(of_bytes(&image), None);
            image[at] ^= 1;
            image.rotate_right(1);
            assert_eq!(of_bytes(&image), None);
        }
        for len in [512, 1024, 4096, 10_240, 10_001] {
            let mut fixed = vec![0x11; len];
            fixed[len - 512..len - 504].copy_from_slice(b"conectix");
            assert_eq!(of_bytes(&fixed), Some("vpc"), "{len}");
        }
    }

    #[test]
    fn raw_images_have_no_format() {
        let boot = [vec![0; 510], vec![0x55, 0xaa], vec![0; 1 << 20]].concat();
        for image in [vec![], vec![0; 3], vec![0; 512], b"LUKS\xba\xbe".repeat(999), boot] {
            assert_eq!(of_bytes(&image), None);
        }
        // An unreadable file, such as one that was opened for writing only.
        let file = File::options().write(true).open("/dev/null").unwrap();
        assert_eq!(of(&file, 1 << 20), None);
    }
}
