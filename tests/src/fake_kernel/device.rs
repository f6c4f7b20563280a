//! The devices of a kernel, and what is in flight on them.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::io::Errno;
use sheave_daemon::DeviceKey;

use super::real::RealDevice;
use super::{Shared, lock};
use crate::wire::{errno, magic};

/// All devices, by number.
#[derive(Default)]
pub(super) struct Devices(BTreeMap<u32, Device>);

pub(super) struct Device {
    pub(super) key: DeviceKey,
    pub(super) size: u64,
    pub(super) block: u32,
    pub(super) flags: u16,
    pub(super) claimed: bool,
    /// It was ended, and is there until the programs that have it open have closed it.
    pub(super) ended: bool,
    /// What the real kernel has of it.
    pub(super) real: Option<RealDevice>,
    /// Keeps other programs from that.
    pub(super) real_claim: Option<File>,
    /// Where programs find it, once it can be used.
    opened: Option<(Arc<OwnedFd>, PathBuf)>,
    server: Option<Arc<Server>>,
    users: HashMap<u64, Arc<User>>,
    /// Requests without a reply, by their cookies.
    pending: BTreeMap<u64, Pending>,
    next: u64,
}

/// A program that has a device open.
pub(super) struct User {
    pub(super) stream: UnixStream,
    /// Held while a reply is written.
    writing: Mutex<()>,
}

/// A connection to a server.
pub(super) struct Server {
    stream: UnixStream,
    /// Held while a request is written.
    writing: Mutex<()>,
}

struct Pending {
    user: u64,
    /// The user's cookie.
    cookie: u64,
    /// The whole request, with the device's cookie.
    bytes: Vec<u8>,
    /// Bytes that a reply without an error carries.
    reply_len: usize,
}

/// The length of a request's header, and where its cookie is (NBD proto.md).
pub(super) const REQUEST_LEN: usize = 28;
pub(super) const COOKIE: std::ops::Range<usize> = 8..16;
const REPLY_LEN: usize = 16;

impl Devices {
    /// Gives a device the lowest free number.
    pub(super) fn add(&mut self, device: Device) -> u32 {
        let id = (0..).find(|id| !self.0.contains_key(id)).expect("a free number");
        self.0.insert(id, device);
        id
    }

    pub(super) fn get(&mut self, id: u32) -> Option<&mut Device> {
        self.0.get_mut(&id)
    }

    /// The device of this number, if it is still the one with this key.
    pub(super) fn same(&mut self, id: u32, key: DeviceKey) -> Option<&mut Device> {
        self.get(id).filter(|device| device.key == key)
    }

    pub(super) fn find(&self, key: DeviceKey) -> Option<u32> {
        self.0.iter().find(|(_, device)| device.key == key).map(|(id, _)| *id)
    }

    pub(super) fn keys(&self) -> Vec<(u32, DeviceKey)> {
        self.0.iter().map(|(id, device)| (*id, device.key)).collect()
    }

    pub(super) fn live(&self) -> impl Iterator<Item = u32> {
        self.0.iter().filter(|(_, device)| device.is_live() && !device.ended).map(|(id, _)| *id)
    }

    pub(super) fn in_flight(&self) -> usize {
        self.0.values().map(|device| device.pending.len()).sum()
    }

    pub(super) fn cut(&mut self) {
        self.0.values_mut().for_each(|device| drop(device.disconnect()));
    }

    /// Ends a device: what is in flight fails.
    pub(super) fn end(&mut self, id: u32) {
        let Some(mut device) = self.0.remove(&id) else { return };
        device.fail();
        if let Some((listener, path)) = &device.opened {
            let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
            let _ = std::fs::remove_file(path);
        }
        for user in device.users.values() {
            let _ = user.stream.shutdown(Shutdown::Both);
        }
    }

    /// What the real kernel has of all devices: to be dropped while the devices still work. I/O of
    /// those that have no server any more fails now.
    pub(super) fn take_all_real(&mut self) -> Vec<RealDevice> {
        let real = self.0.values_mut().filter_map(|device| {
            let mut real = device.take_real()?;
            if device.server.is_none() {
                real.fail();
            }
            Some(real)
        });
        real.collect()
    }

    pub(super) fn end_all(&mut self) {
        for (id, _) in self.keys() {
            self.end(id);
        }
    }
}

impl Device {
    pub(super) fn new(key: DeviceKey, size: u64, block: u32, flags: u16) -> Self {
        Self {
            key,
            size,
            block,
            flags,
            claimed: false,
            ended: false,
            real: None,
            real_claim: None,
            opened: None,
            server: None,
            users: HashMap::new(),
            pending: BTreeMap::new(),
            next: 0,
        }
    }

    /// What the real kernel has of it: to be dropped while the device still works.
    pub(super) fn take_real(&mut self) -> Option<RealDevice> {
        self.real_claim = None;
        self.real.take()
    }

    pub(super) fn is_live(&self) -> bool {
        self.opened.is_some()
    }

    pub(super) fn is_in_use(&self) -> bool {
        // The only user of a block device is the way to the real kernel.
        self.real.is_none() && !self.users.is_empty()
    }

