//! Object volumes that are compressed and encrypted, by the command line and foreign clients.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::Value;
use sheave_tests::{Run, Scratch, Serve, compare, sheave};

/// A line that stands in the image again and again.
const LINE: &[u8] = b"No one but the owner of the key may read this line of text.\n";

struct Store {
    scratch: Scratch,
}

impl Store {
    fn new() -> Self {
        Self { scratch: Scratch::on_disk() }
    }

    fn place(&self, name: &str) -> String {
        format!("dir://{}", self.scratch.file(name))
    }

    fn create(&self, name: &str, options: &str) -> Run {
        let create = Run::new(sheave()).args("volume create").arg(self.place(name));
        create.args("--size 16M").args(options)
    }

    fn info(&self, name: &str) -> Value {
        let info = Run::new(sheave()).args("volume info --json").arg(self.place(name)).ok();
        serde_json::from_str(&info).expect("JSON")
    }

    /// An image of text.
    fn image(&self) -> PathBuf {
        let path = self.scratch.path().join("image");
        let text: Vec<u8> = LINE.iter().copied().cycle().take(16 << 20).collect();
        fs::write(&path, text).expect("an image");
        path
    }

    fn key(&self, name: &str, digit: &str) -> PathBuf {
        let path = self.scratch.path().join(name);
        fs::write(&path, digit.repeat(64)).expect("a key");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("a file");
        path
    }

    /// Copies an image in, kills the server, opens the volume again from the journal, and from the
    /// store.
    fn copy_in_and_out(&self, image: &Path, volume: &str) {
        let mut server = Serve::new(volume).unix();
        nbdcopy(image, server.uri());
        server.kill();
        for _ in 0..2 {
            let out = self.scratch.path().join("out");
            let mut server = Serve::new(volume).unix();
            nbdcopy(server.uri(), &out);
            compare(image, &out);
            assert!(server.end(Signal::TERM).success());
        }
    }
}

fn nbdcopy(from: impl AsRef<Path>, to: impl AsRef<Path>) {
    Run::new("nbdcopy").arg(from.as_ref()).arg(to.as_ref()).ok();
}

/// Whether a file in a directory, or below, has a text.
fn has_text(dir: &Path, text: &[u8]) -> bool {
    fs::read_dir(dir).expect("a directory").any(|entry| {
        let path = entry.expect("an entry").path();
        match path.is_dir() {
            true => has_text(&path, text),
            // A killed server leaves the socket that it took commands at.
            false if !path.is_file() => false,
            false => {
                fs::read(&path).expect("a file").windows(text.len()).any(|bytes| bytes == text)
            }
        }
    })
}

fn refusal(volume: &str) -> String {
    let output = Run::new(sheave()).args("serve").arg(volume).args("--socket /nowhere/s").output();
    let lines: Vec<_> = output.stderr.lines().filter(|line| line.starts_with("sheave: ")).collect();
    assert_eq!((output.status.success(), lines.len()), (false, 1), "{}", output.describe());
    lines[0].to_owned()
}

#[test]
fn a_compressed_volume_takes_less_room_and_is_read_as_it_was_written() {
    let store = Store::new();
    let image = store.image();
    store.create("vol", "--compression lz4").ok();
    store.copy_in_and_out(
        &image,
        &format!("{}?cache-dir={}", store.place("vol"), store.scratch.file("node")),
    );
    let info = store.info("vol");
    assert_eq!((&info["compression"], &info["encryption"]), (&"lz4".into(), &"none".into()));
    let stored = info["stored_bytes"].as_u64().expect("a number");
    assert!(stored < 2 << 20, "{stored} bytes of 16 MiB of text");
}

#[test]
fn an_encrypted_volume_is_read_with_its_key_only() {
    let store = Store::new();
    let image = store.image();
    let [key, other] = [("key", "a"), ("other", "b")].map(|(name, digit)| store.key(name, digit));
    let told = store.create("vol", "--encryption aes-256-gcm").fails();
    assert!(told.contains("--key-file"), "{told}");
    let told = store.create("vol", "").arg("--key-file").arg(&key).fails();
    assert!(told.contains("--encryption aes-256-gcm"), "{told}");
    store.create("vol", "--encryption aes-256-gcm").arg("--key-file").arg(&key).ok();
    let node = store.scratch.file("node");
    let volume = format!("{}?cache-dir={node}", store.place("vol"));
    let with = |key: &Path| format!("{volume}&key-file={}", key.display());
    let mut server = Serve::new(with(&key)).unix();
    nbdcopy(&image, server.uri());
    server.kill();
    assert!(!has_text(store.scratch.path().join("node").as_path(), LINE), "the journal");
    store.copy_in_and_out(&image, &with(&key));
    assert!(!has_text(store.scratch.path().join("vol").as_path(), LINE), "the store");
    assert_eq!(store.info("vol")["encryption"], "aes-256-gcm");
    let told = refusal(&volume);
    assert!(told.contains("the volume is encrypted, and no key is given"), "{told}");
    let told = refusal(&with(&other));
    assert!(told.contains("the key is wrong"), "{told}");
    let told = refusal(&with(&image));
    assert!(told.contains("64 hexadecimal digits"), "{told}");
    store.create("plain", "").ok();
    let told =
        refusal(&format!("{}?cache-dir={node}&key-file={}", store.place("plain"), key.display()));
    assert!(told.contains("the volume is not encrypted"), "{told}");
    // The same key by other ways.
    let command = format!("{volume}&key-command=cat%20{}", key.display());
    let mut server = Serve::new(command).unix();
    nbdcopy(server.uri(), store.scratch.path().join("again"));
    compare(&image, store.scratch.path().join("again"));
    assert!(server.end(Signal::TERM).success());
}
