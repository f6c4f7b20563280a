//! Connections for a volume. Making them waits, so no shard does it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use rustls::ClientConnection;
use sheave_core::{Error, Result};
use sheave_proto::uri::Transport;
use sheave_proto::{ClientConfig, ClientNegotiated, Goal};
use sheave_tls::client_tls;

use crate::RemoteOptions;
use crate::reach::{Reached, reach};

/// An idle connection is probed after so long, so often, and so many times before it counts as
/// broken: a server that is gone without a word is noticed after 11 s.
const KEEP_IDLE: Duration = Duration::from_secs(5);
const KEEP_INTERVAL: Duration = Duration::from_secs(2);
const KEEP_COUNT: u32 = 3;
/// The same for data that is not acknowledged, in milliseconds.
const USER_TIMEOUT_MS: u32 = 11_000;

/// A negotiated connection.
pub(crate) struct Connected {
    /// In blocking mode, without time-outs.
    pub(crate) socket: OwnedFd,
    pub(crate) tls: Option<Box<ClientConnection>>,
    pub(crate) negotiated: ClientNegotiated,
    /// What the server has sent behind its last reply.
    pub(crate) input: Vec<u8>,
}

/// As many connections as are wanted and allowed, at least one.
///
/// # Errors
/// Why there are none.
pub(crate) fn connect_all(options: &RemoteOptions) -> Result<Vec<Connected>> {
    let first = connect(options, Goal::Go)?;
    let count = match first.negotiated.volume_info().can.multi_conn {
        true => options.connections.unwrap_or(1),
        false => 1,
    };
    let mut all = vec![first];
    while all.len() < count {
        match connect(options, Goal::Go) {
            Ok(another) => all.push(another),
            // Some servers promise what they do not take.
            Err(error) => {
                tracing::warn!(count = all.len(), "no more connections: {error}");
                break;
            }
        }
    }
    Ok(all)
}

/// What the export is now.
///
/// # Errors
/// Why that cannot be found out.
pub(crate) fn inquire(options: &RemoteOptions) -> Result<ClientNegotiated> {
    connect(options, Goal::Info).map(|connected| connected.negotiated)
}

fn connect(options: &RemoteOptions, goal: Goal) -> Result<Connected> {
    let uri = &options.uri;
    let by = Instant::now() + options.connect_timeout;
    let name = &options.name;
    let config =
        ClientConfig { export: uri.export.clone(), tls: uri.tls, goal, ..ClientConfig::default() };
    // Read each time, since certificates are renewed.
    let tls = if uri.tls { Some(client_tls(uri)?) } else { None };
    let reached = reach(&uri.transport, config, tls.as_ref(), by);
    match reached.map_err(|refused| refused.at(name))? {
        Reached::Negotiated { stream, negotiated, input } => {
            let (socket, tls) = stream
                .into_parts()
                .map_err(|error| Error::from_io("connect", name.clone(), error))?;
            if let Transport::Tcp { .. } = &uri.transport {
                watch(&socket).map_err(|error| Error::from_io("connect", name.clone(), error))?;
            }
            Ok(Connected { socket, tls, negotiated: *negotiated, input })
        }
        Reached::Listed(_) | Reached::Tls => unreachable!("neither was asked for"),
    }
}

/// Has the kernel notice within seconds that the other side is gone.
fn watch(socket: impl AsFd) -> io::Result<()> {
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, KEEP_IDLE)?;
    sockopt::set_tcp_keepintvl(&socket, KEEP_INTERVAL)?;
    sockopt::set_tcp_keepcnt(&socket, KEEP_COUNT)?;
    sockopt::set_tcp_user_timeout(&socket, USER_TIMEOUT_MS)?;
    Ok(())
}
