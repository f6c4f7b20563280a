//! The volumes that a shard has mounted, and which of them it has to visit.
//!
//! A volume is visited when something happened to it (*touched*), when another thread has woken it,
//! or when it is due. All others cost nothing, however many are mounted.

use std::collections::BTreeSet;
use std::ops::{Index, IndexMut};
use std::sync::Arc;
use std::task::Waker;

use sheave_core::{Backend, Nanos, Result, Volume};
use sheave_telemetry::Recorder;
use slab::Slab;

use crate::Served;
use crate::io::{CONNECTION_SUBMIT_FROM, RingIo};
use crate::shard::Shard;
use crate::waker::{VolumeWaker, Woken};

/// A volume that connections and queues of this shard use.
pub(crate) struct Mounted {
    pub(crate) volume: Arc<dyn Volume>,
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) recorder: Recorder,
    /// What [`sheave_core::Io::waker`] answers.
    pub(crate) waker: Waker,
    wake: Arc<VolumeWaker>,
    touched: bool,
    /// The entry of this volume in [`Volumes::due`].
    due: Option<Nanos>,
    users: usize,
    /// How many of them are [`crate::Opened`].
    opened: usize,
}

/// All mounted volumes.
pub(crate) struct Volumes {
    mounted: Slab<Mounted>,
    /// Volumes to visit in this turn.
    touched: Vec<usize>,
    /// Deadlines of backends that have one, with their volumes.
    due: BTreeSet<(Nanos, usize)>,
    woken: Arc<Woken>,
    /// Scratch space for [`Self::touch_woken`].
    taken: Vec<u32>,
}

impl Volumes {
    pub(crate) fn new(woken: Woken) -> Self {
        Self {
            mounted: Slab::new(),
            touched: Vec::new(),
            due: BTreeSet::new(),
            woken: Arc::new(woken),
            taken: Vec::new(),
        }
    }

    /// The volume's key, for one more connection or queue.
    pub(crate) fn mount(&mut self, served: &Served) -> Result<usize> {
        let index = self.hold(served)?;
        self[index].recorder.add_connections(1);
        Ok(index)
    }

    /// Takes back one [`Self::mount`].
    pub(crate) fn unmount(&mut self, volume: usize) {
        self[volume].recorder.add_connections(-1);
        self.let_go(volume);
    }

    /// See [`crate::Opened`].
    ///
    /// # Errors
    /// When the volume cannot be used.
    pub(crate) fn open(&mut self, served: &Served) -> Result<()> {
        let index = self.hold(served)?;
        self[index].opened += 1;
        Ok(())
    }

