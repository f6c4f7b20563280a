//! Scratch directories and test data.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A directory that goes away with the test.
#[derive(Debug)]
pub struct Scratch {
    dir: TempDir,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Scratch {
    /// A new empty directory with a short path, since a socket's path must be short.
    #[must_use]
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("sheave-").tempdir().expect("scratch directory");
        Self { dir }
    }

    /// One on a real disk rather than in memory, as far as that is known.
    #[must_use]
    pub fn on_disk() -> Self {
        Self::within(Path::new("/var/tmp"))
    }

    /// One in a directory.
    #[must_use]
    pub fn within(base: &Path) -> Self {
        let dir = tempfile::Builder::new().prefix("sheave-").tempdir_in(base);
        Self { dir: dir.expect("scratch directory") }
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The path of a file in it, as text, since it goes into URLs and command lines.
    #[must_use]
    pub fn file(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().expect("UTF-8 path").to_owned()
    }

    /// A file of `bytes` that are different everywhere.
    pub fn filled(&self, name: &str, bytes: usize) -> String {
        let path = self.file(name);
        fs::write(&path, pattern(bytes, 1)).expect("write a file");
        path
    }

    /// A sparse file.
    pub fn sparse(&self, name: &str, bytes: u64) -> String {
        let path = self.file(name);
        File::create(&path).and_then(|file| file.set_len(bytes)).expect("make a sparse file");
        path
    }

    /// A sparse file with islands of data, so that copies have holes to keep.
    pub fn islands(&self, name: &str, bytes: u64) -> String {
        use std::os::unix::fs::FileExt as _;
        let path = self.sparse(name, bytes);
        let file = File::options().write(true).open(&path).expect("open a file");
        let island = 192 << 10;
        for (index, at) in (0..bytes).step_by(2 << 20).enumerate() {
            let data = pattern(island.min(bytes - at) as usize, index as u64 + 2);
            file.write_all_at(&data, at).expect("write a file");
        }
        path
    }

    /// An ext4 file system with this repository's sources as its files.
    pub fn ext4(&self, name: &str, size: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("workspace");
        crate::Run::new("/usr/sbin/mke2fs")
            .args("-q -F -t ext4 -d")
            .arg(root.join("datapath"))
            .arg(&path)
            .arg(size)
            .ok();
        path
    }
}

/// Bytes that repeat nowhere, made from a seed (xorshift).
#[must_use]
pub fn pattern(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_be_bytes());
    }
    out.truncate(bytes);
    out
}

/// Compares two files bit for bit.
///
/// # Panics
/// When they differ; it says where first.
#[track_caller]
pub fn compare(left: impl AsRef<Path>, right: impl AsRef<Path>) {
    const CHUNK: usize = 1 << 20;
    let (left, right) = (left.as_ref(), right.as_ref());
    let sizes = [left, right].map(|path| fs::metadata(path).expect("file to compare").len());
    assert_eq!(sizes[0], sizes[1], "sizes of {} and {}", left.display(), right.display());
    let mut files = [left, right].map(|path| File::open(path).expect("file to compare"));
    let mut chunks = [vec![0; CHUNK], vec![0; CHUNK]];
    let mut at = 0;
    while at < sizes[0] {
        let len = CHUNK.min((sizes[0] - at) as usize);
        for (file, chunk) in files.iter_mut().zip(&mut chunks) {
            file.read_exact(&mut chunk[..len]).expect("read a file");
        }
        if chunks[0][..len] != chunks[1][..len] {
            let first = (0..len).find(|&i| chunks[0][i] != chunks[1][i]).expect("a difference");
            panic!("{} and {} differ at {}", left.display(), right.display(), at + first as u64);
        }
        at += len as u64;
    }
}

/// Writes one more line to the file `lines` of a volume that is mounted there, and returns all.
///
/// # Panics
/// When it cannot be written.
pub fn append_line(at: &Path, line: &str) -> String {
    let file = at.join("lines");
    let text = fs::read_to_string(&file).unwrap_or_default() + line + "\n";
    fs::write(&file, &text).expect("written");
    text
}
