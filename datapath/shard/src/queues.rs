//! A shard's work for block devices.

use std::os::fd::OwnedFd;

use sheave_ring::DeviceEvent;

use crate::io::RingIo;
use crate::queue::{DeviceQueue, QueueAssignment, QueueCx};
use crate::shard::{Mounted, Shard};

/// A queue that this shard serves.
pub(crate) struct Queue {
    device: OwnedFd,
    queue: Box<dyn DeviceQueue>,
    volume: usize,
    touched: bool,
}

impl Shard {
    pub(crate) fn open_queue(&mut self, assignment: QueueAssignment) {
        let QueueAssignment { device, queue, volume, stats, started } = assignment;
        let index = match self.mount(&volume, &stats) {
            Ok(index) => index,
            Err(error) => {
                self.inbox.closed();
                // Whoever waited may have given up.
                let _ = started.send(Err(error));
                return;
            }
        };
        self.retain(index);
        let queue = Queue { device, queue, volume: index, touched: false };
        let key = self.queues.insert(queue);
        self.call_queue(key, |queue, cx| queue.start(cx));
        let _ = started.send(Ok(()));
    }

    pub(crate) fn device_event(&mut self, event: DeviceEvent) {
        match event {
            DeviceEvent::Command { user: (key, slot), result } => {
                self.call_queue(key as usize, |queue, cx| queue.commanded(slot, result, cx));
            }
            DeviceEvent::Copied { user: (key, slot), result, payload } => {
                let key = key as usize;
                self.call_queue(key, |queue, cx| queue.copied(slot, payload, result, cx));
            }
        }
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
            queue.turn_ended(now, &self.volumes[*volume].recorder);
            if queue.is_stalled() {
                self.stalled_queues.push(key);
            } else if queue.is_finished() {
                self.close_queue(key);
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
        let Mounted { backend, recorder, .. } = &mut volumes[*volume];
        let io = RingIo { ring, pool, quick, clock: *clock, now: *now, volume: *volume as u32 };
        let backend = &mut **backend;
        call(&mut **queue, &mut QueueCx { backend, io, recorder, device, queue: key as u32 });
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
        self.release(queue.volume);
        // Last, since with it the device is gone, for others to see.
        drop(queue);
    }
}
