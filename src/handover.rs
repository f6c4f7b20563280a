//! A daemon that gives way to another one, such as a newer version of itself, without anybody's
//! notice: it hands over its control socket, the connections of its devices and its statistics, and
//! ends at once. The other then finds the devices by their records.
//!
//! On a unix socket of packets: the newcomer sends [`ASK`]; each answer is a [`Message`] with at
//! most one descriptor; after [`Message::End`] it sends [`TAKEN`].

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, UCred, accept_with,
    connect, recv, recvmsg, send, sendmsg, socket_with,
};
use serde::{Deserialize, Serialize};
use sheave_core::printable;
use sheave_devices::{Devices, Released};
use sheave_telemetry::{Registry, VolumeSnapshot};

use crate::log;
use crate::systemd::Notify;
use crate::telemetry::{RuntimeDir, listen_at};

/// Changes whenever another version would misunderstand what follows.
const ASK: &[u8] = b"take over 1";
const TAKEN: &[u8] = b"taken";
/// How long connections may take to come to rest. One that does not is cut, and what it had in
/// flight is sent again within seconds.
const REST_TIMEOUT: Duration = Duration::from_secs(1);
/// How long one side waits for a packet of the other.
const PACKET_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the log may take of the pause that devices have.
const LAST_LINES_TIMEOUT: Duration = Duration::from_millis(50);
const PACKET_MAX: usize = 4096;
/// Connections that are handed over, the most that a daemon can have.
const MESSAGES_MAX: usize = 1 << 16;

/// What is handed over, most of it with a descriptor.
#[derive(Serialize, Deserialize)]
enum Message {
    /// The control socket, and whether it was passed by the service manager.
    Control { passed: bool },
    /// The connection of the device with this mark.
    Connection { mark: u64 },
    /// A file with the statistics of all volumes, in JSON.
    Statistics,
    /// Nothing is, and why.
    Refused { why: String },
    /// That was all.
    End,
}

/// What was taken over.
#[derive(Default)]
pub(crate) struct Taken {
    /// The control socket, and whether the service manager keeps it.
    pub(crate) control: Option<(OwnedFd, bool)>,
    pub(crate) connections: Vec<Released>,
    statistics: Vec<VolumeSnapshot>,
}

/// Who can be asked to give way.
pub(crate) struct HandOver {
    pub(crate) devices: Arc<Devices>,
    pub(crate) registry: Arc<Registry>,
    /// The control socket, and whether the service manager keeps it.
    pub(crate) control: OwnedFd,
    pub(crate) passed: bool,
    pub(crate) notify: Arc<Notify>,
}

fn socket_path(dir: &RuntimeDir) -> PathBuf {
    dir.path().join("handover.sock")
}

impl Taken {
    /// Asks the daemon that runs to give way. `None` if none does.
    ///
    /// # Errors
    /// When it refuses, or has another version.
    pub(crate) fn ask(dir: &RuntimeDir) -> Result<Option<Self>> {
        let path = socket_path(dir);
        let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
        let socket = socket_with(family, SocketType::SEQPACKET, flags, None)?;
        let address = SocketAddrUnix::new(&path)?;
        match retry_on_intr(|| connect(&socket, &address)) {
            Err(Errno::NOENT | Errno::CONNREFUSED) => return Ok(None),
            connected => connected.with_context(|| printable(&path).to_string())?,
        }
        set_socket_timeout(&socket, Timeout::Recv, Some(REST_TIMEOUT + PACKET_TIMEOUT))?;
        retry_on_intr(|| send(&socket, ASK, SendFlags::NOSIGNAL))?;
        let mut taken = Self::default();
        for _ in 0..MESSAGES_MAX {
            match receive(&socket).context("take over")? {
                (Message::Control { passed }, Some(fd)) => taken.control = Some((fd, passed)),
                (Message::Connection { mark: name }, Some(socket)) => {
                    taken.connections.push(Released { name, socket });
                }
                (Message::Statistics, Some(file)) => taken.statistics = read_statistics(file)?,
                (Message::Refused { why }, _) => bail!("the daemon does not give way: {why}"),
                (Message::End, _) => {
                    retry_on_intr(|| send(&socket, TAKEN, SendFlags::NOSIGNAL))?;
                    return Ok(Some(taken));
                }
                (_, None) => bail!("a descriptor was lost on the way"),
            }
        }
        bail!("the daemon hands over without an end")
    }

    /// Goes on with its statistics.
    pub(crate) fn count_on(&self, registry: &Registry) {
        for volume in &self.statistics {
            registry.volume(&volume.name).recorder().add_snapshot(volume);
        }
    }
}

