//! The seam at the kernel, which makes a device of a volume, and keeps it when the daemon dies.
//!
//! Behind it are the ublk driver, the NBD client, and a stand-in for tests.

mod fake;
mod nbd;
mod ublk;

use std::any::Any;
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sheave_core::{Error, ErrorKind, Result, printable};
use sheave_shard::{Assignment, Engine, Served};

use crate::block::BlockDevice;
use crate::helper::{self, Task};
use crate::records::Record;

pub use fake::{FakeAnswer, FakeRequest};

/// How a device is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Front {
    /// The kernel's ublk driver.
    Ublk,
    /// The kernel's NBD client.
    Nbd,
    /// A stand-in for a kernel, for tests.
    Fake,
}

/// Which front a device gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// This one.
    This(Front),
    /// The fastest that works here.
    Fastest,
    /// One whose devices can grow while they are used; where none can, the fastest.
    Growing,
}

/// Identifies a device across daemon restarts: a random number that the kernel keeps with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceKey(pub u64);

/// Keeps other programs from using a device until it is dropped.
pub(crate) type Claim = Box<dyn Any + Send>;

/// A kernel's driver for one kind of device. Devices are identified by their numbers. A number may
/// be reused by another device, so calls that change a device check its key. All calls may wait.
pub(crate) trait Kernel: Send + Sync {
    /// Whether devices of this kind can be made here.
    fn check(&self, engine: &Engine) -> Result<()>;

    /// Makes a device and calls `made` with its number: before the device can be used, or where the
    /// kernel finds devices by their key, as soon as the number is known.
    fn attach(
        &self,
        server: Server<'_>,
        record: &Record,
        made: &mut dyn FnMut(u32) -> Result<()>,
    ) -> Result<u32>;

    /// The device of this record, if the kernel still has it.
    fn find(&self, record: &Record) -> Result<Option<u32>>;

    /// Whether a number is still the device with this key, which is `served` or not. Does not wait
    /// and changes nothing.
    fn has(&self, id: u32, key: DeviceKey, served: bool) -> bool;

    /// Serves a device again whose server is gone; on the connection that the server handed over,
    /// if it did. False if the kernel has ended the device and only shows it, since it is open.
    fn recover(
        &self,
        id: u32,
        server: Server<'_>,
        record: &Record,
        left: Option<OwnedFd>,
    ) -> Result<bool>;

    /// Whether the size of a device can be changed.
    fn check_resize(&self) -> Result<()> {
        Ok(())
    }

    /// Sets the size of this record in the kernel. The server serves that size already.
    fn resize(&self, id: u32, record: &Record) -> Result<()>;

    /// Ends a device, even if it is in use, unless it has another key. A claim is dropped once
    /// nothing can begin to use the device any more.
    fn end(&self, id: u32, key: DeviceKey, claim: Option<Claim>) -> Result<()>;

    /// Devices of a daemon that have none of these keys, as far as the kernel shows.
    fn unrecorded(&self, known: &[DeviceKey]) -> Vec<u32> {
        let _ = known;
        Vec::new()
    }

    /// The name of a device under /dev and /sys/block.
    fn name(&self, id: u32) -> String;

    /// The path of a device.
    fn path(&self, id: u32) -> PathBuf {
        BlockDevice::new(self.name(id)).path()
    }

    /// Its size in bytes, if there is such a device.
    fn size(&self, id: u32) -> Option<u64> {
        BlockDevice::new(self.name(id)).size()
    }

    /// Waits until a device has this size and can be used, as a step of `op`.
    fn wait_ready(&self, id: u32, op: &'static str, size: u64) -> Result<()> {
        BlockDevice::new(self.name(id)).wait_ready(op, size)
    }

    /// Writes back dirty pages, and keeps other programs from using the device. Waits for at most
    /// `patience`, if given.
    fn claim(&self, id: u32, patience: Option<Duration>) -> Result<Claim> {
        let task = Task::Claim { name: self.name(id) };
        Ok(Box::new(helper::wait_for("detach", &task, patience)?))
    }

