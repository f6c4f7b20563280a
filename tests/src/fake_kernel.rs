//! A stand-in for a kernel: devices of `sheave daemon` without a driver, in the test's process, so
//! that they outlive a daemon that is killed.
//!
//! A daemon uses it when `SHEAVE_FAKE_KERNEL` names its directory. Each device is a unix socket
//! there, `fake0` and so on, which programs read and write by NBD. As with a device, requests wait
//! while there is no server, those that a dead server has not answered go to the next one, and a
//! device that is open is in use.

mod calls;
mod device;
mod real;
mod users;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
    shutdown, socket_with,
};
use sheave_daemon::{DeviceKey, FakeRequest};

use crate::Scratch;
use device::{Device, Devices};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// What a daemon calls a kernel for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "those of FakeRequest")]
pub enum Call {
    Add,
    Start,
    Find,
    Recover,
    Resize,
    Size,
    Claim,
    End,
    List,
}

/// When in a call something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The kernel has not done it yet.
    Before,
    /// It has, and has not answered.
    After,
}

/// A kernel. Its devices end with it.
pub struct FakeKernel {
    scratch: Scratch,
    listener: Arc<OwnedFd>,
    shared: Arc<Shared>,
}

/// What happens once, at a call.
struct Strike {
    call: Call,
    moment: Moment,
    action: Box<dyn FnOnce() + Send>,
    /// The call goes on afterwards.
    is_answered: bool,
}

struct Shared {
    dir: PathBuf,
    /// Its devices are block devices of the real kernel.
    has_block_devices: bool,
    /// Its devices cannot grow while they are there.
    refuses_resizes: AtomicBool,
    /// Its devices are there until they are closed.
    shows_ended: AtomicBool,
    devices: Mutex<Devices>,
    /// A device is not in use any more.
    changed: Condvar,
    strike: Mutex<Option<Strike>>,
}

impl Call {
    fn of(request: &FakeRequest) -> Self {
        match request {
            FakeRequest::Add { .. } => Self::Add,
            FakeRequest::Start { .. } => Self::Start,
            FakeRequest::Find { .. } => Self::Find,
            FakeRequest::Recover { .. } => Self::Recover,
            FakeRequest::Resize { .. } => Self::Resize,
            FakeRequest::Size { .. } => Self::Size,
            FakeRequest::Claim { .. } => Self::Claim,
            FakeRequest::End { .. } => Self::End,
            FakeRequest::List => Self::List,
        }
    }
}

impl Default for FakeKernel {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeKernel {
    /// A kernel without devices, in a directory of its own.
    ///
    /// # Panics
    /// When its socket cannot be made.
    #[must_use]
    pub fn new() -> Self {
        Self::start(Scratch::new(), false)
    }

    /// A kernel whose devices are block devices of the real one, too, with all their I/O through
    /// the daemon: they can be mounted. It takes root, loop devices and `nbdfuse`.
    ///
    /// # Panics
    /// When its socket cannot be made.
    #[must_use]
    pub fn with_block_devices() -> Self {
        Self::with_block_devices_in(Scratch::new())
    }

    /// The same in this directory.
    ///
    /// # Panics
    /// When its socket cannot be made.
    #[must_use]
    pub fn with_block_devices_in(scratch: Scratch) -> Self {
        Self::start(scratch, true)
    }

    fn start(scratch: Scratch, has_block_devices: bool) -> Self {
        let dir = scratch.path().to_owned();
        let listener = Arc::new(listener(&dir.join("kernel.sock"), SocketType::SEQPACKET));
        let shared = Arc::new(Shared {
            dir,
            has_block_devices,
            refuses_resizes: AtomicBool::new(false),
            shows_ended: AtomicBool::new(false),
            devices: Mutex::default(),
            changed: Condvar::new(),
            strike: Mutex::default(),
        });
        let (accepting, serving) = (Arc::clone(&listener), Arc::clone(&shared));
        thread::spawn(move || {
            while let Ok(connection) = accept_with(&accepting, SocketFlags::CLOEXEC) {
                let shared = Arc::clone(&serving);
                thread::spawn(move || shared.serve_call(&connection));
            }
        });
        Self { scratch, listener, shared }
    }

    /// Its directory.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Has something happen at the next call of this kind, which is not answered then.
    pub fn strike(&self, call: Call, moment: Moment, action: impl FnOnce() + Send + 'static) {
        let (action, is_answered) = (Box::new(action), false);
        *lock(&self.shared.strike) = Some(Strike { call, moment, action, is_answered });
    }

    /// Has something happen at the next call of this kind, which goes on afterwards.
    pub fn interrupt(&self, call: Call, moment: Moment, action: impl FnOnce() + Send + 'static) {
        let (action, is_answered) = (Box::new(action), true);
        *lock(&self.shared.strike) = Some(Strike { call, moment, action, is_answered });
    }

    /// Has devices not grow from now on, as those of ublk before Linux 6.16.
    pub fn refuse_resizes(&self) {
        self.shared.refuses_resizes.store(true, Relaxed);
    }

    /// Has devices that are ended while they are open be found until they are closed, as those of
    /// the NBD client.
    pub fn show_ended(&self) {
        self.shared.shows_ended.store(true, Relaxed);
    }

    /// Whether what was to happen has happened.
    #[must_use]
    pub fn has_struck(&self) -> bool {
        lock(&self.shared.strike).is_none()
    }

    /// Where its devices are.
    #[must_use]
    pub fn devices(&self) -> Vec<PathBuf> {
        let devices = lock(&self.shared.devices);
        devices.live().map(|id| self.shared.path(id)).collect()
    }

    /// Requests that no server has answered yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        lock(&self.shared.devices).in_flight()
    }

    /// Cuts the connections of all devices to their servers.
    pub fn cut(&self) {
        lock(&self.shared.devices).cut();
    }

    /// Ends all devices, and gives their numbers to devices of another program.
    pub fn replace_all(&self) {
        let mut devices = lock(&self.shared.devices);
        for (id, DeviceKey(key)) in devices.keys() {
            devices.end(id);
            devices.add(Device::new(DeviceKey(!key), 0, 512, 0));
        }
    }
}

impl Drop for FakeKernel {
    fn drop(&mut self) {
        let _ = shutdown(&self.listener, Shutdown::Both);
        let real = lock(&self.shared.devices).take_all_real();
        drop(real);
        lock(&self.shared.devices).end_all();
    }
}

impl Shared {
    fn path(&self, id: u32) -> PathBuf {
        self.dir.join(format!("fake{id}"))
    }

    fn devices(&self) -> MutexGuard<'_, Devices> {
        lock(&self.devices)
    }

    /// Has happen what is to happen now: true if the call ends with it.
    fn struck(&self, call: Call, moment: Moment) -> bool {
        let is_meant = |strike: &mut Strike| strike.call == call && strike.moment == moment;
        // Other calls go on meanwhile.
        let planned = lock(&self.strike).take_if(is_meant);
        planned.is_some_and(|strike| {
            (strike.action)();
            !strike.is_answered
        })
    }
}

fn listener(path: &std::path::Path, kind: SocketType) -> OwnedFd {
    let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
    let socket = socket.expect("a socket");
    let _ = std::fs::remove_file(path);
    bind(&socket, &SocketAddrUnix::new(path).expect("a short path")).expect("bind a socket");
    listen(&socket, BACKLOG).expect("listen");
    socket
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
