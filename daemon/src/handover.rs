//! Hand-over from a daemon to its successor, such as a newer version, without an error for the
//! users of its devices: the daemon hands over its control socket, the connections of its devices
//! and its statistics, and ends at once. The successor then finds the devices by their records.
//!
//! On a unix socket of packets: the successor sends [`ASK`]; each answer is a [`Message`] with at
//! most one descriptor; after [`Message::End`] it sends [`TAKEN`].

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::retry_on_intr;
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{RecvFlags, SendFlags, SocketFlags, UCred, accept_with, recv};
use serde::{Deserialize, Serialize};
use sheave_core::printable;
use sheave_shard::Quiesced;
use sheave_telemetry::{Registry, VolumeSnapshot};

use crate::Devices;
use crate::kernel::DeviceKey;
use crate::packets::{PACKET_MAX, connect, receive, send};

/// The version changes whenever another version would misunderstand the messages that follow.
const ASK: &[u8] = b"take over 1";
const TAKEN: &[u8] = b"taken";
/// How long connections may take to quiesce. One that takes longer is cut, and the kernel sends its
/// requests again within seconds.
const QUIESCE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long one side waits for a packet of the other.
const PACKET_TIMEOUT: Duration = Duration::from_secs(10);
/// The most messages: one per connection.
const MESSAGES_MAX: usize = 1 << 16;

/// A message of the hand-over; most come with a descriptor.
#[derive(Serialize, Deserialize)]
enum Message {
    /// The control socket, and whether it was passed by the service manager.
    Control { passed: bool },
    /// The connection of the device with this key.
    Connection {
        #[serde(rename = "mark")]
        key: DeviceKey,
    },
    /// A file with the statistics of all volumes, in JSON.
    Statistics,
    /// Refused, and why.
    Refused { why: String },
    /// The last message.
    End,
}

/// State that a daemon took over from its predecessor.
#[derive(Default)]
pub struct Taken {
    /// The control socket, and whether the service manager keeps it.
    pub control: Option<(OwnedFd, bool)>,
    /// The connections of devices, for [`crate::DevicesConfig::left`].
    pub connections: Vec<Quiesced>,
    statistics: Vec<VolumeSnapshot>,
}

/// State that a daemon hands over to its successor.
pub struct HandOver {
    /// The devices.
    pub devices: Arc<Devices>,
    /// Their statistics.
    pub registry: Arc<Registry>,
    /// The control socket.
    pub control: OwnedFd,
    /// Whether the service manager keeps it.
    pub passed: bool,
    /// A service manager supervises this process. It does not supervise a successor that this
    /// process has not started.
    pub is_service: bool,
    /// Notifies the service manager of the successor's process ID.
    pub succeeded_by: Box<dyn Fn(i32) + Send>,
    /// Ends this process, since the successor has its devices. It must not return.
    pub end: Box<dyn Fn() -> Infallible + Send>,
}

impl Taken {
    /// Asks the daemon that listens at `path` to give way. `None` if none does.
    ///
    /// # Errors
    /// When it refuses, or has another version.
    pub fn ask(path: &Path) -> Result<Option<Self>> {
        let socket = match connect(path) {
            Err(error) if is_no_listener(&error) => return Ok(None),
            connected => connected.with_context(|| printable(path).to_string())?,
        };
        set_socket_timeout(&socket, Timeout::Recv, Some(QUIESCE_TIMEOUT + PACKET_TIMEOUT))?;
        say(&socket, ASK)?;
        let mut taken = Self::default();
        for _ in 0..MESSAGES_MAX {
            match receive(&socket).context("take over")? {
                (Message::Control { passed }, Some(fd)) => taken.control = Some((fd, passed)),
                (Message::Connection { key }, Some(socket)) => {
                    taken.connections.push(Quiesced { key: key.0, socket });
                }
                (Message::Statistics, Some(file)) => taken.statistics = read_statistics(file)?,
                (Message::Refused { why }, _) => bail!("the daemon does not give way: {why}"),
                (Message::End, _) => {
                    say(&socket, TAKEN)?;
                    return Ok(Some(taken));
                }
                (_, None) => bail!("a descriptor was lost on the way"),
            }
        }
        bail!("the daemon hands over without an end")
    }

    /// Continues the predecessor's statistics.
    pub fn count_on(&self, registry: &Registry) {
        for volume in &self.statistics {
            registry.volume(&volume.name).recorder().add_snapshot(volume);
        }
    }
}

impl HandOver {
    /// Waits on a thread of its own for a successor that connects to this socket of packets, and
    /// ends the process when it has taken over.
    ///
    /// # Errors
    /// When there is no thread for it.
    pub fn start(self, listener: OwnedFd) -> Result<()> {
        let thread = std::thread::Builder::new().name("handover".to_owned());
        thread.spawn(move || {
            loop {
                match accept_with(&listener, SocketFlags::CLOEXEC) {
                    Ok(newcomer) => match self.give_way(&newcomer) {
                        Ok(()) => {
                            tracing::info!("taken over");
                            match (self.end)() {}
                        }
                        Err(error) => tracing::warn!("not taken over: {error:#}"),
                    },
                    Err(error) => {
                        tracing::warn!(%error, "handover socket");
                        std::thread::sleep(QUIESCE_TIMEOUT);
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
            send(newcomer, &Message::Refused { why }, None)?;
            bail!("asked by another version");
        }
        let pid = pid.as_raw_nonzero().get();
        if self.is_service && parent_of(pid) != Some(std::process::id()) {
            let why = "it runs as a service, which would lose sight of its successor; use: \
                       systemctl reload sheave";
            send(newcomer, &Message::Refused { why: why.to_owned() }, None)?;
            bail!("process {pid} asks for it, which this one has not started");
        }
        let connections = match self.devices.hand_over(QUIESCE_TIMEOUT) {
            Ok(connections) => connections,
            Err(error) => {
                send(newcomer, &Message::Refused { why: error.to_string() }, None)?;
                return Err(error.into());
            }
        };
        let handed = self.hand(newcomer, &connections);
        match handed {
            // Before this process ends, or the service would end with it.
            Ok(()) => (self.succeeded_by)(pid),
            Err(_) => self.devices.take_back(connections),
        }
        handed
    }

    fn hand(&self, newcomer: &OwnedFd, connections: &[Quiesced]) -> Result<()> {
        let control = Message::Control { passed: self.passed };
        send(newcomer, &control, Some(self.control.as_fd()))?;
        for Quiesced { key, socket } in connections {
            let connection = Message::Connection { key: DeviceKey(*key) };
            send(newcomer, &connection, Some(socket.as_fd()))?;
        }
        let statistics = write_statistics(&self.registry.snapshot())?;
        send(newcomer, &Message::Statistics, Some(statistics.as_fd()))?;
        send(newcomer, &Message::End, None)?;
        let mut packet = [0; PACKET_MAX];
        let count = hear(newcomer, &mut packet)?;
        ensure!(&packet[..count] == TAKEN, "the successor has left");
        Ok(())
    }
}

/// The parent of a process (proc_pid_status(5)).
fn parent_of(pid: i32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

fn is_no_listener(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Sends a packet that is not a message.
fn say(to: &OwnedFd, packet: &[u8]) -> Result<()> {
    retry_on_intr(|| rustix::net::send(to, packet, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Receives a packet that is not a message.
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
    // Statistics of an incompatible version are dropped.
    Ok(serde_json::from_slice(&text).unwrap_or_default())
}
