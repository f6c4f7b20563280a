//! NBD servers of others, on unix sockets. They can be killed and started again.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::{Scratch, eventually, have, skip};

/// A foreign server. Dropping it kills it.
#[derive(Debug)]
pub struct Foreign {
    command: Vec<String>,
    socket: PathBuf,
    child: Option<Child>,
    scratch: Scratch,
}

impl Foreign {
    /// nbdkit with these arguments; `None` where it is not installed.
    #[must_use]
    pub fn nbdkit(test: &str, args: &str) -> Option<Self> {
        let scratch = Scratch::new();
        let before = format!("nbdkit --foreground -U {}", scratch.file("s"));
        Self::started(test, scratch, &before, args)
    }

    /// qemu-nbd with an image of so many zero bytes; `None` where it is not installed.
    #[must_use]
    pub fn qemu_nbd(test: &str, image_len: u64) -> Option<Self> {
        let scratch = Scratch::on_disk();
        let image = scratch.sparse("image", image_len);
        let before = format!(
            "qemu-nbd -f raw -t --shared=16 --discard=unmap --detect-zeroes=off -k {} {image}",
            scratch.file("s")
        );
        Self::started(test, scratch, &before, "")
    }

    fn started(test: &str, scratch: Scratch, before: &str, args: &str) -> Option<Self> {
        let command: Vec<_> =
            before.split_whitespace().chain(args.split_whitespace()).map(str::to_owned).collect();
        if !have(&command[0]) {
            skip(test, &format!("{} is not installed", command[0]));
            return None;
        }
        let socket = PathBuf::from(scratch.file("s"));
        let mut server = Self { command, socket, child: None, scratch };
        server.start();
        Some(server)
    }

    /// Starts it; it has been killed or has not been started.
    ///
    /// # Panics
    /// When it does not listen in time.
    pub fn start(&mut self) {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).stdin(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().expect("the server starts"));
        let listens = eventually(|| UnixStream::connect(&self.socket).is_ok());
        assert!(listens, "{:?} listens", self.command);
    }

    /// Kills it, with all that it has not written.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("a signal");
        child.wait().expect("an end");
        let _ = std::fs::remove_file(&self.socket);
    }

    /// The URI of its default export.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// Its files.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
    }
}