impl HandOver {
    /// Waits on a thread of its own for somebody who takes over; the process ends then.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub(crate) fn start(self, dir: &RuntimeDir) -> Result<()> {
        let path = socket_path(dir);
        let listener = listen_at(&path, SocketType::SEQPACKET)
            .with_context(|| printable(&path).to_string())?;
        let thread = std::thread::Builder::new().name("handover".to_owned());
        thread.spawn(move || {
            loop {
                match accept_with(&listener, SocketFlags::CLOEXEC) {
                    Ok(newcomer) => match self.give_way(&newcomer) {
                        Ok(()) => {
                            tracing::info!("taken over");
                            // Short: the successor waits for the end of this process.
                            log::finish_within(LAST_LINES_TIMEOUT);
                            // Everything that is left is the successor's.
                            std::process::exit(0);
                        }
                        Err(error) => tracing::warn!("not taken over: {error:#}"),
                    },
                    Err(error) => {
                        tracing::warn!(%error, "handover socket");
                        std::thread::sleep(REST_TIMEOUT);
                    }
                }
            }
        })?;
        Ok(())
    }

    fn give_way(&self, newcomer: &OwnedFd) -> Result<()> {
        let own = rustix::process::geteuid();
        let UCred { uid, pid, .. } = socket_peercred(newcomer)?;
        ensure!(uid == own || uid.is_root(), "user {} asks for it", uid.as_raw());
        set_socket_timeout(newcomer, Timeout::Recv, Some(PACKET_TIMEOUT))?;
        set_socket_timeout(newcomer, Timeout::Send, Some(PACKET_TIMEOUT))?;
        let mut packet = [0; PACKET_MAX];
        let count = hear(newcomer, &mut packet)?;
        if &packet[..count] != ASK {
            let why = "it is of another version".to_owned();
            transmit(newcomer, &Message::Refused { why }, None)?;
            bail!("asked by another version");
        }
        let pid = pid.as_raw_nonzero().get();
        if self.notify.is_service() && parent_of(pid) != Some(std::process::id()) {
            let why = "it runs as a service, which would lose sight of its successor; use: \
                       systemctl reload sheave";
            transmit(newcomer, &Message::Refused { why: why.to_owned() }, None)?;
            bail!("process {pid} asks for it, which this one has not started");
        }
        let connections = match self.devices.hand_over(REST_TIMEOUT) {
            Ok(connections) => connections,
            Err(error) => {
                transmit(newcomer, &Message::Refused { why: error.to_string() }, None)?;
                return Err(error.into());
            }
        };
        let handed = self.hand(newcomer, &connections);
        match handed {
            // Before this process ends, or its end would be that of the service.
            Ok(()) => self.notify.succeeded_by(pid),
            Err(_) => self.devices.take_back(connections),
        }
        handed
    }

    fn hand(&self, newcomer: &OwnedFd, connections: &[Released]) -> Result<()> {
        let control = Message::Control { passed: self.passed };
        transmit(newcomer, &control, Some(self.control.as_fd()))?;
        for Released { name, socket } in connections {
            transmit(newcomer, &Message::Connection { mark: *name }, Some(socket.as_fd()))?;
        }
        let statistics = write_statistics(&self.registry.snapshot())?;
        transmit(newcomer, &Message::Statistics, Some(statistics.as_fd()))?;
        transmit(newcomer, &Message::End, None)?;
        let mut packet = [0; PACKET_MAX];
        let count = hear(newcomer, &mut packet)?;
        ensure!(&packet[..count] == TAKEN, "the successor has left");
        Ok(())
    }
}

/// Who has started this process (proc_pid_status(5)).
fn parent_of(pid: i32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

fn transmit(to: &OwnedFd, message: &Message, fd: Option<BorrowedFd<'_>>) -> Result<()> {
    let text = serde_json::to_vec(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.as_slice();
    if !fds.is_empty() {
        ensure!(control.push(SendAncillaryMessage::ScmRights(fds)), "no room for a descriptor");
    }
    let text = [IoSlice::new(&text)];
    retry_on_intr(|| sendmsg(to, &text, &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}

fn receive(from: &OwnedFd) -> Result<(Message, Option<OwnedFd>)> {
    let mut packet = [0; PACKET_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let slices = &mut [IoSliceMut::new(&mut packet)];
    let received = retry_on_intr(|| recvmsg(from, slices, &mut control, RecvFlags::CMSG_CLOEXEC));
    let count = received?.bytes;
    ensure!(count > 0, "the daemon has left");
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = fds.next().and_then(|mut fds| fds.next());
    Ok((serde_json::from_slice(&packet[..count])?, fd))
}

/// A packet without a descriptor.
fn hear(from: &OwnedFd, packet: &mut [u8]) -> Result<usize> {
    // Unlike other calls, one with a timeout is not resumed after a signal (signal(7)).
    let (count, _) = retry_on_intr(|| recv(from, &mut *packet, RecvFlags::empty()))?;
    Ok(count)
}

fn write_statistics(volumes: &[VolumeSnapshot]) -> Result<File> {
    let mut file = File::from(memfd_create("statistics", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(volumes)?)?;
    file.rewind()?;
    Ok(file)
}

fn read_statistics(file: OwnedFd) -> Result<Vec<VolumeSnapshot>> {
    let mut text = Vec::new();
    File::from(file).read_to_end(&mut text)?;
    // Of a version that counts in another way, they are given up.
    Ok(serde_json::from_slice(&text).unwrap_or_default())
}
