//! The two ways to make a device.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sheave_core::Result;
use sheave_shard::{Assignment, Engine, Served};

use crate::helper::{self, Claim, Task};
use crate::records::Record;

/// A connection whose process has died is replaced by its successor; until then requests wait. A
/// server that is alive has all the time it needs: the kernel takes a single connection for dead
/// only if it is closed.
const DEAD_CONNECTION_S: u64 = 600;

/// What identifiers of the daemon's nbd devices begin with.
const IDENTIFIER: &str = "sheave-";

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
pub(crate) struct Server<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) served: &'a Served,
}

impl Device {
    /// The device of this number, which may be another one's or none.
    pub(crate) fn numbered(front: Front, id: u32) -> Self {
        match front {
            Front::Ublk => Self::Ublk(sheave_ublk::Device::numbered(id)),
            Front::Nbd => Self::Nbd(sheave_knbd::Device::numbered(id)),
        }
    }

    /// The device of this record, if the kernel still has it.
    pub(crate) fn find(record: &Record) -> Result<Option<Self>> {
        match (record.front, record.id) {
            (Front::Nbd, _) => Ok(sheave_knbd::find(&identifier(record.mark))?.map(Self::Nbd)),
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

    /// Whether its size can be changed.
    pub(crate) fn check_resize(self) -> Result<()> {
        match self {
            Self::Ublk(_) => sheave_ublk::check_resize(),
            Self::Nbd(_) => Ok(()),
        }
    }

    /// Tells the kernel the size of this record, which the server must know already.
    pub(crate) fn resize(self, record: &Record) -> Result<()> {
        let (size, identifier) = (record.size, identifier(record.mark));
        match self {
            Self::Ublk(device) => device.resize(size),
            Self::Nbd(device) => {
                let task = Task::ResizeNbd { index: device.index(), size, identifier };
                helper::wait_for("resize", &task, None).map(|_| ())
            }
        }
    }

    /// Ends it, whoever uses it. A claim is let go of once nobody can use it any more.
    pub(crate) fn end(self, mark: u64, claim: Option<Claim>) -> Result<()> {
        match self {
            Self::Ublk(device) => device.detach(mark, claim),
            Self::Nbd(device) => device.disconnect(&identifier(mark), claim),
        }
    }
}

/// nbd devices of a daemon that is none with these marks. (The ublk driver does not tell whose its
/// devices are.)
pub(crate) fn unrecorded(marks: &[u64]) -> Vec<Device> {
    let known: Vec<String> = marks.iter().copied().map(identifier).collect();
    let devices = sheave_knbd::identified().unwrap_or_default().into_iter();
    let is_unknown = |name: &String| name.starts_with(IDENTIFIER) && !known.contains(name);
    devices.filter(|(_, name)| is_unknown(name)).map(|(device, _)| Device::Nbd(device)).collect()
}

/// By what the NBD client knows a device.
fn identifier(mark: u64) -> String {
    format!("{IDENTIFIER}{mark:016x}")
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/dev/{}", self.name())
    }
}

impl Server<'_> {
    /// Makes a device and calls `made` with it, for ublk before the device can be used. The NBD
    /// client has no number that early, but finds a device by its identifier.
    pub(crate) fn attach(
        self,
        record: &Record,
        made: impl FnOnce(Device) -> Result<()>,
    ) -> Result<Device> {
        let block = record.block;
        match record.front {
            Front::Ublk => {
                let made = |device| made(Device::Ublk(device));
                let Self { engine, served } = self;
                let device = sheave_ublk::attach(engine, served, block, record.mark, made)?;
                Ok(Device::Ublk(device))
            }
            Front::Nbd => {
                let (volume, identity) = (&*self.served.volume, &identifier(record.mark));
                let serve = |socket| self.serve(socket, record.mark);
                let device =
                    sheave_knbd::attach(volume, block, DEAD_CONNECTION_S, identity, serve)?;
                let told = made(Device::Nbd(device));
                told.inspect_err(|_| drop(device.disconnect(identity, ())))?;
                Ok(Device::Nbd(device))
            }
        }
    }

    /// Serves a device again whose server is gone; on the connection that it left if it did.
    pub(crate) fn recover(
        self,
        device: Device,
        record: &Record,
        left: Option<OwnedFd>,
    ) -> Result<()> {
        let Self { engine, served } = self;
        match (device, left) {
            (Device::Ublk(device), _) => {
                // Before the driver is told anything: another process could not begin again.
                let opened = engine.open(served)?;
                sheave_ublk::recover(&opened, device, record.mark)
            }
            (Device::Nbd(_), Some(socket)) => self.serve(socket, record.mark),
            (Device::Nbd(device), None) => {
                let serve = |socket| self.serve(socket, record.mark);
                sheave_knbd::recover(device, DEAD_CONNECTION_S, &identifier(record.mark), serve)
            }
        }
    }

    fn serve(&self, socket: OwnedFd, mark: u64) -> Result<()> {
        self.engine.serve(Assignment {
            socket,
            session: sheave_nbd::kernel_session(Arc::clone(&self.served.volume)),
            served: self.served.clone(),
            name: Some(mark),
        })
    }
}
