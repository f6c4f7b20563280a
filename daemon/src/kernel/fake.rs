//! A stand-in for a kernel, which a test runs: devices without a driver.
//!
//! Its directory has a unix socket of packets, `kernel.sock`. Each connection to it carries one
//! [`FakeRequest`], in some cases with a descriptor, and one [`FakeAnswer`], in JSON. A device is a
//! unix socket in that directory, where programs read and write by NBD.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::{Deserialize, Serialize};
use sheave_core::{Error, ErrorKind, Result};
use sheave_proto::{ContextSet, ReplyStyle, transmission_flags};
use sheave_shard::Engine;

use super::{Claim, DeviceKey, Kernel, Server};
use crate::packets;
use crate::records::Record;

/// How long an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the connection of a dead server may take to be closed.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(1);

/// A request to the stand-in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FakeRequest {
    /// Make a device that cannot be used yet.
    Add {
        /// Identifies it.
        key: DeviceKey,
        /// Bytes.
        size: u64,
        /// Its logical block in bytes.
        block: u32,
        /// The server's transmission flags (NBD proto.md).
        flags: u16,
    },
    /// Let a device be used, over the connection that comes with this.
    Start {
        /// Its number.
        id: u32,
    },
    /// Find a device. One that was never started is ended.
    Find {
        /// Identifies it.
        key: DeviceKey,
    },
    /// Replace the dead connection of a device by the one that comes with this. It is invalid for a
    /// device that was ended and is found only since it is open.
    Recover {
        /// Its number.
        id: u32,
        /// Identifies it.
        key: DeviceKey,
    },
    /// Make a device longer.
    Resize {
        /// Its number.
        id: u32,
        /// Bytes.
        size: u64,
    },
    /// Report the size of a device.
    Size {
        /// Its number.
        id: u32,
    },
    /// Keep programs from using a device that nothing uses, for as long as the connection lasts.
    Claim {
        /// Its number.
        id: u32,
    },
    /// End a device.
    End {
        /// Its number.
        id: u32,
        /// Identifies it.
        key: DeviceKey,
    },
    /// List all devices.
    List,
}

/// An answer of the stand-in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FakeAnswer {
    /// It is done.
    Done,
    /// The device of this number; none, if it was to be found.
    Device(Option<u32>),
    /// Bytes.
    Size(Option<u64>),
    /// Numbers and keys.
    Devices(Vec<(u32, DeviceKey)>),
    /// It failed with this error number (errno(3)).
    Failed(i32, String),
}

/// The stand-in of this directory, if there is one.
pub(crate) struct Fake {
    dir: Option<PathBuf>,
}

impl Fake {
    pub(crate) fn new(dir: Option<PathBuf>) -> Self {
        Self { dir }
    }

    pub(crate) fn is_there(&self) -> bool {
        self.dir.is_some()
    }

    fn dir(&self) -> Result<&Path> {
        let none = || Error::new(ErrorKind::Unsupported, "fake", "there is no stand-in kernel");
        self.dir.as_deref().ok_or_else(none)
    }

    fn ask(&self, request: &FakeRequest, fd: Option<&OwnedFd>) -> Result<FakeAnswer> {
        self.ask_and_hold(request, fd).map(|(answer, _)| answer)
    }

    /// Sends a request, and returns the answer and the connection.
    fn ask_and_hold(
        &self,
        request: &FakeRequest,
        fd: Option<&OwnedFd>,
    ) -> Result<(FakeAnswer, OwnedFd)> {
        let failed = |error| Error::from_io("fake", "stand-in kernel", error);
        let socket = packets::connect(&self.dir()?.join("kernel.sock")).map_err(failed)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_TIMEOUT))
            .map_err(|errno| failed(errno.into()))?;
        packets::send(&socket, request, fd.map(AsFd::as_fd)).map_err(failed)?;
        match packets::receive(&socket).map_err(failed)? {
            (FakeAnswer::Failed(errno, why), _) => {
                let kind = ErrorKind::of_io(&io::Error::from_raw_os_error(errno));
                Err(Error::new(kind, "fake", why))
            }
            (answer, _) => Ok((answer, socket)),
        }
    }
}

impl Kernel for Fake {
    fn check(&self, _: &Engine) -> Result<()> {
        self.dir().map(drop)
    }

