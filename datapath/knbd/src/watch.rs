//! Connections that die: the kernel multicasts `NBD_CMD_LINK_DEAD`.

use std::io;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use crate::genl::{Genl, Listener};
use crate::netlink::FAMILY;

const GROUP: &str = "nbd_mc_group";
/// Exists while the driver is loaded.
const MODULE: &str = "/sys/module/nbd";

/// Waits until a connection of some device has died.
#[derive(Default)]
pub struct DeadLinks {
    /// `None` while there is no driver.
    listener: Option<Listener>,
}

impl DeadLinks {
    /// Waits until a connection of any device has died (true), at most this long.
    pub fn wait(&mut self, within: Duration) -> bool {
        // A query for the family would load the driver.
        if !Path::new(MODULE).exists() {
            self.listener = None;
        } else if self.listener.is_none() {
            self.listener = listen().ok();
        }
        if let Some(listener) = &self.listener
            && let Ok(died) = listener.wait(within)
        {
            return died;
        }
        self.listener = None;
        sleep(within);
        false
    }
}

fn listen() -> io::Result<Listener> {
    let group = Genl::open()?.group(FAMILY, GROUP)?;
    Listener::open(group)
}