    /// Writes back dirty pages of a device that nothing uses; programs may begin to use it
    /// meanwhile. Waits for at most `patience`.
    fn write_back(&self, id: u32, patience: Duration) -> Result<()> {
        let task = Task::WriteBack { name: self.name(id) };
        helper::wait_for("detach", &task, Some(patience)).map(drop)
    }

    /// Begins to tune a device's queue, and to find its partitions.
    fn tune(&self, id: u32) {
        helper::begin(Task::Tune { name: self.name(id) });
    }
}

/// The driver of each front.
pub(crate) struct Kernels {
    ublk: Arc<ublk::Ublk>,
    nbd: Arc<nbd::Nbd>,
    fake: Arc<fake::Fake>,
}

/// A device of any kind.
#[derive(Clone)]
pub(crate) struct Device {
    pub(crate) kernel: Arc<dyn Kernel>,
    pub(crate) id: u32,
}

/// The server of a device.
#[derive(Clone, Copy)]
pub(crate) struct Server<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) served: &'a Served,
}

impl DeviceKey {
    pub(crate) fn random() -> Self {
        Self(RandomState::new().build_hasher().finish())
    }
}

impl Kernels {
    /// With the stand-in of this directory, for tests; without one there is no fake front.
    pub(crate) fn new(fake: Option<PathBuf>) -> Self {
        Self { ublk: Arc::default(), nbd: Arc::default(), fake: Arc::new(fake::Fake::new(fake)) }
    }

    pub(crate) fn of(&self, front: Front) -> Arc<dyn Kernel> {
        match front {
            Front::Ublk => Arc::clone(&self.ublk) as Arc<dyn Kernel>,
            Front::Nbd => Arc::clone(&self.nbd) as Arc<dyn Kernel>,
            Front::Fake => Arc::clone(&self.fake) as Arc<dyn Kernel>,
        }
    }

    /// The front of a new device.
    pub(crate) fn choose(&self, choice: Choice, engine: &Engine) -> Result<Front> {
        let check = |front| self.of(front).check(engine);
        match choice {
            // The NBD client gives the better error when it is used.
            Choice::This(Front::Nbd) => Ok(Front::Nbd),
            Choice::This(front) => check(front).map(|()| front),
            _ if self.fake.is_there() => Ok(Front::Fake),
            Choice::Fastest => choose(&check, &|_| Ok(())),
            Choice::Growing => choose(&check, &|front| self.of(front).check_resize()),
        }
    }

    /// The device of this record, if the kernel still has it.
    pub(crate) fn find(&self, record: &Record) -> Result<Option<Device>> {
        let kernel = self.of(record.front);
        Ok(kernel.find(record)?.map(|id| Device { kernel, id }))
    }

    /// The device of this record by its number, if that is known. The kernel may not have it any
    /// more.
    pub(crate) fn known(&self, record: &Record) -> Option<Device> {
        record.id().map(|id| Device { kernel: self.of(record.front), id })
    }

    /// The paths of devices of a daemon that have none of these keys.
    pub(crate) fn unrecorded(&self, known: &[DeviceKey]) -> Vec<PathBuf> {
        let fronts = [Front::Ublk, Front::Nbd, Front::Fake].map(|front| self.of(front));
        let paths = fronts.iter().flat_map(|kernel| {
            kernel.unrecorded(known).into_iter().map(|id| kernel.path(id)).collect::<Vec<_>>()
        });
        paths.collect()
    }
}

