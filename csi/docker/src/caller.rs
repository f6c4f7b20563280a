//! Which process calls: it shows, later, which references nothing will undo.

use std::fs;

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;

use crate::TlsListener;

/// A process, usually dockerd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// Its ID here; 0 if it is not known, as that of a caller on TCP.
    pid: u32,
    /// When it was started, in clock ticks since the start of the node (proc_pid_stat(5)); 0 if it
    /// had ended before that was read.
    started: u64,
}

impl Caller {
    /// The process with this ID.
    pub(crate) fn of(pid: u32) -> Self {
        Self { pid, started: started(pid).unwrap_or_default() }
    }

    /// Whether it has ended. Of one that is not known that is never certain.
    pub(crate) fn has_ended(self) -> bool {
        self.pid != 0 && started(self.pid) != Some(self.started)
    }
}

impl Connected<IncomingStream<'_, UnixListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let peer = stream.io().peer_cred().ok().and_then(|peer| peer.pid());
        peer.and_then(|pid| pid.try_into().ok()).map(Self::of).unwrap_or_default()
    }
}

impl Connected<IncomingStream<'_, TlsListener>> for Caller {
    fn connect_info(_: IncomingStream<'_, TlsListener>) -> Self {
        Self::default()
    }
}

fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The 20th field after the name, which is in parentheses and may have any of them.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_has_ended_when_it_is_gone_or_another_has_its_id() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().expect("cat");
        let caller = Caller::of(child.id());
        assert!(!caller.has_ended());
        assert!(Caller { started: caller.started + 1, ..caller }.has_ended());
        drop(child.stdin.take());
        child.wait().expect("it ends");
        assert!(caller.has_ended());
        assert!(Caller::of(child.id()).has_ended());
        assert!(!Caller::default().has_ended());
    }
}
