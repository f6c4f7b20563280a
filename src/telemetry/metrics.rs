//! `/metrics` for Prometheus, in the OpenMetrics text format.

use std::fmt;
#[cfg(test)]
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{self, Unit};
use sheave_core::{LinkGauges, LinkState};
use sheave_nbd::bind_tcp;
use sheave_telemetry::{FailureCount, Histogram, OpSnapshot, Registry, VolumeSnapshot};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::listener::BoundedListener;

/// The most scrapes at a time.
const CONNECTIONS_MAX: usize = 16;
/// How long a scrape may take. A connection serves no more than one.
const LIFETIME: Duration = Duration::from_secs(10);
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of the histograms' buckets in microseconds; one for the rest follows.
const BOUNDS_US: [u64; 23] = [
    5, 10, 25, 50, 75, 100, 150, 250, 500, 750, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000,
    100_000, 250_000, 500_000, 1_000_000, 2_500_000, 10_000_000, 60_000_000,
];
const NS_PER_SECOND: f64 = 1e9;

/// Answers `GET /metrics` until it is dropped.
#[derive(Debug)]
pub(crate) struct MetricsServer {
    #[cfg(test)]
    address: SocketAddr,
    /// One for each address.
    _tasks: JoinSet<()>,
}

impl MetricsServer {
    /// Listens at all addresses of `HOST:PORT`, on the current tokio runtime.
    ///
    /// # Errors
    /// When the address is malformed, or cannot be listened on.
    pub(crate) fn start(address: &str, registry: Arc<Registry>) -> Result<Self> {
        let bound = bind_tcp(address).with_context(|| {
            format!("metrics: cannot listen at {address}; give --metrics a free HOST:PORT")
        })?;
        let mut metrics = registry::Registry::default();
        metrics.register_collector(Box::new(VolumeCollector { registry, started: Instant::now() }));
        let router = Router::new()
            .route("/", get(|| async { "The metrics of sheave are at /metrics.\n" }))
            .route("/metrics", get(scrape))
            .layer(map_response(close))
            .with_state(Arc::new(metrics));
        let free = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut addresses = Vec::with_capacity(bound.len());
        let mut tasks = JoinSet::new();
        for listener in bound {
            listener.set_nonblocking(true).context("metrics")?;
            let listener = TcpListener::from_std(listener).context("metrics")?;
            addresses.push(listener.local_addr().context("metrics: no address")?);
            let listener = BoundedListener::new(listener, Arc::clone(&free), LIFETIME);
            let router = router.clone();
            tasks.spawn(async move {
                if let Err(error) = axum::serve(listener, router).await {
                    tracing::error!(%error, "metrics: no longer served");
                }
            });
        }
        for address in &addresses {
            tracing::info!("metrics at http://{address}/metrics");
        }
        Ok(Self {
            #[cfg(test)]
            address: addresses[0],
            _tasks: tasks,
        })
    }

