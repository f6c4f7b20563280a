//! A shard's work for block devices.

use std::os::fd::OwnedFd;

use crate::io::{Mount, QUEUE_SUBMIT_FROM, RingIo};
use crate::queue::{DeviceQueue, QueueAssignment, QueueCx, Served, owner_of};
use crate::shard::Shard;
use crate::volumes::Mounted;

const OPEN: &str = "who hands a queue over has its volume open on all shards";

/// A queue that this shard serves.
pub(crate) struct Queue {
    name: u64,
    device: OwnedFd,
    pub(crate) queue: Box<dyn DeviceQueue>,
    volume: usize,
    touched: bool,
    /// What it has of the ring's table of buffers.
    first_buffer: Option<u16>,
}

impl Shard {
    /// Serves a queue, whose volume is open.
    pub(crate) fn open_queue(&mut self, assignment: QueueAssignment, served: &Served) {
        let QueueAssignment { name, device, queue } = assignment;
        let volume = self.volumes.mount(served).expect(OPEN);
        let first_buffer = self.ring.reserve_buffers(queue.buffers());
        let queue = Queue { name, device, queue, volume, touched: false, first_buffer };
        let key = self.queues.insert(queue);
        self.call_queue(key, |queue, cx| queue.start(first_buffer, cx));
    }

    /// A command about this slot of a queue has ended.
    pub(crate) fn commanded(&mut self, key: usize, slot: u32, result: i32) {
        self.call_queue(key, |queue, cx| queue.commanded(slot, result, cx));
    }

    /// Ends all requests of this device with errors, those that wait and those that come.
    pub(crate) fn abandon(&mut self, name: u64) {
        self.cut(name);
        for key in self.queues_of(name) {
            self.call_queue(key, |queue, cx| queue.abandon(cx));
            let volume = self.queues[key].volume;
            for (slot, outcome) in self.volumes[volume].waiting.withdraw(owner_of(key as u32)) {
                self.call_queue(key, |queue, cx| queue.completed(slot, outcome, cx));
            }
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

    /// Ends the turn of the queues that something happened to.
    pub(crate) fn settle_queues(&mut self) {
        let mut touched = std::mem::take(&mut self.touched_queues);
        let now = self.clock.now();
        for key in touched.drain(..) {
            let Queue { queue, volume, touched, .. } = &mut self.queues[key];
            *touched = false;
            queue.turn_ended(now, &self.volumes[*volume].recorder);
            if queue.is_finished() {
                self.close_queue(key);
            }
        }
        // Keeps the allocation; settling a queue touches none.
        self.touched_queues = touched;
    }

    fn within_queue(
        &mut self,
        key: usize,
        call: impl FnOnce(&mut dyn DeviceQueue, &mut QueueCx<'_>),
    ) {
        let Self { ring, pool, quick, clock, now, queues, volumes, .. } = self;
        let Queue { device, queue, volume, .. } = &mut queues[key];
        volumes.touch(*volume);
        let index = *volume as u32;
        let Mounted { volume, backend, waiting, recorder, waker, io_in_flight, .. } =
            &mut volumes[*volume];
        let (clock, now, submit_from) = (*clock, *now, QUEUE_SUBMIT_FROM);
        let mount = Mount { waker, io_in_flight };
        let io = RingIo { ring, pool, quick, clock, now, submit_from, volume: index, mount };
        let (volume, backend) = (&**volume, &mut **backend);
        let queue_index = key as u32;
        let mut cx = QueueCx { volume, backend, waiting, recorder, io, device, queue: queue_index };
        call(&mut **queue, &mut cx);
    }

    fn touch_queue(&mut self, key: usize) {
        let queue = &mut self.queues[key];
        if !queue.touched {
            queue.touched = true;
            self.touched_queues.push(key);
        }
    }

    fn close_queue(&mut self, key: usize) {
        let queue = self.queues.remove(key);
        self.inbox.closed();
        self.unmount(queue.volume);
        if let Some(first) = queue.first_buffer {
            self.ring.release_buffers(first, queue.queue.buffers());
        }
        // Last, since with it the device is gone, for others to see.
        drop(queue);
    }
}
