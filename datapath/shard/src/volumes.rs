//! The volumes that a shard has open.

use std::sync::Arc;

use sheave_core::{Backend, Result, Volume};
use sheave_telemetry::Recorder;

use crate::Served;
use crate::io::RingIo;
use crate::shard::Shard;

/// A volume that connections and queues of this shard use.
pub(crate) struct Mounted {
    pub(crate) volume: Arc<dyn Volume>,
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) recorder: Recorder,
    users: usize,
}

impl Shard {
    /// Where the volume is among those of this shard, for one more user.
    pub(crate) fn mount(&mut self, served: &Served) -> Result<usize> {
        let Served { volume, stats } = served;
        let known = self.volumes.iter().find(|(_, have)| Arc::ptr_eq(&have.volume, volume));
        let index = match known {
            Some((index, _)) => index,
            None => {
                let backend = volume.backend()?;
                let (volume, recorder) = (Arc::clone(volume), stats.recorder());
                self.volumes.insert(Mounted { volume, backend, recorder, users: 0 })
            }
        };
        let mounted = &mut self.volumes[index];
        mounted.users += 1;
        mounted.recorder.add_connections(1);
        Ok(index)
    }

    /// One user of the volume is gone.
    pub(crate) fn unmount(&mut self, volume: usize) {
        let mounted = &mut self.volumes[volume];
        mounted.users -= 1;
        mounted.recorder.add_connections(-1);
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
        let (clock, now, volume) = (*clock, *now, index as u32);
        (backend, RingIo { ring, pool, quick, clock, now, volume })
    }
}
