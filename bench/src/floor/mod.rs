//! Floors: servers that do less than any server must. What they reach with the same client over
//! the same socket is what a real server could come close to.

mod echo;
mod handshake;
mod ring;

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

pub(crate) use echo::serve as serve_echo;
pub(crate) use ring::serve as serve_ring;

use crate::units::ByteSize;

/// Bytes received at once.
const RECEIVE_SIZE: usize = 256 << 10;

/// Options of the hidden commands.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct FloorArgs {
    /// Where to listen
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Size of the export
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    size: ByteSize,
    /// Microseconds to look for work before sleeping
    #[arg(long, value_name = "N", default_value_t = 0)]
    poll_us: u64,
}

impl FloorArgs {
    fn poll(&self) -> Duration {
        Duration::from_micros(self.poll_us)
    }
}

/// Gives every connection a thread of its own, which runs `serve` to the connection's end.
fn accept(
    args: &FloorArgs,
    serve: impl Fn(UnixStream) -> Result<()> + Clone + Send + 'static,
) -> Result<()> {
    let listener = UnixListener::bind(&args.socket)
        .with_context(|| format!("listen on {}", args.socket.display()))?;
    for socket in listener.incoming() {
        let (socket, serve) = (socket?, serve.clone());
        thread::spawn(move || {
            // A client that goes away is how every connection ends.
            let _ = serve(socket);
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use sheave_proto::ReplyStyle;
    use tempfile::TempDir;

    use super::*;
    use crate::load::{self, Length, Order, Plan, Target, Workload};

    fn load(
        floor: impl Fn(&FloorArgs) -> Result<()> + Send + 'static,
        bs: usize,
        verify: bool,
    ) -> load::Outcome {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("socket");
        let args = FloorArgs { socket: socket.clone(), size: ByteSize(8 << 20), poll_us: 20 };
        // It listens until the test process ends.
        thread::spawn(move || floor(&args));
        let deadline = Instant::now() + Duration::from_secs(120);
        while UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < deadline, "the floor does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        let url = format!("nbd+unix:///?socket={}", socket.display());
        let plan = Plan {
            target: Target::parse(&url, ReplyStyle::Simple).unwrap(),
            workload: Workload {
                read_percent: 50,
                order: Order::Random,
                block_size: bs,
                queue_depth: 8,
                rate_per_connection: None,
                flush_every: None,
            },
            connections: 2,
            threads: 1,
            length: Length::Ops(400),
            span: None,
            verify,
            seed: 3,
            server: None,
        };
        load::run(&plan).unwrap()
    }

    #[test]
    fn the_echo_answers_every_request() {
        for bs in [4096, 1 << 20] {
            let outcome = load(serve_echo, bs, false);
            assert_eq!((outcome.recorder.count(), outcome.recorder.errors.len()), (400, 0));
        }
    }

    #[test]
    fn the_bare_ring_server_keeps_what_is_written() {
        for bs in [4096, 64 << 10, 1 << 20] {
            let recorder = load(serve_ring, bs, true).recorder;
            assert_eq!(recorder.reads.len() + recorder.writes.len(), 400);
            assert!(recorder.checked_count > 0);
            assert_eq!(recorder.fault_count, 0, "{bs}: {:?}", recorder.faults);
        }
    }
}