/// The fastest front that works and is `fit`; if none is, the fastest that works.
fn choose(check: &dyn Fn(Front) -> Result<()>, fit: &dyn Fn(Front) -> Result<()>) -> Result<Front> {
    let no_ublk = match check(Front::Ublk).map(|()| fit(Front::Ublk)) {
        Ok(Ok(())) => return Ok(Front::Ublk),
        Ok(Err(unfit)) if check(Front::Nbd).is_err() => {
            tracing::info!(reason = %unfit, "ublk all the same: there is no nbd");
            return Ok(Front::Ublk);
        }
        Ok(Err(unfit)) => unfit,
        Err(error) => error,
    };
    match check(Front::Nbd) {
        Ok(()) => {
            tracing::info!(reason = %no_ublk, "nbd instead of ublk");
            Ok(Front::Nbd)
        }
        Err(no_nbd) => {
            let why = format!("{no_ublk}; {no_nbd}");
            let what = format!("neither ublk nor nbd works here (see sheave doctor): {why}");
            // A probe that has not ended says nothing: ublk may work at the next try.
            let kind = match no_ublk.kind() {
                ErrorKind::TimedOut => ErrorKind::TimedOut,
                _ => ErrorKind::Unsupported,
            };
            Err(Error::new(kind, "attach", what))
        }
    }
}

impl Device {
    pub(crate) fn path(&self) -> PathBuf {
        self.kernel.path(self.id)
    }

    /// Sets the device's size to that of its record, and waits until it has it. The server must
    /// serve that size already.
    pub(crate) fn announce_size(&self, op: &'static str, record: &Record) -> Result<()> {
        if self.kernel.size(self.id).is_some_and(|size| size < record.size) {
            self.kernel.resize(self.id, record)?;
        }
        self.kernel.wait_ready(self.id, op, record.size)
    }

    /// See [`Kernel::end`].
    pub(crate) fn end(&self, key: DeviceKey, claim: Option<Claim>) -> Result<()> {
        self.kernel.end(self.id, key, claim)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&printable(&self.path()), f)
    }
}

impl Server<'_> {
    /// Serves this connection of a device.
    fn serve(self, socket: OwnedFd, key: DeviceKey) -> Result<()> {
        self.engine.serve(Assignment {
            socket,
            session: sheave_nbd::kernel_session(Arc::clone(&self.served.volume)),
            served: self.served.clone(),
            key: Some(key.0),
        })
    }
}

/// The path of a device that has no number yet.
pub(crate) fn unknown_path() -> PathBuf {
    Path::new("/dev").join("?")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is chosen when these fronts work, and devices of these can grow.
    fn chosen(works: &[Front], grow: &[Front]) -> Result<Front, ErrorKind> {
        let among = |all: &[Front], front| match all.contains(&front) {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Unsupported, "test", format!("no {front:?}"))),
        };
        choose(&|front| among(works, front), &|front| among(grow, front))
            .map_err(|error| error.kind())
    }

    #[test]
    fn a_front_whose_devices_grow_in_use_comes_before_a_faster_one() {
        use Front::{Nbd, Ublk};
        let both = [Ublk, Nbd];
        assert_eq!(chosen(&both, &both), Ok(Ublk));
        // Linux before 6.16.
        assert_eq!(chosen(&both, &[Nbd]), Ok(Nbd));
        assert_eq!(chosen(&[Ublk], &[Nbd]), Ok(Ublk), "it grows when it is attached again");
        assert_eq!(chosen(&[Nbd], &both), Ok(Nbd));
        assert_eq!(chosen(&[], &both), Err(ErrorKind::Unsupported));
    }

    #[test]
    fn a_probe_without_an_answer_leaves_open_whether_there_is_a_front() {
        let works = |nbd_works| {
            let check = |front| match front {
                Front::Nbd if nbd_works => Ok(()),
                Front::Nbd => Err(Error::new(ErrorKind::Unsupported, "test", "not loaded")),
                _ => Err(Error::new(ErrorKind::TimedOut, "test", "no answer")),
            };
            choose(&check, &|_| Ok(())).map_err(|error| error.kind())
        };
        assert_eq!(works(true), Ok(Front::Nbd));
        assert_eq!(works(false), Err(ErrorKind::TimedOut));
    }
}
