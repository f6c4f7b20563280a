//! Calls about volumes of pools: one at a time for each volume, each with a deadline, and few at a
//! time for a pool whose storage hangs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use sheave_core::{Error, ErrorKind, Result, printable};
use sheave_daemon::{Attached, PoolVolume};
use sheave_pools::{Exclusion, Listed, Pools, VolumeId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use crate::api_status::status;
use crate::pending::{Guard, Pending};

/// How soon a caller has an answer. CSI callers wait for 10 s and more.
const TIMEOUT: Duration = Duration::from_secs(8);
/// Calls to one pool's storage at a time. Each takes a thread for as long as it hangs; more wait
/// for these, as long as a call may take.
const CALLS_MAX: usize = 16;

/// The pools of a process, and the calls about them.
pub(crate) struct PoolCalls {
    pub(crate) pools: Arc<Pools>,
    pending: Pending,
    rooms: BTreeMap<String, Arc<Semaphore>>,
}

impl PoolCalls {
    pub(crate) fn new(pools: Pools) -> Self {
        let names = pools.all().map(|pool| pool.info().name.clone());
        let rooms = names.map(|name| (name, Arc::new(Semaphore::new(CALLS_MAX)))).collect();
        Self { pools: Arc::new(pools), pending: Pending::default(), rooms }
    }

    /// An id of a volume, whose pool there is.
    ///
    /// # Errors
    /// NOT_FOUND for what is no id. FAILED_PRECONDITION where the configuration lacks the pool: the
    /// volume is not known to be absent.
    pub(crate) fn id(&self, id: &str) -> Result<VolumeId, Status> {
        let id: VolumeId = id.parse().map_err(status)?;
        if self.pools.pool(&id.pool).is_ok() {
            return Ok(id);
        }
        let why = format!(
            "{id}: the configuration has no pool {}, so it is not known whether the volume is \
             there; put the pool back",
            id.pool
        );
        Err(Status::failed_precondition(why))
    }

    /// Calls the pool's storage in another thread. With a `key`, ABORTED while another call has it;
    /// the key is held until the call has ended, also when its caller has long been answered.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        pool: &str,
        key: Option<String>,
        call: impl FnOnce(&Pools) -> Result<T> + Send + 'static,
    ) -> Result<T, Status> {
        self.pools.pool(pool).map_err(status)?;
        let guard = key.map(|key| self.pending.begin(&key)).transpose()?;
        let by = Instant::now() + TIMEOUT;
        let room = self.room(pool, by).await?;
        let pools = Arc::clone(&self.pools);
        let called = tokio::task::spawn_blocking(move || {
            let _held = (guard, room);
            call(&pools)
        });
        match timeout_at(by, called).await {
            Ok(Ok(answer)) => answer.map_err(status),
            Ok(Err(error)) => Err(Status::internal(error.to_string())),
            Err(_) => {
                let why = format!(
                    "pool {pool}: its storage has not answered in {TIMEOUT:?}; the call goes on, \
                     so ask again later"
                );
                Err(Status::deadline_exceeded(why))
            }
        }
    }

    /// Waits until few enough calls use the pool's storage.
    async fn room(&self, pool: &str, by: Instant) -> Result<Option<OwnedSemaphorePermit>, Status> {
        let Some(room) = self.rooms.get(pool) else { return Ok(None) };
        match timeout_at(by, Arc::clone(room).acquire_owned()).await {
            Ok(Ok(room)) => Ok(Some(room)),
            _ => {
                let why =
                    format!("pool {pool}: {CALLS_MAX} calls wait for its storage; look there");
                Err(Status::unavailable(why))
            }
        }
    }

    /// The same about the volume with this id.
    pub(crate) async fn call_about<T: Send + 'static>(
        &self,
        id: &str,
        call: impl FnOnce(&Pools, VolumeId) -> Result<T> + Send + 'static,
    ) -> Result<T, Status> {
        let parsed = self.id(id)?;
        self.call(&parsed.pool.clone(), Some(id.to_owned()), |pools| call(pools, parsed)).await
    }

    /// The VOLUME text of a target, if it is a volume of a pool: POOL/UUID, or POOL/NAME.
    pub(crate) async fn text_of(&self, target: &str) -> Result<Option<String>, Status> {
        if !self.pools.has_pool_of(target) {
            return Ok(None);
        }
        // An id needs no storage, so that a device can be ended whose pool hangs.
        if let Ok(id) = target.parse::<VolumeId>() {
            return Ok(Some(self.pools.pool(&id.pool).map_err(status)?.text(id.uuid)));
        }
        Ok(Some(self.find(target).await.map(|found| found.pool.text(found.found.record.uuid))?))
    }

    /// The volume that is called so: POOL/UUID, or POOL/NAME.
    pub(crate) async fn find(&self, target: &str) -> Result<Listed, Status> {
        let (pool, _) = self.pools.split(target).map_err(status)?;
        let target = target.to_owned();
        self.call(pool, None, move |pools| pools.by_name(&target)).await
    }

    /// Begins a call about a volume that has no deadline.
    pub(crate) fn begin(&self, id: &VolumeId) -> Result<Guard, Status> {
        self.pending.begin(&id.to_string())
    }

    /// Begins to attach or detach a volume. A detach beside an attach would find no device yet, and
    /// its caller would take it for gone. Calls that wait for the pool's storage do not matter.
    pub(crate) fn begin_device(&self, id: &VolumeId) -> Result<Guard, Status> {
        self.pending.begin(&format!("the device of {id}"))
    }
}

