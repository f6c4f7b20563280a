//! Object volumes and nodes that are not as they must be: one line says what, nothing is destroyed,
//! and nothing is served that may be wrong.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use sheave_tests::{Run, Scratch, Serve, Server, Wire, cmd, in_namespace, pattern, sheave};

const MIB: usize = 1 << 20;
/// The first record of a segment, behind its header.
const RECORD_AT: usize = 4096;

/// A directory with a volume, and what nodes keep.
struct Place(Scratch);

impl Place {
    fn new() -> Self {
        Self::made("create --size 64M")
    }

    fn made(command: &str) -> Self {
        let place = Self(Scratch::on_disk());
        place.command(command).ok();
        place
    }

    fn command(&self, command: &str) -> Run {
        Run::new(sheave()).args("volume").args(command).arg(self.volume())
    }

    fn volume(&self) -> String {
        format!("dir://{}", self.0.file("vol"))
    }

    fn on_node(&self, node: &str) -> String {
        format!("{}?cache-dir={}", self.volume(), self.0.file(node))
    }

    fn serve(&self, node: &str) -> Server {
        Serve::new(self.on_node(node)).unix()
    }

    /// Why a node cannot open it, in one line. All that the store has stays as it is; a claim may
    /// come to it.
    fn refusal(&self, node: &str) -> String {
        let before = files(&self.0.path().join("vol"));
        let run = Run::new(sheave()).args("serve").arg(self.on_node(node));
        let output = run.args("--socket /nowhere/s").output();
        assert!(!output.status.success(), "{}", output.describe());
        let lines = output.stderr.lines().filter(|line| line.starts_with("sheave: "));
        let lines: Vec<_> = lines.collect();
        assert_eq!(lines.len(), 1, "one line: {}", output.describe());
        let after = files(&self.0.path().join("vol"));
        assert!(before.iter().all(|file| after.contains(file)), "the store has changed");
        lines[0].to_owned()
    }

    /// The directory of a node's only journal.
    fn journal(&self, node: &str) -> PathBuf {
        let dirs = fs::read_dir(self.0.path().join(node)).expect("a directory");
        let dirs = dirs.map(|entry| entry.expect("an entry").path());
        let mut dirs: Vec<_> = dirs.filter(|path| path.is_dir()).collect();
        assert_eq!(dirs.len(), 1, "{dirs:?}");
        dirs.remove(0)
    }

    /// Has a node write and flush, and kills it. The store has that with the durability remote.
    fn kill_written(&self, node: &str, seeds: &[u64]) {
        let mut server = self.serve(node);
        let mut wire = Wire::ready(&server).expect("a client");
        for seed in seeds {
            write_and_flush(&mut wire, *seed);
        }
        drop(wire);
        server.kill();
    }
}

/// Writes a MiB at the place of that number.
fn write_and_flush(wire: &mut Wire, seed: u64) {
    assert_eq!(wire.write(seed * MIB as u64, &pattern(MIB, seed)).expect("a reply"), 0);
    wire.request(cmd::FLUSH, 0, 0, 0).expect("send");
    assert_eq!(wire.simple_reply(0).expect("a reply"), 0);
}

fn read(wire: &mut Wire, seed: u64) -> Vec<u8> {
    wire.read(seed * MIB as u64, MIB as u32).expect("a reply").expect("data")
}

/// All files below a directory, with what they have.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).expect("a directory") {
        let path = entry.expect("an entry").path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            // A killed server leaves the socket that it took commands at.
            false if !path.is_file() => {}
            false => found.push((path.clone(), fs::read(&path).expect("a file"))),
        }
    }
    found.sort();
    found
}

/// Changes a byte of a file.
fn change(path: &Path, at: usize) {
    let mut bytes = fs::read(path).expect("a file");
    bytes[at] ^= 1;
    fs::write(path, bytes).expect("write");
}

/// Sets a byte of a root or an object, and makes the checksum behind it right.
fn set_sealed(path: &Path, (at, byte): (usize, u8), crc_at: impl Fn(usize) -> usize) {
    let mut bytes = fs::read(path).expect("a file");
    bytes[at] = byte;
    let crc_at = crc_at(bytes.len());
    let crc = crc32fast::hash(&bytes[..crc_at]);
    bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
    fs::write(path, bytes).expect("write");
}

#[test]
fn what_a_newer_program_has_written_is_said_to_be_so() {
    let place = Place::made("create --size 64M --durability remote");
    place.kill_written("a", &[1]);
    let stored = files(&place.0.path().join("vol"));
    let newest = &stored.iter().find(|(path, _)| path.to_string_lossy().contains("/root/"));
    let (root, whole) = newest.expect("a root");
    // Its version, a feature, a state.
    for (at, byte) in [(8, 2), (12, 1), (20, 9)] {
        set_sealed(root, (at, byte), |len| len - 4);
        for told in [place.refusal("a"), place.command("info").fails()] {
            assert!(told.contains("it needs a newer version of sheave"), "{told}");
            assert!(told.contains("root/"), "{told}");
        }
        fs::write(root, whole).expect("write");
    }
    // An object behind what the root has.
    let is_log = |(path, _): &&(PathBuf, Vec<u8>)| path.to_string_lossy().contains("/log/");
    let (object, whole) = stored.iter().rfind(is_log).expect("an object");
    set_sealed(object, (8, 2), |_| 124);
    let told = place.refusal("a");
    assert!(told.contains("it needs a newer version of sheave") && told.contains("log/"), "{told}");
    fs::write(object, whole).expect("write");
    let server = place.serve("a");
    assert!(read(&mut Wire::ready(&server).expect("a client"), 1) == pattern(MIB, 1));
}

