//! The volumes' suite through the server and the client: an export behaves like its volume.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use sheave_conformance::stacks::for_any_two;
use sheave_conformance::{Options, PlainEngine, check};
use sheave_core::{
    Backend, Completion, Io, IoDone, Nanos, Op, Reply, Result, Submitted, Tag, Volume, VolumeInfo,
};
use sheave_layers::BlockSize;
use sheave_local::{FileOptions, FileVolume};
use sheave_object::{BLOCK_BYTES, Codec, DirStore, Durability, JournalSize, StoredVolume, Tuning};
use sheave_shard::EngineChoice;
use sheave_volumes::{OpenOptions, open};

use crate::support::{Running, Setup, both_engines};

/// Neither a multiple of a chunk, nor of a page, nor of anything.
const SIZE: u64 = 3 * (64 << 10) + 777;

/// A volume, and the server that it comes from.
struct Served {
    volume: Arc<dyn Volume>,
    _server: Running,
}

impl Served {
    fn new(engine: EngineChoice, volume: Arc<dyn Volume>) -> Self {
        let server = Setup { shards: 1, ..Setup::of(engine, volume) }.start();
        let uri = format!("nbd+unix:///?socket={}", server.socket.display());
        let volume = open(&uri, &OpenOptions::default()).unwrap();
        Self { volume, _server: server }
    }
}

impl Volume for Served {
    fn info(&self) -> &VolumeInfo {
        self.volume.info()
    }

    fn size(&self) -> u64 {
        self.volume.size()
    }

    fn grow(&self) -> Result<u64> {
        self.volume.grow()
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        std::slice::from_ref(&self.volume)
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        Ok(Box::new(Advertised(self.volume.backend()?)))
    }
}

/// Sends only commands that the server has, as clients do: the suite prefetches on every volume.
struct Advertised(Box<dyn Backend>);

impl Backend for Advertised {
    fn info(&self) -> &VolumeInfo {
        self.0.info()
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        match op {
            Op::Cache { .. } if !self.info().can.cache => Submitted::Done(Ok(Reply::Done)),
            op => self.0.submit(op, tag, io),
        }
    }

    fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        self.0.io_done(done, io);
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        self.0.reap(io)
    }

    fn deadline(&self) -> Option<Nanos> {
        self.0.deadline()
    }
}

fn check_served(engine: EngineChoice, make: impl Fn() -> String) {
    let options = Options { cases: 20, unaligned: true };
    let make = || -> Arc<dyn Volume> {
        let volume = open(&make(), &OpenOptions::default()).unwrap();
        Arc::new(Served::new(engine, volume))
    };
    check(options, make, || PlainEngine::new(1));
}

fn check_image(engine: EngineChoice, parameters: &str) {
    let dir = tempfile::TempDir::new_in("/var/tmp").unwrap();
    let image = dir.path().join("a.img");
    check_served(engine, || {
        std::fs::write(&image, vec![0; SIZE as usize]).unwrap();
        format!("{}{parameters}", image.display())
    });
}

both_engines! {
    fn memory(engine) {
        check_served(engine, || format!("memory:?size={SIZE}"));
    }

    fn file(engine) {
        check_image(engine, "");
    }

    fn file_without_the_page_cache(engine) {
        check_image(engine, "?direct=true");
    }

    fn direct_files_under_layers_over_layers(engine) {
        let dir = tempfile::TempDir::new_in("/var/tmp").unwrap();
        let made = AtomicUsize::new(0);
        let base = || {
            let image = dir.path().join(format!("{}.img", made.fetch_add(1, Relaxed)));
            // Of whole blocks: an export of odd size states no minimum block, and without the
            // block-size layer clients must know it.
            std::fs::write(&image, vec![0; 3 << 16]).unwrap();
            let options = FileOptions { direct: true, ..FileOptions::new(image) };
            let volume: Arc<dyn Volume> = Arc::new(FileVolume::open(&options).unwrap());
            volume
        };
        for_any_two(&base, |name, make| {
            // Limits and delays do not change ops, and are slow.
            if name.contains("limits") || name.contains("delays") {
                return;
            }
            let options = Options { cases: 2, unaligned: true };
            check(options, || Arc::new(Served::new(engine, make())), || PlainEngine::new(1));
        });
    }

    fn object_volume(engine) {
        let dir = tempfile::TempDir::new_in("/var/tmp").unwrap();
        let made = AtomicUsize::new(0);
        let make = || -> Arc<dyn Volume> {
            let place = dir.path().join(format!("volume-{}", made.fetch_add(1, Relaxed)));
            // A process has at most one open volume of a name.
            let volume = StoredVolume {
                name: place.display().to_string(),
                store: Arc::new(DirStore::new(&place)),
                journals: dir.path().join("journals"),
                key: None,
                snapshot: None,
            };
            volume.create(64 * BLOCK_BYTES, Codec::Lz4, Durability::Local).unwrap();
            // So small that the suite fills objects and the journal.
            let segment_bytes = JournalSize::SEGMENT_BYTES_MIN;
            let tuning = Tuning {
                journal: JournalSize { segment_bytes, segments_max: 2 },
                object_bytes: 64 << 10,
                tick: Duration::from_millis(50),
                ..Tuning::default()
            };
            let volume = volume.open_tuned(false, tuning).unwrap();
            Arc::new(Served::new(engine, Arc::new(BlockSize::new(Arc::new(volume)))))
        };
        check(Options { cases: 10, unaligned: true }, make, || PlainEngine::new(1));
    }

    fn file_under_all_layers(engine) {
        check_image(
            engine,
            "?direct=true&limit-bps=8G&limit-iops=200000&fault=any:delay=200us:probability=0.2",
        );
    }
}
