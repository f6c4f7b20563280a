//! A shard's work for block devices.

use std::os::fd::OwnedFd;
use std::sync::mpsc::Sender;

use crate::io::{QUEUE_SUBMIT_FROM, RingIo};
use crate::queue::{DeviceQueue, QueueAssignment, QueueCx, Served, Used};
use crate::shard::Shard;
use crate::volumes::Mounted;

const OPEN: &str = "who hands a queue over has its volume open on all shards";

/// A queue that this shard serves.
pub(crate) struct Queue {
    name: u64,
    device: OwnedFd,
    queue: Box<dyn DeviceQueue>,
    /// `None` at rest.
    volume: Option<usize>,
    touched: bool,
    rest: Rest,
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
    /// Serves a queue, whose volume is open.
    pub(crate) fn open_queue(&mut self, assignment: QueueAssignment, served: &Served) {
        let QueueAssignment { name, device, queue } = assignment;
        let index = self.volumes.mount(served).expect(OPEN);
        let (volume, rest) = (Some(index), Rest::Awake);
        let first_buffer = self.ring.reserve_buffers(queue.buffers());
        let queue = Queue { name, device, queue, volume, touched: false, rest, first_buffer };
        let key = self.queues.insert(queue);
        self.call_queue(key, |queue, cx| queue.start(first_buffer, cx));
    }

    /// A command about this slot of a queue has ended.
    pub(crate) fn commanded(&mut self, key: usize, slot: u32, result: i32) {
        match &mut self.queues[key].rest {
            Rest::Resting { held, .. } => held.push((slot, result)),
            Rest::Awake => self.call_queue(key, |queue, cx| queue.commanded(slot, result, cx)),
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

    /// Lets the queues of this device take requests again, for this volume, which is open. Answers
    /// how many it has here.
    pub(crate) fn wake(&mut self, name: u64, served: &Served) -> usize {
        let keys = self.queues_of(name);
        for &key in &keys {
            if self.queues[key].volume.is_none() {
                self.queues[key].volume = Some(self.volumes.mount(served).expect(OPEN));
            }
            self.queues[key].queue.resized(served.volume.size());
            self.go_on(key);
        }
        keys.len()
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
        volume.inspect(|volume| volumes.touch(*volume));
        let (used, waker) = match volume {
            Some(volume) => {
                let Mounted { volume, backend, recorder, waker, .. } = &mut volumes[*volume];
                (Some(Used { volume: &**volume, backend: &mut **backend, recorder }), Some(&*waker))
            }
            None => (None, None),
        };
        // One that is at rest starts no file I/O.
        let volume = volume.unwrap_or_default() as u32;
        let (clock, now, submit_from) = (*clock, *now, QUEUE_SUBMIT_FROM);
        let io = RingIo { ring, pool, quick, clock, now, submit_from, volume, waker };
        call(&mut **queue, &mut QueueCx { used, io, device, queue: key as u32 });
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