    #[cfg(test)]
    fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn scrape(State(metrics): State<Arc<registry::Registry>>) -> Response {
    let mut text = String::new();
    match text::encode(&mut text, &metrics) {
        Ok(()) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(fmt::Error) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// Closes the connection after an answer, to make room for the next client.
async fn close(mut answer: Response) -> Response {
    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    answer
}

/// Reads the counters at each scrape.
#[derive(Debug)]
struct VolumeCollector {
    registry: Arc<Registry>,
    started: Instant,
}

impl Collector for VolumeCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let volumes = self.registry.snapshot();
        encode_process(&mut encoder, self.started.elapsed())?;
        encode_gauges(&mut encoder, &volumes)?;
        encode_read_cache(&mut encoder)?;
        let mut counter = |name, help, unit, value: fn(&OpSnapshot) -> u64| {
            encode_counter(&mut encoder, &volumes, (name, help, unit), value)
        };
        counter("sheave_ops", "Requests that ended", None, OpSnapshot::count)?;
        counter("sheave_op_errors", "Requests that failed", None, |op| op.errors)?;
        counter("sheave_op", "Payload bytes of requests", Some(&Unit::Bytes), |op| op.bytes)?;
        encode_failures(&mut encoder, &volumes)?;
        encode_latencies(&mut encoder, &volumes)?;
        super::objects::encode(&mut encoder, &sheave_volumes::object_statuses())
    }
}

/// The read cache of all object volumes.
fn encode_read_cache(encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let Some(cache) = sheave_object::cache_stats() else { return Ok(()) };
    for (name, help, count) in [
        ("sheave_cache_hits", "Readings of a chunk that the read cache had", cache.hits),
        ("sheave_cache_misses", "Readings of a chunk that it had not", cache.misses),
        ("sheave_cache_evictions", "Chunks that made room for others", cache.evictions),
    ] {
        let mut counter = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        counter.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
    }
    let help = "Chunks of object volumes that the read cache has";
    let unit = Some(&Unit::Bytes);
    let mut gauge = encoder.encode_descriptor("sheave_cache", help, unit, MetricType::Gauge)?;
    gauge.encode_gauge(&i64::try_from(cache.bytes).unwrap_or(i64::MAX))
}

fn encode_process(encoder: &mut DescriptorEncoder<'_>, uptime: Duration) -> fmt::Result {
    let build = [("version", env!("CARGO_PKG_VERSION"))];
    encoder
        .encode_descriptor("sheave_build", "The running program", None, MetricType::Info)?
        .encode_info(&build)?;
    let help = "Time since the process began to serve";
    let unit = Some(&Unit::Seconds);
    encoder
        .encode_descriptor("sheave_uptime", help, unit, MetricType::Gauge)?
        .encode_gauge(&uptime.as_secs_f64())
}

fn encode_gauges(encoder: &mut DescriptorEncoder<'_>, volumes: &[VolumeSnapshot]) -> fmt::Result {
    let help = "Connections served now";
    let mut gauge =
        encoder.encode_descriptor("sheave_connections", help, None, MetricType::Gauge)?;
    for volume in volumes {
        let labels = [("volume", volume.name.as_str())];
        gauge.encode_family(&labels)?.encode_gauge(&volume.gauges.connections)?;
    }
    let (help, unit) = ("Payload bytes of requests in flight", Some(&Unit::Bytes));
    let mut gauge = encoder.encode_descriptor("sheave_in_flight", help, unit, MetricType::Gauge)?;
    for volume in volumes {
        let labels = [("volume", volume.name.as_str())];
        gauge.encode_family(&labels)?.encode_gauge(&volume.gauges.bytes_in_flight)?;
    }
    let help = "Memory that the data of volumes in memory takes";
    let mut gauge = encoder.encode_descriptor("sheave_held", help, unit, MetricType::Gauge)?;
    for volume in volumes {
        let Some(bytes) = volume.gauges.held_bytes else { continue };
        let labels = [("volume", volume.name.as_str())];
        gauge.encode_family(&labels)?.encode_gauge(&i64::try_from(bytes).unwrap_or(i64::MAX))?;
    }
    encode_links(encoder, volumes)
}

/// The connections of remote volumes to their servers.
fn encode_links(encoder: &mut DescriptorEncoder<'_>, volumes: &[VolumeSnapshot]) -> fmt::Result {
    let links = || {
        let remote = volumes.iter().filter_map(|volume| Some((volume, volume.gauges.link?)));
        remote.map(|(volume, link)| ([("volume", volume.name.as_str())], link))
    };
    let help = "Whether the server of a remote volume can be reached: the state that it is in is 1";
    let mut gauge =
        encoder.encode_descriptor("sheave_remote_state", help, None, MetricType::Gauge)?;
    for ([volume], link) in links() {
        for state in LinkState::ALL {
            let labels = [volume, ("state", state.name())];
            gauge.encode_family(&labels)?.encode_gauge(&i64::from(state == link.state))?;
        }
    }
    let help = "How often the connections of a remote volume were made again";
    let mut counter =
        encoder.encode_descriptor("sheave_remote_reconnects", help, None, MetricType::Counter)?;
    for (labels, link) in links() {
        counter
            .encode_family(&labels)?
            .encode_counter::<NoLabelSet, _, u64>(&link.reconnects, None)?;
    }
    type Value = fn(LinkGauges) -> u64;
    let gauges: [(&str, &str, Value); 2] = [
        ("sheave_remote_waiting", "Bytes of requests that a server has not answered", |link| {
            link.waiting_bytes
        }),
        ("sheave_remote_kept", "Memory of writes that no flush covers yet", |link| link.kept_bytes),
    ];
    for (name, help, value) in gauges {
        let unit = Some(&Unit::Bytes);
        let mut gauge = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        for (labels, link) in links() {
            let bytes = i64::try_from(value(link)).unwrap_or(i64::MAX);
            gauge.encode_family(&labels)?.encode_gauge(&bytes)?;
        }
    }
    Ok(())
}

fn encode_counter(
    encoder: &mut DescriptorEncoder<'_>,
    volumes: &[VolumeSnapshot],
    (name, help, unit): (&str, &str, Option<&Unit>),
    value: fn(&OpSnapshot) -> u64,
) -> fmt::Result {
    let mut counter = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
    for volume in volumes {
        for op in &volume.ops {
            let labels = [("volume", volume.name.as_str()), ("op", op.kind.name())];
            let mut of_op = counter.encode_family(&labels)?;
            of_op.encode_counter::<NoLabelSet, _, u64>(&value(op), None)?;
        }
    }
    Ok(())
}

fn encode_failures(encoder: &mut DescriptorEncoder<'_>, volumes: &[VolumeSnapshot]) -> fmt::Result {
    let help = "Requests that the storage failed";
    let mut counter =
        encoder.encode_descriptor("sheave_storage_errors", help, None, MetricType::Counter)?;
    for volume in volumes {
        for FailureCount { op, kind, count } in &volume.failures {
            let labels =
                [("volume", volume.name.as_str()), ("op", op.name()), ("kind", kind.name())];
            let mut of_kind = counter.encode_family(&labels)?;
            of_kind.encode_counter::<NoLabelSet, _, u64>(count, None)?;
        }
    }
    Ok(())
}

fn encode_latencies(
    encoder: &mut DescriptorEncoder<'_>,
    volumes: &[VolumeSnapshot],
) -> fmt::Result {
    let (help, unit) = ("How long requests and their stages took", Some(&Unit::Seconds));
    let mut metric =
        encoder.encode_descriptor("sheave_op_latency", help, unit, MetricType::Histogram)?;
    for volume in volumes {
        for op in &volume.ops {
            for (stage, histogram) in op.stages() {
                let labels = [
                    ("volume", volume.name.as_str()),
                    ("op", op.kind.name()),
                    ("stage", stage.name()),
                ];
                let (sum, buckets) = buckets(histogram);
                let count = histogram.len();
                metric
                    .encode_family(&labels)?
                    .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
            }
        }
    }
    Ok(())
}

/// The sum in seconds, and how many latencies lie in each bucket (not cumulated), by their upper
/// bound in seconds. A latency is taken for the highest that its counter counts.
fn buckets(histogram: &Histogram<u64>) -> (f64, Vec<(f64, u64)>) {
    let bounds = BOUNDS_US.iter().map(|bound_us| *bound_us as f64 / 1e6);
    let mut buckets: Vec<_> = bounds.chain([f64::INFINITY]).map(|bound| (bound, 0)).collect();
    let mut sum_ns = 0.0;
    for step in histogram.iter_recorded() {
        let (value_ns, count) = (step.value_iterated_to(), step.count_at_value());
        sum_ns += histogram.median_equivalent(value_ns) as f64 * count as f64;
        let bucket = BOUNDS_US.partition_point(|bound_us| bound_us * 1_000 < value_ns);
        buckets[bucket].1 += count;
    }
    (sum_ns / NS_PER_SECOND, buckets)
}

#[cfg(test)]
mod tests {
    use sheave_core::{Error, ErrorKind, Link, OpKind};
    use sheave_telemetry::Stage;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn fetch(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_scrape_tells_what_was_counted() {
        let registry = Arc::new(Registry::new());
        let recorder = registry.volume("a \"disk\"").recorder();
        recorder.record_n(OpKind::Read, Stage::Total, 20_000, 3);
        recorder.record(OpKind::Read, Stage::Total, 70_000_000_000);
        recorder.record(OpKind::Read, Stage::Backend, 4_000);
        recorder.add_bytes(OpKind::Read, 4096);
        recorder.add_error(OpKind::Flush);
        recorder.add_connections(2);
        recorder.add_bytes_in_flight(512);
        let full = Error::new(ErrorKind::NoSpace, "write", "no space");
        recorder.note_failure(OpKind::Write, &full, 1, 1);
        let stats = registry.volume("a \"disk\"");
        stats.show_held_bytes(Some(Arc::new(65_536.into())));
        let link = Arc::<Link>::default();
        let state = LinkState::Down;
        link.set(LinkGauges { state, reconnects: 3, waiting_bytes: 4096, kept_bytes: 17 });
        stats.show_link(Some(link));
        let endpoint = MetricsServer::start("127.0.0.1:0", registry).unwrap();

        let answer = fetch(endpoint.address(), "/metrics").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        let volume = r#"volume="a \"disk\"""#;
        let read = format!("{volume},op=\"read\"");
        for line in [
            format!("content-type: {CONTENT_TYPE}\r"),
            format!("sheave_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")),
            format!("sheave_connections{{{volume}}} 2"),
            format!("sheave_in_flight_bytes{{{volume}}} 512"),
            format!("sheave_remote_state{{{volume},state=\"up\"}} 0"),
            format!("sheave_remote_state{{{volume},state=\"down\"}} 1"),
            format!("sheave_remote_reconnects_total{{{volume}}} 3"),
            format!("sheave_remote_waiting_bytes{{{volume}}} 4096"),
            format!("sheave_remote_kept_bytes{{{volume}}} 17"),
            format!("sheave_ops_total{{{read}}} 4"),
            format!("sheave_op_bytes_total{{{read}}} 4096"),
            format!("sheave_op_errors_total{{{volume},op=\"flush\"}} 1"),
            format!("sheave_storage_errors_total{{{volume},op=\"write\",kind=\"no_space\"}} 1"),
            format!("sheave_held_bytes{{{volume}}} 65536"),
            format!("sheave_op_latency_seconds_count{{{read},stage=\"total\"}} 4"),
            format!("sheave_op_latency_seconds_bucket{{le=\"0.00001\",{read},stage=\"total\"}} 0"),
            format!("sheave_op_latency_seconds_bucket{{le=\"0.000025\",{read},stage=\"total\"}} 3"),
            format!("sheave_op_latency_seconds_bucket{{le=\"60.0\",{read},stage=\"total\"}} 3"),
            format!("sheave_op_latency_seconds_bucket{{le=\"+Inf\",{read},stage=\"total\"}} 4"),
            format!(
                "sheave_op_latency_seconds_bucket{{le=\"0.000005\",{read},stage=\"backend\"}} 1"
            ),
            "# EOF".to_owned(),
        ] {
            assert!(answer.lines().any(|have| have == line.trim_end()), "no {line} in\n{answer}");
        }
        assert!(fetch(endpoint.address(), "/else").await.starts_with("HTTP/1.1 404"));
    }

