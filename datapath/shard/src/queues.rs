//! A shard's work for block devices.

use std::os::fd::OwnedFd;
use std::sync::mpsc::Sender;

use sheave_core::Result;
use sheave_ring::DeviceEvent;

use crate::io::RingIo;
use crate::queue::{DeviceQueue, QueueAssignment, QueueCx, Served};
use crate::shard::Shard;

/// A queue that this shard serves.
pub(crate) struct Queue {
    name: u64,
    device: OwnedFd,
    queue: Box<dyn DeviceQueue>,
    /// `None` at rest.
    volume: Option<usize>,
    touched: bool,
    rest: Rest,
    /// It has asked the kernel for requests.
    started: bool,
    /// What it has of the ring's table of buffers.
    first_buffer: Option<u16>,
}

/// Whether a queue takes requests.
enum Rest {
    /// It does.
    Awake,
    /// It is to come to rest, or has. Who waits for that, and the ends of commands until it wakes:
    /// slots and results.
    Resting { told: Option<Sender<()>>, held: Vec<(u32, i32)> },
}

impl Shard {
    /// Takes a queue, which waits for [`Shard::start_queues`].
    ///
    /// # Errors
    /// When its volume cannot be used.
    pub(crate) fn open_queue(&mut self, assignment: QueueAssignment) -> Result<()> {
        let QueueAssignment { name, device, queue, served } = assignment;
        let volume = self.mount(&served).inspect_err(|_| self.inbox.closed())?;
        let (volume, rest) = (Some(volume), Rest::Awake);
        let first_buffer = self.ring.reserve_buffers(queue.buffers());
        let (touched, started) = (false, false);
        self.queues.insert(Queue {
            name,
            device,
            queue,
            volume,
            touched,
            rest,
            started,
            first_buffer,
        });
        Ok(())
    }

    /// Lets the queues of this device that are open ask for requests.
    pub(crate) fn start_queues(&mut self, name: u64) {
        for key in self.queues_of(name) {
            if !std::mem::replace(&mut self.queues[key].started, true) {
                let first_buffer = self.queues[key].first_buffer;
                self.call_queue(key, |queue, cx| queue.start(first_buffer, cx));
            }
        }
    }

    /// Lets go of those that have not asked.
    pub(crate) fn close_queues(&mut self, name: u64) {
        for key in self.queues_of(name) {
            if !self.queues[key].started {
                self.close_queue(key);
            }
        }
    }

    pub(crate) fn device_event(&mut self, event: DeviceEvent) {
        match event {
            DeviceEvent::Command { user: (key, slot), result } => {
                let key = key as usize;
                match &mut self.queues[key].rest {
                    Rest::Resting { held, .. } => held.push((slot, result)),
                    Rest::Awake => {
                        self.call_queue(key, |queue, cx| queue.commanded(slot, result, cx));
                    }
                }
            }
            DeviceEvent::Copied { user: (key, slot), result, payload } => {
                let key = key as usize;
                self.call_queue(key, |queue, cx| queue.copied(slot, payload, result, cx));
            }
        }
    }

    /// Brings the queues of this device to rest: they take no requests, and let go of their volume
    /// once it has nothing of theirs in flight. `to` is told of each.
    pub(crate) fn begin_rest(&mut self, name: u64, to: &Sender<()>) {
        for key in self.queues_of(name) {
            let queue = &mut self.queues[key];
            if matches!(queue.rest, Rest::Awake) {
                let told = Some(to.clone());
                queue.rest = Rest::Resting { told, held: Vec::new() };
                self.touch_queue(key);
            }
        }
    }

    /// Lets the queues of this device take requests again, for this volume. Answers how many it has
    /// here.
    ///
    /// # Errors
    /// When the volume cannot be used; the queues stay at rest.
    pub(crate) fn wake(&mut self, name: u64, served: &Served) -> Result<usize> {
        let keys = self.queues_of(name);
        for &key in &keys {
            if self.queues[key].volume.is_none() {
                let index = self.mount(served)?;
                self.queues[key].volume = Some(index);
            }
            self.queues[key].queue.resized(served.volume.info().size);
            self.go_on(key);
        }
        Ok(keys.len())
    }

    /// Ends all requests of this device with errors, those that wait and those that come.
    pub(crate) fn abandon(&mut self, name: u64) {
        self.cut(name);
        for key in self.queues_of(name) {
            self.call_queue(key, |queue, cx| queue.abandon(cx));
            self.go_on(key);
        }
    }

    /// Works through what has come while the queue was at rest.
    fn go_on(&mut self, key: usize) {
        let rest = std::mem::replace(&mut self.queues[key].rest, Rest::Awake);
        let Rest::Resting { held, .. } = rest else { return };
        for (slot, result) in held {
            self.call_queue(key, |queue, cx| queue.commanded(slot, result, cx));
        }
    }

    fn queues_of(&self, name: u64) -> Vec<usize> {
        self.queues.iter().filter(|(_, queue)| queue.name == name).map(|(key, _)| key).collect()
    }

