//! The volumes' suite on both engines: file I/O by a ring, and by plain calls.

mod engines;

use std::sync::Arc;

use sheave_conformance::Options;
use sheave_layers::BlockSize;
use sheave_local::{FileOptions, FileVolume};
use sheave_volumes::{OpenOptions, open};
use tempfile::TempDir;

use engines::on_both;

/// Neither a multiple of a chunk, nor of a page, nor of anything.
const SIZE: u64 = 3 * (64 << 10) + 777;
const OPTIONS: Options = Options { cases: 40, unaligned: true };

/// An image of zeroes without a hole, so that punching one shows. Not in /tmp, which may be a
/// tmpfs.
fn image() -> (TempDir, FileOptions) {
    let dir = TempDir::new_in("/var/tmp").expect("a directory");
    let path = dir.path().join("a.img");
    (dir, FileOptions::new(path))
}

fn blank(options: &FileOptions) {
    std::fs::write(&options.path, vec![0; SIZE as usize]).expect("an image");
}

#[test]
fn memory() {
    let text = format!("memory:?size={SIZE}");
    on_both("memory", OPTIONS, || open(&text, &OpenOptions::default()).expect("a volume"));
}

#[test]
fn file() {
    let (_dir, options) = image();
    on_both("file", OPTIONS, || {
        blank(&options);
        Arc::new(FileVolume::open(&options).expect("a volume"))
    });
}

#[test]
fn file_in_whole_blocks_without_the_page_cache() {
    let (_dir, options) = image();
    let options = FileOptions { direct: true, ..options };
    on_both("direct", Options { unaligned: false, ..OPTIONS }, || {
        blank(&options);
        Arc::new(FileVolume::open(&options).expect("a volume"))
    });
}

#[test]
fn file_under_block_size() {
    let (_dir, options) = image();
    let options = FileOptions { direct: true, ..options };
    on_both("block size", OPTIONS, || {
        blank(&options);
        Arc::new(BlockSize::new(Arc::new(FileVolume::open(&options).expect("a volume"))))
    });
}

#[test]
fn file_under_all_layers() {
    let (_dir, options) = image();
    let text = format!(
        "{}?direct=true&limit-bps=8G&limit-iops=200000&fault=any:delay=200us:probability=0.2",
        options.path.display()
    );
    on_both("all layers", Options { cases: 15, ..OPTIONS }, || {
        blank(&options);
        open(&text, &OpenOptions::default()).expect("a volume")
    });
}