#[test]
fn a_damaged_journal_is_refused_and_kept() {
    let place = Place::new();
    place.kill_written("a", &[1, 2, 3]);
    let journal = place.journal("a").join("journal");
    let segments = files(&journal);
    let is_first = |(path, bytes): &&(PathBuf, Vec<u8>)| {
        path.to_string_lossy().contains("segment-") && bytes[RECORD_AT..].starts_with(b"SHEAVEJR")
    };
    let (segment, whole) = segments.iter().find(is_first).expect("a segment with records");
    // The blocks of the first record, which later ones state to be durable.
    change(segment, RECORD_AT + 4096 + 77);
    let told = place.refusal("a");
    assert!(told.contains("is damaged or missing") && told.contains("journal segment"), "{told}");
    fs::write(segment, whole).expect("write");
    let superblock = journal.join("superblock");
    change(&superblock, 20);
    let told = place.refusal("a");
    assert!(told.contains("superblock is damaged"), "{told}");
    change(&superblock, 20);
    let text = fs::read_to_string(&superblock).expect("a superblock");
    let json = text.lines().next().expect("a line").replace("\"version\":1", "\"version\":2");
    let newer = format!("{json}\n{:08x}\n", crc32fast::hash(json.as_bytes()));
    fs::write(&superblock, newer).expect("write");
    let told = place.refusal("a");
    assert!(told.contains("use a newer program"), "{told}");
    fs::write(&superblock, text).expect("write");
    let server = place.serve("a");
    let mut wire = Wire::ready(&server).expect("a client");
    for seed in [1, 2, 3] {
        assert!(read(&mut wire, seed) == pattern(MIB, seed));
    }
}

#[test]
fn the_journal_of_another_volume_is_refused() {
    let (place, other) = (Place::new(), Place::new());
    place.kill_written("a", &[1]);
    other.kill_written("a", &[2]);
    let (mine, others) = (place.journal("a"), other.journal("a"));
    let kept = place.0.path().join("kept");
    fs::rename(&mine, &kept).expect("rename");
    Run::new("cp").args("-r").arg(&others).arg(&mine).ok();
    let told = place.refusal("a");
    assert!(told.contains("of another volume"), "{told}");
    let contents = |dir| files(dir).into_iter().map(|(_, bytes)| bytes).collect::<Vec<_>>();
    assert!(contents(&mine) == contents(&others), "it is kept");
    fs::remove_dir_all(&mine).expect("remove");
    fs::rename(&kept, &mine).expect("rename");
    let server = place.serve("a");
    assert!(read(&mut Wire::ready(&server).expect("a client"), 1) == pattern(MIB, 1));
}

#[test]
fn a_volume_that_was_made_anew_has_nothing_of_the_one_before() {
    let place = Place::new();
    let mut server = place.serve("a");
    let mut wire = Wire::ready(&server).expect("a client");
    write_and_flush(&mut wire, 1);
    place.command("delete --take-over").ok();
    place.command("create --size 64M").ok();
    // The program that still has the old one writes nothing into the new one. It learns of that
    // when it makes a root.
    write_and_flush(&mut wire, 3);
    drop(wire);
    server.end(Signal::TERM);
    server.wait_for_log("another node has taken over the volume", 1);
    let server = place.serve("a");
    let mut wire = Wire::ready(&server).expect("a client");
    for seed in [1, 3] {
        assert!(read(&mut wire, seed).iter().all(|byte| *byte == 0));
    }
    write_and_flush(&mut wire, 2);
}

#[test]
fn a_cache_directory_that_cannot_be_one_is_named() {
    let place = Place::new();
    place.0.filled("a", 1);
    let told = place.refusal("a");
    assert!(told.contains(&place.0.file("a")), "{told}");
    in_namespace("a_cache_directory_that_cannot_be_one_is_named", || {
        let place = Place::new();
        place.kill_written("a", &[1]);
        let node = place.0.path().join("full");
        fs::create_dir(&node).expect("a directory");
        Run::new("mount").args("-t tmpfs -o size=1M none").arg(&node).ok();
        fs::write(node.join("all"), vec![1; 2 * MIB]).unwrap_err();
        let run = Run::new(sheave()).args("serve --take-over").arg(place.on_node("full"));
        let told = run.args("--socket /nowhere/s").fails();
        assert!(told.contains("No space left") && told.contains("full"), "{told}");
        // It has not taken the volume.
        let server = place.serve("a");
        assert!(read(&mut Wire::ready(&server).expect("a client"), 1) == pattern(MIB, 1));
    });
}
