//! The listeners of `sheave serve`.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use sheave_nbd::{Listener, SocketAccess};

use crate::systemd::Passed;

const DEFAULT_LISTEN: &str = "127.0.0.1:10809";

/// Where to listen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ListenAddresses {
    /// `HOST:PORT` each.
    pub(crate) listen: Vec<String>,
    pub(crate) sockets: Vec<PathBuf>,
    pub(crate) socket_mode: Option<u32>,
    /// Name or number.
    pub(crate) socket_group: Option<String>,
}

impl ListenAddresses {
    /// Listens on these and on sockets that the service manager passes; on the default address if
    /// there is neither.
    ///
    /// # Errors
    /// Names the address that cannot be used, and why.
    pub(crate) fn listen(&self, passed: Vec<Passed>) -> Result<Vec<Listener>> {
        let take = |passed| match passed {
            Passed::Unix(socket) => Listener::from_unix(socket),
            Passed::Tcp(socket) => Listener::from_tcp(socket),
        };
        let taken = passed.into_iter().map(take).collect::<Result<Vec<_>, _>>();
        let mut listeners = taken.context("a socket passed by the service manager")?;
        let group = self.socket_group.as_deref().map(group_id).transpose()?;
        let access = SocketAccess { mode: self.socket_mode, group };
        for path in &self.sockets {
            listeners.push(Listener::unix_for(path, access)?);
        }
        for address in &self.listen {
            listeners.extend(Listener::tcp(address)?);
        }
        if listeners.is_empty() {
            listeners.extend(Listener::tcp(DEFAULT_LISTEN)?);
        }
        Ok(listeners)
    }
}

/// The number of a group that is given by name or number.
fn group_id(group: &str) -> Result<u32> {
    if let Ok(id) = group.parse() {
        return Ok(id);
    }
    match nix::unistd::Group::from_name(group) {
        Ok(Some(found)) => Ok(found.gid.as_raw()),
        Ok(None) => bail!("socket group {group}: there is no such group (see getent group)"),
        Err(errno) => bail!("socket group {group}: cannot look it up: {errno}"),
    }
}
