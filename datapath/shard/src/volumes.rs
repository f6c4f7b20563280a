//! The volumes that a shard has open.

use std::sync::Arc;

use sheave_core::{Backend, Result, Volume};
use sheave_telemetry::Recorder;

use crate::Served;
use crate::io::{CONNECTION_SUBMIT_FROM, RingIo};
use crate::shard::Shard;

/// A volume that connections and queues of this shard use.
pub(crate) struct Mounted {
    pub(crate) volume: Arc<dyn Volume>,
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) recorder: Recorder,
    users: usize,
    /// How many of them are [`crate::Opened`].
    opened: usize,
}

impl Shard {
    /// Where the volume is among those of this shard, for one more user.
    pub(crate) fn mount(&mut self, served: &Served) -> Result<usize> {
        let index = self.hold(served)?;
        self.volumes[index].recorder.add_connections(1);
        Ok(index)
    }

    /// One user of the volume is gone.
    pub(crate) fn unmount(&mut self, volume: usize) {
        self.volumes[volume].recorder.add_connections(-1);
        self.let_go(volume);
    }

    /// See [`crate::Opened`].
    ///
    /// # Errors
    /// When it cannot be used.
    pub(crate) fn open_volume(&mut self, served: &Served) -> Result<()> {
        let index = self.hold(served)?;
        self.volumes[index].opened += 1;
        Ok(())
    }

    /// Takes that back, if it was so.
    pub(crate) fn close_volume(&mut self, volume: &Arc<dyn Volume>) {
        if let Some(index) = self.index_of(volume)
            && self.volumes[index].opened > 0
        {
            self.volumes[index].opened -= 1;
            self.let_go(index);
        }
    }

    fn index_of(&self, volume: &Arc<dyn Volume>) -> Option<usize> {
        let mut known = self.volumes.iter();
        known.find(|(_, have)| Arc::ptr_eq(&have.volume, volume)).map(|(index, _)| index)
    }

    fn hold(&mut self, served: &Served) -> Result<usize> {
        let Served { volume, stats } = served;
        let index = match self.index_of(volume) {
            Some(index) => index,
            None => {
                let backend = volume.backend()?;
                let (volume, recorder) = (Arc::clone(volume), stats.recorder());
                self.volumes.insert(Mounted { volume, backend, recorder, users: 0, opened: 0 })
            }
        };
        self.volumes[index].users += 1;
        Ok(index)
    }

    fn let_go(&mut self, volume: usize) {
        let mounted = &mut self.volumes[volume];
        mounted.users -= 1;
        if mounted.users == 0 {
            self.volumes.remove(volume);
        }
        if self.volumes.is_empty() {
            self.pool.release();
        }
    }

    /// A volume's backend, and the engine as it sees it.
    pub(crate) fn volume(&mut self, index: usize) -> (&mut dyn Backend, RingIo<'_>) {
        let Self { ring, pool, quick, clock, now, volumes, .. } = self;
        let backend = &mut *volumes[index].backend;
        let (clock, now, submit_from, volume) =
            (*clock, *now, CONNECTION_SUBMIT_FROM, index as u32);
        (backend, RingIo { ring, pool, quick, clock, now, submit_from, volume })
    }
}
