//! The ends of sockets: that of the other side, noticed, and our own, asked for.

use std::os::fd::{AsFd as _, AsRawFd as _};

use io_uring::opcode;
use io_uring::types::{Fd, Fixed};

use crate::ring::{InFlight, Ring, Socket};

impl Ring {
    /// Notices when the other side of a socket is gone, though nothing is received.
    pub fn watch(&mut self, socket: &Socket, user: u64) {
        // The kernel adds POLLERR, POLLHUP and POLLRDHUP.
        let entry = match socket.slot {
            Some(slot) => opcode::PollAdd::new(Fixed(slot), 0).build(),
            None => opcode::PollAdd::new(Fd(socket.as_fd().as_raw_fd()), 0).build(),
        };
        self.push(entry, InFlight::Watch { user });
    }

    /// Ends what this starter has in flight on sockets: with `ECANCELED`, unless it has just ended
    /// otherwise.
    pub fn cancel_sockets_of(&mut self, starter: u32) {
        let is_its = |in_flight: &InFlight| match in_flight {
            InFlight::File { user, request, .. } | InFlight::Message { user, request, .. } => {
                user.0 == starter && request.is_socket()
            }
            _ => false,
        };
        let all = self.in_flight.iter().filter(|(_, in_flight)| is_its(in_flight));
        let keys: Vec<_> = all.map(|(key, _)| key).collect();
        for key in keys {
            self.push(opcode::AsyncCancel::new(key as u64).build(), InFlight::Cancel);
        }
    }
}

/// Whether a poll has ended because the socket is of no more use in either direction: a client that
/// has only said that nothing more comes may wait for answers.
pub(crate) fn is_hung_up(events: usize) -> bool {
    events & (libc::POLLHUP | libc::POLLERR) as usize != 0
}
