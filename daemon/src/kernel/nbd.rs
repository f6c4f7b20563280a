//! Devices of the kernel's NBD client.

use std::os::fd::OwnedFd;

use sheave_core::Result;
use sheave_knbd::Device;
use sheave_shard::Engine;

use super::{Claim, DeviceKey, Kernel, Server};
use crate::helper::{self, Task};
use crate::records::Record;

/// A connection whose process has died is replaced by its successor; until then requests wait. A
/// live server may take any time: the kernel considers a single connection dead only if it is
/// closed.
const DEAD_CONNECTION_S: u64 = 600;

/// The prefix of identifiers of the daemon's nbd devices.
const IDENTIFIER: &str = "sheave-";

/// The client.
#[derive(Default)]
pub(crate) struct Nbd {}

impl Kernel for Nbd {
    fn check(&self, _: &Engine) -> Result<()> {
        sheave_knbd::is_available()
    }

    fn attach(
        &self,
        server: Server<'_>,
        record: &Record,
        made: &mut dyn FnMut(u32) -> Result<()>,
    ) -> Result<u32> {
        let (volume, identifier) = (&*server.served.volume, identifier(record.key));
        let serve = |socket| server.serve(socket, record.key);
        let device =
            sheave_knbd::attach(volume, record.block, DEAD_CONNECTION_S, &identifier, serve)?;
        let index = device.index();
        made(index).inspect_err(|_| drop(device.disconnect(&identifier, ())))?;
        Ok(index)
    }

    fn find(&self, record: &Record) -> Result<Option<u32>> {
        Ok(sheave_knbd::find(&identifier(record.key))?.map(Device::index))
    }

    fn has(&self, id: u32, key: DeviceKey, _: bool) -> bool {
        // What cannot be read now, such as for want of descriptors, is not gone.
        Device::numbered(id).has(&identifier(key)).unwrap_or(true)
    }

    fn recover(
        &self,
        id: u32,
        server: Server<'_>,
        record: &Record,
        left: Option<OwnedFd>,
    ) -> Result<bool> {
        let serve = |socket| server.serve(socket, record.key);
        match left {
            Some(socket) => serve(socket).map(|()| true),
            None => {
                let identifier = identifier(record.key);
                sheave_knbd::recover(Device::numbered(id), DEAD_CONNECTION_S, &identifier, serve)
            }
        }
    }

    fn resize(&self, id: u32, record: &Record) -> Result<()> {
        let (size, identifier) = (record.size, identifier(record.key));
        let task = Task::ResizeNbd { index: id, size, identifier };
        helper::wait_for("resize", &task, None).map(drop)
    }

    fn end(&self, id: u32, key: DeviceKey, claim: Option<Claim>) -> Result<()> {
        Device::numbered(id).disconnect(&identifier(key), claim)
    }

    fn unrecorded(&self, known: &[DeviceKey]) -> Vec<u32> {
        let known: Vec<String> = known.iter().copied().map(identifier).collect();
        let devices = sheave_knbd::identified().unwrap_or_default().into_iter();
        let is_unknown = |name: &String| name.starts_with(IDENTIFIER) && !known.contains(name);
        devices.filter(|(_, name)| is_unknown(name)).map(|(device, _)| device.index()).collect()
    }

    fn name(&self, id: u32) -> String {
        Device::numbered(id).name()
    }
}

/// The identifier of a device in the NBD client.
fn identifier(key: DeviceKey) -> String {
    format!("{IDENTIFIER}{:016x}", key.0)
}
