//! The container image: it is small, what is in it runs, and the same input makes the same image.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use sheave_tests::{Run, Scratch, have, in_namespace, sheave, skip};

/// The most bytes that a node downloads.
const COMPRESSED_MAX: u64 = 40 << 20;
/// A program that is built for tests is large.
const TIMEOUT: Duration = Duration::from_secs(300);
const NEEDED: &[&str] =
    &["python3", "strip", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "partx", "modprobe"];
const FILE_LEN: u64 = 512 << 20;
/// Each program of the image at work, in this order, on a file.
const CALLS: &[&str] = &[
    "sheave --version",
    "mkfs.ext4 -q -F -m0 -E nodiscard,lazy_itable_init=1 /file",
    "e2fsck -p /file",
    "resize2fs /file",
    "mkfs.xfs -q -f -K /file",
    "xfs_repair -n /file",
    "xfs_growfs -V",
    "mkfs.btrfs -q -f -K /file",
    "btrfs check /file",
    "partx --version",
    "modprobe --version",
];

/// An image of this machine's programs, unpacked.
struct Image {
    scratch: Scratch,
    manifest: Value,
}

impl Image {
    fn unpack(archive: &Path) -> Self {
        let scratch = Scratch::on_disk();
        Run::new("tar").arg("-xf").arg(archive).arg("-C").arg(scratch.path()).ok();
        let index = json(Path::new(&scratch.file("index.json")));
        let manifest = json(&blob(&scratch, &index["manifests"][0]));
        let image = Self { scratch, manifest };
        fs::create_dir(image.root()).expect("a directory");
        let layer = blob(&image.scratch, image.layer());
        Run::new("tar").arg("-xzf").arg(layer).arg("-C").arg(image.root()).timeout(TIMEOUT).ok();
        image
    }

    fn root(&self) -> PathBuf {
        self.scratch.path().join("root")
    }

    fn layer(&self) -> &Value {
        &self.manifest["layers"][0]
    }

    fn config(&self) -> Value {
        json(&blob(&self.scratch, &self.manifest["config"]))
    }
}

/// The file with this digest, which is checked.
fn blob(scratch: &Scratch, descriptor: &Value) -> PathBuf {
    let digest = descriptor["digest"].as_str().expect("a digest").replace(':', "/");
    let path = scratch.path().join("blobs").join(&digest);
    let sum = Run::new("sha256sum").arg(&path).ok();
    assert!(digest.ends_with(&sum[..64]), "{digest}: {sum}");
    assert_eq!(descriptor["size"], fs::metadata(&path).expect("a file").len(), "{digest}");
    path
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON")
}

fn build(archive: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/image/build");
    let run = Run::new(script).arg(archive).arg("/").env("SHEAVE_BIN", sheave());
    run.timeout(TIMEOUT).ok();
}

#[test]
fn the_image_is_small_and_what_is_in_it_runs() {
    let test = "the_image_is_small_and_what_is_in_it_runs";
    if let Some(missing) = NEEDED.iter().find(|name| !have(name)) {
        return skip(test, &format!("{missing} is not installed"));
    }
    in_namespace(test, check);
}

fn check() {
    let built = Scratch::on_disk();
    let archive = built.file("image.tar");
    build(&archive);
    let image = Image::unpack(Path::new(&archive));
    let size = image.layer()["size"].as_u64().expect("a size");
    assert!(size <= COMPRESSED_MAX, "{size} bytes compressed");
    assert_eq!(image.config()["config"]["Entrypoint"][0], "/usr/bin/sheave");
    let file = fs::File::create(image.root().join("file")).expect("a file");
    file.set_len(FILE_LEN).expect("a sparse file");
    // As a container has it; programs look there for what is mounted.
    Run::new("mount").args("-t proc proc").arg(image.root().join("proc")).ok();
    for call in CALLS {
        let inside = Run::new("chroot").arg(image.root()).env("PATH", "/usr/sbin:/usr/bin");
        inside.env("LC_ALL", "C").args(call).timeout(TIMEOUT).ok();
    }
    Run::new("umount").arg(image.root().join("proc")).ok();
    let again = built.file("again.tar");
    build(&again);
    let same = fs::read(&archive).expect("an archive") == fs::read(&again).expect("an archive");
    assert!(same, "the same input makes the same image");
}
