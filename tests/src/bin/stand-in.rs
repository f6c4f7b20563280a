//! A stand-in for a kernel as a process of its own: the daemon of a node whose kernel has neither
//! ublk nor nbd makes its devices here. They are block devices, and outlive the daemon.
//!
//! `stand-in DIR` makes its directory in DIR and prints the path. It ends at SIGTERM with all
//! devices.
#![allow(clippy::print_stdout, reason = "a tool for a terminal")]
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::{env, io};

use sheave_tests::{FakeKernel, Scratch};
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main(flavor = "current_thread")]
async fn main() -> io::Result<()> {
    let mut terminated = signal(SignalKind::terminate())?;
    let dir = PathBuf::from(env::args_os().nth(1).expect("a directory"));
    let kernel = FakeKernel::with_block_devices_in(Scratch::within(&dir));
    println!("{}", kernel.scratch().path().display());
    terminated.recv().await;
    Ok(())
}
