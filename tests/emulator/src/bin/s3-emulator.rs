//! The store as a program: it prints its URL, and serves until it is ended. For each line that it
//! reads it prints the requests since the last one.
#![allow(clippy::print_stdout, reason = "a tool for a terminal")]
#![forbid(unsafe_code)]

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use sheave_emulator::{Access, Count, Counts, Emulator, Kind, Settings};

/// An S3 store for tests and figures.
#[derive(Parser)]
struct Args {
    /// Address and port; port 0 is any that is free
    #[arg(long, default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))]
    listen: SocketAddr,
    /// Keeps objects in this directory, not in memory
    #[arg(long)]
    dir: Option<PathBuf>,
    /// A bucket that is made, if there is none of that name
    #[arg(long)]
    bucket: Vec<String>,
    /// Milliseconds before the first byte of an answer
    #[arg(long, default_value_t = 0)]
    first_byte_ms: u64,
    /// Up to so many more, at random
    #[arg(long, default_value_t = 0)]
    jitter_ms: u64,
    /// Megabytes (10^6) per second of one connection
    #[arg(long)]
    bandwidth_mb: Option<u64>,
    /// The client that may use it
    #[arg(long, default_value = "emulated")]
    access_key: String,
    /// What that client signs with
    #[arg(long, default_value = "secret")]
    secret_key: String,
    /// Takes requests without a signature
    #[arg(long)]
    anonymous: bool,
    /// Does not compare bodies with their digests, which saves a CPU
    #[arg(long)]
    unchecked_bodies: bool,
    /// Determines what is random
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> io::Result<()> {
    let args = Args::parse();
    let access = Access { key: args.access_key, secret: args.secret_key };
    let settings = Settings {
        first_byte: Duration::from_millis(args.first_byte_ms),
        jitter: Duration::from_millis(args.jitter_ms),
        bandwidth: args.bandwidth_mb.map(|megabytes| megabytes * 1_000_000),
        access: (!args.anonymous).then_some(access),
        checks_bodies: !args.unchecked_bodies,
        ..Settings::default()
    };
    if let Some(dir) = &args.dir {
        std::fs::create_dir_all(dir)?;
    }
    let store = Emulator::open(settings, args.listen, args.dir, args.seed)?;
    for bucket in &args.bucket {
        store.make_bucket(bucket);
    }
    println!("{}", store.endpoint());
    for line in io::stdin().lines() {
        line?;
        println!("{}", shown(&store.counts()));
        store.clear_log();
    }
    loop {
        std::thread::park();
    }
}

/// Requests by kind, as a line of JSON.
fn shown(counts: &Counts) -> String {
    let kinds = [
        ("put", Kind::Put),
        ("get", Kind::Get),
        ("head", Kind::Head),
        ("list", Kind::List),
        ("delete", Kind::Delete),
    ];
    let of_kind = |(name, kind)| {
        let Count { requests, failed, bytes_in, bytes_out } = counts.of(kind);
        format!(
            "\"{name}\": {{\"requests\": {requests}, \"failed\": {failed}, \
             \"bytes_in\": {bytes_in}, \"bytes_out\": {bytes_out}}}"
        )
    };
    format!("{{{}}}", kinds.map(of_kind).join(", "))
}
