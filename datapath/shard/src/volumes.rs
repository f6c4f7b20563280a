//! The volumes that a shard has mounted, and those that it has to visit.
//!
//! A volume is visited when it was *touched* by an event, when another thread has woken it, or when
//! it is due. All others cost nothing, however many are mounted.

use std::collections::BTreeSet;
use std::ops::{Index, IndexMut};
use std::sync::Arc;
use std::task::Waker;

use sheave_core::{Backend, Completion, IoDone, Nanos, Outcome, Result, Tag, Volume};
use sheave_telemetry::Recorder;
use slab::Slab;

use crate::assignment::Served;
use crate::core::Core;
use crate::io::{CONNECTION_SUBMIT_FROM, Mount, RingIo};
use crate::waiting::{IN_FLIGHT_MAX, Waiting};
use crate::waker::{VolumeWaker, Woken};

/// A volume that connections and queues of this shard use.
pub(crate) struct Mounted {
    pub(crate) volume: Arc<dyn Volume>,
    pub(crate) backend: Box<dyn Backend>,
    /// Ops that the backend had no room for.
    pub(crate) waiting: Waiting,
    pub(crate) recorder: Recorder,
    /// Requests of the backend that have not completed.
    pub(crate) io_in_flight: usize,
    /// The waker that [`sheave_core::Io::waker`] returns.
    pub(crate) waker: Waker,
    wake: Arc<VolumeWaker>,
    touched: bool,
    /// The entry of this volume in [`Volumes::due`].
    due: Option<Nanos>,
    users: usize,
    /// The number of users that are [`crate::Opened`].
    opened: usize,
}

/// An entry of the table of mounted volumes. I/O requests carry its key.
enum Entry {
    Mounted(Box<Mounted>),
    /// Nothing uses the volume any more. Its backend stays until its last request has completed,
    /// and takes the completions: bytes that arrived on a socket may be for ops of other threads.
    Ending(Box<Mounted>),
}

impl Entry {
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

/// The parts of a mounted volume that a connection or queue uses.
pub(crate) struct Lent<'a> {
    pub(crate) volume: &'a dyn Volume,
    pub(crate) backend: &'a mut dyn Backend,
    pub(crate) waiting: &'a mut Waiting,
    pub(crate) recorder: &'a Recorder,
    pub(crate) io: RingIo<'a>,
}

/// The progress of an op.
pub(crate) struct Progress {
    pub(crate) tag: Tag,
    /// It waited for room, and the backend has taken it now.
    pub(crate) was_waiting: bool,
    /// Its outcome, if it has completed.
    pub(crate) outcome: Option<Outcome>,
}

