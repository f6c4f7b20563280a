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
use crate::io::{CONNECTION_SUBMIT_FROM, Mount, RingIo};
use crate::shard::Shard;
use crate::waiting::{IN_FLIGHT_MAX, Waiting};
use crate::waker::{VolumeWaker, Woken};

/// A volume that connections and queues of this shard use.
pub(crate) struct Mounted {
    pub(crate) volume: Arc<dyn Volume>,
    pub(crate) backend: Box<dyn Backend>,
    /// Ops that the backend had no room for.
    pub(crate) waiting: Waiting,
    pub(crate) recorder: Recorder,
    /// Requests of the backend that were started and whose ends are still to come.
    pub(crate) io_in_flight: usize,
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

/// An entry of the table of mounted volumes, whose key is in the names of I/O requests.
enum Place {
    Mounted(Box<Mounted>),
    /// The volume is gone. Its key is not used again before so many requests have ended.
    Ending(usize),
}

impl Place {
    fn mounted(&self) -> Option<&Mounted> {
        match self {
            Self::Mounted(mounted) => Some(mounted),
            Self::Ending(_) => None,
        }
    }

    fn mounted_mut(&mut self) -> Option<&mut Mounted> {
        match self {
            Self::Mounted(mounted) => Some(mounted),
            Self::Ending(_) => None,
        }
    }
}

/// All mounted volumes.
pub(crate) struct Volumes {
    places: Slab<Place>,
    /// Volumes to visit in this turn.
    touched: Vec<usize>,
    /// Volumes with ops that wait for room, which the end of a request of another volume can make,
    /// too.
    crowded: Vec<usize>,
    /// Deadlines of backends that have one, with their volumes.
    due: BTreeSet<(Nanos, usize)>,
    woken: Arc<Woken>,
    /// Scratch space for [`Self::touch_woken`].
    taken: Vec<u32>,
}

impl Volumes {
    pub(crate) fn new(woken: Woken) -> Self {
        Self {
            places: Slab::new(),
            touched: Vec::new(),
            crowded: Vec::new(),
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
        self.places.iter().all(|(_, place)| place.mounted().is_none())
    }

    /// Has the volume visited in this turn.
    pub(crate) fn touch(&mut self, volume: usize) {
        if let Some(mounted) = self.mounted(volume)
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
            self[volume].due = None;
            self.touch(volume);
        }
    }

    /// Touches those in which ops wait for room: once a turn, since something has ended.
    pub(crate) fn touch_crowded(&mut self) {
        while let Some(volume) = self.crowded.pop() {
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
            if let Some(mounted) = self.mounted(volume).filter(|mounted| mounted.touched) {
                mounted.wake.visited();
                return Some(volume);
            }
        }
        None
    }

    /// The backend has nothing more to say for now; takes note of its deadline.
    pub(crate) fn visited(&mut self, volume: usize) {
        let Some(mounted) = self.mounted(volume) else { return };
        mounted.touched = false;
        debug_assert!(mounted.waiting.len() <= mounted.users * IN_FLIGHT_MAX, "see IN_FLIGHT_MAX");
        let is_crowded = !mounted.waiting.is_empty();
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
        if is_crowded && !self.crowded.contains(&volume) {
            self.crowded.push(volume);
        }
    }

    /// When the first volume is due.
    pub(crate) fn deadline(&self) -> Option<Nanos> {
        self.due.first().map(|(due, _)| *due)
    }

    /// A request of this volume has ended. False if the volume is gone.
    pub(crate) fn io_ended(&mut self, volume: usize) -> bool {
        match &mut self.places[volume] {
            Place::Mounted(mounted) => {
                mounted.io_in_flight -= 1;
                true
            }
            Place::Ending(left) => {
                *left -= 1;
                if *left == 0 {
                    self.places.remove(volume);
                }
                false
            }
        }
    }

    fn mounted(&mut self, volume: usize) -> Option<&mut Mounted> {
        self.places.get_mut(volume)?.mounted_mut()
    }

    fn index_of(&self, volume: &Arc<dyn Volume>) -> Option<usize> {
        let is_same = |have: &Mounted| Arc::ptr_eq(&have.volume, volume);
        let mut known = self.places.iter();
        known.find(|(_, place)| place.mounted().is_some_and(is_same)).map(|(index, _)| index)
    }

    fn hold(&mut self, served: &Served) -> Result<usize> {
        let Served { volume, stats } = served;
        let index = match self.index_of(volume) {
            Some(index) => index,
            None => {
                let backend = volume.backend()?;
                let entry = self.places.vacant_entry();
                let wake = VolumeWaker::new(&self.woken, entry.key() as u32);
                let mounted = Mounted {
                    volume: Arc::clone(volume),
                    backend,
                    waiting: Waiting::default(),
                    recorder: stats.recorder(),
                    io_in_flight: 0,
                    waker: Arc::clone(&wake).into(),
                    wake,
                    touched: false,
                    due: None,
                    users: 0,
                    opened: 0,
                };
                let index = entry.key();
                entry.insert(Place::Mounted(Box::new(mounted)));
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
        if self[volume].users > 0 {
            return;
        }
        if let Some(due) = self[volume].due {
            self.due.remove(&(due, volume));
        }
        // Its end shuts down the sockets that it has requests in flight on.
        match self[volume].io_in_flight {
            0 => drop(self.places.remove(volume)),
            left => self.places[volume] = Place::Ending(left),
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

    /// A volume's backend, the ops that wait for it, and the engine as it sees it.
    pub(crate) fn volume(&mut self, index: usize) -> (&mut dyn Backend, &mut Waiting, RingIo<'_>) {
        let Self { ring, pool, quick, clock, now, volumes, .. } = self;
        let Mounted { backend, waiting, waker, io_in_flight, .. } = &mut volumes[index];
        let (clock, now, submit_from, volume) =
            (*clock, *now, CONNECTION_SUBMIT_FROM, index as u32);
        let mount = Mount { waker, io_in_flight };
        let io = RingIo { ring, pool, quick, clock, now, submit_from, volume, mount };
        (&mut **backend, waiting, io)
    }
}

impl Index<usize> for Volumes {
    type Output = Mounted;

    fn index(&self, volume: usize) -> &Mounted {
        self.places[volume].mounted().expect("a key of a mounted volume")
    }
}

impl IndexMut<usize> for Volumes {
    fn index_mut(&mut self, volume: usize) -> &mut Mounted {
        self.mounted(volume).expect("a key of a mounted volume")
    }
}
