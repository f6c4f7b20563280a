//! Volumes that are open on all shards, to serve devices.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use sheave_core::{Error, ErrorKind, Result};

use crate::assignment::{QueueAssignment, Served};
use crate::engine::Engine;
use crate::inbox::Command;
use crate::start::{ShardHandle, ended};

/// How often to check whether a shard that does not answer still runs.
const LOOK: Duration = Duration::from_millis(100);

/// A volume that is open on all shards until this is dropped.
pub struct Opened<'a> {
    engine: &'a Engine,
    served: &'a Served,
}

impl Engine {
    /// Opens the volume on all shards, so that nothing can fail between the first queue of a device
    /// and the last: once a queue has sent its commands, only the end of this process takes them
    /// back.
    ///
    /// # Errors
    /// When there are no shards, or one cannot use the volume.
    pub fn open<'a>(&'a self, served: &'a Served) -> Result<Opened<'a>> {
        if self.shards().is_empty() {
            return Err(Error::new(ErrorKind::Unsupported, "open", "device queues need io_uring"));
        }
        let _alone = self.handing.lock().unwrap_or_else(PoisonError::into_inner);
        // On drop, the shards that have opened the volume close it if another cannot open it.
        let opened = Opened { engine: self, served };
        let answers = ask(self.shards(), |answer| Command::Open(served.clone(), answer))?;
        answers.into_iter().collect::<Result<()>>()?;
        Ok(opened)
    }
}

impl Opened<'_> {
    /// Hands the queues of a device to the shards in turn, and returns when all have sent their
    /// first commands to the kernel.
    ///
    /// # Errors
    /// When a shard has ended.
    pub fn serve(&self, queues: Vec<QueueAssignment>) -> Result<()> {
        let _alone = self.engine.handing.lock().unwrap_or_else(PoisonError::into_inner);
        let (shards, wanted) = (self.engine.shards(), queues.len());
        let (answer, answers) = mpsc::channel();
        for (queue, shard) in queues.into_iter().zip(shards.iter().cycle()) {
            shard.assign(Command::ServeQueue(queue, self.served.clone(), answer.clone()))?;
        }
        drop(answer);
        all_of(shards, &answers, wanted).map(drop)
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        for shard in self.engine.shards() {
            // A shard that has ended has nothing open.
            let _ = shard.hand(Command::Close(Arc::clone(&self.served.volume)));
        }
    }
}

/// Sends a question to all shards, and waits for their answers.
fn ask<T>(shards: &[ShardHandle], question: impl Fn(Sender<T>) -> Command) -> Result<Vec<T>> {
    let (answer, answers) = mpsc::channel();
    shards.iter().try_for_each(|shard| shard.hand(question(answer.clone())))?;
    drop(answer);
    all_of(shards, &answers, shards.len())
}

/// Waits for `wanted` answers, without a time limit.
fn all_of<T>(shards: &[ShardHandle], answers: &Receiver<T>, wanted: usize) -> Result<Vec<T>> {
    let mut all = Vec::with_capacity(wanted);
    while all.len() < wanted {
        match answers.recv_timeout(LOOK) {
            Ok(answer) => all.push(answer),
            Err(RecvTimeoutError::Timeout) => shards.iter().try_for_each(ShardHandle::check)?,
            Err(RecvTimeoutError::Disconnected) => return Err(ended()),
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::time::{Duration, Instant};

    use sheave_core::{Backend, Error, ErrorKind, Nanos, Outcome, Volume, VolumeInfo};
    use sheave_local::Null;
    use sheave_telemetry::{Recorder, Registry};

    use super::*;
    use crate::{Clock, DeviceQueue, EngineChoice, EngineConfig, QueueCx};

    /// A volume that only a limited number of threads can use.
    struct Scarce {
        null: Null,
        left: AtomicUsize,
    }

    impl Volume for Scarce {
        fn info(&self) -> &VolumeInfo {
            self.null.info()
        }

        fn size(&self) -> u64 {
            self.null.size()
        }

        fn grow(&self) -> Result<u64> {
            self.null.grow()
        }

        fn below(&self) -> &[Arc<dyn Volume>] {
            &[]
        }

        fn backend(&self) -> Result<Box<dyn Backend>> {
            let left = self.left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1));
            left.map_err(|_| Error::new(ErrorKind::Busy, "open", "too many open files"))?;
            self.null.backend()
        }
    }

    /// A queue that counts how many of its kind have been started.
    struct Idle {
        started: Arc<AtomicUsize>,
    }

    impl DeviceQueue for Idle {
        fn buffers(&self) -> u16 {
            0
        }

        fn start(&mut self, _: Option<u16>, _: &mut QueueCx<'_>) {
            self.started.fetch_add(1, SeqCst);
        }

        fn commanded(&mut self, _: u32, _: i32, _: &mut QueueCx<'_>) {}

        fn completed(&mut self, _: u32, _: Outcome, _: &mut QueueCx<'_>) {}

        fn taken(&mut self, _: u32, _: Nanos) {}

        fn abandon(&mut self, _: &mut QueueCx<'_>) {}

        fn turn_ended(&mut self, _: Nanos, _: &Recorder) {}

        fn is_finished(&self) -> bool {
            false
        }
    }

    #[test]
    fn a_volume_is_open_on_all_shards_or_none_and_then_its_queues_are_served() {
        let config = EngineConfig { choice: EngineChoice::Auto, shards: 3, poll_us: 0 };
        let engine = Engine::start(config, Clock::start()).unwrap();
        let count = engine.device_queues();
        if count == 0 {
            return;
        }
        let scarce = Arc::new(Scarce { null: Null::new(4096), left: AtomicUsize::new(count - 1) });
        let held = Arc::strong_count(&scarce) + 1;
        let stats = Registry::new().volume("scarce");
        let served = Served { volume: scarce.clone(), stats };
        let settled = |users: usize| {
            let begun = Instant::now();
            while Arc::strong_count(&scarce) != held + users {
                assert!(begun.elapsed() < Duration::from_secs(10), "not {users} users");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        assert_eq!(engine.open(&served).err().unwrap().kind(), ErrorKind::Busy);
        settled(0);

        scarce.left.store(count, SeqCst);
        let opened = engine.open(&served).unwrap();
        settled(count);
        let started = Arc::new(AtomicUsize::new(0));
        let queue = |_| QueueAssignment {
            key: 7,
            device: File::open("/dev/null").unwrap().into(),
            queue: Box::new(Idle { started: Arc::clone(&started) }),
        };
        opened.serve((0..count).map(queue).collect()).unwrap();
        assert_eq!((started.load(SeqCst), engine.connections()), (count, count));
        drop(opened);
        // Only the queues have it now.
        settled(count);
        engine.stop();
        settled(0);
    }
}