/// Whether other nodes use the volume, too, and its record says which of them writes.
pub(crate) fn is_shared(of: &Listed) -> bool {
    let info = of.pool.info();
    !info.is_local && info.exclusion == Exclusion::Recorded
}

/// Whether a volume that is a device may be written, which it was as part of this pool.
pub(crate) fn may_write(pools: &Pools, text: &str, was: Option<&PoolVolume>) -> Result<()> {
    pools.check_writer(text)?;
    let Some(was) = was.filter(|was| was.shared) else { return Ok(()) };
    let id = pools.id_of_text(text);
    if id.is_some_and(|id| pools.pool(&id.pool).is_ok_and(|pool| !pool.info().is_local)) {
        return Ok(());
    }
    let why = format!(
        "{}: nodes shared its pool, which the configuration lacks now, so another one may have \
         used it since; put the pool back, or detach it by force, which drops what this node has \
         not written yet",
        was.id
    );
    Err(Error::new(ErrorKind::Fenced, "serve", why))
}

/// Logs devices whose pool the configuration lacks, or has under another name.
pub(crate) fn warn_of_missing_pools(pools: &Pools, devices: &[Attached]) {
    for device in devices {
        let Some(was) = &device.pool else { continue };
        let now = pools.id_of_text(&device.volume).map(|id| id.to_string());
        if now.as_ref() != Some(&was.id) {
            tracing::warn!(
                volume = was.id,
                device = %printable(&device.path),
                "the configuration lacks its pool, or has it under another name: the device goes \
                 on until it is detached, and the volume cannot be used anew; put the pool back"
            );
        }
    }
}

/// Whether the volume may be attached on this node: as it is published, or by the operator while it
/// is not published.
pub(crate) fn check_publication(
    found: &Listed,
    node: &str,
    epoch: Option<u64>,
    read_only: bool,
) -> Result<()> {
    let record = &found.found.record;
    let info = found.pool.info();
    if info.exclusion != Exclusion::Recorded {
        return if epoch.is_some() { info.check_writer("attach", read_only) } else { Ok(()) };
    }
    let Some(epoch) = epoch else {
        return match record.publications.first() {
            None => Ok(()),
            Some(has) => {
                let why = format!(
                    "{} is published to node {}; it is attached there, by that publication only",
                    found.id(),
                    printable(&has.node)
                );
                Err(Error::new(ErrorKind::Busy, "attach", why))
            }
        };
    };
    let publication = record.published(node, epoch)?;
    if publication.read_only && !read_only {
        let why = format!("{} is published read-only", found.id());
        return Err(Error::new(ErrorKind::Fenced, "attach", why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc;

    use sheave_pools::{PoolConfig, Site};

    use super::*;
    use crate::process::runtime;

    #[test]
    fn rule_11_calls_that_come_at_once_wait_for_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let config = PoolConfig {
            name: "fast".to_owned(),
            url: format!("file://{}", dir.path().display()),
            volumes: BTreeMap::new(),
            shared: false,
            trust_attacher: false,
            capacity: None,
            max_size: None,
            default_size: None,
        };
        let pools = Pools::new(&[config], &Site::default()).unwrap();
        let calls = Arc::new(PoolCalls::new(pools));
        let (release, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let call = |held: Option<Arc<Mutex<mpsc::Receiver<()>>>>| {
            let calls = Arc::clone(&calls);
            tokio::spawn(async move {
                let wait = move |_: &Pools| Ok(held.map(|held| held.lock().unwrap().recv()));
                calls.call("fast", None, wait).await.map(drop)
            })
        };
        runtime().unwrap().block_on(async {
            let slow = Vec::from_iter((0..CALLS_MAX).map(|_| call(Some(Arc::clone(&held)))));
            while calls.rooms["fast"].available_permits() > 0 {
                tokio::task::yield_now().await;
            }
            let one_more = call(None);
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            assert!(!one_more.is_finished());
            drop(release);
            for ended in slow.into_iter().chain([one_more]) {
                ended.await.unwrap().unwrap();
            }
        });
    }
}
