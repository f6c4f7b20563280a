//! The running store.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustix::net::sockopt::set_socket_linger;
use tokio::net::TcpStream;
use tokio::runtime::Builder;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::date::Date;
use crate::fault::{Effect, Fault, Faults};
use crate::log::{Counts, Log, Record};
use crate::objects::{Condition, ListQuery, Objects, PutError};
use crate::random::Random;
use crate::request::Asked;
use crate::service::serve;
use crate::settings::{Outage, Settings};

/// Threads that serve. One carries some 600 MB/s.
const THREADS: usize = 2;
/// After an error of accept, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// A running store. It ends when it is dropped; objects in a directory stay.
#[derive(Debug)]
pub struct Emulator {
    shared: Arc<Shared>,
    address: SocketAddr,
    /// The threads end when this does.
    ends: watch::Sender<()>,
    threads: Vec<JoinHandle<()>>,
}

/// What all requests see.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) settings: watch::Sender<Settings>,
    pub(crate) objects: Objects,
    pub(crate) in_memory: bool,
    pub(crate) began: Instant,
    faults: Mutex<Faults>,
    random: Mutex<Random>,
    log: Mutex<Log>,
    numbers: AtomicU64,
}

impl Emulator {
    /// A store in memory, on a free port of the loopback interface, with one bucket.
    ///
    /// # Panics
    /// When there is no port or no thread.
    #[must_use]
    pub fn start(settings: Settings, bucket: &str) -> Self {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let store = Self::open(settings, address, None, 1).expect("a port of the loopback");
        store.make_bucket(bucket);
        store
    }