    fn attach(
        &self,
        server: Server<'_>,
        record: &Record,
        made: &mut dyn FnMut(u32) -> Result<()>,
    ) -> Result<u32> {
        let volume = &*server.served.volume;
        let (kernel, own) = connection()?;
        server.serve(own, record.key)?;
        let flags = transmission_flags(volume.info(), ReplyStyle::Simple, ContextSet::EMPTY);
        let (key, size, block) = (record.key, volume.size(), record.block);
        let FakeAnswer::Device(Some(id)) =
            self.ask(&FakeRequest::Add { key, size, block, flags }, None)?
        else {
            return Err(strange());
        };
        let started = made(id).and_then(|()| self.ask(&FakeRequest::Start { id }, Some(&kernel)));
        // The caller does not know it.
        started.inspect_err(|_| drop(self.end(id, key, None)))?;
        Ok(id)
    }

    fn find(&self, record: &Record) -> Result<Option<u32>> {
        match self.ask(&FakeRequest::Find { key: record.key }, None)? {
            FakeAnswer::Device(id) => Ok(id),
            _ => Err(strange()),
        }
    }

    fn has(&self, id: u32, key: DeviceKey, _: bool) -> bool {
        match self.ask(&FakeRequest::List, None) {
            Ok(FakeAnswer::Devices(all)) => all.contains(&(id, key)),
            _ => true,
        }
    }

    fn recover(
        &self,
        id: u32,
        server: Server<'_>,
        record: &Record,
        left: Option<OwnedFd>,
    ) -> Result<bool> {
        if let Some(socket) = left {
            return server.serve(socket, record.key).map(|()| true);
        }
        let begun = Instant::now();
        loop {
            let (kernel, own) = connection()?;
            let recover = FakeRequest::Recover { id, key: record.key };
            match self.ask(&recover, Some(&kernel)) {
                Ok(_) => return server.serve(own, record.key).map(|()| true),
                Err(error) if error.kind() == ErrorKind::Invalid => return Ok(false),
                Err(error)
                    if error.kind() == ErrorKind::Busy && begun.elapsed() < RECOVERY_TIMEOUT => {}
                Err(error) => return Err(error),
            }
            sleep(POLL);
        }
    }

    fn resize(&self, id: u32, record: &Record) -> Result<()> {
        self.ask(&FakeRequest::Resize { id, size: record.size }, None).map(drop)
    }

    fn end(&self, id: u32, key: DeviceKey, claim: Option<Claim>) -> Result<()> {
        let ended = self.ask(&FakeRequest::End { id, key }, None).map(drop);
        drop(claim);
        ended
    }

    fn unrecorded(&self, known: &[DeviceKey]) -> Vec<u32> {
        match self.ask(&FakeRequest::List, None) {
            Ok(FakeAnswer::Devices(all)) => {
                all.into_iter().filter(|(_, key)| !known.contains(key)).map(|(id, _)| id).collect()
            }
            _ => Vec::new(),
        }
    }

    fn name(&self, id: u32) -> String {
        format!("fake{id}")
    }

    fn path(&self, id: u32) -> PathBuf {
        let name = self.name(id);
        self.dir.as_ref().map_or_else(|| PathBuf::from(&name), |dir| dir.join(&name))
    }

    fn size(&self, id: u32) -> Option<u64> {
        match self.ask(&FakeRequest::Size { id }, None) {
            Ok(FakeAnswer::Size(size)) => size,
            _ => None,
        }
    }

    fn wait_ready(&self, id: u32, op: &'static str, size: u64) -> Result<()> {
        if self.size(id) == Some(size) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Io, op, format!("fake{id} has not {size} bytes")))
    }

    fn claim(&self, id: u32, _: Option<Duration>) -> Result<Claim> {
        let (_, connection) = self.ask_and_hold(&FakeRequest::Claim { id }, None)?;
        Ok(Box::new(connection))
    }

    fn write_back(&self, id: u32, _: Duration) -> Result<()> {
        self.ask(&FakeRequest::Claim { id }, None).map(drop)
    }

    fn tune(&self, _: u32) {}
}

/// Both ends of a connection: the stand-in's and the server's.
fn connection() -> Result<(OwnedFd, OwnedFd)> {
    let (flags, family) = (SocketFlags::CLOEXEC, AddressFamily::UNIX);
    socketpair(family, SocketType::STREAM, flags, None)
        .map_err(|errno| Error::from_io("fake", "socket pair", errno.into()))
}

fn strange() -> Error {
    Error::new(ErrorKind::Io, "fake", "the stand-in kernel gave a wrong answer")
}