    #[tokio::test]
    async fn silent_clients_do_not_keep_scrapes_out_for_ever() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(|| async { "here" }));
        let bounded =
            BoundedListener::new(listener, Arc::new(Semaphore::new(1)), Duration::from_millis(200));
        let server = tokio::spawn(async move { axum::serve(bounded, router).await });
        let mut silent = TcpStream::connect(address).await.unwrap();
        silent.write_all(b"GET").await.unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(10), async {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream
                .write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                .await
                .unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        });
        assert!(answer.await.unwrap().ends_with("here"));
        server.abort();
    }

    #[tokio::test]
    async fn an_address_in_use_is_named() {
        let first = MetricsServer::start("127.0.0.1:0", Arc::default()).unwrap();
        let address = first.address().to_string();
        for bad in [address.as_str(), "no-port", "256.0.0.1:1"] {
            let error = MetricsServer::start(bad, Arc::default()).unwrap_err();
            let text = format!("{error:#}");
            assert!(text.starts_with(&format!("metrics: cannot listen at {bad}; give")), "{text}");
        }
    }

    #[test]
    fn sums_and_bounds_are_in_seconds() {
        let volume = Registry::new().volume("a");
        let recorder = volume.recorder();
        recorder.record_n(OpKind::Read, Stage::Total, 1_000_000, 1_000);
        let snapshot = volume.snapshot();
        let histogram = snapshot.ops[0].stage(Stage::Total).unwrap();
        let (sum, buckets) = buckets(histogram);
        assert!((sum - 1.0).abs() < 0.001, "{sum} s");
        assert_eq!(buckets.len(), BOUNDS_US.len() + 1);
        assert_eq!(buckets.iter().map(|(_, count)| count).sum::<u64>(), 1_000);
        assert!(BOUNDS_US.is_sorted());
    }
}
