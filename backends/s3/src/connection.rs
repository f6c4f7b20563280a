//! The way to an endpoint: the runtime, the client, and how many requests it carries at once.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use aws_config::BehaviorVersion;
use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::imds::region::ImdsRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::retry::RetryConfig;
use aws_config::stalled_stream_protection::StalledStreamProtectionConfig;
use aws_config::timeout::TimeoutConfig;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{Builder, Region, RequestChecksumCalculation, ResponseChecksumValidation};
use sheave_object::{StoreError, StoreErrorKind};
use tokio::runtime::{self, Runtime};
use tokio::sync::{OnceCell, Semaphore};
use tokio::task::JoinHandle;

use crate::pace::Pace;

/// Threads that sign, encrypt and check bodies.
const THREADS: usize = 2;
/// Threads that look up names and read the AWS configuration.
const WAITING_THREADS_MAX: usize = 8;
/// Requests at once, over all volumes of an endpoint. Each has a connection of its own, so reads do
/// not wait for what is being written.
const READS_MAX: usize = 64;
const CHANGES_MAX: usize = 32;
/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A body that does not move for so long is given up.
const STALL_MAX: Duration = Duration::from_secs(20);
/// Endpoints whose connections are kept.
const KEPT_MAX: usize = 16;
/// For endpoints that are not AWS, which need one for the signature only.
const REGION_OF_OTHERS: &str = "us-east-1";

/// Where buckets are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Its URL, `http://127.0.0.1:9000`; `None` for AWS.
    pub url: Option<String>,
    /// Its region. By default the environment and the AWS configuration say it.
    pub region: Option<String>,
    /// Whether the bucket's name is in the path of a URL, and not in the host's name. By default,
    /// where the endpoint is given.
    pub path_style: Option<bool>,
}

/// The kinds of requests, which do not wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Reads and listings.
    Read,
    /// Creations and deletions.
    Change,
}

/// The way to an endpoint, which all volumes there share.
#[derive(Debug)]
pub(crate) struct Connection {
    endpoint: Endpoint,
    client: OnceCell<Client>,
    reads: Semaphore,
    changes: Semaphore,
    pace: Pace,
}

impl Connection {
    /// The one to that endpoint. Nothing is sent yet.
    pub(crate) fn to(endpoint: &Endpoint) -> Arc<Self> {
        static KEPT: Mutex<Vec<Arc<Connection>>> = Mutex::new(Vec::new());
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        let found = kept.iter().position(|other| other.endpoint == *endpoint);
        // The one that was not used for longest is the first, and goes.
        let connection = match found {
            Some(at) => kept.remove(at),
            None => Arc::new(Self::new(endpoint.clone())),
        };
        if kept.len() == KEPT_MAX {
            kept.remove(0);
        }
        kept.push(Arc::clone(&connection));
        connection
    }

    fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            client: OnceCell::new(),
            reads: Semaphore::new(READS_MAX),
            changes: Semaphore::new(CHANGES_MAX),
            pace: Pace::default(),
        }
    }

    /// The endpoint.
    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Makes one try of a request that moves so many bytes. It ends when its future is dropped.
    pub(crate) fn request<T, F>(
        self: &Arc<Self>,
        lane: Lane,
        bytes: u64,
        send: impl FnOnce(Client) -> F + Send + 'static,
    ) -> impl Future<Output = Result<T, StoreError>> + Send + 'static
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send,
    {
        let connection = Arc::clone(self);
        let running = runtime().map(|runtime| {
            Running(runtime.spawn(async move { connection.try_once(lane, bytes, send).await }))
        });
        async move { running?.await }
    }

    async fn try_once<T, F: Future<Output = Result<T, StoreError>>>(
        &self,
        lane: Lane,
        bytes: u64,
        send: impl FnOnce(Client) -> F,
    ) -> Result<T, StoreError> {
        let places = match lane {
            Lane::Read => &self.reads,
            Lane::Change => &self.changes,
        };
        let _place = places.acquire().await.expect("it is never closed");
        let (begun, limit) = (Instant::now(), self.pace.limit(bytes));
        let answer = async {
            let client = self.client.get_or_try_init(|| connect(&self.endpoint)).await?;
            send(client.clone()).await
        };
        match tokio::time::timeout(limit, answer).await {
            Ok(outcome) => {
                if outcome.is_ok() {
                    self.pace.learn(bytes, Some(begun.elapsed()));
                }
                outcome
            }
            Err(_) => {
                self.pace.learn(bytes, None);
                let why = format!("no answer within {} s", limit.as_secs());
                Err(StoreError::new(StoreErrorKind::Busy, why))
            }
        }
    }
}

/// A task that ends with its future.
struct Running<T>(JoinHandle<Result<T, StoreError>>);

impl<T> Future for Running<T> {
    type Output = Result<T, StoreError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|ended| {
            let early = |_| StoreError::new(StoreErrorKind::Busy, "the request has ended early");
            ended.map_err(early)?
        })
    }
}

impl<T> Drop for Running<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The runtime of all requests, which is begun by the first.
fn runtime() -> Result<&'static Runtime, StoreError> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    static MAKING: Mutex<()> = Mutex::new(());
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    let mut builder = runtime::Builder::new_multi_thread();
    builder.worker_threads(THREADS).max_blocking_threads(WAITING_THREADS_MAX);
    builder.thread_name("s3").enable_all();
    let made = builder.build();
    let made = made.map_err(|error| {
        StoreError::new(StoreErrorKind::Busy, format!("no thread for requests: {error}"))
    })?;
    Ok(RUNTIME.get_or_init(|| made))
}

/// Reads the AWS configuration: the environment, files, and what the node's cloud says.
async fn connect(endpoint: &Endpoint) -> Result<Client, StoreError> {
    let is_given = |name| std::env::var_os(name).is_some_and(|url| !url.is_empty());
    let mut is_aws = endpoint.url.is_none()
        && !["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"].into_iter().any(is_given);
    let region = match &endpoint.region {
        Some(region) => Region::new(region.clone()),
        None => find_region(is_aws).await?,
    };
    let timeouts = TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).build();
    let stalled = StalledStreamProtectionConfig::enabled().grace_period(STALL_MAX).build();
    let found = aws_config::defaults(BehaviorVersion::v2026_01_12())
        .region(region)
        .retry_config(RetryConfig::disabled())
        .timeout_config(timeouts)
        .stalled_stream_protection(stalled)
        .load()
        .await;
    is_aws &= found.endpoint_url().is_none();
    let mut config = Builder::from(&found);
    config.set_force_path_style(endpoint.path_style.or(Some(!is_aws)));
    if let Some(url) = &endpoint.url {
        config = config.endpoint_url(url);
    }
    if !is_aws {
        // Other stores refuse the checksums of AWS, or ignore them; what is stored has its own.
        config = config
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    }
    Ok(Client::from_conf(config.build()))
}

async fn find_region(is_aws: bool) -> Result<Region, StoreError> {
    let local = RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
        .or_else(ProfileFileRegionProvider::new());
    if let Some(region) = local.region().await {
        return Ok(region);
    }
    if !is_aws {
        return Ok(Region::from_static(REGION_OF_OTHERS));
    }
    let instance = ImdsRegionProvider::builder().build();
    instance.region().await.ok_or_else(|| {
        let why = "no region is known; add ?region=… to the volume, or set AWS_REGION";
        StoreError::new(StoreErrorKind::Denied, why)
    })
}
