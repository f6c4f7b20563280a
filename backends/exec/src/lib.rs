//! NBD servers that are started for a volume: `qemu-nbd`, `nbdkit`, `sheave serve`.
//!
//! A program gets a listening socket by systemd's protocol (sd_listen_fds(3)): descriptor 3,
//! `LISTEN_FDS=1` and `LISTEN_PID`. The socket is made and kept here, so a connection can be made
//! before the program runs and while it is restarted. The program is started when the first
//! connection waits for it, and again when one waits after it has ended. It ends with the volume,
//! and with this process, however that ends.
//!
//! ```text
//! Program ── one thread ── poll: socket, process, its output, the end of the volume
//!                  └─ helper of this executable ── exec ─▶ /bin/sh -c 'exec COMMAND'
//! ```
#![forbid(unsafe_code)]

mod lines;
mod program;
mod socket;
mod start;
mod watch;

pub use program::{Program, ProgramOptions, end_all};
pub use start::{HELPER, Start, by_helper, exec};
