//! Connections that receive nothing, since too much waits for their volume.

use std::io;

use super::{Connection, Connections};
use crate::core::Core;
use crate::volumes::Volumes;

/// What is known of the other side while nothing is received from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watch {
    Off,
    On,
    /// It has ended: the other side is gone (true), or has only said that nothing more comes.
    Ended(bool),
}

impl Connections {
    /// A watch has ended.
    pub(crate) fn watched(&mut self, key: usize, is_gone: bool) {
        self.all[key].watch = Watch::Ended(is_gone);
        self.touch(key);
    }

    /// Touches those that were held back and no longer are.
    pub(super) fn let_on(&mut self, volumes: &Volumes) {
        let mut held_back = std::mem::take(&mut self.held_back);
        held_back.retain(|key| {
            // The key may be that of a later connection.
            let one = self.all.get_mut(*key).filter(|one| one.is_held_back);
            let Some(one) = one else { return false };
            one.is_held_back = volumes[one.volume].waiting.is_crowd();
            if !one.is_held_back {
                self.touch(*key);
                return false;
            }
            true
        });
        self.held_back = held_back;
    }

    /// Receives nothing while too much waits for the volume. The other side may go meanwhile, and
    /// its requests with it.
    pub(super) fn hold_back(&mut self, key: usize, core: &mut Core, volumes: &mut Volumes) {
        let Connection { socket, watch, is_held_back, .. } = &mut self.all[key];
        match *watch {
            Watch::Ended(true) => {
                return self.fail(key, &io::ErrorKind::ConnectionReset.into(), core, volumes);
            }
            Watch::Off => {
                core.ring.watch(socket, key as u64);
                *watch = Watch::On;
            }
            Watch::On | Watch::Ended(false) => {}
        }
        if !std::mem::replace(is_held_back, true) {
            self.held_back.push(key);
        }
    }
}
