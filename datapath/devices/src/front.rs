//! The two ways to make a device.

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sheave_core::{Result, Volume};
use sheave_knbd::Timeouts;
use sheave_shard::{Assignment, Engine};
use sheave_telemetry::VolumeStats;

use crate::records::Record;

/// A connection whose process has died is replaced by its successor; until then requests wait.
/// Those in flight wait for their timer, too, which is `io_timeout_ms`. A server that is alive has
/// all the time it needs: the kernel takes a single connection for dead only if it is closed.
const TIMEOUTS: Timeouts = Timeouts { dead_connection_s: 600, io_timeout_ms: 5_000 };

/// How a device is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Front {
    /// The kernel's ublk driver.
    Ublk,
    /// The kernel's NBD client.
    Nbd,
}

/// A device of either kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    Ublk(sheave_ublk::Device),
    Nbd(sheave_knbd::Device),
}

/// What serves a device.
#[derive(Clone, Copy)]
pub(crate) struct Served<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) volume: &'a Arc<dyn Volume>,
    pub(crate) stats: &'a Arc<VolumeStats>,
}

impl Device {
    pub(crate) fn front(self) -> Front {
        match self {
            Self::Ublk(_) => Front::Ublk,
            Self::Nbd(_) => Front::Nbd,
        }
    }

    /// The device of this record, if the kernel still has it.
    pub(crate) fn find(record: &Record) -> Result<Option<Self>> {
        match (record.front, record.id) {
            (Front::Nbd, _) => Ok(sheave_knbd::find(&record.identifier())?.map(Self::Nbd)),
            (Front::Ublk, id) => Ok(sheave_ublk::find(id, record.mark)?.map(Self::Ublk)),
        }
    }

    /// Its number.
    pub(crate) fn id(self) -> u32 {
        match self {
            Self::Ublk(device) => device.id(),
            Self::Nbd(device) => device.index(),
        }
    }

    /// Its name under /dev and /sys/block.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Ublk(device) => device.name(),
            Self::Nbd(device) => device.name(),
        }
    }

    /// Ends it, whoever uses it. `claim` is the device itself, open.
    pub(crate) fn end(self, claim: Option<File>) -> Result<()> {
        match self {
            Self::Ublk(device) => device.detach(claim),
            Self::Nbd(device) => device.disconnect(claim),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/dev/{}", self.name())
    }
}

impl Served<'_> {
    /// Makes a device with blocks of `block` bytes. `made` is told of it, with ublk before it can
    /// be used; the NBD client tells no number that early, but finds a device by its identifier.
    pub(crate) fn attach(
        self,
        record: &Record,
        block: u32,
        made: impl FnOnce(Device) -> Result<()>,
    ) -> Result<Device> {
        match record.front {
            Front::Ublk => {
                let made = |device| made(Device::Ublk(device));
                sheave_ublk::attach(self.ublk(), block, record.mark, made).map(Device::Ublk)
            }
            Front::Nbd => {
                let (info, identity) = (self.volume.info(), &record.identifier());
                let serve = |socket| self.serve(socket, record.mark);
                let device = sheave_knbd::attach(info, block, TIMEOUTS, identity, serve)?;
                let told = made(Device::Nbd(device));
                told.inspect_err(|_| drop(device.disconnect(None)))?;
                Ok(Device::Nbd(device))
            }
        }
    }

    /// Serves a device whose server is gone, on the connection that it left if it did.
    pub(crate) fn recover(
        self,
        device: Device,
        record: &Record,
        left: Option<OwnedFd>,
    ) -> Result<()> {
        match (device, left) {
            (Device::Ublk(device), _) => sheave_ublk::recover(self.ublk(), device, record.mark),
            (Device::Nbd(_), Some(socket)) => self.serve(socket, record.mark),
            (Device::Nbd(device), None) => {
                let serve = |socket| self.serve(socket, record.mark);
                sheave_knbd::recover(device, TIMEOUTS, &record.identifier(), serve)
            }
        }
    }

    fn ublk(&self) -> sheave_ublk::Front<'_> {
        let Self { engine, volume, stats } = self;
        sheave_ublk::Front { engine, volume, stats }
    }

    fn serve(&self, socket: OwnedFd, mark: u64) -> Result<()> {
        self.engine.serve(Assignment {
            socket,
            session: sheave_nbd::kernel_session(self.volume.info()),
            volume: Arc::clone(self.volume),
            stats: Arc::clone(self.stats),
            name: Some(mark),
        })
    }
}
