//! Connections that die: the kernel tells whoever listens (`NBD_CMD_LINK_DEAD`).

use std::io;
use std::thread::sleep;
use std::time::Duration;

use crate::genl::{Genl, Listener};
use crate::netlink::FAMILY;

const GROUP: &str = "nbd_mc_group";

/// Waits until a connection of some device has died.
#[derive(Default)]
pub struct DeadLinks {
    /// None before the driver is there.
    listener: Option<Listener>,
}

impl DeadLinks {
    /// Waits so long, or until a connection has died, of whatever device: true then.
    pub fn wait(&mut self, within: Duration) -> bool {
        if self.listener.is_none() {
            self.listener = listen().ok();
        }
        if let Some(listener) = &self.listener
            && let Ok(died) = listener.wait(within)
        {
            return died;
        }
        // There is no driver, or not any more.
        self.listener = None;
        sleep(within);
        false
    }
}

fn listen() -> io::Result<Listener> {
    let group = Genl::open()?.group(FAMILY, GROUP)?;
    Listener::open(group)
}
