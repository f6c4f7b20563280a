//! Many clients that connect to an NBD server at the same moment: how long their handshakes take.
//!
//! `cargo run --release -p sheave-tests --example burst -- 127.0.0.1:10809 1000 10` prints the
//! percentiles of 10 rounds, in which each of 1 000 clients asks for the default export and leaves
//! when all are served. docs/performance.md compares servers by it.
#![allow(clippy::print_stdout, reason = "a tool for a terminal")]

use std::io::{Error, Read, Result, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use sheave_proto::{ClientConfig, ClientHandshake, ClientNext};

/// A handshake that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Enough for a handshake.
const STACK_BYTES: usize = 128 << 10;

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let [address, clients, rounds] = &args[..] else {
        panic!("usage: burst ADDRESS CLIENTS ROUNDS");
    };
    let address: SocketAddr = address.parse().expect("an IP address and a port");
    let clients: usize = clients.parse().expect("a number of clients");
    let rounds: usize = rounds.parse().expect("a number of rounds");
    let (mut times, mut failures) = (Vec::new(), Vec::new());
    for outcome in (0..rounds).flat_map(|_| round(address, clients)) {
        match outcome {
            Ok(time) => times.push(time),
            Err(error) => failures.push(error),
        }
    }
    times.sort_unstable();
    let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or_default();
    let max = times.last().copied().unwrap_or_default();
    let (served, p50, p99) = (times.len(), at(50), at(99));
    println!("served {served}, p50 {p50:.1?}, p99 {p99:.1?}, max {max:.1?}");
    if let Some(first) = failures.first() {
        println!("failed {}, first: {first}", failures.len());
        std::process::exit(1);
    }
}

fn round(address: SocketAddr, clients: usize) -> Vec<Result<Duration>> {
    let (begin, served) = (Arc::new(Barrier::new(clients)), Arc::new(Barrier::new(clients)));
    let threads: Vec<_> = (0..clients)
        .map(|_| {
            let (begin, served) = (Arc::clone(&begin), Arc::clone(&served));
            let client = move || {
                begin.wait();
                let begun = Instant::now();
                let outcome = connect(address);
                let time = begun.elapsed();
                served.wait();
                outcome.map(|_stream| time)
            };
            thread::Builder::new().stack_size(STACK_BYTES).spawn(client).expect("a thread")
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_nodelay(true)?;
    let mut handshake = ClientHandshake::new(ClientConfig::default()).map_err(Error::other)?;
    let mut input = Vec::new();
    loop {
        let step = handshake.step(&input);
        input.drain(..step.consumed);
        stream.write_all(&step.output)?;
        match step.next {
            ClientNext::NeedMore if step.consumed > 0 && !input.is_empty() => {}
            ClientNext::NeedMore => {
                let mut bytes = [0; 4096];
                match stream.read(&mut bytes)? {
                    0 => return Err(Error::other(handshake.closed())),
                    count => input.extend_from_slice(&bytes[..count]),
                }
            }
            ClientNext::Ready(_) => return Ok(stream),
            other => return Err(Error::other(format!("{other:?}"))),
        }
    }
}
