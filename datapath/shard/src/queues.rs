//! The queues of block devices that a shard serves.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use sheave_core::Outcome;
use slab::Slab;

use crate::assignment::{QueueAssignment, Served};
use crate::core::Core;
use crate::device_queue::{DeviceQueue, QueueCx};
use crate::inbox::Inbox;
use crate::io::QUEUE_SUBMIT_FROM;
use crate::tags::owner_of;
use crate::volumes::{Lent, Volumes};

const OPEN: &str = "a device's volume is open on all shards before its queues are served";

/// All queues, by key.
pub(crate) struct Queues {
    all: Slab<Queue>,
    /// Queues with an event in this turn.
    touched: Vec<usize>,
    /// Counts the queues.
    inbox: Arc<Inbox>,
}

struct Queue {
    /// The key of its device.
    device_key: u64,
    device: OwnedFd,
    queue: Box<dyn DeviceQueue>,
    volume: usize,
    touched: bool,
    /// The first of its entries in the ring's table of buffers.
    first_buffer: Option<u16>,
}

impl Queues {
    pub(crate) fn new(inbox: Arc<Inbox>) -> Self {
        Self { all: Slab::new(), touched: Vec::new(), inbox }
    }

    pub(crate) fn has_touched(&self) -> bool {
        !self.touched.is_empty()
    }

    /// Serves a queue, whose volume is open.
    pub(crate) fn open(
        &mut self,
        assignment: QueueAssignment,
        served: &Served,
        core: &mut Core,
        volumes: &mut Volumes,
    ) {
        let QueueAssignment { key: device_key, device, queue } = assignment;
        let volume = volumes.mount(served, core).expect(OPEN);
        let first_buffer = core.ring.reserve_buffers(queue.buffers());
        let queue = Queue { device_key, device, queue, volume, touched: false, first_buffer };
        let key = self.all.insert(queue);
        self.call(key, core, volumes, |queue, cx| queue.start(first_buffer, cx));
    }

    /// A command of this slot of a queue has completed.
    pub(crate) fn commanded(
        &mut self,
        key: usize,
        slot: u32,
        result: i32,
        core: &mut Core,
        volumes: &mut Volumes,
    ) {
        self.call(key, core, volumes, |queue, cx| queue.commanded(slot, result, cx));
    }

    /// See [`DeviceQueue::taken`].
    pub(crate) fn taken(&mut self, key: usize, slot: u32, core: &Core) {
        self.all[key].queue.taken(slot, core.now);
    }

    /// See [`DeviceQueue::completed`].
    pub(crate) fn completed(
        &mut self,
        key: usize,
        slot: u32,
        outcome: Outcome,
        core: &mut Core,
        volumes: &mut Volumes,
    ) {
        self.call(key, core, volumes, |queue, cx| queue.completed(slot, outcome, cx));
    }

    /// Completes all requests of this device with errors, waiting and later ones.
    pub(crate) fn abandon(&mut self, device_key: u64, core: &mut Core, volumes: &mut Volumes) {
        let of_device = self.all.iter().filter(|(_, queue)| queue.device_key == device_key);
        for key in of_device.map(|(key, _)| key).collect::<Vec<_>>() {
            self.call(key, core, volumes, |queue, cx| queue.abandon(cx));
            let volume = self.all[key].volume;
            for (slot, outcome) in volumes[volume].waiting.withdraw(owner_of(key as u32)) {
                self.completed(key, slot, outcome, core, volumes);
            }
        }
    }

    /// Ends the turn of the touched queues.
    pub(crate) fn settle(&mut self, core: &mut Core, volumes: &mut Volumes) {
        if self.touched.is_empty() {
            return;
        }
        let mut touched = std::mem::take(&mut self.touched);
        let now = core.clock.now();
        for key in touched.drain(..) {
            let Queue { queue, volume, touched, .. } = &mut self.all[key];
            *touched = false;
            queue.turn_ended(now, &volumes[*volume].recorder);
            if queue.is_finished() {
                self.close(key, core, volumes);
            }
        }
        // Keeps the allocation; settling a queue touches none.
        self.touched = touched;
    }

    fn call(
        &mut self,
        key: usize,
        core: &mut Core,
        volumes: &mut Volumes,
        call: impl FnOnce(&mut dyn DeviceQueue, &mut QueueCx<'_>),
    ) {
        let Queue { device, queue, volume: index, touched, .. } = &mut self.all[key];
        let Lent { volume, backend, waiting, recorder, io } =
            volumes.lend(*index, core, QUEUE_SUBMIT_FROM);
        let (number, has_started) = (key as u32, false);
        let mut cx =
            QueueCx { volume, backend, waiting, recorder, io, device, queue: number, has_started };
        call(&mut **queue, &mut cx);
        if cx.has_started {
            volumes.touch(*index);
        }
        if !*touched {
            *touched = true;
            self.touched.push(key);
        }
    }

    fn close(&mut self, key: usize, core: &mut Core, volumes: &mut Volumes) {
        let queue = self.all.remove(key);
        self.inbox.closed();
        volumes.unmount(queue.volume, core);
        if let Some(first) = queue.first_buffer {
            core.ring.release_buffers(first, queue.queue.buffers());
        }
        // Last, since other processes see the end of the device with it.
        drop(queue);
    }
}