    pub(crate) fn call_queue(
        &mut self,
        key: usize,
        call: impl FnOnce(&mut dyn DeviceQueue, &mut QueueCx<'_>),
    ) {
        self.within_queue(key, call);
        self.touch_queue(key);
    }

    /// Ends the turn of the queues that something happened to. True if one tried again what its
    /// backend had no room for.
    pub(crate) fn settle_queues(&mut self) -> bool {
        let mut retried = false;
        for index in 0..self.stalled_queues.len() {
            self.touch_queue(self.stalled_queues[index]);
        }
        self.stalled_queues.clear();
        let mut touched = std::mem::take(&mut self.touched_queues);
        let now = self.clock.now();
        for key in touched.drain(..) {
            self.queues[key].touched = false;
            if self.queues[key].queue.is_stalled() {
                self.within_queue(key, |queue, cx| queue.retry(cx));
                retried = true;
            }
            let Queue { queue, volume, .. } = &mut self.queues[key];
            if let Some(volume) = *volume {
                queue.turn_ended(now, &self.volumes[volume].recorder);
            }
            if queue.is_stalled() {
                self.stalled_queues.push(key);
            } else if queue.is_finished() {
                self.close_queue(key);
            } else {
                self.rest_if_idle(key);
            }
        }
        // Keeps the allocation; settling a queue touches none.
        self.touched_queues = touched;
        retried
    }

    fn within_queue(
        &mut self,
        key: usize,
        call: impl FnOnce(&mut dyn DeviceQueue, &mut QueueCx<'_>),
    ) {
        let Self { ring, pool, quick, clock, now, queues, volumes, .. } = self;
        let Queue { device, queue, volume, .. } = &mut queues[key];
        let mounted = volume.map(|volume| &mut volumes[volume]);
        // One that is at rest starts no file I/O.
        let volume = volume.unwrap_or_default() as u32;
        let io = RingIo { ring, pool, quick, clock: *clock, now: *now, volume };
        call(&mut **queue, &mut QueueCx { mounted, io, device, queue: key as u32 });
    }

    fn touch_queue(&mut self, key: usize) {
        let queue = &mut self.queues[key];
        if !queue.touched {
            queue.touched = true;
            self.touched_queues.push(key);
        }
    }

    /// Lets go of the volume when the queue is to rest and nothing of it is in flight.
    fn rest_if_idle(&mut self, key: usize) {
        let Queue { queue, volume, rest: Rest::Resting { told, .. }, .. } = &mut self.queues[key]
        else {
            return;
        };
        if queue.in_flight() > 0 {
            return;
        }
        let (told, volume) = (told.take(), volume.take());
        if let Some(volume) = volume {
            self.unmount(volume);
        }
        if let Some(told) = told {
            // Whoever waited may have given up.
            let _ = told.send(());
        }
    }

    fn close_queue(&mut self, key: usize) {
        let queue = self.queues.remove(key);
        self.inbox.closed();
        if let Some(volume) = queue.volume {
            self.unmount(volume);
        }
        if let Some(first) = queue.first_buffer {
            self.ring.release_buffers(first, queue.queue.buffers());
        }
        // Last, since with it the device is gone, for others to see.
        drop(queue);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::time::{Duration, Instant};

    use sheave_backends::Null;
    use sheave_core::{Backend, Error, ErrorKind, Nanos, Outcome, Payload, Volume, VolumeInfo};
    use sheave_telemetry::{Recorder, Registry};

    use super::*;
    use crate::{Clock, Engine, EngineChoice, EngineConfig};

    /// A volume that only so many more threads can use.
    struct Scarce {
        null: Null,
        left: AtomicUsize,
    }

    impl Volume for Scarce {
        fn info(&self) -> &VolumeInfo {
            self.null.info()
        }

        fn backend(&self) -> Result<Box<dyn Backend>> {
            let left = self.left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1));
            left.map_err(|_| Error::new(ErrorKind::Busy, "open", "too many open files"))?;
            self.null.backend()
        }
    }

    /// Counts how many of its kind have been started.
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

        fn copied(&mut self, _: u32, _: Payload, _: io::Result<usize>, _: &mut QueueCx<'_>) {}

        fn completed(&mut self, _: u32, _: Outcome, _: &mut QueueCx<'_>) {}

        fn retry(&mut self, _: &mut QueueCx<'_>) {}

        fn is_stalled(&self) -> bool {
            false
        }

        fn in_flight(&self) -> usize {
            0
        }

        fn resized(&mut self, _: u64) {}

        fn abandon(&mut self, _: &mut QueueCx<'_>) {}

        fn turn_ended(&mut self, _: Nanos, _: &Recorder) {}

        fn is_finished(&self) -> bool {
            false
        }
    }

    #[test]
    fn the_queues_of_a_device_start_together_or_not_at_all() {
        const NAME: u64 = 7;
        let config = EngineConfig { choice: EngineChoice::Auto, shards: 3, poll_us: 0 };
        let engine = Engine::start(config, Clock::start()).unwrap();
        let count = engine.device_queues();
        if count == 0 {
            return;
        }
        let volume = Arc::new(Scarce { null: Null::new(4096), left: AtomicUsize::new(count - 1) });
        let started = Arc::new(AtomicUsize::new(0));
        let stats = Registry::new().volume("scarce");
        let serve = || {
            let queue = |_| QueueAssignment {
                name: NAME,
                device: File::open("/dev/null").unwrap().into(),
                queue: Box::new(Idle { started: Arc::clone(&started) }),
                served: Served { volume: volume.clone(), stats: Arc::clone(&stats) },
            };
            engine.serve_queues(NAME, (0..count).map(queue).collect())
        };
        assert_eq!(serve().unwrap_err().kind(), ErrorKind::Busy);
        let begun = Instant::now();
        while Arc::strong_count(&started) > 1 || engine.connections() > 0 {
            assert!(begun.elapsed() < Duration::from_secs(10), "the shards keep queues");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(started.load(SeqCst), 0);
        volume.left.store(count, SeqCst);
        serve().unwrap();
        assert_eq!((started.load(SeqCst), engine.connections()), (count, count));
        engine.stop();
    }
}
