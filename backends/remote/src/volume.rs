//! The volume.

use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError};

use sheave_core::{Backend, Error, ErrorKind, Link, Result, Volume, VolumeInfo};
use sheave_proto::check_exportable;

use crate::RemoteOptions;
use crate::backend::RemoteBackend;
use crate::connect::{connect_all, inquire};
use crate::reconnect;
use crate::state::{Promised, State};

/// An export of an NBD server.
pub struct RemoteVolume {
    shared: Arc<Shared>,
}

/// What backends and the reconnecting thread share.
pub(crate) struct Shared {
    pub(crate) options: Arc<RemoteOptions>,
    pub(crate) info: VolumeInfo,
    size: AtomicU64,
    has_lost: Arc<AtomicBool>,
    link: Arc<Link>,
    state: Mutex<State>,
}

impl RemoteVolume {
    /// Connects, and waits for that.
    ///
    /// # Errors
    /// Why the export cannot be reached or used.
    pub fn open(options: RemoteOptions) -> Result<Self> {
        let connections = connect_all(&options)?;
        let mut promised = Promised::of(&connections[0].negotiated);
        check_exportable(&promised.info, promised.size).map_err(|why| {
            Error::new(ErrorKind::Invalid, "open", format!("{}: {why}", options.name))
        })?;
        promised.info.read_only |= options.read_only;
        let mut info = promised.info.clone();
        // All backends share the connections, or the server says that they see one another.
        info.can.multi_conn = true;
        let (options, has_lost) = (Arc::new(options), Arc::<AtomicBool>::default());
        let size = promised.size.into();
        let mut state = State::new(Arc::clone(&options), promised, Arc::clone(&has_lost));
        state.arrived(0, connections);
        let shared = Shared {
            options,
            info,
            size,
            has_lost,
            link: Arc::default(),
            state: Mutex::new(state),
        };
        Ok(Self { shared: Arc::new(shared) })
    }
}

impl Shared {
    /// Does something with the state, and then what comes of it.
    pub(crate) fn with<T>(self: &Arc<Self>, act: impl FnOnce(&mut State) -> T) -> T {
        let (answer, reconnect) = self.change(act);
        if let Some((epoch, failures)) = reconnect
            && let Err(error) = reconnect::start(self, epoch, failures)
        {
            tracing::error!(%error, "no thread to connect with; trying again");
            self.change(|state| state.not_connecting((epoch, failures)));
        }
        answer
    }

    /// Does something with the state and wakes those that it concerns. Answers whether a thread is
    /// to connect.
    fn change<T>(&self, act: impl FnOnce(&mut State) -> T) -> (T, Option<(u64, u32)>) {
        // Released programs abort on a panic; in others it is the test that has failed.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = act(&mut state);
        self.link.set(state.gauges());
        let effects = std::mem::take(&mut state.effects);
        drop(state);
        effects.wakes.into_iter().for_each(std::task::Waker::wake);
        (answer, effects.reconnect)
    }
}

impl Volume for RemoteVolume {
    fn info(&self) -> &VolumeInfo {
        &self.shared.info
    }

    fn size(&self) -> u64 {
        self.shared.size.load(Relaxed)
    }

    fn grow(&self) -> Result<u64> {
        let (name, before) = (&self.shared.options.name, self.size());
        let now = inquire(&self.shared.options)?;
        check_exportable(&now.volume_info(), now.size)
            .map_err(|why| Error::new(ErrorKind::Invalid, "resize", format!("{name}: {why}")))?;
        let size = now.size;
        if size < before {
            let why = format!("{name}: the export has shrunk from {before} to {size} bytes");
            return Err(Error::new(ErrorKind::Io, "resize", why));
        }
        if size > before {
            // A connection keeps the size that it was negotiated with.
            self.shared.with(|state| state.grown(size))?;
            self.shared.size.store(size, Relaxed);
        }
        Ok(size)
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        &[]
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        let user = self.shared.with(State::enter)?;
        Ok(Box::new(RemoteBackend::new(Arc::clone(&self.shared), user)))
    }

    fn link(&self) -> Option<Arc<Link>> {
        Some(Arc::clone(&self.shared.link))
    }

    fn has_lost_data_itself(&self) -> bool {
        self.shared.has_lost.load(Acquire)
    }
}