    /// A store at an address, with the objects of a directory or else in memory. Chances are
    /// determined by the seed.
    ///
    /// # Errors
    /// When the address cannot be used, or the directory not be read.
    pub fn open(
        settings: Settings,
        address: SocketAddr,
        dir: Option<PathBuf>,
        seed: u64,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            settings: watch::Sender::new(settings),
            in_memory: dir.is_none(),
            objects: Objects::open(dir)?,
            began: Instant::now(),
            faults: Mutex::default(),
            random: Mutex::new(Random::new(seed)),
            log: Mutex::default(),
            numbers: AtomicU64::new(1),
        });
        let ends = watch::Sender::new(());
        let mut threads = Vec::with_capacity(THREADS);
        for _ in 0..THREADS {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let accepting = accept(shared.clone(), listener.try_clone()?);
            let mut ended = ends.subscribe();
            let body = async move {
                tokio::select! {
                    () = accepting => {}
                    _ = ended.changed() => {}
                }
            };
            let named = thread::Builder::new().name("emulator".to_owned());
            threads.push(named.spawn(move || runtime.block_on(body))?);
        }
        Ok(Self { shared, address, ends, threads })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its URL.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Its settings right now.
    #[must_use]
    pub fn settings(&self) -> Settings {
        self.shared.settings.borrow().clone()
    }

    /// Changes its settings.
    pub fn set(&self, change: impl FnOnce(&mut Settings)) {
        self.shared.settings.send_modify(change);
    }

    /// Adds a rule behind those that there are.
    pub fn fail(&self, fault: Fault) {
        self.shared.faults().add(fault);
    }

    /// Removes all rules.
    pub fn heal(&self) {
        self.shared.faults().clear();
    }

    /// The requests that have ended, in that order. Requests without an answer end when their
    /// client has gone.
    #[must_use]
    pub fn log(&self) -> Vec<Record> {
        self.shared.log_lock().records()
    }

    /// How many requests there were.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.shared.log_lock().counts()
    }

    /// Empties the log and the counts.
    pub fn clear_log(&self) {
        self.shared.log_lock().clear();
    }

    /// Makes a bucket, if there is none of that name.
    ///
    /// # Panics
    /// When its directory cannot be made.
    pub fn make_bucket(&self, bucket: &str) {
        self.shared.objects.make_bucket(bucket).expect("a directory");
    }

    /// The keys of a bucket that begin with this, and the objects' lengths.
    #[must_use]
    pub fn objects(&self, bucket: &str, prefix: &str) -> Vec<(String, u64)> {
        let query = ListQuery {
            prefix: prefix.to_owned(),
            delimiter: String::new(),
            after: String::new(),
            max: usize::MAX,
            age_min: Duration::ZERO,
        };
        let listing = self.shared.objects.list(bucket, &query);
        listing.objects.into_iter().map(|entry| (entry.key, entry.len)).collect()
    }

    /// An object's content, if there is such an object.
    ///
    /// # Panics
    /// When its file cannot be read.
    #[must_use]
    pub fn object(&self, bucket: &str, key: &str) -> Option<Bytes> {
        let found = self.shared.objects.find(bucket, key).expect("an object that is readable")?;
        Some(found.read(0, found.len as usize).expect("an object that is readable"))
    }

    /// Makes or replaces an object, as nothing that Sheave does can.
    ///
    /// # Panics
    /// When there is no such bucket.
    pub fn replace(&self, bucket: &str, key: &str, body: impl Into<Bytes>) {
        let new = (self.shared.new_tag(), Date::now(0));
        let put = self.shared.objects.put(bucket, key, body.into(), new, &Condition::None);
        let put: Result<(), PutError> = put;
        put.expect("a bucket with room");
    }

    /// Deletes an object, as a lifecycle rule does; answers whether there was one.
    ///
    /// # Panics
    /// When its file cannot be deleted.
    pub fn remove(&self, bucket: &str, key: &str) -> bool {
        self.shared.objects.delete(bucket, key).expect("an object that can be deleted")
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.ends.send_replace(());
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

async fn accept(shared: Arc<Shared>, listener: TcpListener) {
    let listener = tokio::net::TcpListener::from_std(listener).expect("a socket that is new");
    for number in 1.. {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(connection(shared.clone(), stream, number));
            }
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Serves a connection until it ends, or an outage resets it.
async fn connection(shared: Arc<Shared>, stream: TcpStream, number: u64) {
    let mut settings = shared.settings.subscribe();
    let _ = stream.set_nodelay(true);
    let Ok(socket) = stream.as_fd().try_clone_to_owned() else { return };
    let service = service_fn(|request| {
        let answer = serve(shared.clone(), number, request);
        let socket = &socket;
        async move {
            answer.await.map_err(|_cut| {
                reset(socket);
                io::Error::other("the connection is reset")
            })
        }
    });
    let serving = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    let gone = settings.wait_for(|settings| settings.outage == Some(Outage::Reset));
    tokio::select! {
        // An error is the client's business, or is what a fault was to do.
        _ = serving => {}
        _ = gone => reset(&socket),
    }
}

/// Makes the socket's end a reset.
fn reset(socket: &OwnedFd) {
    let _ = set_socket_linger(socket, Some(Duration::ZERO));
}

impl Shared {
    fn faults(&self) -> std::sync::MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log_lock(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn random(&self) -> std::sync::MutexGuard<'_, Random> {
        self.random.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn log(&self, record: Record) {
        self.log_lock().add(record);
    }

    /// What the rules do to a request.
    pub(crate) fn strike(&self, asked: &Asked) -> Option<Effect> {
        self.faults().strike(asked.kind, asked.name(), &mut self.random())
    }

    pub(crate) fn latency(&self, settings: &Settings) -> Duration {
        if settings.jitter.is_zero() {
            return settings.first_byte;
        }
        settings.first_byte + settings.jitter.mul_f64(self.random().share())
    }

    pub(crate) fn is_hanging(&self) -> bool {
        self.settings.borrow().outage == Some(Outage::Hang)
    }

    pub(crate) async fn until_no_hang(&self) {
        let mut settings = self.settings.subscribe();
        // The sender is in this very object.
        let _ = settings.wait_for(|settings| settings.outage != Some(Outage::Hang)).await;
    }

    pub(crate) fn request_id(&self) -> String {
        format!("{:016X}", self.numbers.fetch_add(1, Ordering::Relaxed))
    }

    /// An object's tag. Those of S3 are no digests either, where objects are encrypted.
    pub(crate) fn new_tag(&self) -> String {
        format!("{:032x}", self.random().next())
    }
}
