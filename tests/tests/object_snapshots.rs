//! Snapshots, clones and restored volumes by the command line and foreign clients, in a directory
//! and in a bucket.

use std::path::Path;

use rustix::process::Signal;
use serde_json::Value;
use sheave_emulator::{Emulator, Settings};
use sheave_tests::{Bucket, Run, Scratch, Serve, Server, compare, sheave};

/// A place of volumes, on one node.
enum Place {
    Directory(Scratch),
    Bucket(Bucket, #[expect(dead_code, reason = "it is the store")] Emulator),
}

impl Place {
    fn bucket() -> Self {
        let store = Emulator::start(Settings::default(), "volumes");
        Self::Bucket(Bucket::emulated(&store, "volumes"), store)
    }

    /// A file beside the volumes.
    fn file(&self, name: &str) -> String {
        match self {
            Self::Directory(scratch) => scratch.file(name),
            Self::Bucket(bucket, _) => bucket.scratch().file(name),
        }
    }

    /// A volume or `VOLUME@NAME`.
    fn volume(&self, name: &str) -> String {
        match self {
            Self::Directory(scratch) => {
                format!("dir://{}?cache-dir={}", scratch.file(name), scratch.file("node"))
            }
            Self::Bucket(bucket, _) => bucket.on_node(name, "node"),
        }
    }

    fn run(&self) -> Run {
        match self {
            Self::Directory(_) => Run::new(sheave()),
            Self::Bucket(bucket, _) => bucket.run(),
        }
    }

    fn command(&self, command: &str) -> Run {
        self.run().args("volume").args(command)
    }

    fn serve(&self, name: &str) -> Server {
        match self {
            Self::Directory(_) => Serve::new(self.volume(name)).unix(),
            Self::Bucket(bucket, _) => bucket.serve(name, "node").unix(),
        }
    }

    fn info(&self, name: &str) -> Value {
        let text = self.command("info --json").arg(self.volume(name)).ok();
        serde_json::from_str(&text).expect("JSON")
    }

    /// What a client reads of it.
    fn has(&self, name: &str, image: &str) {
        let mut server = self.serve(name);
        let out = self.file("out");
        nbdcopy(server.uri(), &out);
        compare(Path::new(image), Path::new(&out));
        assert!(server.end(Signal::TERM).success(), "{}", server.log());
    }
}

fn nbdcopy(from: impl AsRef<Path>, to: impl AsRef<Path>) {
    Run::new("nbdcopy").arg(from.as_ref()).arg(to.as_ref()).ok();
}

fn snapshots_are_read_cloned_and_brought_back(place: &Place) {
    let images = Scratch::on_disk();
    let [first, second] = ["first", "second"].map(|name| {
        images.ext4(name, "32M");
        images.file(name)
    });
    place.command("create --size 32M").arg(place.volume("vol")).ok();
    let uuid = place.info("vol")["uuid"].clone();
    let mut server = place.serve("vol");
    nbdcopy(&first, server.uri());
    place.command("snapshot").arg(place.volume("vol@first")).ok();
    nbdcopy(&second, server.uri());
    // While it is served.
    place.command("clone").arg(place.volume("vol@first")).arg(place.volume("clone")).ok();
    place.has("vol@first", &first);
    let told = place.command("restore").arg(place.volume("vol@first")).fails();
    assert!(told.contains("it is open on node"), "{told}");
    place.command("set --durability remote").arg(place.volume("vol")).ok();
    assert_eq!(place.info("vol")["durability"], "remote");
    let sized = place.command("resize --size 40M").arg(place.volume("vol")).ok();
    assert_eq!(sized.trim(), (40 << 20).to_string());
    assert_eq!(place.info("vol")["size_bytes"], 40 << 20);
    server.kill();
    // Its journal may have what the store lacks.
    let told = place.command("restore").arg(place.volume("vol@first")).fails();
    assert!(told.contains("was not closed there; detach it"), "{told}");
    let mut server = place.serve("vol");
    assert!(server.end(Signal::TERM).success(), "{}", server.log());

    place.command("snapshot").arg(place.volume("vol@second")).ok();
    place.has("vol@second", &grown(&images, &second));
    let told = place.command("restore").arg(place.volume("vol@third")).fails();
    assert!(told.contains("there is no snapshot third; it has first, second"), "{told}");
    place.command("restore").arg(place.volume("vol@first")).ok();
    assert_eq!(place.info("vol")["uuid"], uuid, "it is the same volume");
    place.has("vol", &grown(&images, &first));
    place.has("clone", &first);
    place.command("restore").arg(place.volume("vol@second")).ok();
    place.has("vol", &grown(&images, &second));
    let told = place.command("delete").arg(place.volume("vol@first")).fails();
    assert!(told.contains("it has clones: clone; delete them first"), "{told}");
    for name in ["vol", "clone"] {
        place.command("check").arg(place.volume(name)).ok();
    }
    for name in ["clone", "vol@first", "vol@second", "vol"] {
        place.command("delete").arg(place.volume(name)).ok();
    }
}

/// A longer copy of an image.
fn grown(images: &Scratch, image: &str) -> String {
    let longer = images.file("longer");
    std::fs::copy(image, &longer).expect("a copy");
    let file = std::fs::File::options().write(true).open(&longer).expect("a file");
    file.set_len(40 << 20).expect("a length");
    longer
}

#[test]
fn snapshots_in_a_directory_are_read_cloned_and_brought_back() {
    snapshots_are_read_cloned_and_brought_back(&Place::Directory(Scratch::on_disk()));
}

#[test]
fn snapshots_in_a_bucket_are_read_cloned_and_brought_back() {
    snapshots_are_read_cloned_and_brought_back(&Place::bucket());
}