    /// Takes back one [`Self::open`], if there was one.
    pub(crate) fn close(&mut self, volume: &Arc<dyn Volume>) {
        if let Some(index) = self.index_of(volume)
            && self[index].opened > 0
        {
            self[index].opened -= 1;
            self.let_go(index);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.mounted.is_empty()
    }

    /// Has the volume visited in this turn.
    pub(crate) fn touch(&mut self, volume: usize) {
        if let Some(mounted) = self.mounted.get_mut(volume)
            && !mounted.touched
        {
            mounted.touched = true;
            self.touched.push(volume);
        }
    }

    /// Touches what other threads have woken.
    pub(crate) fn touch_woken(&mut self) {
        let mut taken = std::mem::take(&mut self.taken);
        self.woken.take(&mut taken);
        for volume in taken.drain(..) {
            self.touch(volume as usize);
        }
        self.taken = taken;
    }

    /// Touches what is due.
    pub(crate) fn touch_due(&mut self, now: Nanos) {
        while let Some(&(due, volume)) = self.due.first().filter(|(due, _)| *due <= now) {
            self.due.remove(&(due, volume));
            self.mounted[volume].due = None;
            self.touch(volume);
        }
    }

    pub(crate) fn has_touched(&self) -> bool {
        !self.touched.is_empty()
    }

    /// The next volume to visit. [`Self::visited`] ends the visit.
    pub(crate) fn next_touched(&mut self) -> Option<usize> {
        while let Some(volume) = self.touched.pop() {
            // It may have been unmounted meanwhile.
            if let Some(mounted) = self.mounted.get(volume).filter(|mounted| mounted.touched) {
                mounted.wake.visited();
                return Some(volume);
            }
        }
        None
    }

    /// The backend has nothing more to say for now; takes note of its deadline.
    pub(crate) fn visited(&mut self, volume: usize) {
        let Some(mounted) = self.mounted.get_mut(volume) else { return };
        mounted.touched = false;
        let due = mounted.backend.deadline();
        let before = std::mem::replace(&mut mounted.due, due);
        if before != due {
            if let Some(before) = before {
                self.due.remove(&(before, volume));
            }
            if let Some(due) = due {
                self.due.insert((due, volume));
            }
        }
    }

    /// When the first volume is due.
    pub(crate) fn deadline(&self) -> Option<Nanos> {
        self.due.first().map(|(due, _)| *due)
    }

    fn index_of(&self, volume: &Arc<dyn Volume>) -> Option<usize> {
        let mut known = self.mounted.iter();
        known.find(|(_, have)| Arc::ptr_eq(&have.volume, volume)).map(|(index, _)| index)
    }

    fn hold(&mut self, served: &Served) -> Result<usize> {
        let Served { volume, stats } = served;
        let index = match self.index_of(volume) {
            Some(index) => index,
            None => {
                let backend = volume.backend()?;
                let entry = self.mounted.vacant_entry();
                let wake = VolumeWaker::new(&self.woken, entry.key() as u32);
                let mounted = Mounted {
                    volume: Arc::clone(volume),
                    backend,
                    recorder: stats.recorder(),
                    waker: Arc::clone(&wake).into(),
                    wake,
                    touched: false,
                    due: None,
                    users: 0,
                    opened: 0,
                };
                let index = entry.key();
                entry.insert(mounted);
                index
            }
        };
        self[index].users += 1;
        // A backend may have a deadline from its birth.
        self.touch(index);
        Ok(index)
    }

    fn let_go(&mut self, volume: usize) {
        self[volume].users -= 1;
        if self[volume].users == 0 {
            let mounted = self.mounted.remove(volume);
            if let Some(due) = mounted.due {
                self.due.remove(&(due, volume));
            }
        }
    }
}

impl Shard {
    /// Gives back what a connection or queue has mounted.
    pub(crate) fn unmount(&mut self, volume: usize) {
        self.volumes.unmount(volume);
        self.release_memory();
    }

    pub(crate) fn close_volume(&mut self, volume: &Arc<dyn Volume>) {
        self.volumes.close(volume);
        self.release_memory();
    }

    /// An idle shard keeps no memory.
    fn release_memory(&mut self) {
        if self.volumes.is_empty() {
            self.pool.release();
        }
    }

    /// A volume's backend, and the engine as it sees it.
    pub(crate) fn volume(&mut self, index: usize) -> (&mut dyn Backend, RingIo<'_>) {
        let Self { ring, pool, quick, clock, now, volumes, .. } = self;
        let Mounted { backend, waker, .. } = &mut volumes[index];
        let (clock, now, submit_from, volume) =
            (*clock, *now, CONNECTION_SUBMIT_FROM, index as u32);
        let waker = Some(&*waker);
        (&mut **backend, RingIo { ring, pool, quick, clock, now, submit_from, volume, waker })
    }
}

impl Index<usize> for Volumes {
    type Output = Mounted;

    fn index(&self, volume: usize) -> &Mounted {
        &self.mounted[volume]
    }
}

impl IndexMut<usize> for Volumes {
    fn index_mut(&mut self, volume: usize) -> &mut Mounted {
        &mut self.mounted[volume]
    }
}
