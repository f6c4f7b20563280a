//! What a daemon asks of a kernel.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketType, recv};
use sheave_daemon::{DeviceKey, FakeAnswer, FakeRequest, receive, send};

use super::device::Device;
use super::real::RealDevice;
use super::{Call, Moment, Shared, listener, lock};
use crate::Run;

/// How long a device may be about to be closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

impl Shared {
    /// Does what is asked on a connection.
    pub(super) fn serve_call(self: &Arc<Self>, connection: &OwnedFd) {
        let Ok((request, fd)) = receive::<FakeRequest>(connection) else { return };
        let call = Call::of(&request);
        if self.struck(call, Moment::Before) {
            return;
        }
        let claimed = match request {
            FakeRequest::Claim { id } => self.devices().get(id).map(|device| (id, device.key)),
            _ => None,
        };
        let done = self.carry_out(request, fd);
        let claimed = claimed.filter(|_| done.is_ok());
        if !self.struck(call, Moment::After) {
            let failed = |errno: Errno| FakeAnswer::Failed(errno.raw_os_error(), why(errno));
            let _ = send(connection, &done.unwrap_or_else(failed), None);
            if claimed.is_some() {
                // Until the daemon drops its claim, or dies.
                let _ = recv(connection, &mut [0; 1][..], RecvFlags::empty());
            }
        }
        // Its number may be another device's by now.
        if let Some((id, key)) = claimed
            && let Some(device) = self.devices().same(id, key)
        {
            device.claimed = false;
            device.real_claim = None;
        }
    }

    fn carry_out(
        self: &Arc<Self>,
        request: FakeRequest,
        fd: Option<OwnedFd>,
    ) -> Result<FakeAnswer, Errno> {
        match request {
            FakeRequest::Add { key, size, block, flags } => {
                let device = Device::new(key, size, block, flags);
                Ok(FakeAnswer::Device(Some(self.devices().add(device))))
            }
            FakeRequest::Start { id } => {
                let key = self.devices().get(id).ok_or(Errno::NOENT)?.key;
                self.connect(id, key, fd.ok_or(Errno::INVAL)?)?;
                self.open(id, key);
                Ok(FakeAnswer::Done)
            }
            FakeRequest::Find { key } => {
                let mut devices = self.devices();
                let found = devices.find(key);
                // Its server died while it made it.
                let unfinished = found.filter(|id| devices.get(*id).is_some_and(|d| !d.is_live()));
                if let Some(id) = unfinished {
                    devices.end(id);
                    return Ok(FakeAnswer::Device(None));
                }
                Ok(FakeAnswer::Device(found))
            }
            FakeRequest::Recover { id, key } => {
                if self.devices().same(id, key).is_some_and(|device| device.ended) {
                    return Err(Errno::INVAL);
                }
                self.connect(id, key, fd.ok_or(Errno::INVAL)?)?;
                Ok(FakeAnswer::Done)
            }
            FakeRequest::Resize { .. } if self.refuses_resizes.load(Relaxed) => {
                Err(Errno::OPNOTSUPP)
            }
            FakeRequest::Resize { id, size } => self.resize(id, size).map(|()| FakeAnswer::Done),
            FakeRequest::Size { id } => {
                Ok(FakeAnswer::Size(self.devices().get(id).map(|device| device.size)))
            }
            FakeRequest::Claim { id } => self.claim(id).map(|()| FakeAnswer::Done),
            FakeRequest::End { id, key } => {
                let (real, is_claimed) = {
                    let mut devices = self.devices();
                    let device = devices.same(id, key);
                    let is_claimed = device.as_ref().is_some_and(|device| device.claimed);
                    (device.and_then(Device::take_real), is_claimed)
                };
                if let Some(mut real) = real {
                    // By force: what uses it gets errors.
                    if !is_claimed {
                        real.fail();
                    }
                }
                let mut devices = self.devices();
                match devices.same(id, key) {
                    Some(device) if self.shows_ended.load(Relaxed) && device.is_in_use() => {
                        device.ended = true;
                        device.fail();
                    }
                    Some(_) => devices.end(id),
                    None => {}
                }
                Ok(FakeAnswer::Done)
            }
            FakeRequest::List => Ok(FakeAnswer::Devices(self.devices().keys())),
        }
    }

    /// Has programs find a device.
    fn open(self: &Arc<Self>, id: u32, key: DeviceKey) {
        let path = self.path(id);
        // Of the device before with this number, something may still be there.
        let unique = || path.with_extension(format!("{:x}.sock", key.0));
        let socket = if self.has_block_devices { unique() } else { path.clone() };
        let listener = Arc::new(listener(&socket, SocketType::STREAM));
        if let Some(device) = self.devices().same(id, key) {
            device.listen(Arc::clone(&listener), socket.clone());
        }
        self.accept_users(listener, id, key);
        if self.has_block_devices {
            let size = self.devices().same(id, key).map_or(0, |device| device.size);
            let real = RealDevice::new(&path, &socket, size);
            if let Some(device) = self.devices().same(id, key) {
                device.real = Some(real);
            }
        }
    }

    fn resize(&self, id: u32, size: u64) -> Result<(), Errno> {
        let grow = {
            let mut devices = self.devices();
            let device = devices.get(id).ok_or(Errno::NOENT)?;
            if size < device.size {
                return Err(Errno::INVAL);
            }
            device.size = size;
            device.real.as_ref().map(|real| real.grow(size))
        };
        // The real kernel writes back what is dirty first, so requests are passed on meanwhile.
        match grow.map(Run::output) {
            Some(done) if !done.status.success() => Err(Errno::IO),
            _ => Ok(()),
        }
    }

    /// Keeps others from using a device, which nothing uses.
    fn claim(&self, id: u32) -> Result<(), Errno> {
        let is_used =
            |devices: &mut super::Devices| devices.get(id).is_some_and(|device| device.is_in_use());
        let devices = lock(&self.devices);
        let waited = self.changed.wait_timeout_while(devices, CLOSE_TIMEOUT, is_used);
        let (mut devices, waited) = waited.expect("nothing panics with this lock");
        if waited.timed_out() {
            return Err(Errno::BUSY);
        }
        let device = devices.get(id).ok_or(Errno::NOENT)?;
        device.real_claim = device.real.as_ref().map(RealDevice::claim).transpose()?;
        device.claimed = true;
        Ok(())
    }
}

fn why(errno: Errno) -> String {
    match errno {
        Errno::BUSY => "is in use".to_owned(),
        errno => errno.to_string(),
    }
}