    pub(super) fn listen(&mut self, listener: Arc<OwnedFd>, path: PathBuf) {
        self.opened = Some((listener, path));
    }

    /// Fails what is in flight.
    pub(super) fn fail(&mut self) {
        drop(self.disconnect());
        for (_, pending) in std::mem::take(&mut self.pending) {
            if let Some(user) = self.users.get(&pending.user) {
                user.reply(errno::EIO, pending.cookie, &[]);
            }
        }
    }

    /// Lets a program in, unless the device is claimed or ended; answers with its number.
    pub(super) fn enter(&mut self, user: Arc<User>) -> Option<u64> {
        if self.claimed || self.ended {
            return None;
        }
        self.next += 1;
        self.users.insert(self.next, user);
        Some(self.next)
    }

    pub(super) fn leave(&mut self, user: u64) {
        self.users.remove(&user);
    }

    /// Takes a user's request in; answers with the bytes for the server, and the server if there is
    /// one.
    pub(super) fn take(
        &mut self,
        user: u64,
        mut bytes: Vec<u8>,
        reply_len: usize,
    ) -> (Vec<u8>, Option<Arc<Server>>) {
        let cookie = u64::from_be_bytes(bytes[COOKIE].try_into().expect("eight bytes"));
        self.next += 1;
        bytes[COOKIE].copy_from_slice(&self.next.to_be_bytes());
        let pending = Pending { user, cookie, bytes: bytes.clone(), reply_len };
        self.pending.insert(self.next, pending);
        (bytes, self.server.clone())
    }

    fn disconnect(&mut self) -> Option<Arc<Server>> {
        let server = self.server.take();
        if let Some(server) = &server {
            let _ = server.stream.shutdown(Shutdown::Both);
        }
        server
    }
}

impl User {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, writing: Mutex::default() }
    }

    /// Sends a reply, to a program that may be gone.
    pub(super) fn reply(&self, error: u32, cookie: u64, data: &[u8]) {
        let mut bytes = magic::SIMPLE_REPLY.to_be_bytes().to_vec();
        bytes.extend(error.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(data);
        let _alone = lock(&self.writing);
        let _ = (&self.stream).write_all(&bytes);
    }
}

impl Server {
    /// Sends requests, to a server that may have died.
    pub(super) fn send(&self, bytes: &[u8]) {
        let _alone = lock(&self.writing);
        let _ = (&self.stream).write_all(bytes);
    }
}

impl Shared {
    /// Gives a device a server, if it has none, which gets the requests that have no reply.
    pub(super) fn connect(
        self: &Arc<Self>,
        id: u32,
        key: DeviceKey,
        socket: OwnedFd,
    ) -> Result<(), Errno> {
        let server =
            Arc::new(Server { stream: UnixStream::from(socket), writing: Mutex::default() });
        let unanswered: Vec<u8> = {
            let mut devices = self.devices();
            let device = devices.same(id, key).ok_or(Errno::NOENT)?;
            if device.server.is_some() {
                return Err(Errno::BUSY);
            }
            device.server = Some(Arc::clone(&server));
            device.pending.values().flat_map(|pending| pending.bytes.clone()).collect()
        };
        let (shared, reading) = (Arc::clone(self), Arc::clone(&server));
        thread::spawn(move || {
            while shared.pass_reply(id, key, &reading).is_ok() {}
            if let Some(device) = shared.devices().same(id, key)
                && device.server.as_ref().is_some_and(|server| Arc::ptr_eq(server, &reading))
            {
                device.disconnect();
            }
        });
        thread::spawn(move || server.send(&unanswered));
        Ok(())
    }

    /// Passes a server's next reply on.
    fn pass_reply(&self, id: u32, key: DeviceKey, server: &Server) -> io::Result<()> {
        let mut header = [0; REPLY_LEN];
        (&server.stream).read_exact(&mut header)?;
        let field = |range: std::ops::Range<usize>| &header[range];
        assert_eq!(field(0..4), magic::SIMPLE_REPLY.to_be_bytes(), "a reply");
        let error = u32::from_be_bytes(field(4..8).try_into().expect("four bytes"));
        let cookie = u64::from_be_bytes(field(8..16).try_into().expect("eight bytes"));
        let len = {
            let mut devices = self.devices();
            let device = devices.same(id, key).ok_or(io::ErrorKind::NotConnected)?;
            let pending = device.pending.get(&cookie).expect("a reply to a request");
            if error == 0 { pending.reply_len } else { 0 }
        };
        let mut data = vec![0; len];
        (&server.stream).read_exact(&mut data)?;
        let answered = {
            let mut devices = self.devices();
            let device = devices.same(id, key).ok_or(io::ErrorKind::NotConnected)?;
            let pending = device.pending.remove(&cookie).expect("a reply to a request");
            device.users.get(&pending.user).cloned().map(|user| (user, pending.cookie))
        };
        if let Some((user, cookie)) = answered {
            user.reply(error, cookie, &data);
        }
        Ok(())
    }
}
