//! What is no row: the price of being connected, of being idle, and of being paced.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::measure::Effort;
use super::product::{Product, Role};
use super::results::Check;
use super::server::Server;
use crate::load::{self, Connection, Length, Order, Plan, Workload};
use crate::process::Holdings;
use crate::stats::Spread;
use crate::units::{self, ByteSize};

/// Requests per second of the paced load.
const PACED_PER_S: f64 = 1000.0;
/// Idle connections that every server is asked for; only ours is asked for more.
const PEER_CONNECTIONS_MAX: usize = 60;
/// Connections before growth counts.
const CYCLES_WARMUP: usize = 200;
/// How long a server may take to clean up after connections.
const SETTLE_MAX: Duration = Duration::from_secs(5);

/// How much of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CheckEffort {
    /// Idle connections.
    pub(crate) connections: usize,
    /// Cycles of connecting and disconnecting.
    pub(crate) cycles: usize,
    /// How long an idle server is watched.
    pub(crate) idle: Duration,
}

/// The ids of all checks.
pub(crate) const IDS: [&str; 5] =
    ["idle-memory", "idle-connections", "idle-woken", "paced-1000", "churn"];

/// Runs a check on every server that it makes sense for.
///
/// # Errors
/// When a server fails.
pub(crate) fn run(
    id: &str,
    servers: &[Server],
    effort: Effort,
    checks: CheckEffort,
) -> Result<Vec<Check>> {
    if id == "paced-1000" {
        return paced(servers, effort);
    }
    let real = |server: &&Server| server.product.role() != Role::Floor;
    servers
        .iter()
        .filter(real)
        .map(|server| {
            match id {
                "idle-memory" => idle_memory(server),
                "idle-connections" => idle_connections(server, checks),
                "idle-woken" => idle_woken(server, checks),
                _ => churn(server, checks),
            }
            .with_context(|| format!("{id} of {}", server.product.name()))
        })
        .collect()
}

/// A check's outcome.
fn check<const N: usize>(
    id: &str,
    title: String,
    server: &Server,
    value: String,
    figures: [(&'static str, f64); N],
) -> Check {
    let figures = figures.into();
    Check { id: id.to_owned(), title, product: server.product, value, figures }
}

fn idle_memory(server: &Server) -> Result<Check> {
    let held = server.process().holdings()?.resident_bytes;
    let title = "resident memory, fresh and idle".to_owned();
    Ok(check("idle-memory", title, server, ByteSize(held).to_string(), [("bytes", held as f64)]))
}

fn idle_connections(server: &Server, effort: CheckEffort) -> Result<Check> {
    let count = match server.product.role() {
        Role::Peer => effort.connections.min(PEER_CONNECTIONS_MAX),
        _ => effort.connections,
    };
    // What the first connection costs once is not what each one costs.
    let first = used_connection(server)?;
    let before = settled(server)?;
    let open: Vec<_> = (0..count).map(|_| used_connection(server)).collect::<Result<_>>()?;
    let after = settled(server)?;
    let each = after.resident_bytes.saturating_sub(before.resident_bytes) / count as u64;
    drop((first, open));
    let title = format!("resident memory per idle connection, of {count}");
    Ok(check(
        "idle-connections",
        title,
        server,
        ByteSize(each).to_string(),
        [("bytes", each as f64)],
    ))
}

fn idle_woken(server: &Server, effort: CheckEffort) -> Result<Check> {
    let connection = used_connection(server)?;
    settled(server)?;
    let before = server.process().context_switches()?;
    thread::sleep(effort.idle);
    let woken = server.process().context_switches()?.saturating_sub(before);
    drop(connection);
    let seconds = effort.idle.as_secs_f64();
    let title = format!("context switches in {seconds} s, one idle connection");
    Ok(check("idle-woken", title, server, woken.to_string(), [("switches", woken as f64)]))
}

fn churn(server: &Server, effort: CheckEffort) -> Result<Check> {
    let cycle = || used_connection(server)?.disconnect();
    (0..CYCLES_WARMUP.min(effort.cycles)).try_for_each(|_| cycle())?;
    let before = settled(server)?;
    let start = Instant::now();
    (0..effort.cycles).try_for_each(|_| cycle())?;
    let each_us = start.elapsed().as_secs_f64() * 1e6 / effort.cycles as f64;
    let after = settled(server)?;
    let bytes = after.resident_bytes.saturating_sub(before.resident_bytes);
    let fds = after.fd_count.saturating_sub(before.fd_count);
    let threads = after.thread_count.saturating_sub(before.thread_count);
    let value = format!(
        "+{}, +{fds} descriptors, +{threads} threads; {} a cycle",
        ByteSize(bytes),
        units::micros(each_us)
    );
    let figures =
        [("bytes", bytes as f64), ("descriptors", fds as f64), ("threads", threads as f64)];
    let title = format!("growth by {} connections", effort.cycles);
    Ok(check("churn", title, server, value, figures))
}

/// Does polling pay where there is little to do? Both settings take turns.
fn paced(servers: &[Server], effort: Effort) -> Result<Vec<Check>> {
    let by = |product| servers.iter().find(move |server| server.product == product);
    let (Some(polling), Some(sleeping)) = (by(Product::Sheave), by(Product::SheavePoll0)) else {
        return Ok(Vec::new());
    };
    let mut cpu_us = [Vec::new(), Vec::new()];
    for _ in 0..effort.runs {
        for (server, cpu_us) in [polling, sleeping].into_iter().zip(&mut cpu_us) {
            cpu_us.push(paced_run(server, effort)?);
        }
    }
    let [with, without] = cpu_us.map(|values| Spread::of(values).map_or(f64::NAN, |s| s.median));
    let ratio = with / without;
    let value = format!(
        "{} of CPU per request, {} without polling: {ratio:.2} ×",
        units::micros(with),
        units::micros(without)
    );
    let title = "one connection with 1 000 requests/s".to_owned();
    Ok(vec![check("paced-1000", title, polling, value, [("ratio", ratio)])])
}

fn paced_run(server: &Server, effort: Effort) -> Result<f64> {
    let plan = Plan {
        target: server.target.clone(),
        workload: Workload {
            read_percent: 100,
            order: Order::Random,
            block_size: 4096,
            queue_depth: 1,
            rate_per_connection: Some(PACED_PER_S),
            flush_every: None,
        },
        connections: 1,
        threads: 1,
        length: Length::Time { warmup: effort.warmup, measure: effort.measure },
        span: None,
        verify: false,
        seed: 1,
        server: Some(server.process()),
    };
    load::run(&plan)?.server_cpu_us_per_op().context("the server's CPU time")
}

/// A connection that has read something: one that was never used may not hold anything yet.
fn used_connection(server: &Server) -> Result<Connection> {
    let mut connection = server.target.connect()?;
    connection.read_once(4096)?;
    Ok(connection)
}

/// What the server holds once it has stopped changing.
fn settled(server: &Server) -> Result<Holdings> {
    let deadline = Instant::now() + SETTLE_MAX;
    let mut before = server.process().holdings()?;
    loop {
        thread::sleep(Duration::from_millis(100));
        let now = server.process().holdings()?;
        if now == before {
            return Ok(now);
        }
        ensure!(Instant::now() < deadline, "its memory does not settle");
        before = now;
    }
}