/// All mounted volumes.
pub(crate) struct Volumes {
    entries: Slab<Entry>,
    /// Volumes to visit in this turn.
    touched: Vec<usize>,
    /// Volumes with ops that wait for room. A completed request of another volume can make room,
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
            entries: Slab::new(),
            touched: Vec::new(),
            crowded: Vec::new(),
            due: BTreeSet::new(),
            woken: Arc::new(woken),
            taken: Vec::new(),
        }
    }

    /// The volume's key, for one more connection or queue.
    pub(crate) fn mount(&mut self, served: &Served, core: &mut Core) -> Result<usize> {
        let index = self.hold(served, core)?;
        self[index].recorder.add_connections(1);
        Ok(index)
    }

    /// Reverses one [`Self::mount`].
    pub(crate) fn unmount(&mut self, volume: usize, core: &mut Core) {
        self[volume].recorder.add_connections(-1);
        self.let_go(volume, core);
    }

    /// See [`crate::Opened`].
    ///
    /// # Errors
    /// When the volume cannot be used.
    pub(crate) fn open(&mut self, served: &Served, core: &mut Core) -> Result<()> {
        let index = self.hold(served, core)?;
        self[index].opened += 1;
        Ok(())
    }

    /// Reverses one [`Self::open`], if there was one.
    pub(crate) fn close(&mut self, volume: &Arc<dyn Volume>, core: &mut Core) {
        if let Some(index) = self.index_of(volume)
            && self[index].opened > 0
        {
            self[index].opened -= 1;
            self.let_go(index, core);
        }
    }

    /// Call it whenever the number of entries has changed. A volume that is ending counts, since
    /// its requests in flight can be stalled, too.
    fn note_count(&self, core: &mut Core) {
        core.inline.has_one_volume = self.entries.len() == 1;
    }

    fn is_empty(&self) -> bool {
        self.entries.iter().all(|(_, entry)| entry.mounted().is_none())
    }

    /// The parts of a volume that a connection or queue uses.
    pub(crate) fn lend<'a>(
        &'a mut self,
        index: usize,
        core: &'a mut Core,
        submit_from: usize,
    ) -> Lent<'a> {
        lent(&mut self[index], index, core, submit_from)
    }

    /// Hands the completion of a file or socket request to the backend that started it.
    pub(crate) fn io_done(&mut self, volume: u32, done: IoDone, core: &mut Core) {
        let volume = volume as usize;
        let (Entry::Mounted(mounted) | Entry::Ending(mounted)) = &mut self.entries[volume];
        mounted.io_in_flight -= 1;
        let Lent { backend, mut io, .. } = lent(mounted, volume, core, CONNECTION_SUBMIT_FROM);
        backend.io_done(done, &mut io);
        match &self.entries[volume] {
            Entry::Mounted(_) => self.touch(volume),
            Entry::Ending(mounted) if mounted.io_in_flight == 0 => {
                self.entries.remove(volume);
                self.note_count(core);
            }
            Entry::Ending(_) => core.ring.cancel_sockets_of(volume as u32),
        }
    }

    /// The next progress of the volume's ops: one that has completed, or one that has found room.
    pub(crate) fn next(&mut self, volume: usize, core: &mut Core) -> Option<Progress> {
        let Lent { backend, waiting, mut io, .. } = self.lend(volume, core, CONNECTION_SUBMIT_FROM);
        if let Some(Completion { tag, outcome }) = backend.reap(&mut io) {
            return Some(Progress { tag, was_waiting: false, outcome: Some(outcome) });
        }
        let (tag, outcome) = waiting.offer(backend, &mut io)?;
        Some(Progress { tag, was_waiting: true, outcome })
    }

    /// Marks the volume to be visited in this turn.
    pub(crate) fn touch(&mut self, volume: usize) {
        if let Some(mounted) = self.mounted(volume)
            && !mounted.touched
        {
            mounted.touched = true;
            self.touched.push(volume);
        }
    }

    /// Touches the volumes that other threads have woken.
    pub(crate) fn touch_woken(&mut self) {
        let mut taken = std::mem::take(&mut self.taken);
        self.woken.take(&mut taken);
        for volume in taken.drain(..) {
            self.touch(volume as usize);
        }
        self.taken = taken;
    }

    /// Touches the volumes that are due.
    pub(crate) fn touch_due(&mut self, now: Nanos) {
        while let Some(&(due, volume)) = self.due.first().filter(|(due, _)| *due <= now) {
            self.due.remove(&(due, volume));
            self[volume].due = None;
            self.touch(volume);
        }
    }

    /// Touches the volumes with ops that wait for room: once a turn, since requests have completed.
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

    /// The backend has no more completions for now. Notes its deadline.
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

    #[cfg(test)]
    pub(crate) fn count(&self) -> usize {
        self.entries.iter().filter(|(_, entry)| entry.mounted().is_some()).count()
    }

    fn mounted(&mut self, volume: usize) -> Option<&mut Mounted> {
        self.entries.get_mut(volume)?.mounted_mut()
    }

    fn index_of(&self, volume: &Arc<dyn Volume>) -> Option<usize> {
        let is_same = |have: &Mounted| Arc::ptr_eq(&have.volume, volume);
        let mut known = self.entries.iter();
        known.find(|(_, entry)| entry.mounted().is_some_and(is_same)).map(|(index, _)| index)
    }

    fn hold(&mut self, served: &Served, core: &mut Core) -> Result<usize> {
        let Served { volume, stats } = served;
        let index = match self.index_of(volume) {
            Some(index) => index,
            None => {
                let backend = volume.backend()?;
                let entry = self.entries.vacant_entry();
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
                entry.insert(Entry::Mounted(Box::new(mounted)));
                index
            }
        };
        self[index].users += 1;
        self.note_count(core);
        // A new backend may have a deadline.
        self.touch(index);
        Ok(index)
    }

    fn let_go(&mut self, volume: usize, core: &mut Core) {
        self[volume].users -= 1;
        if self[volume].users > 0 {
            return;
        }
        if let Some(due) = self[volume].due {
            self.due.remove(&(due, volume));
        }
        let Entry::Mounted(mounted) = self.entries.remove(volume) else { return };
        if mounted.io_in_flight > 0 {
            let key = self.entries.insert(Entry::Ending(mounted));
            debug_assert_eq!(key, volume, "the place that has become free last");
            core.ring.cancel_sockets_of(volume as u32);
        }
        core.inline.forget(volume as u32);
        self.note_count(core);
        if self.is_empty() {
            // An idle shard keeps no memory.
            core.pool.release();
        }
    }
}

fn lent<'a>(
    mounted: &'a mut Mounted,
    index: usize,
    core: &'a mut Core,
    submit_from: usize,
) -> Lent<'a> {
    let Mounted { volume, backend, waiting, recorder, waker, io_in_flight, .. } = mounted;
    let mount = Mount { waker, io_in_flight, recorder };
    let io = RingIo { core, submit_from, volume: index as u32, mount };
    Lent { volume: &**volume, backend: &mut **backend, waiting, recorder, io }
}

impl Index<usize> for Volumes {
    type Output = Mounted;

    fn index(&self, volume: usize) -> &Mounted {
        self.entries[volume].mounted().expect("a key of a mounted volume")
    }
}

impl IndexMut<usize> for Volumes {
    fn index_mut(&mut self, volume: usize) -> &mut Mounted {
        self.mounted(volume).expect("a key of a mounted volume")
    }
}
